"""Looks at one picture: is it there, can it be decoded to its last pixel, how large is it.

Easy to get wrong: pictures are told apart by the bytes of their files, so the same picture saved
again counts as another; without decoding (`fast`) files are not read, and only names tell.
"""

import hashlib
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from eve_vlm.data.check.problems import (
    EXTREME_SHAPE,
    PICTURE_DAMAGED,
    PICTURE_MISSING,
    TINY_PICTURE,
)
from eve_vlm.data.picture_ref import PictureBytes, PictureFile, PictureRef, size_of_image
from eve_vlm.pictures import read_picture

LEAST_SIDE = 8  # pixels; a shorter side is a warning
MOST_ASPECT = 10  # times longer than the other side; more is a warning
REMEMBERED = 65_536  # pictures a process knows again, 0.3 kB each; data sets ask often about one


class Look(NamedTuple):
    """What is found out about a picture."""

    size: tuple[int, int]
    """Upright width and height; zeros where it cannot be read."""
    digest: bytes
    """16 bytes that tell pictures apart; empty where it cannot be read."""
    kind: str = ""
    """What is wrong with it, if anything."""
    message: str = ""
    """Said in a sentence."""


def digest_of(*parts: bytes) -> bytes:
    """16 bytes that stand for what was given: two of a billion differ with all but certainty."""
    return hashlib.blake2b(b"\0".join(parts), digest_size=16).digest()


def look_at(image: Image.Image | Path | PictureRef, *, fast: bool) -> Look:
    """One picture of a record.

    Args:
        image: it, or where it is.
        fast: reads the header alone.
    """
    if isinstance(image, Image.Image):
        size = size_of_image(image)
        return _judged(size, digest_of(repr(size).encode(), image.tobytes()), "A picture")
    if isinstance(image, Path):
        image = PictureFile(name=str(image), path=str(image))
    # Bytes of tables are not worth remembering: they would stay in memory.
    return _look(image, fast) if isinstance(image, PictureBytes) else _remembered(image, fast)


def _look(picture: PictureRef, fast: bool) -> Look:
    try:
        if fast:
            called = picture.data if isinstance(picture, PictureBytes) else picture.name.encode()
            return _judged(picture.header_size(), digest_of(called), picture.name)
        data = picture.read()
    except ValueError as error:
        return Look((0, 0), b"", _why(picture) if fast else PICTURE_MISSING.name, str(error))
    try:
        size = read_picture(data, name=picture.name).size
    except ValueError as error:
        return Look((0, 0), b"", PICTURE_DAMAGED.name, str(error))
    return _judged(size, digest_of(data), picture.name)


_remembered = lru_cache(maxsize=REMEMBERED)(_look)


def forget() -> None:
    """Looks anew at what was looked at before; pictures may have changed since the last check."""
    _remembered.cache_clear()


def _why(picture: PictureRef) -> str:
    """Whether a picture without a header is not there, or there and damaged."""
    try:
        picture.read()
    except ValueError:
        return PICTURE_MISSING.name
    return PICTURE_DAMAGED.name


def _judged(size: tuple[int, int], digest: bytes, name: str) -> Look:
    """A picture that can be read; its size may be a warning."""
    kind, (width, height) = "", size
    if min(size) < LEAST_SIDE:
        kind = TINY_PICTURE.name
    elif max(size) > MOST_ASPECT * min(size):
        kind = EXTREME_SHAPE.name
    return Look(size, digest, kind, f"{name} has {width} x {height} pixels." if kind else "")


__all__ = ["LEAST_SIDE", "MOST_ASPECT", "Look", "digest_of", "forget", "look_at"]
