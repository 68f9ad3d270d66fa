"""From the lines of a recipe's mixture table to sources and their mixture.

Easy to get wrong: what a line says is cut in this order: the file's records, the split, the number
behind `#`, and last what the quarantine list leaves out.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from eve_vlm.data.picture_folder import PictureFolder
from eve_vlm.data.sources.forms import FIELDS, Form
from eve_vlm.data.sources.hub import PREFIX, HubTable
from eve_vlm.data.sources.made import MADE, made_source
from eve_vlm.data.sources.mixture import Mixture
from eve_vlm.data.sources.paths import drawn, expand, read_place, read_split, slice_of
from eve_vlm.data.sources.quarantine import read_quarantine
from eve_vlm.data.sources.source import (
    FileSource,
    JoinedSource,
    PartSource,
    Source,
    folder_of,
)
from eve_vlm.data.sources.tables import ending_of, open_table


class SourceSettings(Protocol):
    """A line of the mixture table; `SourceSection` of a recipe says what its keys mean."""

    kind: Any
    name: str | None
    path: str | None
    image_folder: str | None
    split: str | None
    columns: dict[str, str]
    repeat: float
    weight: float | None
    streaming: bool
    options: dict[str, Any]


def build_mixture(
    sections: Sequence[Any], *, seed: int, quarantine: str | Path | None = None
) -> Mixture:
    """The mixture that a recipe's sources describe.

    Args:
        sections: lines of the mixture table, see `SourceSettings`.
        seed: draws the records of `path#500`, and composes scenes.
        quarantine: list of records to leave out.

    Raises:
        ValueError: for what a user can mend in the recipe or the data.
    """
    sources = [source_of(section, seed=seed) for section in sections]
    if quarantine is not None:
        listed = read_quarantine(quarantine)
        unknown = {name for name, _ in listed} - {source.name for source in sources}
        if unknown:
            raise ValueError(
                f"{quarantine} names the data set {min(unknown)!r}, which data.sources does not "
                f"have ({', '.join(source.name for source in sources)}); give every source the "
                "name that it had when the list was made."
            )
        sources = [listed.without(source) for source in sources]
    if any(section.weight is not None for section in sections):
        return Mixture(sources, weights=[section.weight for section in sections])
    return Mixture(sources, [section.repeat for section in sections])


def source_of(section: Any, *, seed: int) -> Source:
    """The source that a line of the mixture table (`SourceSettings`) describes.

    Raises:
        ValueError: as `build_source`.
    """
    return build_source(
        section.kind,
        path=section.path,
        image_folder=section.image_folder,
        options=section.options,
        seed=seed,
        name=section.name,
        split=section.split,
        columns=section.columns,
    )


def build_source(
    kind: str,
    *,
    path: str | None,
    image_folder: str | None = None,
    options: Mapping[str, Any] | None = None,
    seed: int,
    name: str | None = None,
    split: str | None = None,
    columns: Mapping[str, str] | None = None,
) -> Source:
    """Makes the source that one line of the mixture table describes.

    Raises:
        ValueError: if it does not fit the kind, or the data are not there.
    """
    place, part = read_place(path or ""), read_split(split)
    source: Source
    if kind in MADE:
        source = made_source(kind, options or {}, seed=seed, name=name or kind)
        if part.name:
            raise ValueError(
                f"The kind {kind!r} takes the name of its split in options; write [:95%] here."
            )
    else:
        source = _files(kind, place.path, image_folder, options, name, part.name, columns)
    numbers = slice_of(part, len(source))
    if place.cap is not None:
        return PartSource(source, drawn(numbers, place.cap, seed=seed, path=place.path))
    return source if len(numbers) == len(source) else PartSource(source, numbers)


def _files(
    kind: str,
    path: str,
    image_folder: str | None,
    options: Mapping[str, Any] | None,
    name: str | None,
    split: str,
    columns: Mapping[str, str] | None,
) -> Source:
    """All records of a path."""
    if kind not in FIELDS:
        raise ValueError(
            f"data.sources.kind is {kind!r}; use one of {', '.join([*FIELDS, *MADE])}."
        )
    if options:
        raise ValueError(
            f"data.sources.options has {sorted(options)}, but the kind {kind!r} takes none; "
            "remove them."
        )
    if not path:
        raise ValueError(f"data.sources.path is missing for the kind {kind!r}; name a file.")
    form = Form(kind, dict(columns or {})).checked()
    given = PictureFolder(image_folder) if image_folder is not None else None
    if path.startswith(PREFIX):
        pictures = given or PictureFolder(".", free=True)
        return FileSource(HubTable(path, split, form), form, pictures, name=name or path)
    if split:
        raise ValueError(
            f"data.sources.split names {split!r}, but files have no named splits; write [:95%], or "
            "give the files of the split as path."
        )
    files = expand(path)
    named = name or name_of(path)
    sources = [
        FileSource(
            open_table(file, form),
            form,
            given or PictureFolder(folder_of(file)),
            name=named,
            # Without ids of their own, records of several files must not share one.
            prefix=f"{name_of(file)}:" if len(files) > 1 else "",
        )
        for file in files
    ]
    return sources[0] if len(sources) == 1 else JoinedSource(sources, name=named)


def name_of(path: str) -> str:
    """What a data set is called by default: its file without folders and ending."""
    name = path.rstrip("/").rpartition("/")[2]
    return name[: len(name) - len(ending_of(name))] or name


__all__ = ["SourceSettings", "build_mixture", "build_source", "name_of", "source_of"]
