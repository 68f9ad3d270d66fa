"""Loss curves of a run beside a reference: what several seeds of the same recipe did, or one run.

A difference is counted in spreads: how far one more run lies from the reference by chance.  Easy to
get wrong: neighbouring entries of a curve are not independent, so single entries say little; a
curve is judged by fifths of its length, each by its mean difference.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

from eve_vlm.train.recipe import recipes_folder
from eve_vlm.train.strict_yaml import read_mapping

CURVES_FILE = "curves.json"
NEIGHBOURS = 5  # entries on each side that the spread of one is taken from
LIMIT = 3.0  # spreads; by chance a run of the same recipe is within
# A spread that two or three runs give is a rough one: Student's t, 95 of 100, for 1 and 2 degrees
# of freedom.  (With 3 the limit was passed by one of the recorded seeds beside the two others.)
ROUGH_LIMITS = {2: 12.7, 3: 4.3}
PARTS = 5
ROUNDING = 1e-4  # curves are recorded to four digits, so no spread is smaller


@dataclass(frozen=True, kw_only=True, slots=True)
class Curve:
    """What a run logged."""

    name: str
    """Name of its recipe, or where it was found."""
    steps: list[int]
    """Steps that were logged."""
    terms: dict[str, list[float]]
    """`loss` and every `loss_TERM` that each entry of the log has, one value for each step."""
    max_steps: int
    """Steps that the run has, or will have, in all; its learning rates depend on it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Reference:
    """What is expected."""

    name: str
    """What it is, in words."""
    steps: list[int]
    """Steps that were logged."""
    means: dict[str, list[float]]
    """Mean of the runs, by term."""
    spreads: dict[str, list[float]]
    """How far one more run lies from the mean by chance, by term; a standard deviation."""
    limit: float = LIMIT
    """Spreads that a run may lie away; more where few runs gave the spread."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One step of one term."""

    step: int
    yours: float
    reference: float
    difference: float
    """Yours less the reference, in spreads."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """How a curve lies to the reference."""

    verdict: Literal["within", "above", "below"]
    """Where it lies; the fifth of a term that is farthest away decides."""
    term: str
    """The term that lies farthest away."""
    first: int
    """First step of the fifth that lies farthest away."""
    last: int
    """Its last step."""
    spreads: float
    """Mean difference there, in spreads."""
    rows: dict[str, list[Row]]
    """Every step that both have, by term."""


def read_run(folder: str | Path) -> Curve:
    """The curve of a run, finished (`run.json`) or not (its last checkpoint).

    Raises:
        ValueError: if the folder holds no run, or nothing was logged yet.
    """
    folder = Path(folder)
    recipe, result = folder / "recipe.resolved.yaml", folder / "run.json"
    if not recipe.is_file():
        raise ValueError(
            f"{folder} holds no run; name the output_dir of a recipe that was trained, or one "
            "stage of a quickstart."
        )
    checkpoints = sorted(
        folder.glob("checkpoint-*/trainer_state.json"),
        key=lambda file: int(file.parent.name.split("-")[1]),
    )
    if result.is_file():
        state = json.loads(result.read_text(encoding="utf-8"))
        entries, max_steps = state["losses"], state["steps"]
    elif checkpoints:
        state = json.loads(checkpoints[-1].read_text(encoding="utf-8"))
        entries, max_steps = state["log_history"], state["max_steps"]
    else:
        raise ValueError(
            f"{folder} holds neither a finished run nor a checkpoint yet; set "
            "training.save_strategy and save_steps, or wait for its end."
        )
    logged = [entry for entry in entries if "loss" in entry]
    if not logged:
        raise ValueError(f"{folder} has logged no loss yet; lower training.logging_steps.")
    return Curve(
        name=str(read_mapping(recipe)["name"]),
        steps=[entry["step"] for entry in logged],
        terms=loss_terms(logged),
        max_steps=max_steps,
    )


def loss_terms(entries: Sequence[dict[str, Any]]) -> dict[str, list[float]]:
    """`loss` and its terms from the entries of a log; those of single data sets are left out."""
    names = [
        name
        for name in entries[0]
        if (name == "loss" or name.startswith("loss_")) and not name.startswith("loss_of/")
    ]
    return {
        name: [entry[name] for entry in entries]
        for name in names
        if all(name in entry for entry in entries)
    }


def shipped_reference(name: str) -> Reference:
    """The recorded curves of the shipped recipe that is called `name`.

    Raises:
        ValueError: if there are none.
    """
    known: dict[str, dict[str, Any]] = {}
    for file in sorted(recipes_folder().rglob(CURVES_FILE)):
        known |= json.loads(file.read_text(encoding="utf-8"))["recipes"]
    if name not in known:
        raise ValueError(
            f"No reference is recorded for the recipe {name!r}, only for {', '.join(known)}; "
            "compare with another run of yours by --with RUN."
        )
    runs = known[name]["runs"]
    seeds = ", ".join(str(run["seed"]) for run in runs)
    several = f"seeds {seeds}" if len(runs) > 1 else f"seed {seeds} alone: spread is its own noise"
    return reference(
        f"recorded ({several})",
        known[name]["steps"],
        [run["terms"] for run in runs],
    )


def reference(name: str, steps: Sequence[int], runs: Sequence[dict[str, list[float]]]) -> Reference:
    """What to expect from one more run like these.

    The variance at a step is the mean of those at the 11 steps around it, across runs; with one run
    alone, that of its noise from entry to entry, which knows nothing of other seeds.
    """
    means, spreads = {}, {}
    for term in runs[0]:
        curves = [run[term] for run in runs]
        means[term] = [sum(values) / len(runs) for values in zip(*curves, strict=True)]
        variances = _across(curves, means[term]) if len(runs) > 1 else _along(curves[0])
        # One more run differs by its own chance and by that of the mean.
        more = 1 + 1 / len(runs)
        spreads[term] = [
            max(math.sqrt(more * variance), ROUNDING) for variance in _smooth(variances)
        ]
    return Reference(
        name=name,
        steps=list(steps),
        means=means,
        spreads=spreads,
        limit=ROUGH_LIMITS.get(len(runs), LIMIT),
    )


def compare(curve: Curve, expected: Reference) -> Comparison:
    """Every common step, and the verdict.

    Raises:
        ValueError: if the two have no step in common.
    """
    place = {step: index for index, step in enumerate(expected.steps)}
    common = [(number, place[step]) for number, step in enumerate(curve.steps) if step in place]
    if not common:
        raise ValueError(
            f"The run logged steps {_some(curve.steps)} but the reference {_some(expected.steps)}; "
            "set training.logging_steps so that they meet."
        )
    rows = {}
    for term in curve.terms:
        if term not in expected.means:
            continue
        rows[term] = [
            Row(
                step=curve.steps[mine],
                yours=curve.terms[term][mine],
                reference=expected.means[term][theirs],
                difference=(curve.terms[term][mine] - expected.means[term][theirs])
                / expected.spreads[term][theirs],
            )
            for mine, theirs in common
        ]
    parts = [
        (sum(row.difference for row in part) / len(part), term, part)
        for term, found in rows.items()
        for part in _parts(found, len(expected.steps))
    ]
    # A value that is no number is farther away than any that is.
    mean, term, part = max(parts, key=lambda item: math.inf if item[0] != item[0] else abs(item[0]))
    beside: Literal["above", "below"] = "below" if mean < 0 else "above"
    return Comparison(
        verdict="within" if abs(mean) <= expected.limit else beside,
        term=term,
        first=part[0].step,
        last=part[-1].step,
        spreads=mean,
        rows=rows,
    )


def _parts(rows: Sequence[Row], total: int) -> list[Sequence[Row]]:
    """Fifths of the reference's length, as far as the run has come."""
    size = max(math.ceil(total / PARTS), 1)
    return [rows[first : first + size] for first in range(0, len(rows), size)]


def _across(curves: Sequence[list[float]], means: list[float]) -> list[float]:
    """Variance between runs at every step."""
    return [
        sum((value - mean) ** 2 for value in values) / (len(curves) - 1)
        for values, mean in zip(zip(*curves, strict=True), means, strict=True)
    ]


def _along(curve: list[float]) -> list[float]:
    """Variance of the noise at every step: half the square of the difference to the next entry."""
    steps = [(after - before) ** 2 / 2 for before, after in pairwise(curve)]
    return [*steps, steps[-1]] if steps else [0.0]


def _smooth(values: list[float]) -> list[float]:
    """Means over each value and its neighbours."""
    around = [values[max(i - NEIGHBOURS, 0) : i + NEIGHBOURS + 1] for i in range(len(values))]
    return [sum(some) / len(some) for some in around]


def _some(steps: Sequence[int]) -> str:
    return ", ".join(map(str, steps[:3])) + (", ..." if len(steps) > 3 else "")


__all__ = [
    "CURVES_FILE",
    "LIMIT",
    "ROUGH_LIMITS",
    "Comparison",
    "Curve",
    "Reference",
    "Row",
    "compare",
    "loss_terms",
    "read_run",
    "reference",
    "shipped_reference",
]
