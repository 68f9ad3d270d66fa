"""What an epoch of a recipe will be: records and tokens by data set, rows, steps, full rows.

Rows come from the same `Rows` that training walks, so their number is the trained one.  Easy to get
wrong: a record that cannot be used still takes its turn, with one token, unless it is listed in the
recipe's quarantine.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from eve_vlm.data.check.tally import LISTED, DataSetCheck
from eve_vlm.data.packing import Budget, Size
from eve_vlm.data.rows import Rows
from eve_vlm.data.sources import Mixture, Source
from eve_vlm.data.sources.source import PartSource


class PlannedSource(NamedTuple):
    """One line of the mixture table with what it comes to."""

    name: str
    """The data set."""
    records: int
    """What it holds, without what is left out."""
    used: int
    """Records that an epoch takes of it."""
    share: float
    """Part of the records of an epoch, 0 to 1."""
    tokens: int
    """Tokens of an epoch."""
    learnt: int
    """Those of them with a label."""


class Plan(NamedTuple):
    """An epoch."""

    sources: list[PlannedSource]
    """The mixture."""
    rows: int
    """Packed rows, or records where the recipe does not pack."""
    steps: int
    """Optimizer steps of one process."""
    budget: Budget
    """What a packed row holds; rows of max_length where the recipe does not pack."""
    packs: bool
    """Whether the recipe packs."""
    packed_rows: int
    """Rows that packing makes, or would make."""
    packed: float
    """Share of the positions of packed rows that hold tokens."""
    padded: float
    """The same where every record is padded to the longest of its batch."""

    @property
    def tokens(self) -> int:
        """Tokens of an epoch."""
        return sum(source.tokens for source in self.sources)

    @property
    def learnt(self) -> int:
        """Those with a label."""
        return sum(source.learnt for source in self.sources)


def plan_epoch(
    sections: Sequence[Any],
    sources: Sequence[Source],
    checks: Sequence[DataSetCheck],
    *,
    seed: int,
    budget: Budget,
    packs: bool,
    window: int,
    batch: int,
    accumulate: int,
    progress: Callable[[int], object] = lambda windows: None,
) -> Plan:
    """Plans the first epoch from measured sizes.

    Args:
        sections: lines of the mixture table.
        sources: their sources, without the quarantine list.
        checks: what was found in each.
        seed: of the recipe.
        budget: of a packed row.
        packs: whether the recipe packs.
        window: records among which rows are planned.
        batch, accumulate: rows of a micro-batch, and micro-batches of a step.
        progress: is told how many more windows are planned.
    """
    kept = [np.flatnonzero(check.columns.states != LISTED) for check in checks]
    mixture = _mixture(sections, sources, kept)
    tokens, patches, learnt, of = _measured(mixture, kept, checks)
    rows = Rows(
        len(mixture),
        seed=seed,
        window=window,
        sizes=lambda numbers: [Size(int(tokens[n]), int(patches[n])) for n in numbers],
        budget=budget,
    )
    packed_rows = 0
    for number in range(rows.windows):
        packed_rows += len(rows.rows_of(0, number))
        progress(1)
    planned = [
        PlannedSource(*row, int(tokens[of == number].sum()), int(learnt[of == number].sum()))
        for number, row in enumerate(mixture.describe())
    ]
    count = packed_rows if packs else len(mixture)
    return Plan(
        planned,
        count,
        math.ceil(count / (batch * accumulate)),
        budget,
        packs,
        packed_rows,
        float(tokens.sum() / (packed_rows * budget.tokens)),
        _padded(tokens[rows.order(0).numpy()], batch),
    )


def _mixture(
    sections: Sequence[Any], sources: Sequence[Source], kept: Sequence[np.ndarray]
) -> Mixture:
    """The mixture that `build_mixture` makes of the same recipe."""
    parts = [
        source if len(numbers) == len(source) else PartSource(source, numbers)
        for source, numbers in zip(sources, kept, strict=True)
    ]
    if any(section.weight is not None for section in sections):
        return Mixture(parts, weights=[section.weight for section in sections])
    return Mixture(parts, [section.repeat for section in sections])


def _measured(
    mixture: Mixture, kept: Sequence[np.ndarray], checks: Sequence[DataSetCheck]
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Tokens, patches, labels and data set of every record of an epoch, by number."""
    places = np.array([mixture.locate(index) for index in range(len(mixture))])
    tokens, patches, learnt = (np.zeros(len(places), np.int64) for _ in range(3))
    for number, (numbers, check) in enumerate(zip(kept, checks, strict=True)):
        mine = places[:, 0] == number
        index, columns = numbers[places[mine, 1]], check.columns
        usable = (columns.lengths[index] >= 0) & ~check.refused(index)
        tokens[mine] = np.where(usable, columns.lengths[index], 1)
        patches[mine] = np.where(usable, columns.patches[index], 0)
        learnt[mine] = np.where(usable, columns.learnt[index], 0)
    return tokens, patches, learnt, places[:, 0]


def _padded(lengths: np.ndarray, batch: int) -> float:
    """The share of positions that hold tokens, where batches are padded to their longest."""
    starts = np.arange(0, len(lengths), batch)
    longest = np.maximum.reduceat(lengths, starts)
    counts = np.diff([*starts, len(lengths)])
    return float(lengths.sum() / (longest * counts).sum())


__all__ = ["Plan", "PlannedSource", "plan_epoch"]
