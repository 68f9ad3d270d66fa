"""The command `eve data features`: the teacher's features of a recipe's pictures, before training.

What does the work is `eve_vlm.train.filling`, imported inside.  Easy to get wrong: what was kept
until Ctrl-C stays kept, so the same command goes on from there.
"""

from typing import Annotated

import typer

from .data import cores


def features(
    recipe: Annotated[str, typer.Argument(help="A recipe file, or a shipped one.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="KEY=VALUE", help="Values of the recipe, e.g. stage.alignment.cache_gb=40."
        ),
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda or mps; a GPU where there is one.")
    ] = None,
    batch: Annotated[int, typer.Option(help="Records at a time.", min=1)] = 32,
    workers: Annotated[
        int | None,
        typer.Option(help="Processes that open pictures; all cores unless given.", min=0),
    ] = None,
) -> None:
    """Ask a recipe's teacher about every picture once and keep its features for training.

    eve data features recipes/tiny/1_prealign.yaml stage.alignment.cache=disk
    """
    import torch
    from tqdm.auto import tqdm

    from eve_vlm.train.filling import fill_ahead
    from eve_vlm.train.recipe import load_recipe

    loaded = load_recipe(recipe, [*(overrides or [])])
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        chosen = torch.device(device)
    except RuntimeError:
        raise ValueError(f"--device is {device!r}; give cpu, cuda or mps.") from None
    with tqdm(desc="asking the teacher", unit=" records", unit_scale=True) as bar:

        def begin(records: int) -> None:
            bar.reset(total=records)

        try:
            done = fill_ahead(
                loaded,
                device=chosen,
                batch=batch,
                workers=cores() if workers is None else workers,
                begin=begin,
                tick=bar.update,
            )
        except KeyboardInterrupt:
            bar.close()
            typer.echo("\nStopped; what is kept stays, and the same command goes on.", err=True)
            raise typer.Exit(130) from None
    typer.echo(
        f"{done.pictures:,} pictures in {done.records:,} records: {done.asked:,} asked about now, "
        f"{done.pictures - done.asked:,} kept before. {done.kept:,} pictures take "
        f"{done.taken / 1e9:.2f} GB."
    )
    if done.unusable:
        typer.echo(
            f"{done.unusable:,} records cannot be used; `eve data check` says why.", err=True
        )


__all__ = ["features"]
