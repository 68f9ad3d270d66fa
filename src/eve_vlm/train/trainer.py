"""The library's `Trainer` with four seams filled in; there is no training loop here.

  - `create_optimizer`: groups from the recipe's globs;
  - `get_batch_samples`: counts pictures of the whole accumulated batch, and unusable records;
  - `compute_loss`: asks the frozen teacher, remembers the loss by term;
  - `log`: adds terms, tokens per second, and stops at a loss that is not a number.

Easy to get wrong: `Trainer` divides the summed language loss by the labels of all accumulated
micro-batches, and divides nothing else; so the alignment term must be divided by the pictures of
all of them, or it grows with the accumulation steps.
"""

import logging
import math
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm
from transformers import Trainer, TrainerCallback, TrainingArguments

from eve_vlm.data.encode import IGNORED
from eve_vlm.train.parameters import optimizer_groups
from eve_vlm.train.sections import StageSection
from eve_vlm.train.teacher import FrozenTeacher

logger = logging.getLogger(__name__)

LOGGED_BAD_RECORDS = 20  # each of the first ones is named in the log, all are counted
JUDGED_FROM = (
    200  # records before the share of bad ones is judged: one bad first record is not 100 %
)


class EveTrainer(Trainer):
    """Trains one stage.

    Args:
        stage: which parameters learn and how fast; alignment.
        teacher: asked for features of each batch that brings its views; None without alignment.
        teacher_side: patches of the student along one alignment cell.
        max_bad_share: training stops when a larger share of records cannot be used.
    """

    def __init__(
        self,
        *args: Any,
        stage: StageSection,
        teacher: FrozenTeacher | None = None,
        teacher_side: int = 1,
        max_bad_share: float = 0.0,
        **kwargs: Any,
    ):
        super().__init__(*args, **kwargs)
        self.stage, self.teacher, self.teacher_side = stage, teacher, teacher_side
        self.max_bad_share = max_bad_share
        self.bad_records: Counter[str] = Counter()
        self.num_records = 0
        self.optimizer: torch.optim.Optimizer | None
        self._images_in_batch: torch.Tensor | int | None = None
        self._terms: dict[str, torch.Tensor] = {}
        self._tokens, self._steps, self._clock = 0, 0, time.perf_counter()  # since the last log

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The recipe's optimizer on the stage's groups."""
        if self.optimizer is None:
            target = self.model if model is None else model
            optimizer, settings = self.get_optimizer_cls_and_kwargs(self.args, target)
            groups = [
                {name: value for name, value in group.items() if name != "names"}
                for group in optimizer_groups(target, self.stage)
            ]
            self.optimizer = optimizer(groups, **settings)
        return self.optimizer

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list, torch.Tensor | int | None]:
        """The micro-batches of one step and their labels; counts pictures and bad records."""
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        self._steps += 1
        for batch in batches:
            reasons = batch.pop("bad_records", [])
            # A usable record has labels; the stand-in for a batch without one has none.
            usable = int((batch["labels"] != IGNORED).any(1).sum())
            self._count_records(usable, reasons)
            self._tokens += int(batch["attention_mask"].sum())
        images = sum(len(batch["image_grid_thw"]) for batch in batches if "image_grid_thw" in batch)
        count = torch.tensor(images, device=device)
        if self.args.average_tokens_across_devices and self.args.world_size > 1:
            count = self.accelerator.gather(count).sum()
        self._images_in_batch = count.clamp(min=1)
        if num_items is not None:
            num_items = torch.as_tensor(num_items).clamp(min=1)  # all of them may be unusable
        return batches, num_items

    def _count_records(self, usable: int, reasons: list[str]) -> None:
        self.num_records += usable + len(reasons)
        for reason in reasons:
            if self.bad_records.total() < LOGGED_BAD_RECORDS:
                logger.warning("left out: %s", reason)
            self.bad_records[reason] += 1
        bad = self.bad_records.total()
        if bad > self.max_bad_share * max(self.num_records, JUDGED_FROM):
            raise ValueError(
                f"{bad} of the first {self.num_records} records cannot be used, more than the "
                "share of "
                f"{self.max_bad_share} that data.max_bad_share allows; the last: "
                f"{(reasons or ['-'])[-1]}"
            )

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """Language and alignment loss of one micro-batch, as a share of the accumulated batch."""
        views = inputs.pop("teacher_pixel_values", None)
        if self.teacher is not None and views is not None:
            inputs["teacher_features"] = self.teacher.features(
                views, inputs["image_grid_thw"], side=self.teacher_side
            )
            inputs["num_images_in_batch"] = self._images_in_batch
        loss, outputs = super().compute_loss(
            model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch
        )
        for name, term in outputs["loss_terms"].items():
            self._terms[name] = self._terms.get(name, 0.0) + term
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds to each log of a step: every loss term, tokens per second, left-out records."""
        steps = self._steps  # not the state's: a run that is resumed begins in the middle
        if "loss" in logs and steps:
            # By term, because Trainer's own sum leaves out whatever is not a number.
            terms = {f"loss_{name}": (total / steps).item() for name, total in self._terms.items()}
            for name, value in {"loss": logs["loss"], **terms}.items():
                if not math.isfinite(value):
                    raise ValueError(
                        f"The {name} became {value} by step {self.state.global_step}; lower "
                        "stage.learning_rates, set training.max_grad_norm, or look at the last "
                        "records."
                    )
            now = time.perf_counter()
            logs |= terms
            logs["tokens_per_second"] = self._tokens / (now - self._clock)
            if self.bad_records:
                logs["left_out_records"] = self.bad_records.total()
            self._terms, self._tokens, self._steps, self._clock = {}, 0, 0, now
        super().log(logs, start_time)


class StageProgress(TrainerCallback):
    """A progress bar with time left, loss by term and tokens per second."""

    def __init__(self, title: str):
        self.title = title
        self.bar: tqdm | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any
    ) -> None:
        """Opens the bar at the step that training starts from."""
        if state.is_world_process_zero:
            self.bar = tqdm(
                total=state.max_steps,
                initial=state.global_step,
                desc=self.title,
                dynamic_ncols=True,
            )

    def on_step_end(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        """Moves the bar."""
        if self.bar is not None:
            self.bar.update(state.global_step - self.bar.n)

    def on_log(
        self,
        args: TrainingArguments,
        state: Any,
        control: Any,
        logs: dict | None = None,
        **kwargs: Any,
    ) -> None:
        """Writes the latest terms behind the bar."""
        if self.bar is None or not logs or "loss" not in logs:
            return
        shown = {
            name.removeprefix("loss_"): f"{value:.3f}"
            for name, value in logs.items()
            if "loss_" in name
        }
        shown["tokens/s"] = f"{logs.get('tokens_per_second', 0):,.0f}"
        self.bar.set_postfix(shown, refresh=False)

    def on_train_end(
        self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any
    ) -> None:
        """Closes the bar."""
        if self.bar is not None:
            self.bar.close()


__all__ = ["EveTrainer", "StageProgress"]
