"""What differs between two things of a kind: settings, parameters, shapes, values of weights.

Works on the facts of `inspection`; only `compare_weights` reads weights, one pair at a time.  Easy
to get wrong: a configuration and a checkpoint are two of a kind, and of those two only what both
can know is compared: a configuration has no weight files and no chat template.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from eve_vlm.checkpoint_files import WeightEntry, WeightReader
from eve_vlm.inspection.facts import ModelFacts, TensorFact, TokensFact, flattened, size, untied
from eve_vlm.inspection.models import read_model_weights
from eve_vlm.inspection.subjects import Facts, PictureFacts, RecipeFacts
from eve_vlm.pictures import open_picture

PIECE = 2**22  # numbers compared at a time; as float64 two times 34 MB


@dataclass(frozen=True, kw_only=True, slots=True)
class Difference:
    """One thing that is not alike; None where a side does not have it."""

    section: str
    name: str
    left: Any
    right: Any


@dataclass(frozen=True, kw_only=True, slots=True)
class WeightDifference:
    """How far one weight is from its namesake."""

    name: str
    elements: int
    differing: int
    """Numbers that are not equal; two NaN are equal."""
    largest: float
    """Largest absolute difference; infinite where one side is not finite."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Differences:
    """All that differs between two things; `weights` is None where values were not compared."""

    left: str
    right: str
    differences: tuple[Difference, ...]
    weights: tuple[WeightDifference, ...] | None = None

    @property
    def equal(self) -> bool:
        """Whether nothing differs."""
        return not self.differences and not any(one.differing for one in self.weights or ())


def compare(left: Facts, right: Facts, *, weights: bool = False) -> Differences:
    """Compares the facts of two things of a kind.

    Args:
        weights: compare the values of two checkpoints too; reads all of both.

    Raises:
        ValueError: if they are of two kinds, or values are asked for that one side does not have.
    """
    if type(left) is not type(right):
        raise ValueError(
            f"{left.source} and {right.source} are of two kinds; compare two models, "
            "configurations, recipes, pictures or sizes, or see a picture as a model does with "
            "--model."
        )
    found: list[Difference] = []
    values = None
    if isinstance(left, ModelFacts) and isinstance(right, ModelFacts):
        found += _of_models(left, right)
    elif isinstance(left, RecipeFacts) and isinstance(right, RecipeFacts):
        found += _of_settings("recipe", left.settings, right.settings)
        for name in ("parameters", "trained"):
            found += _if_unlike("parameters", name, asdict(left)[name], asdict(right)[name])
    else:
        known = [
            {key: value for key, value in asdict(side).items() if key not in ("source", "tokens")}
            for side in (left, right)
        ]
        found += _of_settings("picture", *known)
        if isinstance(left, PictureFacts) and isinstance(right, PictureFacts):
            found += _of_pixels(left, right)
    found += _of_tokens(left.tokens, right.tokens)
    if weights:
        if not (isinstance(left, ModelFacts) and isinstance(right, ModelFacts)):
            raise ValueError(f"--weights compares two checkpoints; {left.source} is none.")
        values = compare_weights(left, right)
    return Differences(
        left=left.source, right=right.source, differences=tuple(found), weights=values
    )


def compare_weights(left: ModelFacts, right: ModelFacts) -> tuple[WeightDifference, ...]:
    """Compares the values of all weights that both checkpoints have in the same shape.

    Streams: no more than one pair of weights is in memory.

    Raises:
        ValueError: if one of them has no weights on this machine.
    """
    sides = [_entries(facts, left.tied | right.tied) for facts in (left, right)]
    names = [
        name
        for name, entry in sides[0].items()
        if name in sides[1] and entry.shape == sides[1][name].shape
    ]
    folders = [next(iter(entries.values())).file.parent for entries in sides]
    total = sum(torch.Size(sides[0][name].shape).numel() for name in names)
    results = []
    with (
        WeightReader(folders[0]) as first,
        WeightReader(folders[1]) as second,
        tqdm(total=total, unit=" numbers", unit_scale=True, desc="comparing", disable=None) as bar,
    ):
        for name in names:
            pair = first.read(sides[0][name].name), second.read(sides[1][name].name)
            differing, largest = _gap(*pair)
            count = pair[0].numel()
            results.append(
                WeightDifference(name=name, elements=count, differing=differing, largest=largest)
            )
            bar.update(count)
    return tuple(results)


def collapsed(names: Iterable[str]) -> list[tuple[str, int]]:
    """Names that differ only in numbers as one, with how many they are.

    >>> collapsed(["layers.0.q", "layers.1.q", "norm"])
    [('layers.{0-1}.q', 2), ('norm', 1)]
    """
    groups: dict[str, list[list[int]]] = {}
    for name in names:
        pattern = re.sub(r"(?<=\.)\d+(?=\.)", "#", name)
        groups.setdefault(pattern, []).append(
            [int(part) for part in name.split(".") if part.isdigit()]
        )
    result = []
    for pattern, numbers in groups.items():
        for values in zip(*numbers, strict=True):
            pattern = pattern.replace("#", _ranges(sorted(set(values))), 1)
        result.append((pattern, len(numbers)))
    return result


def _ranges(numbers: Sequence[int]) -> str:
    """`3` for one number, `{0-2,5}` for several."""
    if len(numbers) == 1:
        return str(numbers[0])
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1] = [runs[-1][0], number]
        else:
            runs.append([number])
    return "{" + ",".join("-".join(map(str, run)) for run in runs) + "}"


def _entries(facts: ModelFacts, tied: Mapping[str, str]) -> dict[str, WeightEntry]:
    entries, _ = read_model_weights(facts.source) if facts.weights is not None else (None, ())
    if not entries:
        raise ValueError(
            f"{facts.source} has no weights on this machine to compare; leave --weights out."
        )
    return untied(entries, tied)


def _gap(left: torch.Tensor, right: torch.Tensor) -> tuple[int, float]:
    """Numbers that differ, and the largest absolute difference."""
    differing, largest = 0, 0.0
    pieces = zip(left.flatten().split(PIECE), right.flatten().split(PIECE), strict=True)
    for one, other in pieces:
        a, b = one.double(), other.double()
        unlike = (a != b) & ~(a.isnan() & b.isnan())
        count = int(unlike.sum())
        if count:
            gap = (a - b).abs()[unlike].nan_to_num(nan=torch.inf, posinf=torch.inf).max()
            differing, largest = differing + count, max(largest, float(gap))
    return differing, largest


def _of_models(left: ModelFacts, right: ModelFacts) -> list[Difference]:
    found = _of_settings("configuration", left.settings, right.settings)
    if left.images is not None and right.images is not None:
        images = flattened(left.images), flattened(right.images)
        found += _of_settings("image settings", *images)
    if left.weights is not None and right.weights is not None:
        found += _if_unlike("text", "chat template", left.chat_template, right.chat_template)
    sizes = [{part.name: part.parameters for part in facts.parts} for facts in (left, right)]
    found += _of_settings("parameters", *sizes)
    found += _if_unlike("parameters", "total", left.parameters, right.parameters)
    return found + _of_tensors(left, right)


def _of_tensors(left: ModelFacts, right: ModelFacts) -> list[Difference]:
    """Weights of one side only, of other shapes, and of other types where both are stored."""
    first, second = ({tensor.name: tensor for tensor in side.tensors} for side in (left, right))
    alike = [name for name in first if name in second]
    found = _grouped(
        "weights",
        {name: (_described(first[name]), None) for name in first if name not in second}
        | {name: (None, _described(second[name])) for name in second if name not in first},
    )
    found += _grouped(
        "shapes",
        {
            name: (size(first[name].shape), size(second[name].shape))
            for name in alike
            if first[name].shape != second[name].shape
        },
    )
    if left.weights is not None and right.weights is not None:
        found += _grouped(
            "types",
            {
                name: (first[name].dtype, second[name].dtype)
                for name in alike
                if first[name].dtype != second[name].dtype
            },
        )
    return found


def _described(tensor: TensorFact) -> str:
    return f"{size(tensor.shape)} {tensor.dtype}"


def _grouped(section: str, values: Mapping[str, tuple]) -> list[Difference]:
    """One difference for all names that differ alike and only in numbers."""
    by_value: dict[tuple, list[str]] = {}
    for name, pair in values.items():
        by_value.setdefault(pair, []).append(name)
    return [
        Difference(
            section=section, name=name if count == 1 else f"{name} x{count}", left=one, right=other
        )
        for (one, other), names in by_value.items()
        for name, count in collapsed(names)
    ]


def _of_settings(
    section: str, left: Mapping[str, Any], right: Mapping[str, Any]
) -> list[Difference]:
    found = []
    for name in dict.fromkeys([*left, *right]):
        found += _if_unlike(section, name, left.get(name), right.get(name))
    return found


def _if_unlike(section: str, name: str, left: Any, right: Any) -> list[Difference]:
    if left == right:
        return []
    return [Difference(section=section, name=name, left=left, right=right)]


def _of_tokens(left: Sequence[TokensFact], right: Sequence[TokensFact]) -> list[Difference]:
    """Pictures of one size that take another number of tokens; of other sizes, place by place."""
    sides: list[dict[Any, TokensFact]] = []
    one_picture = len({(fact.width, fact.height) for fact in left}) == 1
    for facts in (left, right):
        keys = [fact.settings if one_picture else f"{fact.width} x {fact.height}" for fact in facts]
        sides.append(dict(zip(keys, facts, strict=True)))
    found = []
    for key in sides[0]:
        if key in sides[1]:
            found += _if_unlike("tokens", key, sides[0][key].tokens, sides[1][key].tokens)
    return found


def _of_pixels(left: PictureFacts, right: PictureFacts) -> list[Difference]:
    """Pixels of two pictures of the same upright size."""
    if (left.width, left.height) != (right.width, right.height):
        return []
    first, second = (np.asarray(open_picture(side.source), np.int16) for side in (left, right))
    unlike = int((first != second).any(-1).sum())
    largest = int(np.abs(first - second).max())
    note = f"{unlike:,} pixels differ, by at most {largest} of 255"
    return [] if not unlike else _if_unlike("picture", "pixels", None, note)


__all__ = ["Difference", "Differences", "WeightDifference", "collapsed", "compare"]
