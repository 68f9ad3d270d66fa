"""The command that makes pre-training sets: `eve curate` runs a recipe, or goes on with it.

It reads the recipe, shows how far each stage is and prints where the results are; the work is in
`eve_vlm.curate`, imported inside.  Easy to get wrong: the last lines go to standard output, all
progress to standard error.
"""

import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from eve_vlm.curate.recipe import CurateRecipe
    from eve_vlm.curate.run import Progress

EVERY = 5.0  # seconds between two lines of a step at least


def curate(
    recipe: Annotated[
        str, typer.Argument(help="A recipe file, or a shipped one such as curate/offline_emoji.")
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="KEY=VALUE", help="Values of the recipe, e.g. output_dir=runs/mine."
        ),
    ] = None,
    only: Annotated[
        str | None,
        typer.Option("--only", help="Run this stage alone; those before it must be finished."),
    ] = None,
    begin: Annotated[
        str | None,
        typer.Option(
            "--from", help="Remove the results of this stage and all after it, and make them again."
        ),
    ] = None,
    address: Annotated[
        str | None,
        typer.Option(help="A Ray cluster, such as auto or head:6379; this machine without."),
    ] = None,
    cores: Annotated[
        int | None, typer.Option(min=1, help="Cores of this machine to use; all by default.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the resolved recipe and its stages only.")
    ] = False,
) -> None:
    """Make a pre-training set: filter, spread, recaption and shard pictures.

    eve curate recipes/curate/offline_emoji.yaml output_dir=runs/curated

    The same command again goes on where it was stopped.
    """
    loaded = load(recipe, overrides or ())
    from eve_vlm.curate.stages import stages_of

    if dry_run:
        typer.echo(_resolved(loaded))
        for stage in stages_of(loaded):
            typer.echo(f"{stage.name:>12}  {stage.what}")
        return
    from eve_vlm.curate.page import write_curation_report
    from eve_vlm.curate.run import curate as run

    settings: dict[str, Any] = {"progress": _Lines(), "say": _say}
    try:
        result = run(loaded, only=only, begin=begin, address=address, cores=cores, **settings)
    except ValueError:
        if Path(loaded.output_dir).is_dir():
            with suppress(OSError):  # a full disk, which is what stopped the run
                _say(f"{write_curation_report(loaded)} shows how far it came.")
        raise
    page = write_curation_report(loaded)
    typer.echo(
        f"{result.folder}: {result.kept:,} of {result.read:,} pictures are kept; {result.made:,} "
        f"units were made now. {page} shows what each stage did."
    )


def load(recipe: str, overrides: Sequence[str] = ()) -> "CurateRecipe":
    """A recipe of curation with overrides, every key and value checked.

    Raises:
        ValueError: one sentence with the file, the dotted key, what is wrong and how to mend it.
    """
    from eve_vlm.curate.recipe import CurateRecipe, checked
    from eve_vlm.train.recipe import find_recipe
    from eve_vlm.train.strict_yaml import apply_overrides, build, read_mapping

    data = read_mapping(find_recipe(recipe))
    origin = apply_overrides(data, overrides, cls=CurateRecipe, file=recipe)
    try:
        return checked(build(CurateRecipe, data, origin=origin))
    except ValueError as error:
        text = str(error)
        raise ValueError(text if text.startswith(recipe) else f"{recipe}: {text}") from None


def _resolved(recipe: "CurateRecipe") -> str:
    import dataclasses

    import yaml

    return yaml.safe_dump(dataclasses.asdict(recipe), sort_keys=False, allow_unicode=True)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


class _Lines:
    """Progress as lines on standard error: the first and the last of a step, and some between."""

    def __init__(self) -> None:
        self._step, self._at = "", 0.0

    def __call__(self, progress: "Progress") -> None:
        from eve_vlm.train.progress import human_time

        now, last = time.monotonic(), progress.units == progress.all_units
        if progress.step == self._step and not last and now - self._at < EVERY:
            return
        self._step, self._at = progress.step, now
        kept = f", {progress.kept:,} kept" if progress.step == progress.stage else ""
        left = "done" if last else f"{human_time(progress.seconds_left)} left"
        print(
            f"{progress.step}: unit {progress.units:,} of {progress.all_units:,}, "
            f"{progress.rows:,} rows{kept}, {progress.per_second:,.0f}/s, {left}",
            file=sys.stderr,
            flush=True,
        )


__all__ = ["curate", "load"]
