"""The command about speed: `eve bench` measures answering and training beside what limits them.

Here are the options and what is printed; `eve_vlm.bench` does the work and is imported inside. Easy
to get wrong: the last line on standard output is one JSON object, so progress goes to standard
error.
"""

import json
import time
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .answering import CompileSteps, Device, StaticCache
from .options import Dtype

if TYPE_CHECKING:
    from eve_vlm.bench.programme import Settings
    from eve_vlm.bench.subjects import Subject

REPEATS, QUICK_REPEATS = 5, 2
NEW_TOKENS, QUICK_TOKENS = 16, 4
BATCHES, QUICK_BATCHES = (1, 4, 8, 32), (1, 4)
PAPER_SECTIONS = ("preprocessing", "embedding", "prefill")
PAPER_OUTPUT = Path("runs/bench")


class Table(StrEnum):
    """Tables that can be printed beside the figures."""

    paper = "paper"


def bench(
    model: Annotated[
        str | None, typer.Argument(help="A model folder; random weights of --shape without it.")
    ] = None,
    shape: Annotated[
        str | None,
        typer.Option(
            help="Random weights shaped like small (SmolLM2-135M's decoder), eve-7b, tiny, or like "
            "the model in a folder; small by default.",
            show_default=False,
        ),
    ] = None,
    device: Device = None,
    dtype: Annotated[
        Dtype | None, typer.Option(help="Type of numbers: float32 on a CPU, else bfloat16.")
    ] = None,
    longest_edge: Annotated[
        str | None,
        typer.Option(help="Longer sides of pictures in pixels, with commas: 672,1344."),
    ] = None,
    batch: Annotated[
        str | None, typer.Option(help="Questions at once, with commas: 1,4,8,32.")
    ] = None,
    only: Annotated[
        str | None,
        typer.Option(
            help="Parts, with commas: preprocessing, embedding, prefill, decode, training, growth."
        ),
    ] = None,
    repeats: Annotated[
        int | None, typer.Option(min=1, help="Rounds that count; 5 by default.")
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Fewer cases and rounds, to see that all works.")
    ] = False,
    static_cache: StaticCache = False,
    compile_steps: CompileSteps = False,
    table: Annotated[
        Table | None,
        typer.Option(help="Print the published table of costs beside formulas and times here."),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Folder for bench.json and bench.html."),
    ] = None,
) -> None:
    """Measure answering and training beside their floors and an encoder-based model.

    eve bench --shape small --longest-edge 672 --batch 1,4 --output runs/bench

    The last line is one JSON object with everything.
    """
    from eve_vlm.bench.page import write_results
    from eve_vlm.bench.programme import SECTIONS, Settings

    if table and only:
        raise ValueError("--table paper measures what its columns need; leave --only out.")
    steps = {"static_cache": static_cache, "compile_steps": compile_steps}
    subject = _subject(model, shape, device, dtype, **steps)
    edges = _numbers(longest_edge, "--longest-edge") or subject.edges
    settings = Settings(
        edges=edges[:1] if quick and not longest_edge and not table else edges,
        batches=_numbers(batch, "--batch") or (QUICK_BATCHES if quick else BATCHES),
        sections=PAPER_SECTIONS if table else tuple(only.split(",")) if only else SECTIONS,
        repeats=repeats or (QUICK_REPEATS if quick else REPEATS),
        new_tokens=QUICK_TOKENS if quick else NEW_TOKENS,
        quick=quick,
        paper=table is not None,
    )
    data = _measured(subject, settings)
    if output is None and table:
        output = PAPER_OUTPUT
    if output is not None:
        typer.echo(f"\nWritten: {', '.join(map(str, write_results(data, output)))}.")
    typer.echo(json.dumps(data, separators=(",", ":")))


def _subject(
    model: str | None,
    shape: str | None,
    device: str | None,
    dtype: Dtype | None,
    **steps: bool,
) -> "Subject":
    """What is measured, and where.

    Raises:
        ValueError: if both or no such thing is named.
    """
    import torch

    from eve_vlm.bench.subjects import SHAPES, Subject

    if model is not None and shape is not None:
        raise ValueError("A model has a shape of its own; give MODEL or --shape, not both.")
    if shape is not None and shape not in SHAPES and not Path(shape).exists():
        raise ValueError(
            f"--shape {shape} is neither a folder nor one of {', '.join(SHAPES)}; name one of them."
        )
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    numbers = dtype.value if dtype else "float32" if place.type == "cpu" else "bfloat16"
    return Subject(
        shape or "small",
        model=model,
        device=place,
        dtype=getattr(torch, numbers),
        **steps,
    )


def _measured(subject: "Subject", settings: "Settings") -> dict[str, Any]:
    """Runs the benchmark and prints its tables."""
    from tqdm.auto import tqdm

    from eve_vlm.bench.page import growth_table, in_columns, roof_line, table_of
    from eve_vlm.bench.paper_table import paper_lines
    from eve_vlm.bench.programme import run_bench

    started, said = time.perf_counter(), set[str]()
    with tqdm(desc="bench", bar_format="{desc}  {elapsed}", disable=None, leave=False) as bar:

        def say(text: str) -> None:
            """On a terminal in one line that changes; in a file a line when a case comes first."""
            bar.set_description_str(text)
            if bar.disable and text not in said:
                said.add(text)
                typer.echo(f"{time.perf_counter() - started:.0f} s  {text}", err=True)

        data = run_bench(subject, settings, say=say)
    typer.echo(roof_line(data))
    typer.echo("\n" + in_columns(table_of(data), left=4))
    if data["growth"]:
        typer.echo("\n" + in_columns(growth_table(data), left=2))
    if "paper" in data:
        typer.echo("\n" + in_columns(paper_lines(data["paper"], subject.name), left=1))
    return data


def _numbers(text: str | None, option: str) -> tuple[int, ...]:
    """Numbers with commas between them; none of no text.

    Raises:
        ValueError: if it is something else.
    """
    if text is None:
        return ()
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdigit() and int(part) for part in parts):
        raise ValueError(f"{option} {text} is no list of numbers; write it as in {option} 4,8.")
    return tuple(dict.fromkeys(map(int, parts)))


__all__ = ["bench"]
