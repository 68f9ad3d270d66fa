"""The commands that score models: `eve eval MODEL`, `eve eval compare`, `tasks` and `report`.

What does the work is `eve_vlm.eval`, imported inside.  `eve eval MODEL ...` is short for
`eve eval run MODEL ...`.  Easy to get wrong: with several processes each runs this same command, so
only the first may print, and all must agree on tasks and folders.
"""

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from .answering import (
    Attention,
    AttentionKind,
    CompileSteps,
    Device,
    NumberType,
    Quantize,
    StaticCache,
    public_name,
)
from .data import in_columns
from .default import default_model
from .options import Dtype, FewerBits

if TYPE_CHECKING:
    from collections.abc import Callable

    from eve_vlm.eval.comparing import TaskComparison
    from eve_vlm.eval.other_models import TransformersEngine
    from eve_vlm.serve.engine import EveEngine

RUN = "run"
SHOWN_LETTERS = 70


class RunByDefault(TyperGroup):
    """A group whose command `run` need not be written."""

    def parse_args(self, ctx: typer.Context, args: list[str]) -> list[str]:  # type: ignore[override]
        """Puts `run` in front of what is no command."""
        if args and args[0] not in self.commands and args[0] != "--help":
            args = [RUN, *args]
        return super().parse_args(ctx, args)


eval_app = typer.Typer(
    cls=RunByDefault,
    help="Score models: `eve eval MODEL` (short for `eve eval run MODEL`), and compare results.",
    no_args_is_help=True,
    add_completion=False,
)

TaskNames = Annotated[
    str,
    typer.Option("--tasks", help="Tasks or sets of them (paper, others, offline), with commas."),
]
Limit = Annotated[
    int | None, typer.Option(help="Samples of each task at most, always the same ones.", min=1)
]
Split = Annotated[
    list[str] | None,
    typer.Option(metavar="TASK=SPLIT", help="Another split than the preset's; repeatable."),
]
JudgeUrl = Annotated[
    str | None, typer.Option(help="OpenAI-compatible endpoint of the judge; OPENAI_BASE_URL.")
]
JudgeModel = Annotated[
    str | None, typer.Option(help="The judge's model; its key is taken from OPENAI_API_KEY.")
]
DataRoot = Annotated[
    Path | None,
    typer.Option(help="Folder with data sets, one folder for each Hub id (lmms-lab/POPE ...)."),
]


@eval_app.command(name=RUN)
def run(
    models: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[NAME=]MODEL",
            help="Model folders or Hub ids, EVE or any image-text-to-text model of transformers; "
            "eve-small if none is given.",
        ),
    ] = None,
    tasks: TaskNames = "offline",
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder of the results, a folder for each model.")
    ] = Path("runs/eval"),
    limit: Limit = None,
    batch_size: Annotated[int, typer.Option(help="Questions answered together.", min=1)] = 16,
    blind: Annotated[
        bool, typer.Option("--blind", help="Ask every model again without the pictures.")
    ] = False,
    majority: Annotated[
        bool, typer.Option("--majority", help="Score the most frequent answer of each task too.")
    ] = False,
    preset: Annotated[
        str, typer.Option(help="Prompts and decoding of the public benchmarks.")
    ] = "published@1",
    split: Split = None,
    data_root: DataRoot = None,
    judge_url: JudgeUrl = None,
    judge_model: JudgeModel = None,
    max_image_tokens: Annotated[
        int | None, typer.Option(help="Most tokens for each picture (EVE only).", min=1)
    ] = None,
    device: Device = None,
    dtype: NumberType = None,
    attention: AttentionKind = Attention.sdpa,
    quantize: Quantize = None,
    static_cache: StaticCache = False,
    compile_steps: CompileSteps = False,
) -> None:
    """Score models on tasks; goes on where the same run was stopped.

    eve eval runs/quickstart --tasks counting,presence --blind --majority

    Writes OUTPUT/MODEL/results.json, a line for each sample beside it, and OUTPUT/report.html.
    """
    from eve_vlm.eval.benchmarks.judge import judge_or_none
    from eve_vlm.eval.page import PAGE
    from eve_vlm.eval.programme import run_evaluation
    from eve_vlm.eval.registry import TaskOptions
    from eve_vlm.eval.runner import RunSettings
    from eve_vlm.eval.tables import notes, score_table

    results = run_evaluation(
        _named(models or [default_model()]),
        tasks.split(","),
        output,
        open_model=_opener(
            device,
            dtype,
            attention,
            quantize,
            batch_size=batch_size,
            static_cache=static_cache or compile_steps,
            compile_steps=compile_steps,
        ),
        options=TaskOptions(
            data_root=data_root,
            preset=preset,
            judge=judge_or_none(base_url=judge_url, model=judge_model),
            splits=_pairs(split or []),
        ),
        settings=RunSettings(limit=limit, batch_size=batch_size, max_image_tokens=max_image_tokens),
        blind=blind,
        majority=majority,
    )
    if results:  # in the first process
        typer.echo(in_columns(score_table(results), left=2))
        for note in notes(results):
            typer.echo(note)
        typer.echo(f"{output / PAGE} shows all of it; open it in a browser.")


@eval_app.command()
def compare(
    first: Annotated[Path, typer.Argument(help="Folder of a model's results.")],
    second: Annotated[Path, typer.Argument(help="Folder of another's, or of another run.")],
    show: Annotated[
        int, typer.Option(help="Samples of each task to show whose points changed.", min=0)
    ] = 5,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Compare two results sample by sample, with a paired test.

    eve eval compare runs/eval/before runs/eval/after

    p is the chance of such a difference if the two were alike (random swaps of paired units).
    """
    from eve_vlm.eval.comparing import compare_results

    compared, why = compare_results(first, second)
    if as_json:
        found = [
            one._asdict() | {"changed": [c._asdict() for c in one.changed]} for one in compared
        ]
        found = [one | {"test": one["test"]._asdict()} for one in found]
        typer.echo(json.dumps({"tasks": found, "not_compared": why}, ensure_ascii=False))
        return
    typer.echo(_comparison_table(compared))
    for one in compared:
        for change in one.changed[:show]:
            sign = "+" if change.gained else "-"
            typer.echo(f"\n{sign} {one.task} {change.id}: {_short(change.prompt)}")
            typer.echo(f"    expected {_short(' | '.join(change.expected))}")
            typer.echo(f"    first    {_short(change.first)}")
            typer.echo(f"    second   {_short(change.second)}")
    for line in why:
        typer.echo(f"Not compared: {line}")


@eval_app.command()
def tasks() -> None:
    """List all tasks, what is asked, the score that stands for each, and the sets."""
    from eve_vlm.eval.registry import SETS, TASKS, build_task

    table = [["task", "score", "judge", "what"]]
    for name in TASKS:
        task = build_task(name)
        table.append([name, task.metric, "yes" if task.needs_judge else "", task.title])
    typer.echo(in_columns(table, left=2))
    for name, members in SETS.items():
        typer.echo(f"{name}: {', '.join(members)}")


@eval_app.command()
def perplexity(
    model: Annotated[str, typer.Argument(help="An EVE model folder or Hub id.")],
    beside: Annotated[
        str, typer.Option(help="What it was before: a folder that `eve init` made, for example.")
    ],
    texts: Annotated[
        Path | None,
        typer.Option(help="Conversations (JSON Lines, kind `messages`) instead of the shipped."),
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Texts scored together.", min=1)] = 16,
    device: Device = None,
    dtype: NumberType = None,
    attention: AttentionKind = Attention.sdpa,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Measure whether a model still talks as its decoder did: perplexity of texts, beside another.

    eve eval perplexity runs/eve-small/finetune-merged --beside runs/eve-small/base
    """
    import torch

    from eve_vlm.eval.perplexity import plain_english, read_talks, text_perplexity
    from eve_vlm.serve.engine import EveEngine

    talks = plain_english() if texts is None else read_talks(texts)
    engines = [
        EveEngine.from_pretrained(
            one,
            device=device,
            dtype=None if dtype is None else getattr(torch, dtype.value),
            attn_implementation=attention.value,
            batch_size=batch_size,
        )
        for one in (model, beside)
    ]
    found = text_perplexity(engines[0], engines[1], talks)
    if as_json:
        named = {name: asdict(getattr(found, name)) for name in ("model", "base", "worse")}
        typer.echo(json.dumps(named | {"tokens": found.tokens, "texts": len(talks)}))
        return
    for name, one, unit in (
        (model, found.model, ""),
        (beside, found.base, ""),
        ("worse by", found.worse, " %"),
    ):
        typer.echo(f"{name}  {one.value:.2f}{unit}  [{one.low:.2f}, {one.high:.2f}]")
    typer.echo(f"{found.tokens:,} tokens of {len(talks):,} answers; 95 % intervals over answers.")


@eval_app.command()
def report(
    output: Annotated[Path, typer.Argument(help="Folder of a run, with a folder for each model.")],
) -> None:
    """Draw report.html again from the results in a folder.

    eve eval report runs/eval
    """
    from eve_vlm.eval.page import write_page

    typer.echo(f"{write_page(output)} is written; open it in a browser.")


def _opener(
    device: str | None,
    dtype: Dtype | None,
    attention: Attention,
    quantize: FewerBits | None,
    **settings: Any,
) -> "Callable[[str], EveEngine | TransformersEngine]":
    """What loads a model as the options say; of several processes each on its own device.

    Args:
        settings: of the engine.
    """
    import torch

    from eve_vlm.eval.other_models import open_answerer

    if device is None and torch.cuda.is_available():
        device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
    return lambda model: open_answerer(
        model,
        device=device,
        dtype=None if dtype is None else getattr(torch, dtype.value),
        attn_implementation=attention.value,
        quantize=None if quantize is None else quantize.value,
        **settings,
    )


def _named(models: list[str]) -> dict[str, str]:
    """{name: model}; two folders of one name are told apart by `NAME=MODEL`."""
    named: dict[str, str] = {}
    for given in models:
        name, mark, model = given.partition("=")
        # A folder by the name it was called by, links included: results lie under that name.
        called = Path(given).expanduser()
        short = called.name if called.exists() and called.name else public_name(given)
        name, model = (name, model) if mark else (short, given)
        if name in named:
            raise ValueError(f"Two models are called {name}; write NAME={model} for one of them.")
        named[name] = model
    return named


def _pairs(given: list[str]) -> dict[str, str]:
    bad = [one for one in given if "=" not in one]
    if bad:
        raise ValueError(f"--split {bad[0]} is not of the form TASK=SPLIT.")
    return dict(one.split("=", 1) for one in given)


def _comparison_table(compared: "list[TaskComparison]") -> str:

    table = [["task", "score", "samples", "first", "second", "difference", "p", "better", "worse"]]
    for one in compared:
        test, better = one.test, sum(change.gained for change in one.changed)
        table.append(
            [
                one.task,
                one.metric,
                f"{one.samples:,}",
                f"{one.first:.1f}",
                f"{one.second:.1f}",
                f"{test.difference:+.1f}"
                + ("" if test.low is None else f" [{test.low:+.1f}, {test.high:+.1f}]"),
                f"{test.p:.4f}",
                str(better),
                str(len(one.changed) - better),
            ]
        )
    return in_columns(table, left=2)


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= SHOWN_LETTERS else line[: SHOWN_LETTERS - 3] + "..."


__all__ = ["eval_app"]
