"""Where a picture lies, as columns of a table, and how it is opened from there.

Every row says it in four columns, so that pixels are read when a stage needs them and never travel
between stages.  Easy to get wrong: drawings (.svg) have no pixels of their own; they are rendered
on white at the recipe's size, the same in every stage, as are pictures with an alpha channel.
"""

import io
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from PIL import Image, ImageOps

from eve_vlm.curate.recipe import DecodeSection
from eve_vlm.data.picture_ref import PictureFile, PicturePart, PictureRef
from eve_vlm.data.svg_drawing import draw_svg, on_white
from eve_vlm.pictures import read_picture

if TYPE_CHECKING:
    import pyarrow as pa

SVG = ".svg"
_MAY_BE_TRANSPARENT = (b"\x89PNG", b"GIF8", b"RIFF")  # the last is WebP
Row = Mapping[str, Any]


def row_schema() -> "pa.Schema":
    """The columns that reading gives."""
    import pyarrow as pa

    return pa.schema(
        [
            ("id", pa.string()),
            ("source", pa.string()),
            ("licence", pa.string()),
            ("text", pa.string()),  # the words that came with the picture
            ("path", pa.string()),  # of the file that holds it
            ("member", pa.string()),  # its name in there, a column of Parquet, or its URL
            ("offset", pa.int64()),  # bytes in the file; in Parquet the row group
            ("length", pa.int64()),  # bytes; in Parquet the row of the group; null: a whole file
            ("listed_side", pa.int32()),  # the shorter side in pixels, where a list of URLs says it
        ]
    )


def picture_ref(row: Row) -> PictureRef:
    """The picture of a row, not opened yet."""
    if row["length"] is None:
        return PictureFile(name=row["id"], path=row["path"])
    if row["path"].endswith(".parquet"):
        from eve_vlm.data.sources.parquet import PictureCell

        return PictureCell(
            name=row["id"],
            path=row["path"],
            group=row["offset"],
            row=row["length"],
            column=row["member"],
        )
    return PicturePart(name=row["id"], path=row["path"], offset=row["offset"], length=row["length"])


def is_drawing(row: Row) -> bool:
    """Whether it has to be rendered."""
    return (row["member"] or row["path"]).lower().endswith(SVG)


def read_bytes(row: Row) -> bytes:
    """The bytes of the picture file of a row.

    Raises:
        ValueError: if they cannot be read, or the picture was not fetched.
    """
    if row["path"] is None:
        raise ValueError(f"{row['id']} was not fetched; see why in its row.")
    return picture_ref(row).read()


class Opened(NamedTuple):
    """An opened picture."""

    picture: Image.Image
    """Upright and in RGB."""
    redrawn: bool
    """Whether it is not what its file decodes to: a drawing, or put on white."""


def open_bytes(data: bytes, row: Row, section: DecodeSection) -> Opened:
    """A row's picture from its file's bytes; what is transparent stands on white.

    Raises:
        ValueError: if it cannot be opened.
    """
    if is_drawing(row):
        try:
            return Opened(on_white(draw_svg(data.decode("utf-8"), width=section.svg_size)), True)
        except UnicodeDecodeError:
            raise ValueError(f"{row['id']} is no text, so no drawing; get it again.") from None
    picture = read_picture(data, name=row["id"], max_pixels=section.most_pixels)
    if data.startswith(_MAY_BE_TRANSPARENT):
        # Decoded once more, behind the checks of the first time: RGB alone shows what lies below
        # transparent pixels, mostly black.
        with Image.open(io.BytesIO(data)) as again:
            if again.has_transparency_data:
                seen = ImageOps.exif_transpose(again.convert("RGBA"))
                if np.asarray(seen.getchannel("A")).min() < 255:
                    return Opened(on_white(seen), True)
    return Opened(picture, False)


def open_rows(rows: Sequence[Row], section: DecodeSection) -> Iterator[Image.Image]:
    """The pictures of rows that were opened before, for a model; one at a time, as some are huge.

    Raises:
        ValueError: if one is not there any more.
    """
    for row in rows:
        yield open_bytes(read_bytes(row), row, section).picture


def as_png(picture: Image.Image) -> bytes:
    """A picture as a file that loses nothing."""
    stream = io.BytesIO()
    picture.save(stream, "PNG")
    return stream.getvalue()


__all__ = [
    "SVG",
    "Opened",
    "as_png",
    "is_drawing",
    "open_bytes",
    "open_rows",
    "picture_ref",
    "read_bytes",
    "row_schema",
]
