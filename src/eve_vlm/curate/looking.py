"""The stage `decode`: opens every picture once and notes all that later stages decide by.

Decoding costs more than everything else that is done without a model, so it is done once: size,
checksum, contrast, detail, share of text, hashes.  A rule of the filter can then change without a
picture being opened again.  Easy to get wrong: a file that ends early decodes in some programs with
a grey rest, and must count as damaged here (Pillow raises, `pictures.py` says it).
"""

import hashlib
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from eve_vlm.curate.blocks import with_reasons
from eve_vlm.curate.hashes import SIGNATURE, coarse_hash, signature
from eve_vlm.curate.places import is_drawing, open_bytes, read_bytes
from eve_vlm.curate.tasks import Task, bins

if TYPE_CHECKING:
    import pyarrow as pa
    from numpy.typing import NDArray

SMALL = 128  # pixels, the longer side of the copy that contrast and detail are measured on
TEXT_SIDE, CELL = 512, 16  # pixels: the copy for text, and its cells
LEAST_TEXT = 128  # pixels, the shorter side of a picture that can hold lines of text
EDGE = 48  # of 255: a step between neighbours that a stroke makes
SIDES = (0, 128, 256, 449, 672, 1024, 2048, 4096)  # bins of shorter sides, pixels


def look(rows: "pa.Table", task: Task) -> "pa.Table":
    """The rows with what their pictures measure; what cannot be opened is dropped."""
    import pyarrow as pa

    section = task.recipe.decode
    found: list[dict[str, Any]] = []
    why: list[str | None] = []
    because: list[str | None] = []
    for row in rows.to_pylist():
        try:
            data = read_bytes(row)
            picture, redrawn = open_bytes(data, row, section)
            kind = "svg" if is_drawing(row) else kind_of(data)
            found.append(measured(picture) | {"bytes": len(data), "format": kind})
            found[-1]["redrawn"] = redrawn
            found[-1]["sha256"] = hashlib.sha256(data).digest()
            why.append(None)
            because.append(None)
        except ValueError as error:
            found.append({})
            why.append("cannot be opened")
            because.append(str(error))
    added = pa.Table.from_pylist(found, schema=looked_schema())
    sides = np.array([min(one["width"], one["height"]) for one in found if one], int)
    task.counts["shorter side in pixels"] += bins(sides, SIDES)
    for name in added.column_names:
        rows = rows.append_column(name, added[name])
    return with_reasons(rows, why, because)


def looked_schema() -> "pa.Schema":
    """The columns that decoding adds."""
    import pyarrow as pa

    return pa.schema(
        [
            ("width", pa.int32()),
            ("height", pa.int32()),
            ("bytes", pa.int64()),
            ("format", pa.string()),
            ("redrawn", pa.bool_()),  # not what the file decodes to: see places.py
            ("sha256", pa.binary(32)),  # of the file
            ("contrast", pa.float32()),
            ("detail", pa.float32()),
            ("text_share", pa.float32()),
            ("hash", pa.uint64()),
            ("signature", pa.binary(SIGNATURE)),
        ]
    )


def kind_of(data: bytes) -> str:
    """The ending that fits the bytes of a picture that could be opened."""
    for kind, start in (
        ("jpg", b"\xff\xd8"),
        ("png", b"\x89PNG"),
        ("gif", b"GIF8"),
        ("bmp", b"BM"),
    ):
        if data.startswith(start):
            return kind
    if data[8:12] == b"WEBP":
        return "webp"
    if data[4:8] == b"ftyp":
        return "avif"
    return "tif" if data[:2] in (b"II", b"MM") else "ppm"


def measured(picture: Image.Image) -> dict[str, Any]:
    """What the filter and the search for duplicates ask of a picture."""
    size = picture.size
    # Whole blocks of pixels are averaged first, which is fast: of 2250 x 1500 pixels all that
    # follows took 27 ms on the picture itself.
    picture = picture.reduce(max(max(size) // TEXT_SIDE, 1))
    small = picture.convert("L")
    small.thumbnail((SMALL, SMALL), Image.Resampling.BOX, reducing_gap=None)
    grey = np.asarray(small, np.float32)
    steps = [np.abs(np.diff(grey, axis=axis)).ravel() for axis in (0, 1)]
    joined = np.concatenate(steps)
    return {
        "width": size[0],
        "height": size[1],
        "contrast": float(grey.std()),
        "detail": float(joined.mean()) if joined.size else 0.0,
        "text_share": text_share(picture),
        "hash": coarse_hash(picture),
        "signature": signature(picture),
    }


def text_share(picture: Image.Image) -> float:
    """The share of a picture that looks like lines of text, from 0 to 1.

    Text is strokes on a plain ground: a cell counts if sharp steps cross it often and most of its
    pixels have the ground's grey; and if its neighbours on the left or right count too, because
    text runs in lines.
    """
    if min(picture.size) < LEAST_TEXT:
        return 0.0
    copy = picture.convert("L")
    copy.thumbnail((TEXT_SIDE, TEXT_SIDE), Image.Resampling.BOX)
    grey = np.asarray(copy, np.int16)
    rows, cols = grey.shape[0] // CELL, grey.shape[1] // CELL
    if not rows:
        return 0.0  # a strip that is too thin at this size
    cells = _cells(grey[: rows * CELL, : cols * CELL], rows, cols)  # (rows, cols, CELL, CELL)
    sharp = np.abs(np.diff(cells, axis=3)) > EDGE
    crossings = sharp.sum((2, 3)) / CELL  # steps in each line of the cell, on average
    texty = crossings > 1.0
    # The median is the slow part, so it is taken of those cells alone that may be text.
    chosen = cells[texty].reshape(-1, CELL * CELL)
    ground = np.median(chosen, axis=1, keepdims=True) if len(chosen) else chosen
    plain = (np.abs(chosen - ground) < EDGE / 2).mean(1) if len(chosen) else np.empty(0)
    texty[texty] = (plain > 0.4) & (plain < 0.97)
    beside = np.zeros_like(texty)
    beside[:, 1:] |= texty[:, :-1]
    beside[:, :-1] |= texty[:, 1:]
    return float((texty & beside).mean())


def _cells(grey: "NDArray[np.int16]", rows: int, cols: int) -> "NDArray[np.int16]":
    return grey.reshape(rows, CELL, cols, CELL).transpose(0, 2, 1, 3)


__all__ = ["kind_of", "look", "looked_schema", "measured", "text_share"]
