"""The commands around `eve-small`, the default model: `eve small train` and `eve small pack`.

They read arguments and call `eve_vlm.small` and `eve_vlm.default_model`, imported inside.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .training import stops_tidily, tell

if TYPE_CHECKING:
    from eve_vlm.train.sections import Recipe

small_app = typer.Typer(
    help="Make eve-small, the model that answers when none is named.",
    no_args_is_help=True,
    add_completion=False,
)


@small_app.command()
def train(
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="KEY=VALUE",
            help="Values for the recipes of all stages, or of one: finetune:training.max_steps=10.",
        ),
    ] = None,
    decoder: Annotated[
        str,
        typer.Option(
            metavar="smollm2|new",
            help="smollm2: SmolLM2-135M-Instruct, for one GPU.  new: a small one from nothing, for "
            "two CPU cores in about two hours.",
        ),
    ] = "smollm2",
    recipes: Annotated[
        str | None,
        typer.Option(
            metavar="FOLDER",
            help="Other recipes of the same stages: eve_small_gpu, a new decoder on one GPU, or a "
            "folder of your own.",
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            help="Folder of the run; runs/eve-small, runs/eve-small-cpu and so on by its recipes, "
            "and RUN-twin for the twin of RUN."
        ),
    ] = None,
    steps_scale: Annotated[
        float, typer.Option(help="Factor of the steps of every stage, to fit a time.")
    ] = 1.0,
    twin_of: Annotated[
        Path | None,
        typer.Option(
            metavar="RUN",
            help="Train the encoder-based twin of a run instead, for comparison: with its recipes, "
            "conversations, seed and steps.  It is not packed.",
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what is missing and how many steps there are.")
    ] = False,
    packing: Annotated[
        bool, typer.Option("--pack/--no-pack", help="Pack what was trained into OUTPUT/packed.")
    ] = True,
) -> None:
    """Train eve-small in three stages and pack it; goes on where it stopped and fetches nothing.

    eve small train --output runs/eve-small --steps-scale 0.5

    eve small train --decoder new

    eve small train --decoder new --recipes eve_small_gpu

    eve small train --twin-of runs/eve-small
    """
    from eve_vlm import small

    if output is None:
        output = small.usual_output(decoder, recipes)
        if twin_of is not None:
            output = Path(f"{twin_of}-twin")
    chosen: dict[str, Any] = {
        "decoder": decoder,
        "folder": recipes,
        "steps_scale": steps_scale,
        "overrides": overrides or (),
        "twin_of": twin_of,
    }
    if dry_run:
        _tell_plan(small.stage_recipes(output, **chosen))
        return
    with stops_tidily():
        model = small.train_small(output, **chosen, say=tell)
    typer.echo(f"{model} is trained.")
    if packing and twin_of is None:
        _pack(output, output / "packed", None)


def _tell_plan(recipes: "list[Recipe]") -> None:
    """The stages, and what is missing for them."""
    from eve_vlm.small import lacking_parts

    for recipe in recipes:
        steps, sources = recipe.training["max_steps"], recipe.data.sources
        names = ", ".join(source.name or source.kind for source in sources)
        encoder = recipe.model.encoder
        frozen = "" if encoder is None else f"twin with a frozen {encoder.name}, "
        typer.echo(f"{recipe.stage.name}: {frozen}{steps:,} steps of {names}")
    for sentence in lacking_parts(recipes):
        typer.echo(f"lacking: {sentence}")


@small_app.command()
def pack(
    run: Annotated[Path, typer.Argument(help="Folder of a finished `eve small train`.")],
    out: Annotated[
        Path | None, typer.Option(help="Folder for the files; where the package has its own.")
    ] = None,
    results: Annotated[
        Path | None, typer.Option(help="Folder of `eve eval`, for the scores of the card.")
    ] = None,
) -> None:
    """Write what is shipped of a trained eve-small: weights of at most 40 MB, facts and card.

    eve small pack runs/eve-small --results runs/eval
    """
    from eve_vlm.default_model.assembling import SHIPPED

    _pack(run, out or SHIPPED, results)


def _pack(run: Path, out: Path, results: Path | None) -> None:
    from eve_vlm import small
    from eve_vlm.default_model.packing import pack as pack_model

    decoder = small.decoder_of(run)
    recipes = small.stage_recipes(run, decoder=decoder)
    done = pack_model(
        small.merged_folder(recipes[-1]),
        run / small.BASE if decoder == small.SMOLLM2 else None,
        [Path(recipe.output_dir) for recipe in recipes],
        out=out,
        results=results,
    )
    size, made = done.facts["bytes"] / 1e6, done.difference
    if made is None:
        typer.echo(f"{done.weights} has {size:.1f} MB, all of the model.")
        return
    typer.echo(
        f"{done.weights} has {size:.1f} MB and {made.kept:.2%} of the change of "
        f"{len(made.ranks)} decoder matrices (sum of squares)."
    )


__all__ = ["small_app"]
