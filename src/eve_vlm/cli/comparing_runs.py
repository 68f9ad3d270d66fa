"""The command that lays a run's losses over a reference: `eve compare-run`.

The comparison is in `train/curves.py`; here it is drawn as a table, a line of blocks and a picture.
Easy to get wrong: exit code 1 says that the run lies outside, below counts too (labels that leak
make a loss low), and 2 that there was nothing to compare.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from eve_vlm.train.curves import Comparison, Curve, Reference

ROWS = 10  # of the table for each term
BLOCKS = "▁▂▃▄▅▆▇█"
COLUMNS = 60  # of a line of blocks
LABEL = 27  # columns of what stands before it


def compare_run(
    run: Annotated[Path, typer.Argument(help="Output folder of a run, finished or not.")],
    other: Annotated[
        Path | None,
        typer.Option("--with", metavar="RUN", help="Compare with this run, not the recorded ones."),
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option(help="Where to draw both; curves.png in the run's folder by default."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Lay a run's losses over those recorded for its recipe, or over another run's.

    eve compare-run runs/quickstart/prealign

    Exit code 0 when every fifth of every term lies within its limit, 1 when one does not.
    """
    from eve_vlm.train.curves import compare, read_run, reference, shipped_reference

    curve = read_run(run)
    if other is None:
        expected = shipped_reference(curve.name)
    else:
        second = read_run(other)
        expected = reference(f"{other} ({second.name})", second.steps, [second.terms])
    found = compare(curve, expected)
    drawn = _picture(curve, expected, found, plot or run / "curves.png", asked=plot is not None)
    if as_json:
        result = {"run": str(run), "reference": expected.name, **asdict(found)}
        typer.echo(json.dumps(result))
    else:
        typer.echo(_text(curve, expected, found))
        if drawn is not None:
            typer.echo(f"Both curves are drawn in {drawn}.")
    raise typer.Exit(0 if found.verdict == "within" else 1)


def _text(curve: "Curve", expected: "Reference", found: "Comparison") -> str:
    """The table, both curves in one line each, and the verdict."""
    lines = [f"{curve.name}, beside: {expected.name}; differences in spreads", ""]
    table = [("term", "step", "yours", "reference", "difference")]
    for term, rows in _shown(found).items():
        every = max(math.ceil(len(rows) / ROWS), 1)
        # From the end, so that the last step is always there.
        for row in rows[::-1][::every][::-1]:
            numbers = (f"{row.yours:.4f}", f"{row.reference:.4f}", f"{row.difference:+.1f}")
            table.append((term, str(row.step), *numbers))
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for cells in table:
        padded = [cell.rjust(width) for cell, width in zip(cells[1:], widths[1:], strict=True)]
        lines.append("  ".join([cells[0].ljust(widths[0]), *padded]))
    lines.append("")
    for term, rows in _shown(found).items():
        yours, theirs = [row.yours for row in rows], [row.reference for row in rows]
        both = [value for value in yours + theirs if math.isfinite(value) and value > 0]
        for whose, values in (("yours", yours), ("reference", theirs)):
            lines.append(f"{term}, {whose}".ljust(LABEL) + _blocks(values, both))
    return "\n".join([*lines, "", *_notes(curve, expected), _verdict(found)])


def _shown(found: "Comparison") -> "dict":
    """The terms worth a place: a single term is the loss itself."""
    return {"loss": found.rows["loss"]} if len(found.rows) == 2 else found.rows


def _notes(curve: "Curve", expected: "Reference") -> list[str]:
    notes = []
    if curve.steps[-1] < expected.steps[-1]:
        notes.append(f"The run has come to step {curve.steps[-1]} of {curve.max_steps}.")
    if curve.max_steps != expected.steps[-1]:
        notes.append(
            f"The run has {curve.max_steps} steps but the reference {expected.steps[-1]}, so their "
            "learning rates differ."
        )
    return notes


def _verdict(found: "Comparison") -> str:
    farthest = (
        f"{found.term} is {abs(found.spreads):.1f} spreads "
        f"{'below' if found.spreads < 0 else 'above'} in steps {found.first} to {found.last}"
    )
    if found.verdict == "within":
        return f"within: at the most, {farthest}."
    return f"{found.verdict}: {farthest}."


def _blocks(values: Sequence[float], both: Sequence[float]) -> str:
    """A line of blocks, by the logarithm, on the scale of both curves."""
    low, high = (math.log(min(both)), math.log(max(both))) if both else (0.0, 0.0)
    line = ""
    for index in range(min(COLUMNS, len(values))):
        value = values[index * len(values) // min(COLUMNS, len(values))]
        if not math.isfinite(value) or value <= 0:
            line += "?"
            continue
        place = (math.log(value) - low) / (high - low) if high > low else 0.0
        line += BLOCKS[min(int(place * len(BLOCKS)), len(BLOCKS) - 1)]
    return line


def _picture(
    curve: "Curve", expected: "Reference", found: "Comparison", file: Path, *, asked: bool
) -> Path | None:
    """Draws every term, the reference with a band of one spread; None without matplotlib."""
    if find_spec("matplotlib") is None:
        if asked:
            raise ValueError("--plot needs matplotlib; run: pip install 'eve-vlm[demo]'.")
        return None
    from matplotlib.figure import Figure  # no pyplot: no window system is touched

    terms = list(_shown(found))
    figure = Figure(figsize=(4.4 * len(terms), 3.2), layout="constrained")
    for place, term in enumerate(terms, start=1):
        axes = figure.add_subplot(1, len(terms), place)
        means, spreads = expected.means[term], expected.spreads[term]
        pairs = list(zip(means, spreads, strict=True))
        axes.fill_between(
            expected.steps,
            [mean - spread for mean, spread in pairs],
            [mean + spread for mean, spread in pairs],
            alpha=0.3,
            linewidth=0,
        )
        axes.plot(expected.steps, means, label="reference, one spread")
        axes.plot(curve.steps, curve.terms[term], label="yours")
        axes.set_title(term)
        axes.set_xlabel("step")
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
    figure.savefig(file, dpi=110)
    return file


__all__ = ["compare_run"]
