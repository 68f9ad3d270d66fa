"""What an evaluation is made of: samples, the marks of an answer, and scores as functions of sums.

A task gives samples, says how a question is put, and marks each answer with numbers.  Its scores
are functions of *sums of marks over independent units* (pictures, usually).  That form is all that
intervals and paired tests need, whether the score is a mean, an F1 or MME's sum of pairs: another
draw of units is another weight for each, and so another sum.

Easy to get wrong: a score has the unit of the published tables (percent for most, points for MME
and OCRBench), while marks are shares between 0 and 1.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
from PIL import Image

Sums = Mapping[str, np.ndarray]
COUNT = "samples"  # the mark that every sample has once


class MissingDataError(ValueError):
    """The data of a task is not on this machine; says what to fetch."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """One question."""

    id: str
    """Unique in its task, the same in every run."""
    question: str
    """As its data set has it; `<image>` marks say where pictures go, else they go in front."""
    images: Callable[[], Sequence[Image.Image]]
    """Opens or draws the pictures; called only when the question is asked."""
    answers: tuple[str, ...]
    """What counts as right, the usual one first; empty where a server keeps the answers."""
    options: tuple[str, ...] = ()
    """What can be chosen from, in the order shown."""
    group: str = ""
    """Scores are shown for each group too: a category, a sampling, a kind of question."""
    unit: str = ""
    """Samples of one unit (one picture) are drawn together; empty means a unit of its own."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """What else the metric or an upload file needs; plain JSON."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One answered sample: a line of the file of samples."""

    id: str
    group: str
    unit: str
    prompt: str
    """The user's words as they were put."""
    answer: str
    expected: tuple[str, ...]
    marks: Mapping[str, float]
    """Of this answer; empty where a server marks it."""
    failed: str = ""
    """Why there is no answer; such a sample is marked as wrong and counted."""
    facts: Mapping[str, Any] = field(default_factory=dict)


class Task(ABC):
    """A set of samples with a metric.  A subclass is one benchmark, or one of our own tasks."""

    name: ClassVar[str]
    """What users type."""
    version: ClassVar[int]
    """Rises when samples, prompts or marks change; results of two versions are not compared."""
    title: ClassVar[str]
    """What is asked, in a few words."""
    metric: ClassVar[str] = "accuracy"
    """The score that stands for the task."""
    max_new_tokens: int = 16
    ranked: ClassVar[bool] = False
    """Whether the answer is the option that the model finds likeliest, instead of what it says."""
    needs_judge: ClassVar[bool] = False
    """Whether a language model marks the answers; `mark` is then called from several threads."""
    upload_note: ClassVar[str] = ""
    """What to do with the upload files, where that is not plain."""

    @abstractmethod
    def samples(self) -> Sequence[Sample]:
        """All samples, in the order that is fixed by the version.

        Raises:
            MissingDataError: if they are not on this machine.
        """

    def prompt(self, sample: Sample) -> str:
        """The user's words."""
        return sample.question

    @abstractmethod
    def mark(self, sample: Sample, answer: str) -> dict[str, float]:
        """Numbers for one answer, the same names for every sample; an empty answer is wrong.

        Names that are scores of their own are shares between 0 and 1.
        """

    def units(self, rows: Sequence[Row]) -> list[dict[str, float]]:
        """Sums of marks for each independent unit, with the number of samples as `COUNT`."""
        found: dict[str, dict[str, float]] = {}
        for row in rows:
            sums = found.setdefault(row.unit or f"sample {row.id}", {})
            for name, value in {COUNT: 1.0, **row.marks}.items():
                sums[name] = sums.get(name, 0.0) + value
        return list(found.values())

    def scores(self, sums: Sums) -> dict[str, np.ndarray]:
        """Scores from sums of marks: arrays of any shape in, the same shape out.

        Unless a task says otherwise: the mean of every mark, in percent.
        """
        return {
            name: 100 * ratio(total, sums[COUNT]) for name, total in sums.items() if name != COUNT
        }

    def settings(self) -> dict[str, Any]:
        """What besides the version decides samples, prompts and marks; plain JSON.

        A preset, a split, a judge: rows that were made under others are not used again.
        """
        return {}

    def upload(self, rows: Sequence[Row]) -> dict[str, str]:
        """Files for the server that scores this task, {name: text}; none for most."""
        return {}


def ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """`part / whole`, and 0 where nothing is."""
    part, whole = np.asarray(part, float), np.asarray(whole, float)
    return np.divide(part, whole, out=np.zeros_like(part * whole), where=whole != 0)


__all__ = ["COUNT", "MissingDataError", "Row", "Sample", "Sums", "Task", "ratio"]
