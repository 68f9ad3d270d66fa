"""The command about the paper's claims: `eve reproduce` trains small variants and judges them.

Here are the options and what is printed; `eve_vlm.reproduce` does the work and is imported inside.
Easy to get wrong: what is kept (results, a small file for each run) and what may be deleted (models
of all stages) are in two folders.
"""

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from eve_vlm.reproduce.claims import Claim


class Where(StrEnum):
    """Devices of the processes."""

    cpu = "cpu"
    cuda = "cuda"


def reproduce(
    claim: Annotated[
        str,
        typer.Argument(
            help="prealign, alignment, tap_interval, attention, encoder, any_ratio, "
            "high_resolution, several of them with commas, or all."
        ),
    ],
    seeds: Annotated[str, typer.Option(help="Seeds, with commas.")] = "0,1,2",
    scale: Annotated[
        float, typer.Option(min=0.0001, help="Share of the steps of the recipes in recipes/tiny.")
    ] = 1.0,
    questions: Annotated[
        int, typer.Option(min=2, help="Held-out questions of each of six families.")
    ] = 200,
    workers: Annotated[
        int, typer.Option(min=1, help="Processes side by side, each with one thread.")
    ] = 1,
    device: Annotated[Where, typer.Option(help="cpu or cuda.")] = Where.cpu,
    minutes: Annotated[
        float | None,
        typer.Option(help="Stop after so many minutes; the same command goes on from there."),
    ] = None,
    commit: Annotated[
        str | None,
        typer.Option(help="Noted in the results where git cannot be asked.", show_default="git's"),
    ] = None,
    work: Annotated[Path, typer.Option(help="Folder for models and logs.")] = Path(
        "runs/reproduce"
    ),
    results: Annotated[
        Path | None,
        typer.Option(help="Folder for results and report.", show_default="WORK/results"),
    ] = None,
    report_only: Annotated[
        bool, typer.Option("--report-only", help="Train nothing; write the report again.")
    ] = False,
) -> None:
    """Test a claim of the paper on small models, with several seeds.

    eve reproduce prealign --workers 2

    Finished runs are kept, and the report is written from their results alone.
    """
    from eve_vlm.reproduce.claims import CLAIMS
    from eve_vlm.reproduce.page import write_report
    from eve_vlm.reproduce.scheduling import Limits, run_all
    from eve_vlm.reproduce.variants import runs_of

    chosen = _chosen(claim, CLAIMS)
    results = results or work / "results"
    if not report_only:
        runs = runs_of(
            list(dict.fromkeys(name for one in chosen for name in one.variants)),
            _numbers(seeds),
            work=work.absolute(),
            scale=scale,
            questions=questions,
        )
        outcome = run_all(
            runs,
            results.absolute(),
            logs=work.absolute() / "logs",
            limits=Limits(workers=workers, minutes=minutes, device=device.value, commit=commit),
            say=lambda text: typer.echo(text, err=True),
        )
        for name, log in outcome.failed.items():
            typer.echo(f"failed: {name}; see {log}", err=True)
        typer.echo(f"{len(outcome.done)} of {len(runs)} runs have results.", err=True)
        if not outcome.done:
            raise typer.Exit(1 if outcome.failed else 0)
    text, files = write_report(chosen, results)
    typer.echo(text)
    typer.echo(f"Written: {', '.join(map(str, files))}.", err=True)
    if not report_only and outcome.failed:
        raise typer.Exit(1)


def _chosen(text: str, claims: "dict[str, Claim]") -> "list[Claim]":
    """Claims by name.

    Raises:
        ValueError: if there is no such claim.
    """
    names = list(claims) if text == "all" else [part.strip() for part in text.split(",")]
    for name in names:
        if name not in claims:
            raise ValueError(f"{name} is no claim; name one of {', '.join(claims)}, or all.")
    return [claims[name] for name in names]


def _numbers(text: str) -> list[int]:
    """Seeds with commas between them.

    Raises:
        ValueError: if it is something else.
    """
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdigit() for part in parts):
        raise ValueError(f"--seeds {text} is no list of numbers; write it as in --seeds 0,1,2.")
    return list(dict.fromkeys(map(int, parts)))


__all__ = ["reproduce"]
