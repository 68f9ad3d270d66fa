"""Opens pictures of people and from the network; whatever is wrong with one is said in a sentence.

Easy to get wrong: Pillow opens lazily, so a truncated file fails only when its pixels are read; a
tiny file can announce billions of pixels; and Pillow's own guard is one global for all threads,
which a server must not touch.  All three are settled here, once: the size is read from the header
and checked before any pixel is decoded, and Pillow's guard stays as the caller has set it.
"""

import io
import re
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from PIL import ExifTags, Image, ImageFile
from PIL.TiffImagePlugin import (
    IMAGELENGTH,
    IMAGEWIDTH,
    TILELENGTH,
    TILEWIDTH,
    TiffImageFile,
)

from .image_processing_eve import to_rgb

# 16384 x 16384, which takes 800 MB as RGB; a server should ask for less.
MAX_PIXELS = 2**28
# More than an uncompressed picture of MAX_PIXELS takes; for pipes and devices without an end.
MAX_BYTES = 2**30
# What is read, by Pillow's names.  Left out on purpose: EPS (starts ghostscript), ICO (its true
# size shows only when it is decoded), JPEG 2000 and some forty formats that hardly anybody has.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF")
# What a server should take from strangers: what every browser shows, with decoders well tried.
WEB_FORMATS = ("PNG", "JPEG", "WEBP", "GIF")
# A progressive JPEG has about 10 scans; each costs time for the whole picture and may be 30 bytes
# long: 1000 more on 16 megapixels (94 kB) took 15 s.
MAX_SCANS = 100
# Inside a scan 0xFF is followed by 0 or a restart marker (0xD0 to 0xD7); before markers it fills.
_MARKER = re.compile(rb"\xff[^\x00\x01\xff\xd0-\xd8]", re.DOTALL)
# Whatever Pillow's readers raise for bytes that do not make sense.
_DAMAGE = (
    *(OSError, SyntaxError, EOFError, ValueError, TypeError, LookupError, ArithmeticError),
    *(RuntimeError, MemoryError, AttributeError, AssertionError, struct.error, zlib.error),
)


def open_picture(
    path: str | Path, *, max_pixels: int = MAX_PIXELS, formats: tuple[str, ...] | None = None
) -> Image.Image:
    """Reads one picture file upright and in RGB (the first frame of an animation).

    Raises:
        ValueError: if there is no such file, or it is no picture, truncated, empty or too large.
    """
    path = Path(path)
    try:
        if not path.is_file():
            raise ValueError(f"{path} is not a file; check the name of the picture.")
        with path.open("rb") as stream:
            return read_picture(stream, name=str(path), max_pixels=max_pixels, formats=formats)
    except OSError as error:
        raise ValueError(
            f"{path} cannot be read ({error.strerror}); check that you may read it."
        ) from None


def read_picture(
    data: bytes | BinaryIO,
    *,
    name: str,
    max_pixels: int = MAX_PIXELS,
    formats: tuple[str, ...] | None = None,
) -> Image.Image:
    """Reads the bytes of one picture upright and in RGB (the first frame of an animation).

    Safe to call from many threads at once.

    Args:
        data: the whole file, or a stream that is read to its end.
        name: what the picture is called in messages.
        max_pixels: larger pictures are refused from their header, undecoded.
        formats: the formats to read, by Pillow's names; `FORMATS` unless told otherwise.

    Raises:
        ValueError: if it is no picture of these formats, or damaged, truncated, empty or too large.
    """
    content = data if isinstance(data, bytes) else data.read(MAX_BYTES + 1)
    if len(content) > MAX_BYTES:
        raise ValueError(f"{name} has more than {MAX_BYTES:,} bytes; make it smaller first.")
    kind, image = _begin(io.BytesIO(content), name, formats or FORMATS)
    with image:
        _check_sizes(image, name, max_pixels)
        if kind == "JPEG" and _scans_of(content) > MAX_SCANS:
            raise ValueError(
                f"{name} is a JPEG of more than {MAX_SCANS} scans, which would take very long; "
                "save it again with any program."
            )
        if image.mode == "F":
            raise ValueError(
                f"{name} has floating-point pixels, whose range is unknown; convert it to 8 or 16 "
                "bits first."
            )
        with _damage_is_said_of(name):
            image.load()
            return to_rgb(image, copy=False)


def picture_size(
    data: bytes | BinaryIO,
    *,
    name: str,
    max_pixels: int = MAX_PIXELS,
    formats: tuple[str, ...] | None = None,
) -> tuple[int, int]:
    """Width and height of what `read_picture` would return; from the header, undecoded.

    One exception: a PNG with text or EXIF behind its pixels is decoded, since Pillow looks there
    for its orientation.  Damage behind the header is not seen.

    Args:
        data: the whole file, or a stream that can seek.
        name: what the picture is called in messages.
        max_pixels: larger pictures are refused.
        formats: the formats to read, by Pillow's names; `FORMATS` unless told otherwise.

    Raises:
        ValueError: as `read_picture`, as far as the header shows it.
    """
    stream = io.BytesIO(data) if isinstance(data, bytes) else data
    if "JPEG" in (formats or FORMATS) and (size := _plain_jpeg_size(stream.read(4096))):
        _check_size(*size, name, max_pixels)
        return size
    stream.seek(0)
    kind, image = _begin(stream, name, formats or FORMATS)
    with image:
        _check_sizes(image, name, max_pixels)
        with _damage_is_said_of(name):
            width, height = image.size
            if isinstance(image, TiffImageFile):  # newer Pillows turn the size, not yet the pixels
                width, height = int(image.tag_v2[IMAGEWIDTH]), int(image.tag_v2[IMAGELENGTH])
            if kind == "PNG" and "exif" not in image.info and not _has_text_behind(stream):
                exif = Image.Image.getexif(image)  # not its own, which decodes the pixels first
            else:
                exif = image.getexif()
            turned = exif.get(ExifTags.Base.Orientation, 1) in (5, 6, 7, 8)
    return (height, width) if turned else (width, height)


def _begin(
    stream: BinaryIO, name: str, formats: tuple[str, ...]
) -> tuple[str, ImageFile.ImageFile]:
    """The kind of a picture, and the picture with its header read."""
    head = stream.read(16)
    stream.seek(0)
    kind = _kind_of(head, formats)
    if kind is None:
        raise ValueError(
            f"{name} is not a picture of a kind that is read here; give a file of one of these "
            f"kinds: {', '.join(formats)}."
        )
    with _damage_is_said_of(name):
        # Not `Image.open`, which applies the global guard; this is what it calls.
        return kind, Image.OPEN[kind][0](stream, "")


def _check_sizes(image: Image.Image, name: str, max_pixels: int) -> None:
    """Refuses what would be too large to decode, or is nothing."""
    with _damage_is_said_of(name):
        sizes = _sizes_to_decode(image)
    for width, height in sizes:
        _check_size(width, height, name, max_pixels)


def _check_size(width: int, height: int, name: str, max_pixels: int) -> None:
    if width * height > max_pixels:
        raise ValueError(
            f"{name} has {width} x {height} pixels, more than {max_pixels:,} in all; make "
            "it smaller first."
        )
    if min(width, height) < 1:
        raise ValueError(f"{name} has {width} x {height} pixels, so there is nothing to look at.")


def _plain_jpeg_size(head: bytes) -> tuple[int, int] | None:
    """Width and height of a JPEG whose beginning holds nothing that could turn it.

    None leaves it to Pillow, which takes three times as long: that counts in a million headers.
    """
    at, size = 2, None
    while head[:3] == b"\xff\xd8\xff" and at + 10 <= len(head) and head[at] == 0xFF:
        marker = head[at + 1]
        if marker == 0xDA:  # the pixels begin
            return size
        if marker == 0xE1 or not 0xC0 <= marker <= 0xFE or 0xD0 <= marker <= 0xD9:
            return None  # EXIF or XMP, or something rare
        if marker in (0xC0, 0xC1, 0xC2):  # baseline, extended, progressive
            if size or head[at + 4] != 8 or head[at + 9] not in (1, 3, 4):
                return None
            height, width = struct.unpack_from(">HH", head, at + 5)
            size = (width, height) if width and height else None
        at += 2 + int.from_bytes(head[at + 2 : at + 4], "big")
    return None


def _has_text_behind(png: BinaryIO) -> bool:
    """Whether text or EXIF chunks follow the pixels of a PNG; every chunk is stepped over."""
    place, at = png.tell(), 8  # behind the signature
    kind, seen = b"", set()
    while kind != b"IEND":
        png.seek(at)
        head = png.read(8)
        if len(head) < 8:
            break
        length, kind = int.from_bytes(head[:4], "big"), head[4:]
        if kind == b"IDAT" or b"IDAT" in seen:
            seen.add(kind)
        at += 12 + length
    png.seek(place)  # where Pillow goes on
    return bool(seen & {b"eXIf", b"tEXt", b"zTXt", b"iTXt"})


def _kind_of(content: bytes, formats: tuple[str, ...]) -> str | None:
    """The first of these formats whose signature the bytes begin with."""
    Image.init()  # idempotent; fills Image.OPEN
    for kind in formats:
        if kind in Image.OPEN:  # AVIF came with Pillow 11.3
            accepts = Image.OPEN[kind][1]
            # A reader whose library is missing answers with a text instead.
            if accepts is not None and accepts(content[:16].ljust(16, b"\0")) is True:
                return kind
    return None


def _sizes_to_decode(image: Image.Image) -> list[tuple[int, int]]:
    """The size of a picture, and of what is decoded for it if that can be larger."""
    sizes = [image.size]
    if isinstance(image, TiffImageFile) and {TILEWIDTH, TILELENGTH} <= set(image.tag_v2):
        # A tile is decoded whole: 140 kB with a tile of 12000 x 12000 can show 8 x 8 pixels.
        sizes.append((int(image.tag_v2[TILEWIDTH]), int(image.tag_v2[TILELENGTH])))
    return sizes


def _scans_of(jpeg: bytes) -> int:
    """Counts a JPEG's scans, from marker to marker up to the end of the first picture."""
    at, scans = 2, 0
    while (marker := _MARKER.search(jpeg, at)) and marker[0] != b"\xff\xd9":  # the end
        scans += marker[0] == b"\xff\xda"
        at = marker.end() + int.from_bytes(jpeg[marker.end() : marker.end() + 2], "big")
    return scans


@contextmanager
def _damage_is_said_of(name: str) -> Iterator[None]:
    try:
        yield
    except Image.DecompressionBombError as error:  # some readers apply Pillow's guard themselves
        raise ValueError(f"{name} has too many pixels ({error}); make it smaller first.") from None
    except _DAMAGE as error:
        reason = " ".join(str(error).split())[:200].rstrip(".") or type(error).__name__
        raise ValueError(
            f"{name} is damaged or cut short ({reason}); get the file again."
        ) from None


__all__ = [
    "FORMATS",
    "MAX_BYTES",
    "MAX_PIXELS",
    "WEB_FORMATS",
    "open_picture",
    "picture_size",
    "read_picture",
]
