"""Options of a made source, checked: a line of a recipe's mixture table to values of known types.

Sources that draw or reduce their own pictures share it, so that a mistake in any of them is said
in the same words.  Easy to get wrong: YAML reads `true` as a boolean, which Python counts as an
integer, so that `size: true` has to be refused by itself.
"""

import bisect
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

REQUIRED = object()
"""The default of an option that has none."""


def read_options(
    options: Mapping[str, Any], known: Mapping[str, tuple[type, Any]], *, of: str
) -> dict[str, Any]:
    """Every known option, given or by default.

    Args:
        options: as a recipe gives them.
        known: {name: (type, default)}; the default `REQUIRED` makes it one that must be given.
        of: what the source is called in messages.

    Raises:
        ValueError: if an option is unknown, missing, or of another type.
    """
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise ValueError(
            f"data.sources.options has {', '.join(unknown)}, which {of} does not know; use "
            f"{', '.join(known)}."
        )
    values = {}
    for name, (kind, default) in known.items():
        value = options.get(name, default)
        if value is REQUIRED:
            raise ValueError(
                f"data.sources.options.{name} is missing; {of} needs it as {kind.__name__}."
            )
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise ValueError(
                f"data.sources.options.{name} must be given as {kind.__name__} for {of}, but it is "
                f"{value!r}."
            )
        values[name] = value
    return values


def check_size(size: int, *, of: str) -> int:
    """The number of records.

    Raises:
        ValueError: if it is not at least 1.
    """
    if size < 1:
        raise ValueError(f"data.sources.options.size is {size} for {of}; give at least 1.")
    return size


def check_split(split: str, *, of: str) -> None:
    """Which side of a data set it is.

    Raises:
        ValueError: if it is neither.
    """
    if split not in ("train", "held_out"):
        raise ValueError(f"The split of {of} is {split!r}; use train or held_out.")


class Shares:
    """Things that are drawn as often as their weights say.

    Args:
        weights: {thing: weight}; those of weight 0 are never drawn.
        known: the things that there are.
        of: what the source is called in messages.

    Raises:
        ValueError: if a thing is unknown, or a weight is no number from 0 on, or all are 0.
    """

    def __init__(self, weights: Mapping[str, Any], known: Sequence[str], *, of: str) -> None:
        unknown = sorted(map(str, set(weights) - set(known)))
        if unknown:
            raise ValueError(
                f"data.sources.options.families has {', '.join(unknown)}, which {of} does not "
                f"know; use {', '.join(known)}."
            )
        for name, weight in weights.items():
            right = isinstance(weight, int | float) and not isinstance(weight, bool)
            if not right or not math.isfinite(weight) or weight < 0:
                raise ValueError(
                    f"data.sources.options.families.{name} is {weight!r} for {of}; give a weight "
                    "from 0 on."
                )
        self._weights = {name: weights[name] for name in known if weights.get(name)}
        if not self._weights:
            raise ValueError(
                f"data.sources.options.families of {of} gives nothing a weight above 0; use "
                f"{', '.join(known)}."
            )

    @property
    def things(self) -> tuple[str, ...]:
        """Those of a weight above 0."""
        return tuple(self._weights)

    def draw(self, unit: float, among: Sequence[str] | None = None) -> str:
        """The thing at a point in [0, 1), of all or of some (one of `things` at least)."""
        things = [name for name in self._weights if among is None or name in among]
        ends = list(itertools.accumulate(self._weights[name] for name in things))
        return things[min(bisect.bisect_right(ends, unit * ends[-1]), len(things) - 1)]


__all__ = ["REQUIRED", "Shares", "check_size", "check_split", "read_options"]
