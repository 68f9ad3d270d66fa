"""Records that say the same twice, found by digests of 16 bytes after all were read.

Easy to get wrong: the first of several equal records is not reported, the others are, and a record
that repeats another whole is not said to repeat its text as well.
"""

from collections.abc import Sequence

import numpy as np

from eve_vlm.data.check.data_sets import DataSet
from eve_vlm.data.check.problems import SAME_ID, SAME_RECORD, SAME_TEXT, Kind, Problem
from eve_vlm.data.check.tally import EXAMPLES, LISTED, WARNED, DataSetCheck

ID, TEXT, CONTENT = 0, 1, 2  # columns of digests


def repeats_of(digests: np.ndarray) -> np.ndarray:
    """(pairs, 2): the number of each record that was there before, and of the first like it.

    Args:
        digests: (records, 2) uint64; zeros are not compared.
    """
    numbers = np.flatnonzero(digests.any(1))
    some = digests[numbers]
    order = np.lexsort((some[:, 1], some[:, 0]))  # stable: equal ones stay in order
    if not len(order):
        return np.empty((0, 2), np.int64)
    sorted_ = some[order]
    new = np.concatenate([[True], (sorted_[1:] != sorted_[:-1]).any(1)])
    firsts = order[new][np.cumsum(new) - 1]
    pairs = np.stack([numbers[order[~new]], numbers[firsts[~new]]], 1)
    return pairs[np.argsort(pairs[:, 0])]


def find_repeats(
    checks: Sequence[DataSetCheck], data_sets: Sequence[DataSet], *, name_all: Sequence[str] = ()
) -> list[list[Problem]]:
    """The repeated records by data set: ids inside each, texts and contents over all of them.

    Counts them, and returns those that are named: the first few of each kind, or all of the kinds
    in `name_all`.
    """
    starts = np.cumsum([0, *(check.records for check in checks)])
    same_id = [
        repeats_of(_compared(check, ID)) + start
        for check, start in zip(checks, starts, strict=False)
    ]
    content, text = (
        repeats_of(np.concatenate([_compared(check, column) for check in checks]))
        for column in (CONTENT, TEXT)
    )
    text = text[~np.isin(text[:, 0], content[:, 0])]
    named: list[list[Problem]] = [[] for _ in checks]
    for kind, pairs in (
        (SAME_ID, np.concatenate(same_id)),
        (SAME_RECORD, content),
        (SAME_TEXT, text),
    ):
        _name(kind, pairs, starts, checks, data_sets, named, everything=kind.name in name_all)
    return named


def _compared(check: DataSetCheck, column: int) -> np.ndarray:
    """(records, 2) digests of one kind, zeros for records that are left out already."""
    columns = check.columns
    digests, listed = columns.digests[:, column], columns.states == LISTED
    return np.where(listed[:, None], np.uint64(0), digests) if listed.any() else digests


def _name(
    kind: Kind,
    pairs: np.ndarray,
    starts: np.ndarray,
    checks: Sequence[DataSetCheck],
    data_sets: Sequence[DataSet],
    named: list[list[Problem]],
    *,
    everything: bool,
) -> None:
    """Counts repeated records, and says of the first few which record they repeat."""
    places = np.searchsorted(starts, pairs, side="right") - 1
    for number, check in enumerate(checks):
        mine = pairs[places[:, 0] == number]
        check.counts[kind.name] += len(mine)
        check.mark(mine[:, 0] - starts[number], WARNED)
        chosen = mine if everything else mine[:EXAMPLES]
        ids = data_sets[number].fetch((chosen[:, 0] - starts[number]).tolist())
        for later, first in chosen.tolist():
            index = later - int(starts[number])
            other = int(np.searchsorted(starts, first, side="right") - 1)
            behind = first - int(starts[other])
            where = "" if other == number else f" of {checks[other].name}"
            id = ids[index].id if index in ids else str(index)
            problem = Problem(kind.name, index, id, f"The same as record {behind}{where}.")
            named[number].append(problem)
            examples = check.examples.setdefault(kind.name, [])
            if len(examples) < EXAMPLES:
                examples.append(problem)


__all__ = ["find_repeats", "repeats_of"]
