"""Several sources as one: each used so many times per epoch, or in a given share.

The order is fixed; shuffling is the sampler's, from the recipe's seed.  Easy to get wrong: a weight
is a share of the *records*, and an epoch stays as long as all sources together, so a large weight
on a small source repeats it often; `describe` shows how often.
"""

import bisect
import dataclasses
import itertools
from collections.abc import Sequence
from typing import NamedTuple

from eve_vlm.data.records import Record
from eve_vlm.data.sources.source import Source, digest


class MixtureRow(NamedTuple):
    """One line of the table of a mixture."""

    name: str
    """The data set."""
    records: int
    """What it holds."""
    used: int
    """Records that an epoch takes of it."""
    share: float
    """Part of an epoch, 0 to 1."""


class Mixture:
    """Sources joined in their order.

    Args:
        sources: where records come from.
        repeats: times that each is used per epoch (0.5: every other record); once by default.
        weights: shares instead of repeats, in any unit.

    Raises:
        ValueError: if there are no records.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        repeats: Sequence[float] | None = None,
        *,
        weights: Sequence[float] | None = None,
    ):
        self.name, self.sources = "mixture", list(sources)
        sizes = [len(source) for source in sources]
        if weights is not None:
            whole = sum(weights)
            shares = [weight / whole for weight in weights]
            self._used = [round(sum(sizes) * share) for share in shares]
            for source, used in zip(sources, self._used, strict=True):
                if used and not len(source):
                    raise ValueError(f"{source.name} has a weight but holds no records; remove it.")
        else:
            times = [1.0] * len(sizes) if repeats is None else repeats
            self._used = [round(size * time) for size, time in zip(sizes, times, strict=True)]
        self._sizes = sizes
        self._ends = list(itertools.accumulate(self._used))
        if not sum(self._used):
            raise ValueError("The data sources hold no records; check data.sources in the recipe.")

    @property
    def names(self) -> list[str]:
        """Names of the sources, in their order."""
        return [source.name for source in self.sources]

    @property
    def fingerprint(self) -> str:
        """Changes when the records or their order change."""
        return digest([source.fingerprint for source in self.sources], self._used)

    def __len__(self) -> int:
        """Records of one epoch."""
        return self._ends[-1]

    def __getitem__(self, index: int) -> Record:
        """Record `index` of the epoch."""
        number, place = self.locate(index)
        source = self.sources[number]
        record = source[place]
        return record if record.source else dataclasses.replace(record, source=source.name)

    def locate(self, index: int) -> tuple[int, int]:
        """The number of the source that record `index` comes from, and the record's number in it.

        Raises:
            IndexError: if the epoch is shorter.
        """
        if not 0 <= index < len(self):
            raise IndexError("record index out of range")
        number = bisect.bisect_right(self._ends, index)
        inside = index - (self._ends[number - 1] if number else 0)
        size, used = self._sizes[number], self._used[number]
        # A share of a source is spread over it; several uses go round it again.
        return number, inside * size // used if used < size else inside % size

    def describe(self) -> list[MixtureRow]:
        """The mixture as a table, one line a source."""
        return [
            MixtureRow(source.name, size, used, used / len(self))
            for source, size, used in zip(self.sources, self._sizes, self._used, strict=True)
        ]


__all__ = ["Mixture", "MixtureRow"]
