"""Differences between variants, paired by seed, their intervals, and a verdict by rule.

Each seed gives one difference, between models with the same decoder that answered the same
questions.  The interval is Student's t over those differences, so it holds both kinds of chance,
training's and the questions'.  Easy to get wrong: with three seeds it reaches 2.5 standard
deviations either way, so `not seen` does not mean that there is no difference.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import mean, stdev
from typing import Any, Literal

Verdict = Literal["confirmed", "not seen", "contrary", "not known yet"]
Result = Mapping[str, Any]

# Student's t, 95 of 100 inside, by degrees of freedom; beyond these the last, which is too wide.
T_95 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}
EARLY = 0.25  # share of the steps of the pretrain stage that `early_loss` is the mean of


@dataclass(frozen=True, kw_only=True, slots=True)
class Difference:
    """A difference over some seeds."""

    values: tuple[float, ...]
    """One for each seed that has all results."""
    middle: float | None
    """Their mean; None of nothing."""
    low: float | None
    """Lower end of the interval; None below two seeds."""
    high: float | None
    """Its upper end."""

    @property
    def verdict(self) -> Verdict:
        """`confirmed` where the whole interval is above zero, `contrary` where it is below."""
        if self.low is None or self.high is None:
            return "not known yet"
        if self.low > 0:
            return "confirmed"
        return "contrary" if self.high < 0 else "not seen"


def difference_of(values: Sequence[float]) -> Difference:
    """Mean and interval of paired differences.

    >>> found = difference_of([1.0, 2.0, 3.0])
    >>> found.middle, round(found.low, 3), round(found.high, 3), found.verdict
    (2.0, -0.484, 4.484, 'not seen')
    """
    if not values:
        return Difference(values=(), middle=None, low=None, high=None)
    middle = mean(values)
    if len(values) < 2:
        return Difference(values=tuple(values), middle=middle, low=None, high=None)
    freedom = min(len(values) - 1, max(T_95))
    reach = T_95[freedom] * stdev(values) / math.sqrt(len(values))
    return Difference(values=tuple(values), middle=middle, low=middle - reach, high=middle + reach)


def measure(result: Result, metric: str) -> float:
    """One number of a run.

    Args:
        result: what was kept of it.
        metric: `score` (mean exact answers of the families, in per cent), `early_loss` (language
            loss over the first quarter of the pretrain stage) or `collapsed` (1 if the alarm rang
            in it).
    """
    if metric == "score":
        return 100 * mean(result["scores"].values())
    if metric == "collapsed":
        return float(result["collapse"]["pretrain"] is not None)
    if metric == "early_loss":
        curve = result["curves"]["pretrain"]
        end = EARLY * curve["steps"][-1]
        early = [
            loss
            for step, loss in zip(curve["steps"], curve["loss"], strict=True)
            if step <= end or step == curve["steps"][0]
        ]
        return mean(early)
    raise ValueError(f"{metric!r} is no figure of a run; use score, early_loss or collapsed.")


def compare(
    results: Mapping[tuple[str, int], Result], terms: Sequence[tuple[int, str]], metric: str
) -> Difference:
    """The sum of +1 or -1 times a figure of each variant, seed by seed.

    Args:
        results: by variant and seed.
        terms: factor and variant; a seed counts if all of them have results.
        metric: see `measure`.
    """
    seeds = sorted({seed for _, seed in results})
    return difference_of(
        [
            sum(factor * measure(results[name, seed], metric) for factor, name in terms)
            for seed in seeds
            if all((name, seed) in results for _, name in terms)
        ]
    )


def joined(verdicts: Sequence[Verdict]) -> Verdict:
    """Of several findings: confirmed if all are, contrary if one is.

    >>> joined(["confirmed", "not seen"])
    'not seen'
    """
    worst: tuple[Verdict, ...] = ("contrary", "not known yet", "not seen")
    return next((verdict for verdict in worst if verdict in verdicts), "confirmed")


__all__ = ["T_95", "Difference", "Verdict", "compare", "difference_of", "joined", "measure"]
