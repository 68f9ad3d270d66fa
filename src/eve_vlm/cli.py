"""The command `eve`.  Each command only reads its arguments and calls what does the work.

Whatever a user can mend ends as one sentence and exit code 2; `EVE_DEBUG=1` shows the traceback
too. What only one command needs is imported inside it.
"""

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    help="Encoder-free vision-language models: train them in three stages and ask them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _version(wanted: bool) -> None:
    if wanted:
        from eve_vlm import __version__

        typer.echo(f"eve-vlm {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    pass


@app.command()
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
        bool, typer.Option("--resume", help="Go on from the run's last checkpoint.")
    ] = False,
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
    result = run.train(loaded, resume=resume)
    typer.echo(
        f"{result.output_dir} is trained ({result.records:,} records, {result.seconds:.0f} s)."
    )


@app.command()
def quickstart(
    output: Annotated[Path, typer.Option(help="Folder of the run.")] = Path("runs/quickstart"),
    seed: Annotated[int, typer.Option(help="Seed of data and weights.")] = 0,
) -> None:
    """Train a small model from nothing in three stages, on real pictograms, and let it answer.

    Takes about ten minutes on two CPU cores and leaves report.html in the folder.
    """
    from eve_vlm.quickstart import run_quickstart

    summary = run_quickstart(output, seed=seed)
    typer.echo(summary)


@app.command()
def ask(
    words: Annotated[
        list[str],
        typer.Argument(metavar="PICTURE... QUESTION", help="Picture files, then the question."),
    ],
    model: Annotated[
        Path | None,
        typer.Option(help="A model folder; without it the last quickstart run is taken."),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 128,
) -> None:
    """Ask a question about pictures.

    eve ask cat.png "What is this?"
    """
    *pictures, question = words
    if os.path.isfile(question):  # Path.is_file() raises for a question as long as a page
        raise ValueError(f"There is no question behind {question}; put it last, in quotes.")
    from eve_vlm.quickstart import last_quickstart_model
    from eve_vlm.serve.engine import EveEngine

    engine = EveEngine.from_pretrained(model or last_quickstart_model())
    typer.echo(engine.ask(question, pictures, max_new_tokens=max_new_tokens))


def main() -> None:
    """Runs the command line; user errors are one sentence and exit code 2."""
    try:
        app()
    except (ValueError, OSError) as error:
        if os.environ.get("EVE_DEBUG"):
            raise
        typer.echo(f"eve: {error}", err=True)
        sys.exit(2)


if __name__ == "__main__":
    main()
