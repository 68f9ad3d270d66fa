"""The commands around training data: `eve data index` looks at all of it without decoding pixels.

What does the work is `eve_vlm.data`, imported inside.  Easy to get wrong: a recipe's sources are
indexed whole, before split and cap, so that another split costs nothing.
"""

import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from eve_vlm.train.sections import SourceSection

data_app = typer.Typer(
    help="Look at training data before training on them.",
    no_args_is_help=True,
    add_completion=False,
)

HEADINGS = (
    *("data set", "records", "unreadable", "pictures", "unreadable", "megapixels"),
    *("letters: median", "90 %", "99 %", "most"),
)


@data_app.callback()
def _root() -> None:
    pass


@data_app.command()
def index(
    files: Annotated[
        list[str],
        typer.Argument(
            metavar="FILES|RECIPE", help="Data files, patterns or URLs; or one recipe (.yaml)."
        ),
    ],
    kind: Annotated[
        str, typer.Option(help="Form of the records: llava, messages, captions or text.")
    ] = "llava",
    image_folder: Annotated[
        str | None, typer.Option(help="Folder, tar or URL that picture names start from.")
    ] = None,
    again: Annotated[
        bool, typer.Option("--again", help="Index anew; pictures may have changed.")
    ] = False,
    workers: Annotated[
        int | None, typer.Option(help="Processes; all cores unless given.", min=0)
    ] = None,
) -> None:
    """Index records, picture headers and text lengths on all cores, and show what is there.

    eve data index data/llava_v1_5_mix665k.json --image-folder data/images
    """
    from tqdm.auto import tqdm

    from eve_vlm.data.indexing import files_of, index_sources
    from eve_vlm.data.sources import source_of
    from eve_vlm.data.sources.made import MADE

    sections, seed = read_sections(files, kind=kind, image_folder=image_folder)
    sources = [
        source_of(section, seed=seed)
        for section in sections
        if section.kind not in MADE and not section.streaming
    ]
    if not sources:
        raise ValueError(
            "There is nothing to index: pictures that are made here are drawn, and streams are "
            "read in order; name data files."
        )
    total = sum(len(file) for source in sources for file in files_of(source))
    with tqdm(total=total, desc="indexing", unit=" records", unit_scale=True) as bar:
        rows = index_sources(
            sources,
            workers=cores() if workers is None else workers,
            again=again,
            progress=lambda records: bar.update(records),
        )
    table: list[tuple[str, ...]] = [HEADINGS]
    for row in rows:
        counts = (row.records, row.unread, row.pictures, row.missing, round(row.megapixels))
        table.append((row.name, *(f"{number:,}" for number in (*counts, *row.characters))))
    typer.echo(in_columns(table))


def read_sections(
    files: list[str], *, kind: str, image_folder: str | None
) -> tuple[list["SourceSection"], int]:
    """The lines of a recipe's mixture table, or one for each data file; and the seed.

    Raises:
        ValueError: if a recipe stands beside other files, or `kind` is unknown.
    """
    from eve_vlm.data.sources.forms import FIELDS
    from eve_vlm.train.recipe import load_recipe
    from eve_vlm.train.sections import SourceSection

    recipes = [file for file in files if is_recipe(file)]
    if recipes and len(files) > 1:
        raise ValueError(f"{recipes[0]} is a recipe; give it alone, or data files alone.")
    if recipes:
        recipe = load_recipe(recipes[0])
        return list(recipe.data.sources), recipe.seed
    if kind not in FIELDS:
        raise ValueError(f"--kind is {kind!r}; use one of {', '.join(FIELDS)}.")
    sections = [
        SourceSection(kind=kind, path=file, image_folder=image_folder)  # type: ignore[arg-type]
        for file in files
    ]
    return sections, 0


def is_recipe(file: str) -> bool:
    """Whether a name means a recipe: it ends so, or is the short name of a shipped one."""
    from eve_vlm.train.recipe import recipes_folder

    return file.endswith((".yaml", ".yml")) or (recipes_folder() / f"{file}.yaml").is_file()


def cores() -> int:
    """Cores that this process may use."""
    if sys.platform == "linux":
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def in_columns(table: Sequence[Sequence[str]], *, left: int = 1) -> str:
    """Rows as text: the first `left` columns on the left, numbers on the right."""
    widths = [max(len(row[column]) for row in table) for column in range(len(table[0]))]
    lines = [
        "  ".join(
            cell.ljust(width) if number < left else cell.rjust(width)
            for number, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in table
    ]
    return "\n".join(line.rstrip() for line in lines)


__all__ = ["data_app"]
