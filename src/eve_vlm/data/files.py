"""Files that may lie anywhere: on this disk, or behind a URL that fsspec knows (`s3://`, `zip://`).

Whatever is wrong with a place is said in a sentence that names it.  Easy to get wrong: fsspec comes
with some schemes only; `s3://` needs s3fs beside it, and a scheme nobody knows is a typing mistake.
"""

import io
import os
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO, cast

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.\-]*(::[A-Za-z][A-Za-z0-9+.\-]*)*://")


def is_url(path: str | Path) -> bool:
    """Whether fsspec has to open it: anything that begins with a scheme and `://`."""
    return isinstance(path, str) and "://" in path and _URL.match(path) is not None


def open_file(path: str | Path) -> BinaryIO:
    """Opens a file or URL for reading bytes; it can seek.

    Raises:
        ValueError: if it is not there, may not be read, or its scheme needs a package.
    """
    with place_is_said(path):
        if not is_url(path):
            return open(path, "rb")
        system, inside = url_system(str(path))
        return cast(BinaryIO, system.open(inside, "rb"))


def read_range(path: str | Path, offset: int, length: int) -> bytes:
    """Bytes `offset` to `offset + length` of a file or URL, and nothing around them.

    Raises:
        ValueError: as `open_file`, and if the file ends before.
    """
    if is_url(path):
        system, inside = url_system(str(path))
        with place_is_said(path):
            data = system.cat_file(inside, start=offset, end=offset + length)
    else:
        with open_file(path) as file, place_is_said(path):
            file.seek(offset)
            data = file.read(length)
    if len(data) != length:
        raise ValueError(
            f"{path} ends {length - len(data)} bytes too early; it is cut short, or changed since "
            "it was indexed, so get the file again."
        )
    return data


def url_system(url: str) -> tuple[Any, str]:
    """The fsspec file system of a URL, and the path inside it.

    Raises:
        ValueError: if the scheme is unknown or its package is missing.
    """
    with place_is_said(url):
        first, _, outer = url.partition("::")
        if outer:  # a file inside an archive, whose directory is read once
            scheme, _, inside = first.partition("://")
            return _archive(f"{scheme}://::{outer}", os.getpid()), inside
        import fsspec

        return fsspec.core.url_to_fs(url)


@lru_cache(maxsize=16)
def _archive(url: str, process: int) -> Any:
    """The file system of an archive; by process, because a fork shares the place in its file."""
    import fsspec

    return fsspec.core.url_to_fs(url)[0]


@contextmanager
def place_is_said(path: str | Path) -> Iterator[None]:
    """Turns what goes wrong with a file or URL into one sentence that names it.

    Raises:
        ValueError: in place of OSError, of a missing package and of an unknown scheme.
    """
    try:
        yield
    except FileNotFoundError:
        raise ValueError(f"{path} is not a file; check its name.") from None
    except ModuleNotFoundError as error:
        raise ValueError(
            f"{path} needs the package {error.name}; install it with pip install {error.name}."
        ) from None
    except ImportError as error:  # what fsspec raises for a scheme whose package is missing
        reason = " ".join(str(error).split()).rstrip(".")
        raise ValueError(f"{path} cannot be opened ({reason}); install that package.") from None
    except ValueError as error:
        if not str(error).startswith("Protocol not known"):
            raise
        scheme = str(path).split("://")[0]
        raise ValueError(
            f"{path} begins with {scheme}://, which fsspec does not know; use file://, s3://, "
            "gs://, https:// or a path."
        ) from None
    except (EOFError, zlib.error) as error:  # of what is compressed
        reason = " ".join(str(error).split()).rstrip(".")
        raise ValueError(
            f"{path} is cut short or damaged ({reason}); get the file again."
        ) from None
    except OSError as error:
        reason = error.strerror or " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{path} cannot be read ({reason}); check that you may read it.") from None


class FileWindow(io.RawIOBase):
    """Bytes `offset` to `offset + length` of an open file, as a file of its own (not copied)."""

    def __init__(self, file: BinaryIO, offset: int, length: int):
        self._file, self._offset, self._length, self._at = file, offset, length, 0

    def readable(self) -> bool:
        """It is."""
        return True

    def seekable(self) -> bool:
        """It is."""
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Moves the place of the next read."""
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._length}[whence]
        self._at = max(start + offset, 0)
        return self._at

    def tell(self) -> int:
        """The place of the next read."""
        return self._at

    def readinto(self, buffer: Any) -> int:
        """Fills a buffer with what comes next."""
        self._file.seek(self._offset + self._at)
        data = self._file.read(max(min(len(buffer), self._length - self._at), 0))
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)


__all__ = [
    "FileWindow",
    "is_url",
    "open_file",
    "place_is_said",
    "read_range",
    "url_system",
]
