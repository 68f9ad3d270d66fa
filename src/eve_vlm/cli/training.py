"""The commands that train: `eve train` for one stage, `eve quickstart` for three small ones.

They read arguments and call `eve_vlm.train.run` and `eve_vlm.quickstart`, imported inside.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer


def train(
    recipe: Annotated[
        str, typer.Argument(help="A recipe file, or a shipped one such as tiny/1_prealign.")
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="KEY=VALUE", help="Values of the recipe, e.g. training.max_steps=10."
        ),
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", help="Print the resolved recipe, its parameters and tokens per step only."
        ),
    ] = False,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume/--no-resume",
            help="Go on from the last checkpoint where the same run stands unfinished, or refuse.",
        ),
    ] = True,
) -> None:
    """Train one stage from a recipe.

    eve train recipes/tiny/1_prealign.yaml training.max_steps=10 output_dir=runs/try
    """
    from eve_vlm.train.recipe import load_recipe

    loaded = load_recipe(recipe, overrides or ())
    from eve_vlm.train import run

    if dry_run:
        typer.echo(run.describe(loaded))
        return
    with stops_tidily():
        result = run.train(loaded, resume=resume, say=tell)
    typer.echo(
        f"{result.output_dir} is trained ({result.records:,} records, {result.seconds:.0f} s)."
    )


def quickstart(
    output: Annotated[Path, typer.Option(help="Folder of the run.")] = Path("runs/quickstart"),
    seed: Annotated[int, typer.Option(help="Seed of data and weights.")] = 0,
) -> None:
    """Train a small model from nothing in three stages, on real pictograms, and let it answer.

    Takes about ten minutes on two CPU cores and leaves report.html in the folder.  Before that
    eve-small answers about a few pictures, in versions that have its weights.
    """
    from eve_vlm.quickstart import run_quickstart

    _introduce(output / "eve-small")
    with stops_tidily():
        summary = run_quickstart(output, seed=seed)
    typer.echo(summary)


def _introduce(folder: Path) -> None:
    """Shows what the default model says of a few pictures; without it, says so in a line."""
    from eve_vlm.default_model.examples import answered_examples

    from .default import eve_small

    try:
        model = eve_small()
        begin = time.perf_counter()
        shown = answered_examples(model, folder)
    except ValueError as error:
        tell(f"eve-small is not shown: {error}")
        return
    seconds = time.perf_counter() - begin
    typer.echo(
        f"eve-small, trained before, about {len(shown)} pictures that it has not seen ({folder}), "
        f"drawn, loaded and answered in {seconds:.1f} s:"
    )
    for one in shown:
        answer = " ".join(one.answer.split())  # a line each
        typer.echo(f"  {one.file.name}  {one.question}  {answer}  (it is: {one.truth})")


@contextmanager
def stops_tidily() -> Iterator[None]:
    """Ends with the exit code of the signal where a run was asked to stop and has saved itself."""
    from eve_vlm.train.stopping import RunStopped

    try:
        yield
    except RunStopped as stopped:
        tell(f"eve: {stopped}")
        raise typer.Exit(stopped.exit_code) from None


def tell(text: str) -> None:
    """To the terminal, and not into what is piped on."""
    typer.echo(text, err=True)


__all__ = ["quickstart", "stops_tidily", "tell", "train"]
