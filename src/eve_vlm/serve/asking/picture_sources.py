"""What a user may name as a picture: a file, a folder, a PDF, a URL, or - for standard input.

All become a stream of sources, each with a name that stays the same from run to run, so that a long
run can go on where it was stopped.  Easy to get wrong: nothing is opened while the names are
listed, so a folder of a million pictures costs its file names only, and a picture that cannot be
read is still listed: opening it raises, so that the caller decides whether to go on.
"""

import functools
import logging
import os
import re
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, NoReturn

from PIL import Image

from eve_vlm.pictures import MAX_BYTES, MAX_PIXELS, open_picture, read_picture
from eve_vlm.serve.fetch import fetch_picture_bytes

logger = logging.getLogger(__name__)

PAGE_PIXELS = 1344  # the longer side of a rendered page: twice the published longest_edge of 672
# For a URL that the user of this machine has typed: much more than a server grants to strangers.
FETCH_SECONDS, FETCH_BYTES = 60.0, 2**28
# What counts as a picture in a folder, also where it cannot be read here, so that this is said.
SUFFIXES = (
    *(".apng", ".avif", ".bmp", ".eps", ".gif", ".heic", ".heif", ".ico", ".j2k", ".jfif", ".jp2"),
    *(".jpe", ".jpeg", ".jpg", ".jxl", ".pbm", ".pdf", ".pgm", ".png", ".pnm", ".ppm", ".psd"),
    *(".svg", ".tga", ".tif", ".tiff", ".webp"),
)
# PDFium must be called by one thread at a time, whatever the documents.
_PDFIUM = threading.Lock()


@dataclass(frozen=True, kw_only=True, slots=True)
class PictureSource:
    """One picture that is not open yet."""

    name: str
    "What to call it: its path or URL, `-`, or a PDF's path with `#` and the number of the page."
    open: Callable[[], Image.Image]
    "Reads it upright and in RGB, or raises a ValueError of one sentence."


class _Settings(NamedTuple):
    recursive: bool
    page_pixels: int
    max_pixels: int


def find_pictures(
    names: Sequence[str],
    *,
    recursive: bool = False,
    page_pixels: int = PAGE_PIXELS,
    max_pixels: int = MAX_PIXELS,
    stdin: BinaryIO | None = None,
) -> Iterator[PictureSource]:
    """The pictures that a user names, in order; folders and PDFs become many.

    A name is a file, a folder (its pictures, sorted by name; hidden files and links to folders are
    left out), a PDF (`a.pdf`, `a.pdf#2` or `a.pdf#2-4`), an http or https URL, or `-` for the bytes
    of standard input.  Names are looked up at once, before the first picture is given.  Files in a
    folder whose suffix is no picture's are left out, and their number is logged.

    Args:
        recursive: looks into the folders of a folder too.
        page_pixels: the longer side of a PDF's page in pixels; about twice the model's
            `longest_edge` keeps small print sharp.
        max_pixels: larger pictures are refused when they are opened.
        stdin: is read instead of standard input.

    Raises:
        ValueError: if a name leads nowhere or `-` comes twice, and, when its turn comes, if a
            folder has no pictures or cannot be listed.
    """
    if list(names).count("-") > 1:
        raise ValueError("Standard input (-) can be read only once; name it once.")
    settings = _Settings(recursive, page_pixels, max_pixels)
    found = [_sources_of(name, settings, stdin) for name in names]
    return (source for sources in found for source in sources)


def _sources_of(name: str, settings: _Settings, stdin: BinaryIO | None) -> Iterator[PictureSource]:
    """The sources behind one name."""
    read = functools.partial(read_picture, name=name, max_pixels=settings.max_pixels)
    if name == "-":
        stream = sys.stdin.buffer if stdin is None else stdin
        data = functools.cache(stream.read)  # once, although a source may be opened twice
        read = functools.partial(read, name="standard input")
        return iter([PictureSource(name=name, open=lambda: read(data(MAX_BYTES + 1)))])
    if re.match("https?://", name, re.IGNORECASE):
        return iter([PictureSource(name=name, open=lambda: read(_fetched(name)))])
    path, pages = Path(name), ""
    if path.is_dir():
        return _sources_in(path, settings)
    document, mark, after = name.rpartition("#")
    if mark and not path.exists() and document.lower().endswith(".pdf"):
        path, pages = Path(document), after
    if not path.exists():
        raise ValueError(f"{name} is neither a file nor a folder; check the name of the picture.")
    return _sources_from(path, pages, settings)


def _fetched(url: str) -> bytes:
    """The bytes of a picture in the internet, from any port, but from public addresses only."""
    return fetch_picture_bytes(
        url, max_bytes=FETCH_BYTES, timeout=FETCH_SECONDS, allow_http=True, ports=range(1, 2**16)
    )


def _sources_in(folder: Path, settings: _Settings) -> Iterator[PictureSource]:
    """The pictures in a folder, by name, before those in its folders."""
    given = left_out = 0
    for parent, folders, files in os.walk(folder, onerror=_refuse_folder):
        folders[:] = sorted(_visible(folders)) if settings.recursive else []
        for file in sorted(_visible(files)):
            if os.path.splitext(file)[1].lower() in SUFFIXES:
                given += 1
                yield from _sources_from(Path(parent, file), "", settings)
            else:
                left_out += 1
    if left_out:
        logger.warning("%s: %d files are left out, which are no pictures by name", folder, left_out)
    if not given:
        hint = "" if settings.recursive else "; folders in it were not looked into"
        raise ValueError(f"{folder} has no pictures{hint}.")


def _visible(names: list[str]) -> Iterator[str]:
    return (name for name in names if not name.startswith("."))


def _refuse_folder(error: OSError) -> None:
    raise ValueError(
        f"{error.filename} cannot be listed ({error.strerror}); check its permissions."
    )


def _sources_from(path: Path, pages: str, settings: _Settings) -> Iterator[PictureSource]:
    """The picture of one file, or the pages of a PDF."""
    # A name that is not UTF-8 could not be written to a file of answers.
    name = path.as_posix().encode("utf-8", "backslashreplace").decode("utf-8")
    if path.suffix.lower() != ".pdf":
        read = functools.partial(open_picture, path, max_pixels=settings.max_pixels)
        yield PictureSource(name=name, open=read)
        return
    try:
        numbers = _page_numbers(path, pages)
    except ValueError as error:
        # Said when it is opened, as of any other file that cannot be read.
        refuse = functools.partial(_refuse, str(error))
        yield PictureSource(name=f"{name}#{pages}" if pages else name, open=refuse)
        return
    for number in numbers:
        read = functools.partial(_page, path, number, settings.page_pixels)
        yield PictureSource(name=f"{name}#{number}", open=read)


def _refuse(reason: str) -> NoReturn:
    raise ValueError(reason)


# --- the pages of a PDF ---------------------------------------------------------------------------


@contextmanager
def _document(path: Path) -> Iterator[Any]:
    """An open PDF; whatever is wrong with it is said."""
    try:
        import pypdfium2 as pdfium
    except ImportError:
        raise ValueError(
            f'{path} is a PDF, and no package reads it yet; run: pip install "eve-vlm[pdf]".'
        ) from None
    try:
        with _PDFIUM, path.open("rb") as stream:
            document = pdfium.PdfDocument(stream)
            try:
                yield document
            finally:
                document.close()
    except OSError as error:
        raise ValueError(
            f"{path} cannot be read ({error.strerror}); check that you may read it."
        ) from None
    except pdfium.PdfiumError as error:
        if pdfium.raw.FPDF_GetLastError() == pdfium.raw.FPDF_ERR_PASSWORD:
            raise ValueError(f"{path} has a password; save it without one first.") from None
        raise ValueError(
            f"{path} has no pages or is damaged ({str(error).rstrip('.')}); get the file again."
        ) from None


def _page_numbers(path: Path, pages: str) -> range:
    """The pages of a PDF that are asked for: all, one (`2`) or some (`2-4`), counted from 1."""
    asked = re.fullmatch(r"([0-9]{1,9})(?:-([0-9]{1,9}))?", pages)
    if pages and not asked:
        raise ValueError(f"{path}#{pages} names no pages; write {path}#2 or {path}#2-4.")
    with _document(path) as document:
        count = len(document)
    if count == 0:
        raise ValueError(f"{path} has no pages, so there is nothing to look at.")
    first, last = (int(asked[1]), int(asked[2] or asked[1])) if asked else (1, count)
    if not 1 <= first <= last <= count:
        raise ValueError(f"{path} has {count} pages, not {pages}; choose from 1 to {count}.")
    return range(first, last + 1)


def _page(path: Path, number: int, page_pixels: int) -> Image.Image:
    """Draws one page, its longer side `page_pixels` long whatever size it claims on paper."""
    with _document(path) as document:
        page = document[number - 1]
        scale = page_pixels / max(page.get_size())
        return page.render(scale=scale).to_pil().convert("RGB")  # a copy


__all__ = ["PAGE_PIXELS", "SUFFIXES", "PictureSource", "find_pictures"]
