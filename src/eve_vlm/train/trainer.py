"""The library's `Trainer` with some seams filled in; there is no training loop here.

  - `create_optimizer`: groups from the recipe's globs;
  - `get_train_dataloader`: batches from an endless stream of rows with an exact position;
  - `get_batch_samples`: counts labels, pictures and unusable records of all accumulated batches;
  - `compute_loss`: asks the frozen teacher, remembers the loss by term and by data set;
  - `_prepare_input`: copies pinned batches to the device while it computes;
  - `training_step`: lets the guards judge each step before its gradients are used;
  - `log`: adds terms, rates and how full rows are, and stops at a loss that is not a number.

Easy to get wrong: `Trainer` divides the summed language loss by the labels of all accumulated
micro-batches of all processes, and divides nothing else; so the alignment term must be divided by
the pictures of all of them, or it grows with the accumulation steps.
"""

import logging
import math
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from accelerate import DistributedType
from torch import nn
from torch.distributed.checkpoint.stateful import Stateful
from torch.utils.data import DataLoader

from eve_vlm.data.feature_table import FeatureTable
from eve_vlm.train.data_log import DataLog
from eve_vlm.train.guards import Guards
from eve_vlm.train.meter import Meter
from eve_vlm.train.muon import MuonAdamW
from eve_vlm.train.parameters import optimizer_groups
from eve_vlm.train.sections import GuardsSection, StageSection
from eve_vlm.train.step_sums import StepSums
from eve_vlm.train.teacher import FrozenTeacher
from eve_vlm.train.teacher_cache import TeacherFeatures
from eve_vlm.train.whole_checkpoints import WholeCheckpoints

logger = logging.getLogger(__name__)


class BatchInfo(NamedTuple):
    """What comes with a batch and is not for the model."""

    record_ids: list[list[str]]
    """Ids of the records of each row."""
    source_names: list[list[str]]
    """Their data sets."""
    num_tokens: int
    """Tokens without padding."""
    num_positions: int
    """Tokens with padding."""


class EveTrainer(WholeCheckpoints):
    """Trains one stage.

    Args:
        stage: which parameters learn and how fast; alignment.
        data_log: the rows that this process reads, and what it could not use.
        sources: names of the data sets, for the loss of each.
        teacher: asked for features of each batch that brings its views; None without alignment.
        teacher_side: patches of the student along one alignment cell.
        teacher_table: where its features are kept, the one that the encoder looks into.
        guards: what is watched, and what to do about a bad step.
        decode: makes text of token ids, for the records of a bad step.
    """

    def __init__(
        self,
        *args: Any,
        stage: StageSection,
        data_log: DataLog,
        sources: tuple[str, ...] = (),
        teacher: FrozenTeacher | None = None,
        teacher_side: int = 1,
        teacher_table: FeatureTable | None = None,
        guards: GuardsSection | None = None,
        decode: Callable[[list[int]], str] | None = None,
        **kwargs: Any,
    ):
        super().__init__(*args, **kwargs)
        self.stage = stage
        self.teacher_features: TeacherFeatures | None = None
        if teacher is not None:
            self.teacher_features = TeacherFeatures(teacher, side=teacher_side, table=teacher_table)
        self.data_log = self.data_position = data_log
        self.sources = sources
        self.args.ignore_data_skip = True  # the stream of rows knows its place
        self.optimizer: torch.optim.Optimizer | None
        self.infos: list[BatchInfo] = []  # of the step that runs
        self.meter: Meter | None = None
        self._images_in_batch: torch.Tensor | int | None = None
        self._sums = StepSums()
        self._step_losses: list[dict[str, Any]] = []  # of the step that runs, by micro-batch
        self._deepspeed = self.accelerator.distributed_type == DistributedType.DEEPSPEED
        self.guards = Guards(
            guards or GuardsSection(),
            self.args.output_dir,
            device=self.args.device,
            gradients=not self._deepspeed and self.accelerator.scaler is None,
            decode=decode,
        )
        self.add_callback(self.guards)

    def kept(self) -> dict[str, Stateful]:
        """States that a checkpoint keeps, among them what was added up since the last log."""
        return super().kept() | {"sums": self._sums}

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The recipe's optimizer on the stage's groups."""
        if self.optimizer is None:
            target = self.model if model is None else model
            optimizer, settings = self.get_optimizer_cls_and_kwargs(self.args, target)
            groups = [
                {name: value for name, value in group.items() if name != "names"}
                for group in optimizer_groups(target, self.stage)
            ]
            if self.stage.muon:
                optimizer = MuonAdamW
            self.optimizer = optimizer(groups, **settings)
        return self.optimizer

    def get_train_dataloader(self) -> DataLoader:
        """Batches of this process, without an end; `Trainer` stops at `max_steps`."""
        workers = self.args.dataloader_num_workers
        return DataLoader(
            self.train_dataset,
            batch_sampler=self.data_log.rows,
            collate_fn=self.data_collator,
            num_workers=workers,
            prefetch_factor=self.args.dataloader_prefetch_factor if workers else None,
            pin_memory=self.args.dataloader_pin_memory and self.args.device.type != "cpu",
            # Its own, or it draws from the global one, and a resumed run sees other dropout.
            generator=torch.Generator().manual_seed(self.args.seed),
        )

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list, torch.Tensor | int | None]:
        """The micro-batches of one step and their labels; counts pictures and records."""
        started = time.perf_counter()
        batches, self.infos = [], []
        for _ in range(num_batches):
            batches.append(next(epoch_iterator))
            self.data_log.rows.taken()
        self._sums.data_wait += time.perf_counter() - started
        self._sums.steps += 1
        self._step_losses = []
        self.guards.begin_step(batches)
        for batch in batches:
            bad = batch.pop("bad_records")
            info = BatchInfo(
                record_ids=batch.pop("record_ids"),
                source_names=batch.pop("source_names"),
                num_tokens=batch.pop("num_tokens"),
                num_positions=batch["input_ids"].numel(),
            )
            self.infos.append(info)
            self._sums.tokens += info.num_tokens
            self._sums.positions += info.num_positions
            self.data_log.count(sum(map(len, info.record_ids)), bad)
            if self.meter is not None:
                self.meter.count(batch)
            if self.teacher_features is not None:
                self.teacher_features.prepare(batch, pin=self.args.device.type == "cuda")
        images = sum(len(batch["image_grid_thw"]) for batch in batches if "image_grid_thw" in batch)
        self._images_in_batch = self._over_processes(torch.tensor(images, device=device)).clamp(1)
        num_items = self._get_num_items_in_batch(batches, device)
        if num_items is not None:
            num_items = torch.as_tensor(num_items).clamp(min=1)  # all of them may be unusable
        return batches, num_items

    def _get_num_items_in_batch(
        self, batch_samples: list, device: torch.device
    ) -> torch.Tensor | int | None:
        """Labels of all micro-batches, or the sum of their weights where they have any."""
        if "label_weights" not in batch_samples[0]:
            return super()._get_num_items_in_batch(batch_samples, device)
        weights = sum(batch["label_weights"][:, 1:].sum() for batch in batch_samples)
        return self._over_processes(torch.as_tensor(weights, device=device))

    def _over_processes(self, value: torch.Tensor) -> torch.Tensor:
        """The sum over all processes where the loss is averaged over them."""
        if self.args.average_tokens_across_devices and self.args.world_size > 1:
            return self.accelerator.gather(value).sum()
        return value

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """Language and alignment loss of one micro-batch, as a share of the accumulated batch."""
        features = None if self.teacher_features is None else self.teacher_features(inputs)
        if features is not None:
            inputs["teacher_features"] = features
            inputs["num_images_in_batch"] = self._images_in_batch
        # Rows are padded behind their end, where a causal decoder's labelled positions do not look;
        # with a mask `sdpa` computes both halves of the square, and copies of grouped heads.
        inputs.pop("attention_mask", None)
        if "label_groups" in inputs:
            inputs["num_groups"] = len(self.sources)
        loss, outputs = super().compute_loss(
            model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch
        )
        losses = ("loss_terms", "group_losses", "group_counts")
        self._step_losses.append({name: outputs.get(name) for name in losses})
        self.guards.after_loss(loss)
        if self._deepspeed and self.accelerator.sync_gradients:
            self._may_step(model)  # its backward pass makes the step, so only this can come before
        return (loss, outputs) if return_outputs else loss

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """One micro-batch; behind the last of a step, whether the step may be made."""
        loss = super().training_step(*args, **kwargs)
        if self.accelerator.sync_gradients and self._deepspeed:
            norm = self.accelerator.deepspeed_engine_wrapped.get_global_grad_norm()
            self.guards.after_engine_step(norm, **self._about_step())
        elif self.accelerator.sync_gradients and not self._may_step(self.model_wrapped):
            self.model_wrapped.zero_grad()  # no optimizer moves a parameter that has no gradient
        if self.accelerator.sync_gradients and self.teacher_features is not None:
            self.teacher_features.keep()  # the guards have just waited for the device
        return loss

    def _prepare_input(self, data: Any) -> Any:
        """As the library, but the host does not wait for the copy of a pinned tensor."""
        if isinstance(data, torch.Tensor) and data.is_pinned():
            data = data.to(self.args.device, non_blocking=True)
        return super()._prepare_input(data)

    def _may_step(self, model: nn.Module) -> bool:
        """The guards' word; the losses of a skipped step count nowhere."""
        good = self.guards.may_step(model, **self._about_step())
        if not good:
            self._sums.steps -= 1
        for losses in self._step_losses if good else ():
            self._sums.add_losses(losses)
        return good

    def _about_step(self) -> dict[str, Any]:
        assert self.optimizer is not None
        rates = [group["lr"] for group in self.optimizer.param_groups]
        return {"step": self.state.global_step + 1, "learning_rates": rates}

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds to each log of a step: loss terms, rates, how full rows are, left-out records."""
        if "loss" in logs:
            self.guards.add_to_log(logs)
            if self.meter is not None:
                logs |= self.meter.figures()
        if "loss" in logs and self._sums.steps:
            added = self._sums.logs(self.accelerator, self.sources)
            # By term, because Trainer's own sum leaves out whatever is not a number.
            terms = {name: value for name, value in added.items() if name.startswith("loss_")}
            for name, value in {"loss": logs["loss"], **terms}.items():
                if not math.isfinite(value):
                    raise ValueError(
                        f"The {name} became {value} by step {self.state.global_step}; lower "
                        "stage.learning_rates, set training.max_grad_norm, or look at the last "
                        "records."
                    )
            logs |= added
            if self.data_log.bad:
                logs["left_out_records"] = len(self.data_log.bad)
            self.state.epoch = self.data_log.rows.epoch  # Trainer only knows its own steps
            self._sums = StepSums()
        super().log(logs, start_time)


__all__ = ["BatchInfo", "EveTrainer"]
