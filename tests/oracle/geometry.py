"""Which box of the canvas a picture takes, and how many tokens: whole numbers by slow search.

The published sizes come from doubles and `ceil`; here the smallest number of patches that covers
the short side is found by counting up, in integers. One thing a reader would get wrong: a square
picture takes the branch of tall ones.
"""

from __future__ import annotations

from typing import Any, NamedTuple


class Box(NamedTuple):
    """Pixels of the canvas that a picture covers; `bottom` and `right` are past the end."""

    top: int
    left: int
    bottom: int
    right: int


def cover(budget: int, short: int, long: int, patch: int) -> int:
    """Smallest count of patches with `count * patch >= budget * short / long`."""
    count = 0
    while count * patch * long < budget * short:
        count += 1
    return count


def teacher_box(height: int, width: int, settings: dict[str, Any]) -> Box:
    """The box on the teacher's canvas."""
    side, patch = settings["image_size_clip"], settings["patch_stride_clip"]
    if width > height:
        count = cover(side, height, width, patch)
        before = ((side // patch - count) // 2) * patch
        return Box(before, 0, before + count * patch, side)
    count = cover(side, width, height, patch)
    before = ((side // patch - count) // 2) * patch
    return Box(0, before, side, before + count * patch)


def box(height: int, width: int, settings: dict[str, Any]) -> Box:
    """The box on the student's canvas: the teacher's, magnified by a whole number."""
    ratio = settings["image_size"] // settings["image_size_clip"]
    return Box(*(ratio * number for number in teacher_box(height, width, settings)))


def grid(height: int, width: int, settings: dict[str, Any]) -> tuple[int, int]:
    """Rows and columns of tokens."""
    valid = box(height, width, settings)
    step = settings["patch_stride"] * settings["conv_stride"]
    return (valid.bottom - valid.top) // step, (valid.right - valid.left) // step


def count_tokens(rows: int, cols: int) -> int:
    """Class token, and for every row its columns and one row-end, counted one by one."""
    count = 1
    for _ in range(rows):
        for _ in range(cols):
            count += 1
        count += 1
    return count
