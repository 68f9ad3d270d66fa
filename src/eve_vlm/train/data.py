"""The data side of a run: from a recipe's `data` section to rows, encoder, collator and step count.

Easy to get wrong: the number of steps follows from the rows, and with packing the rows follow from
the sizes of all records; so `num_train_epochs` becomes `max_steps` here, once, and is the same in
every process.
"""

import json
import logging
from dataclasses import asdict
from typing import NamedTuple

from transformers import TrainingArguments

from eve_vlm.cache import cache_folder
from eve_vlm.data.collator import EveCollator
from eve_vlm.data.encode import Encoder
from eve_vlm.data.encoded_rows import EncodedRows
from eve_vlm.data.lengths import measured_lengths
from eve_vlm.data.packing import Budget
from eve_vlm.data.rows import Rows, RowSampler
from eve_vlm.data.sources import Mixture
from eve_vlm.data.teacher_view import TeacherView
from eve_vlm.processing_eve import EveProcessor
from eve_vlm.train.data_log import DataLog
from eve_vlm.train.sections import DataSection, Recipe

logger = logging.getLogger(__name__)


class RunData(NamedTuple):
    """What a trainer reads."""

    dataset: EncodedRows
    """Rows of encoded records by the numbers of their records."""
    collator: EveCollator
    """Joins rows into batches."""
    log: DataLog
    """The order of rows, and what could not be used."""
    sources: tuple[str, ...]
    """Names of the data sets."""


def build_data(
    recipe: Recipe,
    records: Mixture,
    processor: EveProcessor,
    arguments: TrainingArguments,
    *,
    view: TeacherView | None = None,
) -> RunData:
    """The data of one process, and `arguments.max_steps` where the recipe counts epochs.

    Args:
        view: how the teacher sees pictures; None without alignment.

    Raises:
        ValueError: for what a user can mend in the recipe or the data.
    """
    data, encoder = recipe.data, build_encoder(recipe.data, processor, view=view)
    lengths, budget = None, None
    if data.packing is not None:
        budget = Budget(data.packing.tokens, data.packing.patches)
        lengths = measured_lengths(
            records,
            encoder,
            fingerprint=json.dumps([asdict(source) for source in data.sources]),
            folder=cache_folder() / "lengths",
            workers=arguments.dataloader_num_workers,
        ).of
    rows = Rows(
        len(records),
        seed=recipe.seed,
        window=1024 if data.packing is None else data.packing.window,
        sizes=lengths,
        budget=budget,
    )
    sampler = RowSampler(
        rows,
        batch_size=arguments.per_device_train_batch_size,
        rank=arguments.process_index,
        world=arguments.world_size,
    )
    if arguments.max_steps <= 0:
        arguments.max_steps = sampler.steps(
            arguments.num_train_epochs, accumulation=arguments.gradient_accumulation_steps
        )
    names: tuple[str, ...] = ()
    collator = EveCollator(
        processor.tokenizer.pad_token_id,
        packed=data.packing is not None,
        varlen=data.packing is not None and recipe.model.attn_implementation.startswith("flash"),
        label_weight=recipe.stage.label_weight,
        sources=names,
    )
    log = DataLog(sampler, max_bad_share=data.max_bad_share)
    return RunData(EncodedRows(records, encoder), collator, log, names)


def build_encoder(
    data: DataSection, processor: EveProcessor, *, view: TeacherView | None = None
) -> Encoder:
    """What turns records into arrays, as the recipe says."""
    return Encoder(
        processor,
        format=data.format,
        max_length=data.max_length,
        max_patches=None if data.packing is None else data.packing.patches,
        shrink=data.too_long == "shrink",
        teacher_view=view,
    )


__all__ = ["RunData", "build_data", "build_encoder"]
