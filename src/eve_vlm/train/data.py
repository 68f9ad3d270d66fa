"""The data side of a run: from a recipe's `data` section to rows, encoder, collator and step count.

Easy to get wrong: the number of steps follows from the rows, and with packing the rows follow from
the sizes of all records; so `num_train_epochs` becomes `max_steps` here, once, and is the same in
every process.
"""

from typing import NamedTuple

from transformers import TrainingArguments

from eve_vlm.cache import cache_folder
from eve_vlm.data.collator import EveCollator
from eve_vlm.data.encode import Encoder
from eve_vlm.data.encoded_rows import EncodedRows
from eve_vlm.data.feature_table import FeatureTable
from eve_vlm.data.lengths import MixtureLengths
from eve_vlm.data.packing import Budget
from eve_vlm.data.rows import Rows, RowSampler, steps_of
from eve_vlm.data.sources import Mixture
from eve_vlm.data.sources.streams import StreamMixture
from eve_vlm.data.stream_rows import StreamRows
from eve_vlm.data.teacher_view import TeacherView
from eve_vlm.processing_eve import EveProcessor
from eve_vlm.train.data_log import DataLog
from eve_vlm.train.sections import DataSection, Recipe

WINDOW = 1024  # records of a stream that are shuffled at a time, without packing


class RunData(NamedTuple):
    """What a trainer reads."""

    dataset: EncodedRows
    """Rows of encoded records."""
    collator: EveCollator
    """Joins rows into batches."""
    log: DataLog
    """The order of rows, and what could not be used."""
    sources: tuple[str, ...]
    """Names of the data sets."""


def build_data(
    recipe: Recipe,
    records: Mixture | StreamMixture,
    processor: EveProcessor,
    arguments: TrainingArguments,
    *,
    view: TeacherView | None = None,
    table: FeatureTable | None = None,
) -> RunData:
    """The data of one process, and `arguments.max_steps` where the recipe counts epochs.

    Args:
        view: how the teacher sees pictures; None without alignment.
        table: where its features are kept, if they are.

    Raises:
        ValueError: for what a user can mend in the recipe or the data.
    """
    encoder = build_encoder(recipe.data, processor, view=view, table=table)
    dataset = EncodedRows(records if isinstance(records, Mixture) else None, encoder)
    sampler = _sampler(recipe, records, encoder, arguments)
    names = tuple(dict.fromkeys(records.names))
    packed = recipe.data.packing is not None
    collator = EveCollator(
        processor.tokenizer.pad_token_id,
        packed=packed,
        varlen=packed and recipe.model.attn_implementation.startswith("flash"),
        label_weight=recipe.stage.label_weight,
        sources=names,
    )
    log = DataLog(
        sampler,
        max_bad_share=recipe.data.max_bad_share,
        rows_per_step=arguments.per_device_train_batch_size
        * arguments.gradient_accumulation_steps
        * arguments.world_size,
    )
    return RunData(dataset, collator, log, names)


def _sampler(
    recipe: Recipe,
    records: Mixture | StreamMixture,
    encoder: Encoder,
    arguments: TrainingArguments,
) -> RowSampler:
    """The rows of this process, and the number of steps."""
    packing = recipe.data.packing
    budget = None if packing is None else Budget(packing.tokens, packing.patches)
    window = WINDOW if packing is None else packing.window
    batch, rank, world = (
        arguments.per_device_train_batch_size,
        arguments.process_index,
        arguments.world_size,
    )
    if isinstance(records, StreamMixture):
        if arguments.max_steps <= 0:
            raise ValueError(
                "data.sources are streams, whose length is not known; set training.max_steps."
            )
        share = records.shard(rank, world)
        stream = StreamRows(
            share, seed=recipe.seed, window=window, size=encoder.size, budget=budget
        )
        return RowSampler(stream, batch_size=batch)
    sizes = None
    if budget is not None:
        sizes = MixtureLengths(
            records,
            encoder,
            folder=cache_folder() / "lengths",
            workers=arguments.dataloader_num_workers,
        )
    rows = Rows(len(records), seed=recipe.seed, window=window, sizes=sizes, budget=budget)
    if arguments.max_steps <= 0:
        at_once = batch * world * arguments.gradient_accumulation_steps
        arguments.max_steps = steps_of(rows, arguments.num_train_epochs, at_once=at_once)
    return RowSampler(rows, batch_size=batch, rank=rank, world=world)


def build_encoder(
    data: DataSection,
    processor: EveProcessor,
    *,
    view: TeacherView | None = None,
    table: FeatureTable | None = None,
) -> Encoder:
    """What turns records into arrays, as the recipe says."""
    return Encoder(
        processor,
        format=data.format,
        max_length=data.max_length,
        max_patches=None if data.packing is None else data.packing.patches,
        shrink=data.too_long == "shrink",
        teacher_view=view,
        teacher_table=table,
    )


__all__ = ["RunData", "build_data", "build_encoder"]
