"""How sure a score is: bootstrap intervals of one run, and paired tests between two runs.

Both work on sums of marks over independent units (`task.py`), so they hold for every score, F1 and
MME's points too.  Units with the same marks are one kind: drawing units again is drawing how often
each kind comes, which is exact, and quick for 200,000 questions that are right or wrong.  Easy to
get wrong: an interval says how much *other pictures* would change the score, not other seeds of
training; and two overlapping intervals may still differ clearly, for runs share their pictures.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from .task import COUNT, Sums

Units = Sequence[Mapping[str, float]]
Scores = Callable[[Sums], Mapping[str, np.ndarray]]

CHUNK = 1 << 22  # numbers drawn at once: 32 MiB


@dataclass(frozen=True, kw_only=True, slots=True)
class Interval:
    """A score and where it would lie for other draws of units."""

    value: float
    low: float | None
    """None where there are fewer than two units, so that nothing can be said."""
    high: float | None
    units: int
    """How many independent units the interval rests on."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Paired:
    """What two runs over the same units say about the difference of a score."""

    first: float
    second: float
    difference: float
    """Second minus first."""
    low: float | None
    """Of the difference; None where there are fewer than two units."""
    high: float | None
    p: float
    """How often a difference as large comes from swapping the runs unit by unit at random."""
    exact_p: float | None
    """McNemar's exact test, where every unit is one sample that is right or wrong."""
    units: int
    changed: int
    """Units whose marks differ between the runs."""


def interval(
    units: Units, scores: Scores, *, resamples: int = 1000, seed: int = 0, level: float = 0.95
) -> dict[str, Interval]:
    """Percentile bootstrap intervals of all scores, by drawing units with replacement.

    Marks that a unit does not have are 0.  A score of a rare group is drawn with the group's size,
    and is 0 in draws without any of its units.

    Args:
        units: sums of marks, one mapping for each independent unit.
        scores: scores from sums, arrays in and arrays out.
        level: share of draws inside the interval.

    Raises:
        ValueError: if there are no units.
    """
    names = _names(units)
    kinds, counts = _kinds(_matrix(units, names))
    values = _scores(scores, names, counts @ kinds)
    drawn: dict[str, np.ndarray] = {}
    if len(units) > 1:
        sums = _resampled(kinds, counts, resamples, np.random.default_rng(seed))
        drawn = {name: np.asarray(found) for name, found in _scores(scores, names, sums).items()}
    return {
        name: Interval(
            value=float(value), units=len(units), **_bounds(drawn.get(name), resamples, level)
        )
        for name, value in values.items()
    }


def paired_test(
    first: Units,
    second: Units,
    scores: Scores,
    metric: str,
    *,
    permutations: int = 10_000,
    resamples: int = 1000,
    seed: int = 0,
    level: float = 0.95,
) -> Paired:
    """Tests whether two runs differ in a score; units are paired by position.

    `p` is two-sided, by swapping the two sides of each unit with probability 1/2; one is added to
    both counts, so that it is never below 1 / (permutations + 1).  The interval of the difference
    draws pairs of units with replacement.

    Raises:
        ValueError: if the runs have other numbers of units, no units, or no such score.
    """
    if len(first) != len(second):
        raise ValueError(
            f"One run has {len(first)} units but the other has {len(second)}; evaluate both on "
            "the same samples."
        )
    names = _names([*first, *second])
    width = len(names)
    sides = _matrix(first, names), _matrix(second, names)
    kinds, counts = _kinds(np.concatenate(sides, axis=1))

    def score(sums: np.ndarray) -> np.ndarray:
        found = _scores(scores, names, sums)
        if metric not in found:
            raise ValueError(f"metric is {metric!r} but the scores are {', '.join(found)}.")
        return np.asarray(found[metric], float)

    def differences(sums: np.ndarray) -> np.ndarray:
        return score(sums[..., width:]) - score(sums[..., :width])

    total = counts @ kinds
    difference = float(differences(total))
    rng = np.random.default_rng(seed)
    swapped = _swapped(kinds, counts, permutations, rng)
    # Sums in another order differ in their last digits; equal differences must count as such.
    slack = 1e-9 * max(1.0, abs(difference))
    extreme = int(np.sum(np.abs(differences(swapped)) >= abs(difference) - slack))
    drawn = differences(_resampled(kinds, counts, resamples, rng)) if len(first) > 1 else None
    return Paired(
        first=float(score(total[:width])),
        second=float(score(total[width:])),
        difference=difference,
        **_bounds(drawn, resamples, level),
        p=(1 + extreme) / (1 + permutations),
        exact_p=_mcnemar(*sides, names, metric, difference),
        units=len(first),
        changed=int(np.any(sides[0] != sides[1], axis=1).sum()),
    )


def mcnemar(gained: int, lost: int) -> float:
    """Exact two-sided p of `gained` against `lost` changes, if both were as likely.

    >>> round(mcnemar(9, 1), 6)
    0.021484
    """
    number, fewer = gained + lost, min(gained, lost)
    if gained == lost:
        return 1.0
    # Logarithms: the binomials of 100,000 changes have 30,000 digits.
    steps = np.arange(1, fewer + 1)
    logs = np.concatenate([[0.0], np.cumsum(np.log(number - steps + 1) - np.log(steps))])
    tail = logs[-1] + math.log(np.sum(np.exp(logs - logs[-1])))
    return min(1.0, math.exp(math.log(2) + tail - number * math.log(2)))


# --- sums -----------------------------------------------------------------------------------------


def _names(units: Units) -> list[str]:
    if not units:
        raise ValueError("There are no units to score; answer at least one sample.")
    return list(dict.fromkeys(name for unit in units for name in unit))


def _matrix(units: Units, names: Sequence[str]) -> np.ndarray:
    return np.array([[unit.get(name, 0.0) for name in names] for unit in units], float)


def _kinds(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Different rows, and how often each comes: (kinds, columns), (kinds)."""
    kinds, counts = np.unique(matrix, axis=0, return_counts=True)
    return kinds, counts


def _scores(scores: Scores, names: Sequence[str], sums: np.ndarray) -> Mapping[str, np.ndarray]:
    """Scores of sums whose last axis is the columns."""
    return scores({name: sums[..., at] for at, name in enumerate(names)})


def _resampled(
    kinds: np.ndarray, counts: np.ndarray, resamples: int, rng: np.random.Generator
) -> np.ndarray:
    """Sums of as many units drawn with replacement: (resamples, columns)."""
    number = int(counts.sum())
    if number > 8 * len(counts):
        return _chunked(
            lambda size: rng.multinomial(number, counts / number, size=size) @ kinds,
            resamples,
            len(counts),
        )
    # The same draw, five times as quick where nearly every unit is a kind of its own.
    kind_of = np.repeat(np.arange(len(counts)), counts)

    def draw(size: int) -> np.ndarray:
        drawn = kind_of[rng.integers(0, number, (size, number))]
        drawn += np.arange(size)[:, None] * len(counts)
        times = np.bincount(drawn.ravel(), minlength=size * len(counts))
        return times.reshape(size, len(counts)) @ kinds

    return _chunked(draw, resamples, number)


def _swapped(
    kinds: np.ndarray, counts: np.ndarray, permutations: int, rng: np.random.Generator
) -> np.ndarray:
    """Sums of both sides after swapping units at random: (permutations, both sides' columns)."""
    width = kinds.shape[1] // 2
    total = counts @ kinds
    gain = kinds[:, width:] - kinds[:, :width]
    gain, counts = gain[gain.any(axis=1)], counts[gain.any(axis=1)]
    if not len(counts):
        return np.tile(total, (permutations, 1))
    single = counts == 1

    def draw(size: int) -> np.ndarray:
        # A unit by itself is swapped or not; of several alike, some number is.
        moved = rng.integers(0, 2, (size, int(single.sum())), dtype=np.int8) @ gain[single]
        moved += rng.binomial(counts[~single], 0.5, (size, int((~single).sum()))) @ gain[~single]
        return total + np.concatenate([moved, -moved], axis=1)

    return _chunked(draw, permutations, len(counts))


def _chunked(draw: Callable[[int], np.ndarray], number: int, width: int) -> np.ndarray:
    """Draws in pieces that fit in memory."""
    size = max(1, CHUNK // max(width, 1))
    return np.concatenate([draw(min(size, number - at)) for at in range(0, number, size)])


def _bounds(drawn: np.ndarray | None, resamples: int, level: float) -> dict[str, float | None]:
    if drawn is None:
        return {"low": None, "high": None}
    # A score may be a constant, whatever is drawn.
    edges = [(1 - level) / 2, (1 + level) / 2]
    low, high = np.quantile(np.broadcast_to(drawn, resamples), edges)
    return {"low": float(low), "high": float(high)}


def _mcnemar(
    first: np.ndarray, second: np.ndarray, names: Sequence[str], metric: str, difference: float
) -> float | None:
    """Exact p if the score is the mean of a mark of single samples, right or wrong."""
    if metric not in names or COUNT not in names:
        return None
    counted, mark = names.index(COUNT), names.index(metric)
    both = np.stack([first, second])
    if not (np.all(both[..., counted] == 1) and np.isin(both[..., mark], (0, 1)).all()):
        return None
    gain = second[:, mark] - first[:, mark]
    if not math.isclose(100 * gain.mean(), difference, abs_tol=1e-6):
        return None
    return mcnemar(int((gain > 0).sum()), int((gain < 0).sum()))


__all__ = ["Interval", "Paired", "Scores", "Units", "interval", "mcnemar", "paired_test"]
