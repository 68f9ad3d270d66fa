"""Perceptual hashes: numbers that stay nearly the same when a picture is resized or saved again.

A hash says for each cell of a small grey copy whether it is brighter than its left neighbour.  64
of these bits find candidates, 256 bits and a grid of colours confirm them.  Easy to get wrong:
small copies must be made by averaging areas; with fewer samples, one pixel more or less of size
flips many bits.
"""

from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

if TYPE_CHECKING:
    from numpy.typing import NDArray

COARSE, FINE, COLOURS = 8, 16, 4  # cells a side
SIGNATURE = FINE * FINE // 8 + 3 * COLOURS * COLOURS  # bytes
BITS = 64


def difference_bits(picture: Image.Image, side: int) -> "NDArray[np.bool_]":
    """(side, side) booleans: whether a cell is brighter than the one on its left."""
    small = picture.convert("L").resize((side + 1, side), Image.Resampling.BOX)
    grey = np.asarray(small, np.int16)
    return grey[:, 1:] > grey[:, :-1]


def coarse_hash(picture: Image.Image) -> int:
    """64 bits as a number."""
    return int.from_bytes(np.packbits(difference_bits(picture, COARSE)).tobytes(), "big")


def signature(picture: Image.Image) -> bytes:
    """The finer hash and the colours of a grid, as bytes."""
    fine = np.packbits(difference_bits(picture, FINE)).tobytes()
    return fine + picture.resize((COLOURS, COLOURS), Image.Resampling.BOX).tobytes()


def bits_apart(one: "NDArray[np.uint64]", other: "NDArray[np.uint64]") -> "NDArray[np.uint8]":
    """In how many bits hashes differ, element by element."""
    return np.bitwise_count(one ^ other)


def fine_apart(
    one: "NDArray[np.uint8]", other: "NDArray[np.uint8]"
) -> "tuple[NDArray[np.int64], NDArray[np.float64]]":
    """Bits and mean colour in which signatures (n, bytes) differ, row by row."""
    cut = FINE * FINE // 8
    bits = np.bitwise_count(one[..., :cut] ^ other[..., :cut]).sum(-1, dtype=np.int64)
    colours = np.abs(one[..., cut:].astype(np.int16) - other[..., cut:]).mean(-1)
    return bits, colours


__all__ = [
    "BITS",
    "SIGNATURE",
    "bits_apart",
    "coarse_hash",
    "difference_bits",
    "fine_apart",
    "signature",
]
