"""The order in which a made source shows things: each once in every round, in an order by chance.

Draws by chance alone would show a third of the things not at all in as many records.  Easy to get
wrong: a round's order is made when it is first asked for, so an index costs the same wherever it
lies, and records can be read from the middle.
"""

from functools import lru_cache

import numpy as np


class Rounds:
    """Which of `count` things stands at an index.

    Args:
        count: number of things, at least 1.
        key: non-negative integers; equal keys give equal orders.
    """

    def __init__(self, count: int, key: tuple[int, ...]) -> None:
        self._count, self._key = count, key

    def __getitem__(self, index: int) -> int:
        """The number of the thing at an index."""
        turn, place = divmod(index, self._count)
        return int(_order(self._count, (*self._key, turn))[place])


@lru_cache(maxsize=64)  # of all sources of a process, some rounds each; 8 bytes a thing
def _order(count: int, key: tuple[int, ...]) -> np.ndarray:
    return np.random.default_rng(np.random.SeedSequence(key)).permutation(count)


__all__ = ["Rounds"]
