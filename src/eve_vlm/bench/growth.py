"""How cost grows: with pictures in a batch, tokens of a picture, layers of the decoder.

Each is measured at a few sizes, and a straight line through the logarithms gives the exponent: 1 is
a cost that doubles with the size.  The exponent of the operations stands beside it, since nothing
needs to grow faster than they do.  Easy to get wrong: small sizes cost mostly what any call costs,
which makes exponents too small, never too large.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from .answering import answer_case, embedding_case
from .measuring import Case, Measured
from .subjects import EndlessEngine, Subject
from .words import SQUARE, picture

PICTURES = (1, 2, 4, 8)
SHARES = (0.25, 0.5, 0.75, 1.0)  # of the longest edge
DEPTHS = (0.25, 0.5, 1.0)  # of the decoder's layers


class Point(NamedTuple):
    """A size of one kind, and the case that is measured there."""

    what: str
    by: str
    size: int
    figure: str
    case: Case


class Growth(NamedTuple):
    """How one cost grows."""

    what: str
    by: str
    points: list[tuple[int, float, float]]
    """Size, seconds, operations."""
    exponent: float
    flops_exponent: float

    def as_data(self) -> dict[str, Any]:
        """For the JSON line."""
        return self._asdict()


def growth_points(subject: Subject, edge: int, *, quick: bool) -> list[Point]:
    """What is measured; a quick run takes every other size."""
    step = 2 if quick else 1
    square, points = picture(SQUARE), []
    whole = subject.engine(edge)
    for count in PICTURES[::step]:
        case = embedding_case(whole, edge, [square] * count, f"{count} squares")
        points.append(Point("embedding", "pictures in a batch", count, "seconds", case))
    cell = whole.processor.image_processor.size_multiple
    sizes = {max(int(edge * share) // cell, 1) * cell for share in SHARES[::step] + SHARES[-1:]}
    for size in sorted(sizes):
        engine = subject.engine(size)
        case = embedding_case(engine, size, [square], "one square")
        tokens = case.tokens["seconds"]
        points.append(Point("embedding", "tokens of a picture", tokens, "seconds", case))
        case = answer_case(engine, size, [square], "one square", new_tokens=1)
        points.append(Point("first token", "tokens of a picture", tokens, "first token", case))
    layers = subject.config.text_config.num_hidden_layers
    for depth in sorted({max(int(layers * share), 1) for share in DEPTHS}):
        model = subject.model if depth == layers else subject.shorter(depth)
        engine = EndlessEngine(model, subject.processor(min(sizes)))
        case = answer_case(engine, min(sizes), [square], f"{depth} layers", new_tokens=1)
        points.append(Point("first token", "layers", depth, "first token", case))
    return points


def growth_of(points: Sequence[Point], measured: Sequence[Measured]) -> list[Growth]:
    """A line for each kind of growth, in the order of the points."""
    found: dict[tuple[str, str], list[tuple[int, float, float]]] = {}
    for point, one in zip(points, measured, strict=True):
        seconds, need = one.seconds[point.figure].median, point.case.needs[point.figure]
        found.setdefault((point.what, point.by), []).append((point.size, seconds, need.flops))
    return [
        Growth(
            what,
            by,
            kept,
            exponent([(size, seconds) for size, seconds, _ in kept]),
            exponent([(size, flops) for size, _, flops in kept]),
        )
        for (what, by), kept in found.items()
        if len(kept) > 1
    ]


def exponent(points: Sequence[tuple[float, float]]) -> float:
    """Slope of the least-squares line through the logarithms of at least two sizes.

    >>> round(exponent([(1, 3), (2, 12), (4, 48)]), 9)
    2.0
    """
    logs = [(math.log(size), math.log(cost)) for size, cost in points]
    middle = [sum(part) / len(logs) for part in zip(*logs, strict=True)]
    spread = sum((x - middle[0]) ** 2 for x, _ in logs)
    return sum((x - middle[0]) * (y - middle[1]) for x, y in logs) / spread


__all__ = ["Growth", "Point", "exponent", "growth_of", "growth_points"]
