"""Rows of records of a stream, which is read in its own order and never counted.

A window of records is read, planned into rows and shuffled; then the next.  Every process reads its
own share of the stream.  Easy to get wrong: a place is the place of the stream *before* the window
and the number of rows taken of it, so going on reads one window again, and no more.
"""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from eve_vlm.data.encode import BadRecord
from eve_vlm.data.packing import Budget, Size, pack
from eve_vlm.data.records import Record
from eve_vlm.data.sources.streams import StreamSource


class StreamRows:
    """An endless stream of rows of records.

    Args:
        stream: this process's share, endless.
        seed: shuffles the rows of each window.
        window: records among which rows are planned and shuffled.
        size: what a record takes, from its text and the headers of its pictures.
        budget: packs records into rows; None makes every record a row.
    """

    def __init__(
        self,
        stream: StreamSource,
        *,
        seed: int,
        window: int,
        size: Callable[[Record], Size],
        budget: Budget | None = None,
    ):
        self.stream, self.seed, self.window = stream, seed, window
        self.size, self.budget = size, budget
        self.start = self._place(0, 0)

    def walk(self, place: dict[str, Any]) -> Iterator[tuple[list[Record | BadRecord], dict]]:
        """Rows from a place on, each with the place behind it."""
        self.stream.load_state_dict(place["stream"])
        number, row = place["window"], place["row"]
        while True:
            before = self._place(number, 0)
            rows = self._rows(number)
            for taken in range(row, len(rows)):
                yield rows[taken], before | {"row": taken + 1}
            number, row = number + 1, 0

    def _place(self, window: int, row: int) -> dict[str, Any]:
        return {"stream": self.stream.state_dict(), "window": window, "row": row}

    def _rows(self, number: int) -> list[list[Record | BadRecord]]:
        """The next window of the stream as rows."""
        members = [self._next() for _ in range(self.window)]
        rows = [[index] for index in range(len(members))]
        if self.budget is not None:
            rows = pack([self._size(member) for member in members], self.budget)
        order = np.random.default_rng([self.seed, number]).permutation(len(rows))
        return [[members[index] for index in rows[row]] for row in order]

    def _next(self) -> Record | BadRecord:
        try:
            return next(self.stream)
        except ValueError as error:
            return BadRecord(str(error))

    def _size(self, member: Record | BadRecord) -> Size:
        """A record that cannot be used takes one position, where it is counted."""
        if isinstance(member, BadRecord):
            return Size(1, 0)
        try:
            return self.size(member)
        except ValueError:
            return Size(1, 0)

    def epochs_at(self, place: dict[str, Any]) -> float:
        """Not known for a stream: 0."""
        return 0.0

    def identity(self) -> dict[str, Any]:
        """What a place means something for."""
        return {"seed": self.seed, "window": self.window, "packed": list(self.budget or ())}


__all__ = ["StreamRows"]
