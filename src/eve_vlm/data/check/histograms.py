"""Histograms of a check: bins with their names, drawn as lines of text or as bars on a page.

Easy to get wrong: lengths have long tails, so the last bin takes everything beyond the 99.5 %
quantile, and its name says so.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from eve_vlm.data.check.tally import ASPECTS, MEGAPIXELS, PICTURES

BINS = 16
WIDTH = 40  # letters of the longest bar in a terminal
EIGHTHS = " ▏▎▍▌▋▊▉█"


class Histogram(NamedTuple):
    """Counts by bins."""

    title: str
    """What is counted."""
    labels: list[str]
    """Name of each bin."""
    counts: list[int]
    """How many fall in it."""
    beyond: int = -1
    """The first bin that lies beyond a limit as a whole, -1 for none."""

    @property
    def most(self) -> int:
        """The largest count, at least 1."""
        return max([1, *self.counts])


def of_lengths(title: str, lengths: np.ndarray, *, limit: int | None = None) -> Histogram:
    """Bins of equal width over what is there.

    Args:
        limit: marks what lies above.
    """
    if not len(lengths):
        return Histogram(title, [], [])
    step = _step(float(np.quantile(lengths, 0.995)) / BINS)
    number = max(int(np.quantile(lengths, 0.995)) // step + 1, 1)
    last = int(lengths.max())
    counts = np.bincount(np.minimum(lengths // step, number), minlength=number + 1)
    labels = [f"{n * step:,} - {(n + 1) * step - 1:,}" for n in range(number)]
    labels.append(f"{number * step:,} and more")
    if last < number * step:
        counts, labels = counts[:-1], labels[:-1]
    first = int(np.flatnonzero(counts)[0])
    beyond = len(labels) if limit is None else limit // step + 1
    beyond = beyond - first if beyond < len(labels) else -1
    return Histogram(title, labels[first:], counts[first:].tolist(), max(beyond, -1))


def _step(wanted: float) -> int:
    """The next larger of 1, 2, 5, 10, 20, 50, ..."""
    size = 1
    while True:
        for factor in (1, 2, 5):
            if size * factor >= wanted:
                return size * factor
        size *= 10


def of_pictures(counts: np.ndarray) -> Histogram:
    """Records by pictures."""
    labels = [*map(str, PICTURES[:-2]), f"{PICTURES[-2]} and more"]
    return _cut("Pictures per record", labels, counts)


def of_megapixels(counts: np.ndarray) -> Histogram:
    """Pictures by megapixels."""
    return _cut("Megapixels", _between(MEGAPIXELS), counts)


def of_aspects(counts: np.ndarray) -> Histogram:
    """Pictures by width over height."""
    return _cut("Width over height", _between(ASPECTS), counts)


def _between(edges: Sequence[float]) -> list[str]:
    inner = [f"{low:g} - {high:g}" for low, high in pairwise(edges[:-1])]
    return [*inner, f"{edges[-2]:g} and more"]


def _cut(title: str, labels: list[str], counts: np.ndarray) -> Histogram:
    """Without the empty bins at both ends."""
    filled = np.flatnonzero(counts)
    if not len(filled):
        return Histogram(title, [], [])
    first, end = int(filled[0]), int(filled[-1]) + 1
    return Histogram(title, labels[first:end], counts[first:end].tolist())


def drawn_in_text(histogram: Histogram, *, blocks: bool = True) -> str:
    """Lines with bars, of block characters or of `#`."""
    names = max(map(len, histogram.labels), default=0)
    lines = [histogram.title]
    for number, (label, count) in enumerate(zip(histogram.labels, histogram.counts, strict=True)):
        eighths = -(-count * WIDTH * 8 // histogram.most)
        bar = EIGHTHS[8] * (eighths // 8) + EIGHTHS[eighths % 8].strip()
        bar = bar if blocks else "#" * -(-eighths // 8)
        note = "  above max_length" if number == histogram.beyond else ""
        lines.append(f"  {label.rjust(names)} {'│' if blocks else '|'}{bar} {count:,}{note}")
    return "\n".join(lines)


__all__ = [
    "Histogram",
    "drawn_in_text",
    "of_aspects",
    "of_lengths",
    "of_megapixels",
    "of_pictures",
]
