"""What the commands that ask have in common: their options, the opened model, and printing.

An option means the same in each of them because it is written here once.  Easy to get wrong: what a
model says may hold control characters, which must not reach a terminal, and must reach a file.
"""

import io
import re
import sys
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .options import Dtype, FewerBits

if TYPE_CHECKING:
    from eve_vlm.serve.engine import EveEngine

STOPPED = 130  # the exit code of a command that Ctrl-C ended


class Attention(StrEnum):
    """Ways to compute attention; answers are alike, speed and memory differ."""

    sdpa = "sdpa"
    eager = "eager"
    flex_attention = "flex_attention"
    flash_attention_2 = "flash_attention_2"


ModelName = Annotated[
    str | None,
    typer.Option(
        "--model",
        help="A model folder or Hub id; without it eve-small, see docs/small.md.",
    ),
]
Device = Annotated[
    str | None,
    typer.Option("--device", help="cpu, cuda, cuda:1 or mps; a GPU where there is one."),
]
NumberType = Annotated[
    Dtype | None,
    typer.Option("--dtype", help="Type of the weights; float32 on a CPU, else the stored one."),
]
AttentionKind = Annotated[Attention, typer.Option("--attention", help="How attention is computed.")]
Quantize = Annotated[
    FewerBits | None,
    typer.Option("--quantize", help="Decoder weights in 8 or 4 bits; needs the extra quantize."),
]
StaticCache = Annotated[
    bool,
    typer.Option(
        "--static-cache",
        help="Make tokens over a cache of fixed size; on a GPU steps are recorded (docs/fast.md).",
    ),
]
CompileSteps = Annotated[
    bool,
    typer.Option(
        "--compile-steps",
        help="The fastest way on a GPU: --static-cache, and the decoder's layers are compiled.",
    ),
]
System = Annotated[
    str | None,
    typer.Option("--system", metavar="TEXT", help="Instructions in front of the conversation."),
]
MaxNewTokens = Annotated[
    int, typer.Option("--max-new-tokens", min=1, help="Longest answer, in tokens.")
]
Temperature = Annotated[
    float,
    typer.Option("--temperature", min=0, help="0 takes the likeliest token; above, it is drawn."),
]
TopP = Annotated[
    float,
    typer.Option("--top-p", help="Draw from the likeliest tokens of this probability together."),
]
TopK = Annotated[
    int, typer.Option("--top-k", min=0, help="Draw from so many likeliest tokens; 0 means all.")
]
Seed = Annotated[int | None, typer.Option("--seed", help="The same seed draws the same answer.")]
Stop = Annotated[
    list[str] | None,
    typer.Option("--stop", metavar="TEXT", help="A text that ends the answer. May be repeated."),
]
MaxImageTokens = Annotated[
    int | None,
    typer.Option("--max-image-tokens", min=1, help="Most tokens for each picture."),
]


def open_engine(
    model: str,
    *,
    device: str | None,
    dtype: Dtype | None,
    attention: Attention | None = None,
    quantize: FewerBits | None = None,
    static_cache: bool = False,
    compile_steps: bool = False,
    **settings: Any,
) -> "EveEngine":
    """The model, loaded as the options say.

    Args:
        attention: None for a command without that option.
        compile_steps: a static cache comes with it.
        settings: of the engine.

    Raises:
        ValueError: if it cannot be loaded, or not in that way.
    """
    import torch

    from eve_vlm.errors import first_line
    from eve_vlm.serve.engine import EveEngine

    try:
        torch.empty(0, device=device)  # before weights are read for minutes
        return EveEngine.from_pretrained(
            model,
            device=device,
            dtype=None if dtype is None else getattr(torch, dtype.value),
            attn_implementation=(attention or Attention.sdpa).value,
            quantize=None if quantize is None else quantize.value,
            static_cache=static_cache or compile_steps,
            compile_steps=compile_steps,
            **settings,
        )
    except (RuntimeError, AssertionError, ImportError) as error:
        others = ", --attention or --quantize" if attention else ""
        raise ValueError(
            f"{model} cannot be loaded so ({first_line(error)}); choose another --device"
            f"{', --dtype' if attention else ' or --dtype'}{others}."
        ) from None


def public_name(model: str) -> str:
    """A Hub id as it is; of a folder only its name, because the place is nobody's business."""
    folder = Path(model).expanduser()
    return folder.resolve().name if folder.exists() else model


def show(text: str, *, end: str = "\n", err: bool = False) -> None:
    """Prints; letters that the terminal has no place for are shown as what they are."""
    stream = sys.stderr if err else sys.stdout
    if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
        stream.reconfigure(errors="backslashreplace")
    if stream.isatty():
        text = re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", "\N{REPLACEMENT CHARACTER}", text)
    print(text, end=end, file=stream, flush=True)  # typer.echo would leave out what ESC begins


__all__ = [
    "STOPPED",
    "Attention",
    "AttentionKind",
    "CompileSteps",
    "Device",
    "MaxImageTokens",
    "MaxNewTokens",
    "ModelName",
    "NumberType",
    "Quantize",
    "Seed",
    "StaticCache",
    "Stop",
    "System",
    "Temperature",
    "TopK",
    "TopP",
    "open_engine",
    "public_name",
    "show",
]
