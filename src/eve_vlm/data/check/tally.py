"""What workers find, added up: counts, a few examples of each kind, and a row of numbers a record.

Kept for each record are three digests of 16 bytes and 13 bytes of numbers, whatever its texts and
pictures hold; everything else is counted in bins.  Easy to get wrong: examples are the first of
their kind, so parts must be added in the order of the records.
"""

from collections import Counter
from collections.abc import Collection, Sequence
from typing import NamedTuple

import numpy as np

from eve_vlm.data.check.problems import Problem
from eve_vlm.data.check.record import UNKNOWN, Facts

EXAMPLES = 5  # of each kind, kept with id and message
MEGAPIXELS = (0, 0.01, 0.03, 0.1, 0.2, 0.3, 0.5, 0.75, 1, 1.5, 2, 3, 5, 8, 12, 20, np.inf)
ASPECTS = (0, 0.1, 0.2, 0.33, 0.5, 0.67, 0.8, 0.95, 1.05, 1.25, 1.5, 2, 3, 5, 10, np.inf)
PICTURES = (*range(11), np.inf)  # of a record; the last bin holds ten and more
FINE, WARNED, BAD, LISTED = 0, 1, 2, 3  # states of a record


class Columns(NamedTuple):
    """Numbers of records in order."""

    lengths: np.ndarray
    """(records,) int32 tokens, or letters without a tokenizer; -1 where it is not known."""
    patches: np.ndarray
    """(records,) int32."""
    learnt: np.ndarray
    """(records,) int32 tokens with a label, or letters of answers."""
    states: np.ndarray
    """(records,) uint8: `FINE`, `WARNED`, `BAD`, or `LISTED` in the recipe's quarantine; set when
    parts are added."""
    digests: np.ndarray
    """(records, 3, 2) uint64 of id, text, and text with pictures; zeros where it is not known."""


class Part(NamedTuple):
    """Some records that follow one another, as a worker hands them back."""

    columns: Columns
    """Their numbers."""
    problems: list[Problem]
    """What is wrong with them."""
    unread: int
    """Records that could not be read at all."""
    edges: Counter[int]
    """How many are made smaller, by the longer side of their pictures."""
    pictures: np.ndarray
    """(bins,) records by pictures."""
    megapixels: np.ndarray
    """(bins,) pictures by megapixels."""
    aspects: np.ndarray
    """(bins,) pictures by width over height."""


def part_of(found: Sequence[tuple[Facts | None, bytes, list[Problem]]]) -> Part:
    """Facts, digests of ids and problems of records as one part; None for one that was not read."""
    facts = [one for one, _, _ in found]
    sizes = np.array([size for one in facts if one for size in one.sizes], float).reshape(-1, 2)
    digests = b"".join(
        (id or bytes(16)) + ((one and one.text) or bytes(16)) + ((one and one.content) or bytes(16))
        for one, id, _ in found
    )
    problems = [problem for _, _, listed in found for problem in listed]
    columns = Columns(
        np.array([UNKNOWN if one is None else one.length for one in facts], np.int32),
        np.array([0 if one is None else one.patches for one in facts], np.int32),
        np.array([0 if one is None else one.learnt for one in facts], np.int32),
        np.full(len(found), FINE, np.uint8),
        np.frombuffer(digests, np.uint64).reshape(-1, 3, 2),
    )
    return Part(
        columns,
        problems,
        sum(one is None for one in facts),
        Counter(one.edge for one in facts if one and one.edge),
        _binned([len(one.sizes) for one in facts if one], PICTURES),
        _binned(sizes[:, 0] * sizes[:, 1] / 1e6, MEGAPIXELS),
        _binned(sizes[:, 0] / sizes[:, 1], ASPECTS),
    )


def _binned(values: Sequence[float] | np.ndarray, edges: Sequence[float]) -> np.ndarray:
    return np.histogram(np.asarray(values, float), edges)[0]


class DataSetCheck:
    """What is known of one data set, part by part.

    Args:
        name: the data set.
        errors: kinds that make a record bad.
        listed: numbers of records that the recipe's quarantine list leaves out already.
    """

    def __init__(self, name: str, errors: Collection[str], listed: Collection[int] = ()):
        self.name, self.errors, self.listed = name, frozenset(errors), frozenset(listed)
        self._listed = np.array(sorted(self.listed), np.int64)
        self.counts: Counter[str] = Counter()
        """Records by kind of problem, without those listed already."""
        self.examples: dict[str, list[Problem]] = {}
        """The first of each kind."""
        self.records = self.unread = 0
        self.edges: Counter[int] = Counter()
        self.pictures = np.zeros(len(PICTURES) - 1, np.int64)
        self.megapixels = np.zeros(len(MEGAPIXELS) - 1, np.int64)
        self.aspects = np.zeros(len(ASPECTS) - 1, np.int64)
        self.stopped = ""
        """Why the rest could not be read, for a stream that broke off."""
        self._columns: list[Columns] = []
        self._listed_bad = 0

    def add(self, part: Part) -> None:
        """Adds the records that follow."""
        start, states = self.records, part.columns.states.copy()
        for problem in part.problems:
            self.note(problem)
            at = problem.number - start
            states[at] = max(states[at], BAD if problem.kind in self.errors else WARNED)
        first, last = np.searchsorted(self._listed, [start, start + len(states)])
        inside = self._listed[first:last] - start
        self._listed_bad += int((states[inside] == BAD).sum())
        states[inside] = LISTED
        self._columns.append(part.columns._replace(states=states))
        self.unread += part.unread
        self.edges += part.edges
        self.pictures += part.pictures
        self.megapixels += part.megapixels
        self.aspects += part.aspects
        self.records = start + len(states)

    def note(self, problem: Problem) -> None:
        """Counts one problem; one of a record that is listed already does not count."""
        if problem.number in self.listed:
            return
        self.counts[problem.kind] += 1
        examples = self.examples.setdefault(problem.kind, [])
        if len(examples) < EXAMPLES:
            examples.append(problem)

    @property
    def columns(self) -> Columns:
        """The numbers of all records."""
        if len(self._columns) != 1:
            joined = Columns(
                *(np.concatenate(parts) for parts in zip(_EMPTY, *self._columns, strict=True))
            )
            self._columns = [joined]
        return self._columns[0]

    def mark(self, indices: Sequence[int] | np.ndarray, state: int) -> None:
        """Raises the state of records that turned out worse at the end."""
        states = self.columns.states.copy()
        states[indices] = np.maximum(states[indices], state)
        self._columns = [self.columns._replace(states=states)]

    def refused(self, indices: np.ndarray) -> np.ndarray:
        """Which of these records training would refuse."""
        return np.asarray(self.columns.states[indices] == BAD)

    def drop_digests(self) -> None:
        """Gives back the memory of what only duplicates need."""
        self._columns = [self.columns._replace(digests=_EMPTY.digests)]

    @property
    def bad(self) -> int:
        """Records that training would refuse, without those listed already."""
        return int((self.columns.states == BAD).sum())

    @property
    def warned(self) -> int:
        """Records with warnings alone."""
        return int((self.columns.states == WARNED).sum())

    @property
    def listed_but_fine(self) -> int:
        """Records of the quarantine list that nothing is wrong with now."""
        return len(self.listed) - self._listed_bad

    @property
    def lengths(self) -> np.ndarray:
        """The lengths that are known, of records that are not left out."""
        columns = self.columns
        return columns.lengths[(columns.lengths >= 0) & (columns.states != LISTED)]

    @property
    def learnt(self) -> tuple[int, int]:
        """Tokens (or letters) of records that training can use, and those of them learnt."""
        columns = self.columns
        usable = (columns.lengths >= 0) & (columns.states < BAD)
        return int(columns.lengths[usable].sum()), int(columns.learnt[usable].sum())


_EMPTY = Columns(
    np.empty(0, np.int32),
    np.empty(0, np.int32),
    np.empty(0, np.int32),
    np.empty(0, np.uint8),
    np.empty((0, 3, 2), np.uint64),
)

__all__ = [
    "ASPECTS",
    "BAD",
    "EXAMPLES",
    "FINE",
    "LISTED",
    "MEGAPIXELS",
    "PICTURES",
    "WARNED",
    "Columns",
    "DataSetCheck",
    "Part",
    "part_of",
]
