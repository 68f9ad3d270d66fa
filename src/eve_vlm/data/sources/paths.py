"""What `path` and `split` of a source mean: several files, a part of them, a few of them.

    shards/{000..123}.tar        124 files in this order, all of which must be there
    data/*.jsonl                 every file that fits, by name
    hf:org/name, hf:folder       a Hugging Face data set (hf:org/name:config for one of several)
    mix.json#500                 500 records, drawn by the seed and the same in every epoch

Easy to get wrong: the split is cut first and the number is drawn from what is left.
"""

import glob
import re
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import numpy as np

from eve_vlm.data.files import is_url, place_is_said, url_system

_CAP = re.compile(r"#(\d+)$")
_BRACES = re.compile(r"\{([^{}]*)\}")
_SPLIT = re.compile(r"([^\[\]]*)(?:\[([^\[\]:]*):([^\[\]:]*)\])?$")
_BOUND = re.compile(r"(\d+)|(\d+(?:\.\d+)?)%")


class Place(NamedTuple):
    """A path taken apart."""

    path: str
    """What is left of it."""
    cap: int | None
    """Records to draw, None for all."""


def read_place(path: str) -> Place:
    """The path and the number behind its `#`."""
    found = _CAP.search(path)
    if found is None or (not is_url(path) and Path(path).is_file()):
        return Place(path, None)
    return Place(path[: found.start()], int(found[1]))


def expand(path: str) -> list[str]:
    """The files that a path means, in the order in which they are read.

    Raises:
        ValueError: if there is none.
    """
    if not is_url(path) and Path(path).exists():
        return [path]
    files = [
        file
        for pattern in _braces(path)
        for file in (_fitting(pattern) if _is_pattern(pattern) else [pattern])
    ]
    if not files:
        raise ValueError(f"{path} fits no file; check data.sources.path in the recipe.")
    twice = (
        {file for file in files if files.count(file) > 1} if len(set(files)) < len(files) else ()
    )
    if twice:
        raise ValueError(f"{path} names {min(twice)} twice; name every file once.")
    return files


def _is_pattern(path: str) -> bool:
    return any(sign in path for sign in "*?[")


def _fitting(pattern: str) -> list[str]:
    if not is_url(pattern):
        return sorted(glob.glob(pattern, recursive=True))
    system, inside = url_system(pattern)
    with place_is_said(pattern):
        return sorted(system.unstrip_protocol(name) for name in system.glob(inside))


def _braces(path: str) -> list[str]:
    """Every `{a,b}` and `{000..123}` written out, the first one slowest."""
    found = _BRACES.search(path)
    if found is None:
        return [path]
    inner = found[1]
    ends = re.fullmatch(r"(\d+)\.\.(\d+)", inner)
    if ends is None:
        choices = inner.split(",")
    else:
        first, last = int(ends[1]), int(ends[2])
        if last < first:
            raise ValueError(f"{path} counts down in {{{inner}}}; write the smaller number first.")
        choices = [str(number).zfill(len(ends[1])) for number in range(first, last + 1)]
    head, tail = path[: found.start()], path[found.end() :]
    return [head + choice + rest for choice in choices for rest in _braces(tail)]


# --- parts ----------------------------------------------------------------------------------------


class Split(NamedTuple):
    """A split taken apart."""

    name: str
    """Name of a split, empty for none."""
    begin: str
    """Where it begins, as it is written."""
    end: str
    """Where it ends, as it is written."""


def read_split(split: str | None) -> Split:
    """The name and the two ends of `train`, `[:95%]` or `train[1000:2000]`.

    Raises:
        ValueError: if it is written otherwise.
    """
    found = _SPLIT.match((split or "").strip())
    ends = () if found is None else [end for end in (found[2], found[3]) if end and end.strip()]
    if found is None or not all(_BOUND.fullmatch(end.strip()) for end in ends):
        raise ValueError(
            f"The split {split!r} is not understood; write a name, [:95%], [1000:2000] or "
            "train[:95%]."
        )
    return Split(found[1].strip(), (found[2] or "").strip(), (found[3] or "").strip())


def slice_of(split: Split, records: int) -> range:
    """The numbers of the records between the two ends.

    Slices that meet (`[:95%]` and `[95%:]`) hold every record exactly once, for any size.

    Raises:
        ValueError: if it reaches beyond the records, or holds none.
    """
    begin, end = _bound(split.begin or "0", records), _bound(split.end or "100%", records)
    if max(begin, end) > records:
        raise ValueError(
            f"The split [{split.begin}:{split.end}] reaches to record {max(begin, end):,}, but "
            f"there are {records:,}; make it smaller."
        )
    if end <= begin and (split.begin or split.end):
        raise ValueError(
            f"The split [{split.begin}:{split.end}] of {records:,} records holds none; make it "
            "larger."
        )
    return range(begin, end)


def _bound(text: str, records: int) -> int:
    found = _BOUND.fullmatch(text)
    assert found is not None, "checked by read_split"
    if found[1]:
        return int(found[1])
    # Exact, since 0.29 * 100 is below 29; halves go up.
    return int(Fraction(found[2]) * records / 100 + Fraction(1, 2))


def drawn(numbers: range, cap: int | None, *, seed: int, path: str) -> np.ndarray | range:
    """The numbers, or `cap` of them in order, drawn by the seed.

    Raises:
        ValueError: if there are fewer, or none is asked for.
    """
    if cap is None:
        return numbers
    if not 0 < cap <= len(numbers):
        raise ValueError(
            f"{path}#{cap} asks for {cap:,} records, but there are {len(numbers):,}; ask for 1 to "
            f"{len(numbers):,}."
        )
    chosen = np.random.default_rng(seed).choice(len(numbers), cap, replace=False, shuffle=False)
    return np.sort(chosen) + numbers.start


__all__ = ["Place", "Split", "drawn", "expand", "read_place", "read_split", "slice_of"]
