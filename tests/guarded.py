"""A guarded trainer on a few records, and records that go wrong in one way each.

Shared by `test_guards.py` and the processes it starts. Everything is in order and without dropout,
so that two runs that do the same are equal bit for bit.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PrinterCallback, TrainerCallback, TrainingArguments

import tiny
from eve_vlm.data.collator import EveCollator
from eve_vlm.data.encode import IGNORED, EncodedRecord, Encoder
from eve_vlm.data.records import Record
from eve_vlm.data.rows import Rows, RowSampler
from eve_vlm.train.data_log import DataLog
from eve_vlm.train.parameters import select_trainable
from eve_vlm.train.sections import GuardsSection, StageSection
from eve_vlm.train.trainer import EveTrainer


class InOrder(Rows):
    """Records in the order of their numbers."""

    def order(self, epoch: int) -> torch.Tensor:
        return torch.arange(self.num_records)


class OneByOne:
    """Rows of a list of encoded records."""

    def __init__(self, records: Sequence[EncodedRecord]):
        self.records = records

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, row: Sequence[int]) -> list[EncodedRecord]:
        return [self.records[index] for index in row]


def records(number: int) -> list[EncodedRecord]:
    """Conversations about a picture, called r0, r1, ..."""
    encoder = Encoder(tiny.processor(), format="chat", max_length=256)
    return [
        encoder(
            Record(
                id=f"r{index}",
                messages=tiny.conversation(tiny.QUESTIONS[index % 4], tiny.ANSWERS[index % 3]),
                images=[tiny.picture(16 + 8 * (index % 3), 24, seed=index)],
            )
        )
        for index in range(number)
    ]


def with_nan_picture(record: EncodedRecord) -> EncodedRecord:
    """The same with one pixel that is no number."""
    pixels = record.pixel_values.copy()
    pixels[0, 0] = math.nan
    return record._replace(pixel_values=pixels)


def without_labels(record: EncodedRecord) -> EncodedRecord:
    """The same with every label masked but the first, which is never learnt."""
    labels = np.full_like(record.labels, IGNORED)
    labels[0] = record.input_ids[0]
    return record._replace(labels=labels)


def one_batch() -> dict[str, Any]:
    """A batch as the model gets it, with features of a teacher."""
    batch = EveCollator(0)([[record] for record in records(2)])
    batch = {name: value for name, value in batch.items() if isinstance(value, torch.Tensor)}
    cells = int((batch["image_grid_thw"].prod(-1) // tiny.MERGE**2).sum())
    generator = torch.Generator().manual_seed(1)
    features = torch.randn(cells, tiny.TEACHER_WIDTH, generator=generator)
    return {**batch, "teacher_features": features}


def trainer(
    folder: Path,
    data: Sequence[EncodedRecord],
    *,
    batch: int = 2,
    steps: int = 4,
    guards: GuardsSection | None = None,
    **arguments: Any,
) -> EveTrainer:
    """A trainer of a new tiny model: AdamW with moments and decay."""
    model = tiny.model()
    section = StageSection(
        name="finetune",
        trainable=["*"],
        learning_rates={"*": arguments.pop("rate", 1e-3)},
        weight_decay=0.1,
        alignment=None,
    )
    select_trainable(model, section)
    rows = InOrder(len(data), seed=0)
    settings = {
        "optim": "adamw_torch",
        "save_strategy": "no",
        "logging_steps": 1,
        "lr_scheduler_type": "constant",
        **arguments,
    }
    settings_of_run = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=batch,
        max_steps=steps,
        report_to="none",
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        disable_tqdm=True,
        use_cpu=True,
        **settings,
    )
    sampler = RowSampler(
        rows,
        batch_size=batch,
        rank=settings_of_run.process_index,
        world=settings_of_run.world_size,
    )
    made = EveTrainer(
        model=model,
        args=settings_of_run,
        train_dataset=OneByOne(data),
        data_collator=EveCollator(0),
        stage=section,
        data_log=DataLog(sampler, max_bad_share=0.0),
        guards=guards,
        decode=tiny.tokenizer().decode,
    )
    made.remove_callback(PrinterCallback)
    return made


class Weights(TrainerCallback):
    """Whether weights and optimizer are bit for bit the same behind a step as before it."""

    def __init__(self, step: int):
        self.step, self.unchanged, self.rate_moved = step, False, False
        self.before: dict[str, Any] = {}

    @staticmethod
    def _all(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        tensors = {name: weight.detach().clone() for name, weight in model.named_parameters()}
        for index, state in optimizer.state_dict()["state"].items():
            tensors |= {
                f"{index}.{name}": torch.as_tensor(value).clone()
                for name, value in state.items()
                if value is not None
            }
        return tensors

    def on_step_begin(self, args, state, control, model=None, optimizer=None, **kwargs) -> None:
        if state.global_step + 1 == self.step:
            self.before = self._all(model, optimizer)
            self.rate = optimizer.param_groups[0]["lr"]

    def on_step_end(self, args, state, control, model=None, optimizer=None, **kwargs) -> None:
        if state.global_step == self.step:
            after = self._all(model, optimizer)
            same = [torch.equal(value, after[name]) for name, value in self.before.items()]
            self.unchanged = len(self.before) == len(after) and all(same)
            self.rate_moved = self.rate != optimizer.param_groups[0]["lr"]
