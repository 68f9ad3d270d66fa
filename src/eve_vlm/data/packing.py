"""Which records share a packed row: first fit over token and patch budgets, from sizes alone.

Nothing is read or decoded here; sizes come from texts and picture headers (`encode.Encoder.size`).
Records are put longest first into the first row that has room for their tokens and their patches,
which fills rows to 98 % and more where records are short (measured: `docs/packing.md`).  Easy to
get wrong: rows come out sorted by their longest record, so whoever trains on them has to shuffle
the rows, or every window begins with its longest records.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Size(NamedTuple):
    """What one record takes of a row."""

    tokens: int
    """Positions, with every picture in place."""
    patches: int
    """Patches of all its pictures."""


class Budget(NamedTuple):
    """What one packed row holds at most."""

    tokens: int
    """Positions."""
    patches: int | None = None
    """Patches of all pictures; None sets no limit."""


def pack(sizes: Sequence[Size], budget: Budget) -> list[list[int]]:
    """Rows of indices into `sizes`; every index is in exactly one row, in ascending order.

    A record that is larger than the budget gets a row of its own: it is for the encoder to refuse
    it, with its name and reason.

    >>> pack([Size(60, 0), Size(50, 0), Size(40, 0), Size(30, 0)], Budget(100))
    [[0, 2], [1, 3]]
    """
    tokens = np.array([size.tokens for size in sizes], np.int64)
    patches = np.array([size.patches for size in sizes], np.int64)
    most_patches = int(patches.sum()) if budget.patches is None else budget.patches
    # Rows open with all their room; there cannot be more rows than records.
    free_tokens = np.full(len(sizes), budget.tokens, np.int64)
    free_patches = np.full(len(sizes), most_patches, np.int64)
    rows: list[list[int]] = []
    # Stable: equal records stay in order, so the plan is the same on every machine.
    for index in np.argsort(-tokens, kind="stable").tolist():
        needed, needed_patches = tokens[index], patches[index]
        used = len(rows)
        fits = (free_tokens[:used] >= needed) & (free_patches[:used] >= needed_patches)
        row = int(fits.argmax()) if fits.any() else used
        if row == used:
            rows.append([])
        rows[row].append(index)
        free_tokens[row] -= needed
        free_patches[row] -= needed_patches
    return [sorted(row) for row in rows]


__all__ = ["Budget", "Size", "pack"]
