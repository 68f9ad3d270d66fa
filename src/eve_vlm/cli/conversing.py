"""The command `eve data converse`: text-only conversations, answered by a decoder itself.

What does the work is `eve_vlm.conversing`, imported inside.  Easy to get wrong: what is drawn also
depends on how many prompts are answered together and on the device, so both are noted beside the
file, and a stopped run goes on only with the same.
"""

from pathlib import Path
from typing import Annotated

import typer

from .answering import Device, NumberType

DECODER = "smollm2"


def converse(
    file: Annotated[Path, typer.Argument(help="JSON Lines of the kind `messages` to write.")],
    decoder: Annotated[
        str,
        typer.Option(help="An asset (smollm2), or a folder, GGUF file or Hub id of any decoder."),
    ] = DECODER,
    number: Annotated[int, typer.Option(help="Prompts; all different.", min=1)] = 8000,
    split: Annotated[
        str, typer.Option(help="train, or held_out: topics that train never talks about.")
    ] = "train",
    seed: Annotated[int, typer.Option(help="Draws prompts and answers.", min=0)] = 0,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer, in tokens.", min=1)] = 192,
    temperature: Annotated[
        float, typer.Option(help="0 takes the likeliest token each time.", min=0.0)
    ] = 1.0,
    top_k: Annotated[
        int, typer.Option(help="Draw from so many of the likeliest tokens; 0: from all.", min=0)
    ] = 0,
    batch_size: Annotated[
        int | None, typer.Option(help="Prompts answered together; 1024 on a GPU, else 32.", min=1)
    ] = None,
    device: Device = None,
    dtype: NumberType = None,
) -> None:
    """Let a decoder answer some thousand prompts, so that training keeps its language as it is.

    eve data converse runs/conversations.jsonl --number 8000

    Goes on where it was stopped.  What made the file stands beside it, in FILE.made.json.
    """
    import torch
    from tqdm.auto import tqdm

    from eve_vlm.conversing import ConverseSettings, load_speaker
    from eve_vlm.conversing import converse as talk

    if split not in ("train", "held_out"):
        raise ValueError(f"--split is {split!r}; use train or held_out.")
    speaker = load_speaker(
        decoder, device=device, dtype=getattr(torch, dtype.value) if dtype else None
    )
    settings = ConverseSettings(
        number=number,
        split=split,  # type: ignore[arg-type]
        seed=seed,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        batch_size=batch_size or speaker.batch_size,
    )
    with tqdm(total=number, desc="answering", unit=" prompts") as bar:
        done = talk(
            speaker.decoder,
            speaker.tokenizer,
            file,
            settings,
            name=decoder,
            progress=bar.update,
        )
    typer.echo(
        f"{file} has {done.written:,} conversations; {done.cut:,} reached the limit and end behind "
        f"their last whole sentence, {done.left_out:,} had none and were left out."
    )


__all__ = ["converse"]
