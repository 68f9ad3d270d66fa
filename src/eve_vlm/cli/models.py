"""The commands that turn one checkpoint into another: `eve convert`, between the two layouts.

They read arguments, call what does the work (imported inside), and print what was done.
"""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from .options import Dtype


class Layout(StrEnum):
    """The two layouts that a checkpoint can have."""

    ours = "ours"
    published = "published"


def convert(
    model: Annotated[str, typer.Argument(help="A model folder or a Hub id, in either layout.")],
    out: Annotated[Path, typer.Option(help="New folder for the result.")],
    to: Annotated[
        Layout,
        typer.Option(help="ours: for transformers. published: for the published programme."),
    ] = Layout.ours,
    dtype: Annotated[
        Dtype | None, typer.Option(help="Type of the written weights; the stored one if not given.")
    ] = None,
    shard_size: Annotated[
        str, typer.Option(help="Largest weight file, e.g. 5GB or 500MB.")
    ] = "5GB",
    aligner: Annotated[
        bool, typer.Option("--aligner", help="Keep the patch aligning layer, for training.")
    ] = False,
    check: Annotated[
        bool, typer.Option("--check", help="Read it all again and compare bit by bit.")
    ] = False,
) -> None:
    """Write a checkpoint in the other layout, another type or other shards.

    eve convert BAAI/EVE-7B-HD-v1.0 --out eve-7b-hd --dtype bfloat16 --check
    """
    import torch

    from eve_vlm.convert_eve_weights_to_hf import convert as convert_checkpoint

    done = convert_checkpoint(
        model,
        out,
        to=to.value,
        dtype=None if dtype is None else getattr(torch, dtype.value),
        max_shard_size=shard_size,
        aligner=aligner,
        check=check,
    )
    files = "1 file" if done.shards == 1 else f"{done.shards} files"
    typer.echo(
        f"{out} holds {done.weights} weights, {done.parameters:,} parameters, "
        f"{done.num_bytes / 1e9:.2f} GB in {files}."
    )
    for reason, count in done.left_behind.items():
        typer.echo(f"Left behind: {count} weights ({reason}).")
    if done.compared is not None:
        typer.echo(f"Checked: {done.compared} weights read again, all equal bit by bit.")


__all__ = ["Layout", "convert"]
