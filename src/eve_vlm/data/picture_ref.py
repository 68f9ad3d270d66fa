"""Pictures that are not opened yet: a file, a URL, a part of a tar, or bytes of a table.

Records carry these, so that planning a batch costs a header and only a worker decodes pixels.
Easy to get wrong: `size()` is the size *upright*, as `open()` gives it; a camera that was held on
its side writes the other one into the header.
"""

import hashlib
import io
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, cast

from PIL import Image

from eve_vlm.data.files import FileWindow, open_file, place_is_said, read_range
from eve_vlm.image_processing_eve import to_rgb
from eve_vlm.pictures import open_picture, picture_size, read_picture


@dataclass(frozen=True, kw_only=True, slots=True)
class PictureRef:
    """A picture that is not opened yet; goes to other processes as it is."""

    name: str
    """What it is called in messages."""
    known_size: tuple[int, int] | None = None
    """Upright width and height, where an index knows them."""

    def read(self) -> bytes:
        """The bytes of the picture file.

        Raises:
            ValueError: if they cannot be read.
        """
        raise NotImplementedError

    def open(self) -> Image.Image:
        """The picture, upright and in RGB.

        Raises:
            ValueError: if it is not there or cannot be read.
        """
        return read_picture(self.read(), name=self.name)

    def size(self) -> tuple[int, int]:
        """Upright width and height, without decoding pixels; known ones without reading.

        Raises:
            ValueError: if it is not there or its header cannot be read.
        """
        return self.known_size or self.header_size()

    def header_size(self) -> tuple[int, int]:
        """Upright width and height as the header says it now.

        Raises:
            ValueError: if it is not there or its header cannot be read.
        """
        return picture_size(self.read(), name=self.name)


@dataclass(frozen=True, kw_only=True, slots=True)
class PictureFile(PictureRef):
    """A picture file on a disk."""

    path: str
    """The file; a text, since a million paths as objects take seconds."""

    def read(self) -> bytes:
        """The whole file."""
        with open_file(self.path) as file, place_is_said(self.path):
            return file.read()

    def open(self) -> Image.Image:
        """The picture, upright and in RGB."""
        return open_picture(self.path)

    def header_size(self) -> tuple[int, int]:
        """Upright width and height; reads the header alone."""
        with open_file(self.path) as file:
            return picture_size(file, name=self.name)


@dataclass(frozen=True, kw_only=True, slots=True)
class PictureUrl(PictureRef):
    """A picture behind a URL that fsspec knows."""

    url: str
    """The URL."""

    def read(self) -> bytes:
        """The whole file."""
        with open_file(self.url) as file, place_is_said(self.url):
            return file.read()

    def open(self) -> Image.Image:
        """The picture, upright and in RGB."""
        with open_file(self.url) as file, place_is_said(self.url):
            return read_picture(file, name=self.name)

    def header_size(self) -> tuple[int, int]:
        """Upright width and height; reads the beginning of the file, if the server can do that."""
        with open_file(self.url) as file, place_is_said(self.url):
            return picture_size(file, name=self.name)


@dataclass(frozen=True, kw_only=True, slots=True)
class PicturePart(PictureRef):
    """A picture that is a part of a larger file: a member of a tar that is not compressed."""

    path: str
    """The larger file, on a disk or behind a URL."""
    offset: int
    """Where the picture begins."""
    length: int
    """Its bytes."""

    def read(self) -> bytes:
        """The bytes of the picture, and nothing around them."""
        return read_range(self.path, self.offset, self.length)

    def header_size(self) -> tuple[int, int]:
        """Upright width and height; reads the beginning of the part."""
        with open_file(self.path) as file, place_is_said(self.path):
            window = io.BufferedReader(FileWindow(file, self.offset, self.length))
            return picture_size(cast(BinaryIO, window), name=self.name)


@dataclass(frozen=True, kw_only=True, slots=True)
class PictureBytes(PictureRef):
    """A picture whose file is in memory: a cell of a table."""

    data: bytes
    """The bytes of the picture file."""

    def read(self) -> bytes:
        """The bytes."""
        return self.data


def open_image(image: Image.Image | Path | PictureRef) -> Image.Image:
    """The picture of a record: opened, or as it is where it is open already.

    Raises:
        ValueError: if it is not there or cannot be read.
    """
    if isinstance(image, Image.Image):
        return image
    return image.open() if isinstance(image, PictureRef) else open_picture(image)


def open_with_digest(image: Image.Image | Path | PictureRef) -> tuple[Image.Image, bytes]:
    """The picture as `open_image` gives it, and what its content comes to.

    That of a file counts its bytes, which are read once for both; that of an open picture its
    pixels, upright and in RGB.

    Raises:
        ValueError: as `open_image`.
    """
    if isinstance(image, Image.Image):
        upright = to_rgb(image, copy=False)
        content = hashlib.blake2b(repr(upright.size).encode())
        content.update(upright.tobytes())
        return image, content.digest()
    if isinstance(image, Path):
        image = PictureFile(name=str(image), path=str(image))
    data = image.read()
    return read_picture(data, name=image.name), hashlib.blake2b(data).digest()


def size_of_image(image: Image.Image | Path | PictureRef) -> tuple[int, int]:
    """Upright width and height of a record's picture, without decoding pixels.

    Raises:
        ValueError: if it is not there or its header cannot be read.
    """
    if isinstance(image, Image.Image):
        turned = image.getexif().get(0x0112, 1) in (5, 6, 7, 8)  # the orientation, as in to_rgb
        return (image.height, image.width) if turned else image.size
    if isinstance(image, PictureRef):
        return image.size()
    return PictureFile(name=str(image), path=str(image)).size()


__all__ = [
    "PictureBytes",
    "PictureFile",
    "PicturePart",
    "PictureRef",
    "PictureUrl",
    "open_image",
    "open_with_digest",
    "size_of_image",
]
