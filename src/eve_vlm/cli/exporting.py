"""The commands that write a model anew: `eve export` for others, `eve merge` a run with LoRA.

What they print at the end says what came along and what stayed behind; the work is in
`eve_vlm.export`, imported inside so that `eve --help` does not wait for it.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from eve_vlm.export.folder import Exported


def export(
    model: Annotated[str, typer.Argument(help="A model folder, or a published checkpoint's name.")],
    out: Annotated[Path, typer.Option(help="A new folder.")],
    format: Annotated[
        str,
        typer.Option(
            help="transformers: the whole model; decoder: its language model alone; gguf: that for "
            "llama.cpp, and the patch embedding beside it."
        ),
    ] = "transformers",
    lora: Annotated[
        Path | None, typer.Option(help="A PEFT LoRA adapter folder to merge first.")
    ] = None,
    any_base: Annotated[
        bool, typer.Option("--any-base", help="Merge an adapter that names another model.")
    ] = False,
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16 or float16; the model's own if left out.")
    ] = None,
    shard_size: Annotated[str, typer.Option(help="Largest weight file.")] = "4GB",
    llama_cpp: Annotated[
        Path | None,
        typer.Option(help="A llama.cpp folder, for gguf; else the variable LLAMA_CPP."),
    ] = None,
) -> None:
    """Write a model for others: merged, whole, with its code.

    eve export runs/quickstart --out exported
    """
    from eve_vlm.export.folder import export as write

    done = write(
        model,
        out,
        format=format,
        lora=lora,
        any_base=any_base,
        dtype=dtype,
        shard_size=shard_size,
        llama_cpp=llama_cpp,
    )
    _show(done)


def merge(
    run: Annotated[
        Path, typer.Argument(help="A run with LoRA, one of its checkpoints, or a PEFT folder.")
    ],
    out: Annotated[Path, typer.Argument(help="A new folder.")],
    base: Annotated[
        str | None,
        typer.Option(help="The model that it was trained on; found by itself where it is at hand."),
    ] = None,
    any_base: Annotated[
        bool, typer.Option("--any-base", help="Take a base that is not known as the run's own.")
    ] = False,
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16 or float16; the base's own if left out.")
    ] = None,
) -> None:
    """Merge a run with LoRA into its base: a plain folder, which later stages can start from.

    eve merge runs/lora runs/merged
    """
    from eve_vlm.export.merged_run import merge_run

    _show(merge_run(run, out, base=base, any_base=any_base, dtype=dtype))


def _show(done: "Exported") -> None:
    for note in done.notes:
        typer.echo(note)
    typer.echo(
        f"{done.folder}: {done.parameters:,} parameters, {done.bytes / 1e6:,.1f} MB in "
        f"{sum(1 for file in done.folder.iterdir())} files"
    )


__all__ = ["export", "merge"]
