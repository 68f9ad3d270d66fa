"""What `eve data check` looks at: data sets of files or of a recipe, and what counts their tokens.

Easy to get wrong: the data sets are whole, without the recipe's quarantine list, because the
numbers of records in that list count whole data sets; what it leaves out is handed on beside them.
"""

from typing import TYPE_CHECKING, Any, NamedTuple

import typer

from .data import is_recipe, read_sections

if TYPE_CHECKING:
    from eve_vlm.data.check import DataSet
    from eve_vlm.data.encode import Encoder
    from eve_vlm.data.sources import Mixture, Quarantine
    from eve_vlm.processing_eve import EveProcessor
    from eve_vlm.train.sections import Recipe, SourceSection


class Subject(NamedTuple):
    """What is checked, and how its tokens are counted."""

    sections: "list[SourceSection]"
    """Lines of the mixture table."""
    data_sets: "list[DataSet]"
    """Their records."""
    recipe: "Recipe | None"
    """The recipe, if one was given."""
    encoder: "Encoder | None"
    """None where no tokenizer is known."""
    listed: "list[set[int]]"
    """By data set: records that the recipe's quarantine list leaves out."""


def read_subject(
    files: list[str],
    kind: str,
    image_folder: str | None,
    model: str | None,
    format: str | None,
    max_length: int | None,
) -> Subject:
    """Builds what the arguments of the command name.

    Raises:
        ValueError: for what a user can mend in arguments, recipe or data.
    """
    from eve_vlm.data.check import Numbered, Streamed
    from eve_vlm.data.sources import source_of
    from eve_vlm.data.sources.streams import build_stream
    from eve_vlm.train.recipe import load_recipe

    sections, seed = read_sections(files, kind=kind, image_folder=image_folder)
    recipe = load_recipe(files[0]) if is_recipe(files[0]) else None
    for option, value in (("--format", format), ("--max-length", max_length)):
        if value is not None and (recipe is not None or model is None):
            why = "the recipe says it" if recipe is not None else "it needs --model"
            raise ValueError(f"{option} cannot be given here, because {why}; leave it out.")
    data_sets: list[DataSet] = []
    for section in sections:
        if section.streaming:
            data_sets.append(Streamed(build_stream([section], endless=False).streams[0]))
            continue
        source = source_of(section, seed=seed)
        data_sets.append(Numbered(source))
    if all(data_set.records == 0 for data_set in data_sets):
        raise ValueError(f"{files[0]} holds no records, so there is nothing to check.")
    listed = None if recipe is None else _quarantine_of(recipe, data_sets)
    encoder = _encoder(recipe, listed is not None, model, format, max_length)
    entries = [] if listed is None else listed.entries
    numbers = [
        {entry.index for entry in entries if entry.source == data_set.name}
        for data_set in data_sets
    ]
    return Subject(sections, data_sets, recipe, encoder, numbers)


def _quarantine_of(recipe: "Recipe", data_sets: "list[DataSet]") -> "Quarantine | None":
    """The recipe's list; None, with a word, if it belongs to other data and must be made again."""
    from eve_vlm.data.check import Numbered
    from eve_vlm.data.sources import read_quarantine

    if recipe.data.quarantine is None:
        return None
    listed = read_quarantine(recipe.data.quarantine)
    try:
        for data_set in data_sets:
            if isinstance(data_set, Numbered):
                listed.without(data_set.source)
    except ValueError as error:
        typer.echo(f"eve: {error} Here the list is not used.", err=True)
        return None
    return listed


class _Readable:
    """Records for a new tokenizer: a bad one gives its place to the next that can be read."""

    def __init__(self, records: "Mixture"):
        self.records = records

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Any:
        for number in (*range(index, len(self)), *range(index)):
            try:
                return self.records[number]
            except ValueError:
                continue  # its reason comes in the check
        raise ValueError("None of the records can be read, so no tokenizer can be made of them.")


def _encoder(
    recipe: "Recipe | None",
    listed: bool,
    model: str | None,
    format: str | None,
    max_length: int | None,
) -> "Encoder | None":
    """What counts tokens as training would; None without a recipe and a model."""
    if recipe is None and model is None:
        return None
    from eve_vlm.data.encode import Encoder
    from eve_vlm.loading import load_config, load_processor, require_model_folder
    from eve_vlm.train.data import build_encoder

    if model is not None:
        folder = require_model_folder(model)
        image = None if recipe is None else recipe.model.image
        processor = load_processor(
            folder,
            longest_edge=None if image is None else image.longest_edge,
            size_multiple=None if image is None else image.size_multiple,
        )
    else:
        assert recipe is not None
        try:
            processor = _trained_processor(recipe, listed)
        except ValueError as error:
            raise ValueError(
                f"{str(error).rstrip('.')}; or give --model with another folder that has the "
                "same tokenizer."
            ) from None
    if recipe is not None:
        return build_encoder(recipe.data, processor)
    if format not in (None, "chat", "plain"):
        raise ValueError(f"--format is {format!r}; use chat or plain.")
    if max_length is None:
        max_length = load_config(folder).text_config.max_position_embeddings
    return Encoder(
        processor,
        format=format or "chat",  # type: ignore[arg-type]
        max_length=max_length,
    )


def _trained_processor(recipe: "Recipe", listed: bool) -> "EveProcessor":
    """The processor that training would build, bad records or not."""
    from eve_vlm.data.sources import build_mixture
    from eve_vlm.train.build import build_processor

    model = recipe.model
    if model.init_from or model.tokenizer or model.decoder:
        return build_processor(recipe, None)  # type: ignore[arg-type]  # needs no records
    quarantine = recipe.data.quarantine if listed else None
    records = build_mixture(recipe.data.sources, seed=recipe.seed, quarantine=quarantine)
    return build_processor(recipe, _Readable(records))  # type: ignore[arg-type]


__all__ = ["Subject", "read_subject"]
