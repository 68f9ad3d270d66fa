"""Two results laid beside each other, sample by sample, with a paired test.

Two models that answer the same questions differ by less than two intervals suggest, because both
find the same questions hard; so units are paired.  Easy to get wrong: rows may be compared only if
they answer the same samples of the same version under the same prompts.
"""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from .registry import build_task
from .results import UNFINISHED, read_results, read_rows
from .statistics import Paired, paired_test
from .task import Row, Task


class Changed(NamedTuple):
    """One sample that the two answered with different marks."""

    id: str
    prompt: str
    expected: tuple[str, ...]
    first: str
    second: str
    gained: bool
    """Whether the second one is right where the first is wrong."""


class TaskComparison(NamedTuple):
    """One task of two results."""

    task: str
    metric: str
    samples: int
    first: float
    second: float
    test: Paired
    """Of second minus first."""
    changed: list[Changed]


def compare_results(first: Path, second: Path) -> tuple[list[TaskComparison], list[str]]:
    """Compares all tasks that both hold; and says of the others why they cannot be compared.

    Raises:
        ValueError: if a folder holds no results, or nothing can be compared.
    """
    one, two = read_results(first), read_results(second)
    compared, why = [], []
    for name in dict.fromkeys([*one["tasks"], *two["tasks"]]):
        reason = _reason(name, one["tasks"].get(name), two["tasks"].get(name), (first, second))
        if not reason:
            rows = read_rows(_folder(first), name), read_rows(_folder(second), name)
            if [row.id for row in rows[0]] == [row.id for row in rows[1]]:
                compared.append(_compare(build_task(name), *rows))
                continue
            counts = f"{len(rows[0])} and {len(rows[1])}"
            reason = f"{name} has {counts} samples that are not the same."
        why.append(reason)
    if not compared:
        raise ValueError(f"Nothing can be compared: {' '.join(why) or 'no task was run.'}")
    return compared, why


def _compare(task: Task, first: list[Row], second: list[Row]) -> TaskComparison:
    test = paired_test(task.units(first), task.units(second), task.scores, task.metric)
    changed = []
    for before, after in zip(first, second, strict=True):
        points = [points_of(task, row) for row in (before, after)]
        if points[0] != points[1]:
            changed.append(
                Changed(
                    before.id,
                    before.prompt,
                    before.expected,
                    before.answer,
                    after.answer,
                    points[1] > points[0],
                )
            )
    return TaskComparison(
        task.name, task.metric, len(first), test.first, test.second, test, changed
    )


def points_of(task: Task, row: Row) -> float:
    """Points of one row by itself, 0 to 100; by accuracy where the task has it.

    A single true "no" has an F1 of 0, so F1 does not tell right from wrong.
    """
    scores = task.scores({name: np.asarray(value) for name, value in task.units([row])[0].items()})
    return float(scores["accuracy" if "accuracy" in scores else task.metric])


def _reason(
    name: str, one: dict[str, Any] | None, two: dict[str, Any] | None, places: tuple[Path, Path]
) -> str:
    """Why a task cannot be compared, as far as the two results say; empty if it can."""
    for entry, place in zip((one, two), places, strict=True):
        if entry is None:
            return f"{place} has no {name}."
        if "samples" not in entry:
            return f"{name} in {place} is not finished; {UNFINISHED}."
        if entry["scores"] is None:
            return f"{name} is scored by its server."
    assert one is not None and two is not None
    if one["identity"] != two["identity"]:
        return f"{name} was asked in two ways ({one['identity']} and {two['identity']})."
    if build_task(name).version != one["identity"]["version"]:
        return f"{name} has another version now than both results; evaluate again."
    return ""


def _folder(place: Path) -> Path:
    return place.parent if place.is_file() else place


__all__ = ["Changed", "TaskComparison", "compare_results", "points_of"]
