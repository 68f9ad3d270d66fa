"""What all public benchmarks have in common: a preset, a table of the Hub, lazy pictures.

A benchmark says which columns it reads, what a row means (`fields`) and what an answer is worth
(`marks`); everything else is here.  Easy to get wrong: a split whose answers a server keeps has no
marks at all, not zeros, and a split with answers for some rows only would mix the two.
"""

from abc import abstractmethod
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any, ClassVar

from PIL import Image

from eve_vlm.eval.task import Row, Sample, Task

from .hub_data import Table
from .judge import Judge
from .presets import Preset


class Benchmark(Task):
    """A public benchmark.

    Args:
        preset: how it is asked.
        root: folder with data sets; None for the Hub's cache.
        split: another split than the preset's.
        judge: marks the answers of benchmarks that need one.
    """

    version = 1
    columns: ClassVar[tuple[str, ...]]
    """Columns with words that are read."""
    pictures: ClassVar[tuple[str, ...]] = ("image",)
    """Columns with pictures, in the order in which they are shown."""

    def __init__(
        self,
        preset: Preset,
        *,
        root: Path | None = None,
        split: str | None = None,
        judge: Judge | None = None,
    ):
        self.preset, self.root, self.judge = preset, root, judge
        self.split = split or preset.split
        # The preset says it, so it differs between objects of one class.
        self.max_new_tokens = preset.max_new_tokens

    def settings(self) -> dict[str, Any]:
        """The preset with its digest, the split, and the judge if there is one."""
        facts: dict[str, Any] = {
            "preset": self.preset.name,
            "preset_digest": self.preset.digest,
            "preset_text": self.preset.text,
            "split": self.split,
        }
        if self.needs_judge and self.judge:
            facts["judge"] = self.judge.facts
        return facts

    def samples(self) -> Sequence[Sample]:
        """All rows of the split, in their order."""
        return self._samples

    def prompt(self, sample: Sample) -> str:
        """The preset's words for this question."""
        return self.preset.words(
            sample.question,
            options=sample.options,
            hint=sample.facts.get("hint", ""),
            ocr=", ".join(sample.facts.get("ocr_tokens", ())),
        )

    def mark(self, sample: Sample, answer: str) -> dict[str, float]:
        """Marks of an answer; none where a server keeps the answers."""
        return self.marks(sample, answer) if sample.answers else {}

    @abstractmethod
    def fields(self, row: Mapping[str, Any], number: int) -> dict[str, Any]:
        """What a row says: the fields of its sample except the pictures."""

    @abstractmethod
    def marks(self, sample: Sample, answer: str) -> dict[str, float]:
        """Marks of an answer to a question whose answers are known."""

    def table(self) -> Table:
        """The rows.

        Raises:
            MissingDataError: if they are not on this machine.
        """
        config = self.preset.config.format(split=self.split)
        return Table(self.preset.data, split=self.split, config=config, root=self.root)

    def rows(self) -> Iterable[Mapping[str, Any]]:
        """All rows, without pictures."""
        return self._table.words(self.columns)

    def open(self, number: int, fields: Mapping[str, Any]) -> Sequence[Image.Image]:
        """The pictures of a row, by its number and what it says."""
        return self._table.pictures(number, self.pictures)

    @cached_property
    def _table(self) -> Table:
        return self.table()

    @cached_property
    def _samples(self) -> list[Sample]:
        found = []
        for number, row in enumerate(self.rows()):
            fields = self.fields(row, number)
            found.append(Sample(images=partial(self.open, number, fields), **fields))
        lacking = sum(not sample.answers for sample in found)
        if lacking not in (0, len(found)):
            raise ValueError(
                f"{self.preset.data} {self.split} has no answers for {lacking} of its {len(found)} "
                "questions; take a split where all or none have one."
            )
        return found


def usual_first(answers: Iterable[str]) -> tuple[str, ...]:
    """Answers of several people, the ones that more people gave first.

    >>> usual_first(["2", "two", "two"])
    ('two', 'two', '2')
    """
    given = list(answers)
    counts = Counter(given)
    return tuple(sorted(given, key=lambda answer: -counts[answer]))


def hidden(rows: Sequence[Row]) -> bool:
    """Whether a server keeps the answers to these."""
    return bool(rows) and not any(row.expected for row in rows)


__all__ = ["Benchmark", "hidden", "usual_first"]
