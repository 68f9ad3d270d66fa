"""The command that looks: `eve inspect` shows a model, recipe or picture, or how two differ.

Facts, words and drawings are made in `inspection`, `differences` and `grid_picture`, imported
inside; here only options are checked against what they are given with.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from eve_vlm.inspection.subjects import Facts


def inspect(
    what: Annotated[
        list[str],
        typer.Argument(
            metavar="WHAT [OTHER]",
            help="A model folder or Hub id, a config.json, a recipe, a picture, or a size such as "
            "640x480; two of a kind are compared.",
        ),
    ],
    model: Annotated[
        list[str] | None,
        typer.Option(
            help="See the picture as this model does: a folder, a Hub id, 672 or 1344 (the "
            "published settings, and both the default). May be repeated.",
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Draw the token grid over the picture into this PNG file.")
    ] = None,
    size: Annotated[
        list[str] | None,
        typer.Option(help="One more picture size for the table, such as 800x600. May be repeated."),
    ] = None,
    shapes: Annotated[bool, typer.Option("--shapes", help="List every weight.")] = False,
    weights: Annotated[
        bool, typer.Option("--weights", help="Compare the values of two checkpoints too.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Look at a model, recipe or picture without loading anything, or at how two of them differ.

    eve inspect picture.png --model 672 --out grid.png

    With two, the exit code is 0 where nothing differs and 1 where something does, as with diff.
    """
    if len(what) > 2:
        raise ValueError(f"{len(what)} things were named; look at one, or compare two.")
    two = len(what) == 2
    for wrong, option, reason in (
        (two and out is not None, "--out", "draws over one picture; name one"),
        (two and shapes, "--shapes", "lists the weights of one model; name one"),
        (not two and weights, "--weights", "compares two checkpoints; name the second"),
    ):
        if wrong:
            raise ValueError(f"{option} {reason}, or leave the option out.")
    from eve_vlm.inspection.subjects import inspect as facts_of

    facts = [facts_of(one, sizes=size or (), models=model or ()) for one in what]
    if two:
        from eve_vlm.inspection.differences import compare
        from eve_vlm.inspection.text import differences_json, differences_text

        found = compare(*facts, weights=weights)
        typer.echo(differences_json(found) if as_json else differences_text(found))
        raise typer.Exit(0 if found.equal else 1)
    from eve_vlm.inspection.facts import ModelFacts
    from eve_vlm.inspection.text import facts_json, facts_text

    if shapes and not isinstance(facts[0], ModelFacts):
        raise ValueError(f"--shapes lists the weights of a model, and {what[0]} is none.")
    drawn = [] if out is None else _draw(facts[0], out, model or ())
    typer.echo(facts_json(facts[0]) if as_json else facts_text(facts[0], shapes=shapes))
    for file in drawn:
        typer.echo(f"{file} shows the token grid.", err=as_json)


def _draw(facts: "Facts", out: Path, models: "list[str] | tuple[()]") -> list[Path]:
    """One drawing for each model: `grid.png`, or `grid-672.png`, `grid-1344.png`, ..."""
    from PIL import Image

    from eve_vlm.inspection.grid_picture import draw_grid, save_grid
    from eve_vlm.inspection.subjects import (
        SHIPPED_SETTINGS,
        PictureFacts,
        SizeFacts,
        picture_settings,
    )
    from eve_vlm.pictures import open_picture

    if isinstance(facts, PictureFacts):
        picture = open_picture(facts.source)
    elif isinstance(facts, SizeFacts):
        picture = Image.new("RGB", (facts.width, facts.height), "lightgrey")
    else:
        raise ValueError(f"--out draws over a picture or a size, and {facts.source} is neither.")
    names = list(models or SHIPPED_SETTINGS)
    written = []
    for number, name in enumerate(names, start=1):
        settings = picture_settings(name)
        mark = name if name in SHIPPED_SETTINGS else str(number)
        file = out if len(names) == 1 else out.with_name(f"{out.stem}-{mark}{out.suffix}")
        title = f"{Path(facts.source).name} as seen with {settings.name}"
        drawn = draw_grid(picture, pictures=settings.pictures, title=title)
        written.append(save_grid(drawn, file))
    return written


__all__ = ["inspect"]
