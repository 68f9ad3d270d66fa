"""The rows that a run reads, in an order that the seed decides, with an exact position.

A row is one record, or the records of one packed row.  The stream of rows never ends: epoch after
epoch, each in its own order.  All processes walk the same stream and take turns, so that every one
gets the same number of rows however many there are, and a position means the same on any number of
them.  Easy to get wrong: a data loader reads ahead, so the position that is saved is that of the
batch which the trainer took last (`taken`), not that of the stream.
"""

import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch

from eve_vlm.data.packing import Budget, Size, pack


class Position(NamedTuple):
    """A place in the stream of rows: the next row is number `row` of a window of an epoch."""

    epoch: int = 0
    window: int = 0
    row: int = 0


class RowStream(Protocol):
    """An endless stream of rows; a place in it is what JSON takes."""

    start: Any
    """The place before the first row."""

    def walk(self, place: Any) -> Iterator[tuple[list[Any], Any]]:
        """Rows from a place on, each with the place behind it."""

    def epochs_at(self, place: Any) -> float:
        """Epochs that lie behind a place; 0 where they are not known."""

    def identity(self) -> dict[str, Any]:
        """What a place means something for."""


class Rows:
    """An endless stream of rows of record numbers.

    Args:
        num_records: records of an epoch.
        seed: decides the order, together with the number of the epoch.
        window: records among which rows are planned and shuffled.
        sizes: sizes of records by their numbers; needed with a budget.
        budget: packs records into rows; None makes every record a row.
    """

    def __init__(
        self,
        num_records: int,
        *,
        seed: int,
        window: int = 1024,
        sizes: Callable[[Sequence[int]], Sequence[Size]] | None = None,
        budget: Budget | None = None,
    ):
        assert (sizes is None) == (budget is None)
        self.num_records, self.seed, self.window = num_records, seed, window
        self.sizes, self.budget = sizes, budget
        self.windows = math.ceil(num_records / window)
        self.start = Position()
        self._epoch: tuple[int, torch.Tensor] | None = None

    def order(self, epoch: int) -> torch.Tensor:
        """Numbers of all records in the order of an epoch, (num_records,)."""
        if self._epoch is None or self._epoch[0] != epoch:
            generator = torch.Generator().manual_seed(self.seed + epoch)
            self._epoch = epoch, torch.randperm(self.num_records, generator=generator)
        return self._epoch[1]

    def rows_of(self, epoch: int, window: int) -> list[list[int]]:
        """The rows of one window of one epoch, in the order in which they are read."""
        members = self.order(epoch)[window * self.window : (window + 1) * self.window].tolist()
        if self.sizes is None or self.budget is None:
            return [[member] for member in members]
        planned = pack(self.sizes(members), self.budget)
        # Planned longest first; a window's rows are shuffled by its own seed.
        order = np.random.default_rng([self.seed, epoch, window]).permutation(len(planned))
        return [[members[index] for index in planned[row]] for row in order]

    def count(self, epochs: float) -> int:
        """Rows of so many epochs, the last one possibly in part."""
        if self.budget is None:
            return math.ceil(epochs * self.num_records)
        rows = 0
        for epoch in range(math.ceil(epochs)):
            whole = sum(len(self.rows_of(epoch, window)) for window in range(self.windows))
            rows += math.ceil(whole * min(1.0, epochs - epoch))
        return rows

    def walk(self, place: Sequence[int]) -> Iterator[tuple[list[int], Position]]:
        """Rows from a position on, each with the position behind it."""
        epoch, window, row = place
        while True:
            rows = self.rows_of(epoch, window)
            for number in range(row, len(rows)):
                yield rows[number], Position(epoch, window, number + 1)
            row, window = 0, window + 1
            if window == self.windows:
                epoch, window = epoch + 1, 0

    def epochs_at(self, place: Sequence[int]) -> float:
        """Epochs that lie behind a position; within a window in equal steps."""
        epoch, window, row = place
        start = window * self.window
        length = min(self.window, self.num_records - start)
        rows = len(self.rows_of(epoch, window)) if row else 1
        return epoch + (start + length * row / rows) / self.num_records

    def identity(self) -> dict[str, Any]:
        """What a position means something for."""
        return {
            "num_records": self.num_records,
            "seed": self.seed,
            "window": self.window,
            "packed": list(self.budget or ()),
        }


class RowSampler:
    """Batches of rows for one process: what a `DataLoader` takes as `batch_sampler`.

    Args:
        rows: the stream.
        batch_size: rows of one process at a time.
        rank, world: this process and how many there are that share the stream.
    """

    def __init__(self, rows: RowStream, *, batch_size: int, rank: int = 0, world: int = 1):
        self.rows, self.batch_size, self.rank, self.world = rows, batch_size, rank, world
        self.place = rows.start
        self._ahead: deque[Any] = deque()

    def __iter__(self) -> Iterator[list[list[Any]]]:
        """Batches from the saved place on, without an end."""
        self._ahead.clear()
        walk = self.rows.walk(self.place)
        mine = range(self.rank * self.batch_size, (self.rank + 1) * self.batch_size)
        while True:
            turn = [next(walk) for _ in range(self.batch_size * self.world)]
            self._ahead.append(turn[-1][1])
            yield [turn[number][0] for number in mine]

    def taken(self) -> None:
        """Says that the trainer took one more batch, the oldest of those handed out."""
        self.place = self._ahead.popleft()

    @property
    def epoch(self) -> float:
        """Epochs that are behind the batch taken last; 0 where they are not known."""
        return self.rows.epochs_at(self.place)

    def state_dict(self) -> dict[str, Any]:
        """The place, and what it means something for."""
        return {"place": self.place, "of": self.rows.identity()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes to a saved place.

        Raises:
            ValueError: if it belongs to other data or another order.
        """
        own = self.rows.identity()
        for name, saved in state["of"].items():
            if saved != own[name]:
                raise ValueError(
                    f"The checkpoint stands in a stream with {name} {saved}, but the data now have "
                    f"{own[name]}; give the data and settings that the run began with."
                )
        self.place = state["place"]


def steps_of(rows: Rows, epochs: float, *, at_once: int) -> int:
    """Optimizer steps for so many epochs, `at_once` rows each; the last is filled from the next.

    Args:
        at_once: rows of all processes and micro-batches of a step.
    """
    return math.ceil(rows.count(epochs) / at_once)


__all__ = ["Position", "RowSampler", "RowStream", "Rows", "steps_of"]
