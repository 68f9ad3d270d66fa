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
from typing import Any, NamedTuple

import numpy as np
import torch

from eve_vlm.data.packing import Budget, Size, pack


class Position(NamedTuple):
    """A place in the stream of rows: the next row is number `row` of a window of an epoch."""

    epoch: int = 0
    window: int = 0
    row: int = 0


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

    def walk(self, position: Position) -> Iterator[tuple[list[int], Position]]:
        """Rows from a position on, each with the position behind it."""
        epoch, window, row = position
        while True:
            rows = self.rows_of(epoch, window)
            for number in range(row, len(rows)):
                yield rows[number], Position(epoch, window, number + 1)
            row, window = 0, window + 1
            if window == self.windows:
                epoch, window = epoch + 1, 0

    def epochs_at(self, position: Position) -> float:
        """Epochs that lie behind a position; within a window in equal steps."""
        start = position.window * self.window
        length = min(self.window, self.num_records - start)
        rows = len(self.rows_of(position.epoch, position.window)) if position.row else 1
        return position.epoch + (start + length * position.row / rows) / self.num_records


class RowSampler:
    """Batches of rows for one process: what a `DataLoader` takes as `batch_sampler`.

    Args:
        rows: the stream.
        batch_size: rows of one process at a time.
        rank, world: this process and how many there are.
    """

    def __init__(self, rows: Rows, *, batch_size: int, rank: int = 0, world: int = 1):
        self.rows, self.batch_size, self.rank, self.world = rows, batch_size, rank, world
        self.position = Position()
        self._ahead: deque[Position] = deque()

    def __iter__(self) -> Iterator[list[list[int]]]:
        """Batches from the saved position on, without an end."""
        self._ahead.clear()
        walk = self.rows.walk(self.position)
        mine = range(self.rank * self.batch_size, (self.rank + 1) * self.batch_size)
        while True:
            turn = [next(walk) for _ in range(self.batch_size * self.world)]
            self._ahead.append(turn[-1][1])
            yield [turn[number][0] for number in mine]

    def taken(self) -> None:
        """Says that the trainer took one more batch, the oldest of those handed out."""
        self.position = self._ahead.popleft()

    def steps(self, epochs: float, *, accumulation: int) -> int:
        """Optimizer steps for so many epochs; the last step is filled from the next epoch."""
        return math.ceil(self.rows.count(epochs) / (self.batch_size * self.world * accumulation))

    @property
    def epoch(self) -> float:
        """Epochs that are behind the batch taken last."""
        return self.rows.epochs_at(self.position)

    def state_dict(self) -> dict[str, Any]:
        """The position, and what it means something for."""
        return {
            "position": list(self.position),
            "num_records": self.rows.num_records,
            "seed": self.rows.seed,
            "window": self.rows.window,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes to a saved position.

        Raises:
            ValueError: if it belongs to other data or another order.
        """
        own = self.state_dict()
        for name, saved in state.items():
            if name != "position" and saved != own[name]:
                raise ValueError(
                    f"The checkpoint stands in a stream with {name} {saved}, but the data now have "
                    f"{own[name]}; give the data and settings that the run began with."
                )
        self.position = Position(*state["position"])


__all__ = ["Position", "RowSampler", "Rows"]
