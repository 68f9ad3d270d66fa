"""Features of pictures kept by key: one table in a file or in memory, of records of one size.

A hash table with open places: a record lies in the first free one of `PROBES` places behind its
key's own.  Workers and processes read it through one map without a lock and see at once what was
added; writers take turns.  A record's head is written behind its features and holds their checksum,
so what is torn or damaged is not found and is made again.  Easy to get wrong: the file has holes,
so its length says nothing (twice the stated size); what it takes of the disk is counted inside.
"""

import json
import logging
import mmap
import struct
import zlib
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock

from eve_vlm.output_folder import require_room, written_whole

logger = logging.getLogger(__name__)

PAGE = 4096  # bytes that a disk gives at a time; records begin at multiples of it
PROBES = 64  # places that are looked at; half full, a free one comes after 2.5 on average
KEY_BYTES = 16  # of blake2b: two of a billion pictures meet with a chance of 1e-21
MAGIC = b"eve teacher features 1\n"
EMPTY = bytes(KEY_BYTES)
_HEAD = struct.Struct("<16sII8x")  # key, cells, checksum of the features
_COUNTS = struct.Struct("<QQ")  # records, bytes taken
_COUNTS_AT = PAGE - _COUNTS.size


class FeatureTable:
    """(cells, width) float16 features of pictures by `KEY_BYTES`-long keys.

    Args:
        path: the file; None keeps the table in memory, which processes forked later share.
        fingerprint: of what made the features; a file with another one is refused.
        width: of a cell's features.
        most_cells: of one picture.
        limit: bytes that the records may take.

    Raises:
        ValueError: if the file is of another size or maker, or there is no room for it.
    """

    def __init__(
        self, path: Path | None, *, fingerprint: str, width: int, most_cells: int, limit: int
    ):
        self.path, self.width, self.most_cells, self.limit = path, width, most_cells, limit
        self.record_bytes = self._taken(most_cells)
        # Twice as many places as whole records, so that they are found after a few.
        self.places = 2 * (limit // self.record_bytes)
        if not self.places:
            raise ValueError(
                f"stage.alignment.cache_gb is {limit / 1e9:g}, but one picture's features take "
                f"{self.record_bytes / 1e9:g} GB; give more."
            )
        self.full = False
        self._about = {"fingerprint": fingerprint, "width": width, "most_cells": most_cells}
        self._about["limit"] = limit
        self._map: Any = None
        if path is None:
            self._map = self._in_memory()
        else:
            self._open(path)

    # --- reading ----------------------------------------------------------------------------------

    def get(self, key: bytes, cells: int) -> np.ndarray | None:
        """(cells, width) float16 features, or None where they are not kept, or damaged."""
        place = self._find(key)
        return None if place is None else self._read(place, key, cells)

    @property
    def counts(self) -> tuple[int, int]:
        """Records, and the bytes that they take."""
        return (0, 0) if self._mapped is None else _COUNTS.unpack_from(self._mapped, _COUNTS_AT)

    def _read(self, at: int, key: bytes, cells: int) -> np.ndarray | None:
        found, held, checksum = _HEAD.unpack_from(self._mapped, at)
        size = 2 * cells * self.width
        start = at + _HEAD.size
        data = bytes(self._mapped[start : start + size])  # a copy, which no writer changes
        if found != key or held != cells or zlib.crc32(data) != checksum:
            return None
        return np.frombuffer(data, np.float16).reshape(cells, self.width)

    def _find(self, key: bytes) -> int | None:
        """Where the record of a key begins, whole or not."""
        if self._mapped is None:
            return None
        for at in self._around(key):
            found = self._mapped[at : at + KEY_BYTES]
            if found == key:
                return at
            if found == EMPTY:
                return None
        return None

    def _around(self, key: bytes) -> Iterator[int]:
        first = int.from_bytes(key[:8], "little")
        for step in range(min(PROBES, self.places)):
            yield PAGE + (first + step) % self.places * self.record_bytes

    # --- writing ----------------------------------------------------------------------------------

    def put(self, keys: Sequence[bytes], features: Sequence[np.ndarray]) -> int:
        """Keeps (cells, width) float16 features, those that are there already excepted.

        Where there is no room left it says so once and sets `full`; the features are then computed
        anew each time that they are wanted.

        Returns:
            How many were kept.

        Raises:
            ValueError: if features do not fit float16.
        """
        kept = 0
        with self._writing() as write:
            for key, value in zip(keys, features, strict=True):
                if not np.isfinite(value).all():
                    raise ValueError(
                        "The teacher's features go beyond 65,504, the most that float16 holds, so "
                        "they cannot be kept; set stage.alignment.cache to null."
                    )
                kept += self._put(write, key, np.ascontiguousarray(value, np.float16))
        return kept

    def _put(self, write: "_Writer", key: bytes, value: np.ndarray) -> bool:
        assert value.ndim == 2 and value.shape[1] == self.width and len(value) <= self.most_cells
        at = self._find(key)
        records, taken = self.counts
        if at is None:
            at = next((at for at in self._around(key) if self._mapped[at : at + 16] == EMPTY), None)
            records, taken = records + 1, taken + self._taken(len(value))
            if at is None or taken > self.limit:
                self._say_full(f"the {self.limit / 1e9:g} GB of stage.alignment.cache_gb are taken")
                return False
        elif self._read(at, key, len(value)) is not None:
            return False
        data = value.tobytes()
        try:
            write(at + _HEAD.size, data)
            write(at, _HEAD.pack(key, len(value), zlib.crc32(data)))
            write(_COUNTS_AT, _COUNTS.pack(records, taken))
        except OSError as error:
            self._say_full(f"{self.path} cannot grow ({error.strerror})")
            return False
        return True

    def _say_full(self, reason: str) -> None:
        if not self.full:
            logger.warning(
                "No more features of the teacher are kept, because %s; those of other pictures are "
                "computed each time. %d pictures are kept.",
                reason,
                self.counts[0],
            )
        self.full = True

    def _writing(self) -> "_Writer":
        if self._mapped is None:
            raise RuntimeError("a table in memory is written by the process that made it")
        return _Writer(self.path, self._mapped)

    # --- the file ---------------------------------------------------------------------------------

    def _taken(self, cells: int) -> int:
        """Bytes of the disk for a record of so many cells."""
        return -(-(_HEAD.size + 2 * cells * self.width) // PAGE) * PAGE

    @property
    def _length(self) -> int:
        return PAGE + self.places * self.record_bytes

    @property
    def _mapped(self) -> Any:
        """The table's bytes; None where one in memory came to a process that was not forked."""
        if self._map is None and self.path is not None:
            with self.path.open("rb") as file:
                self._map = mmap.mmap(file.fileno(), self._length, access=mmap.ACCESS_READ)
        return self._map

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_map": None}

    def _first_page(self) -> bytes:
        text = MAGIC + json.dumps(self._about, sort_keys=True).encode() + b"\n"
        assert len(text) <= _COUNTS_AT
        return text.ljust(PAGE, b"\0")

    def _in_memory(self) -> mmap.mmap:
        import psutil  # comes with accelerate

        free = psutil.virtual_memory().available
        if free < self.limit:
            raise ValueError(
                f"stage.alignment.cache_gb is {self.limit / 1e9:g}, but there are {free / 1e9:.2f} "
                "GB of memory left; give less, or set stage.alignment.cache to disk."
            )
        return mmap.mmap(-1, self._length)  # takes memory where it is written only

    def _open(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{path}.lock"):
            if path.exists() and not self._is_whole(path):
                logger.warning("%s is damaged; it is made again", path)
                path.unlink()
            try:
                require_room(path, self.limit - (self.counts[1] if path.exists() else 0))
            except ValueError as error:
                said = str(error).rstrip(".")
                raise ValueError(f"{said}, or give a smaller stage.alignment.cache_gb.") from None
            if not path.exists():
                with written_whole(path) as part, part.open("wb") as file:
                    file.write(self._first_page())
                    file.truncate(self._length)

    def _is_whole(self, path: Path) -> bool:
        """Whether a file is a table; one of another size or maker is refused."""
        with path.open("rb") as file:
            page = file.read(PAGE)
        wanted = self._first_page()
        if page[:_COUNTS_AT] == wanted[:_COUNTS_AT]:
            return path.stat().st_size == self._length
        if not page.startswith(MAGIC):
            return False
        try:
            found = json.loads(page[len(MAGIC) :].partition(b"\n")[0])
        except ValueError:
            return False
        if self._about == found | {"limit": self.limit}:
            raise ValueError(
                f"{path} was made with stage.alignment.cache_gb {found['limit'] / 1e9:g} but the "
                f"recipe says {self.limit / 1e9:g}; give it as before, or remove the file."
            )
        raise ValueError(
            f"{path} holds features of another teacher, layer or canvas ({found}); remove the file."
        )


class _Writer:
    """Writes bytes at a place of a table while it holds the table's lock.

    Files are written through a handle: a full disk is an error there, and would be a signal that
    ends the process where a map is written to.
    """

    def __init__(self, path: Path | None, mapped: mmap.mmap):
        self.path, self.mapped = path, mapped
        self.lock: Any = nullcontext() if path is None else FileLock(f"{path}.lock")
        self.file: Any = None

    def __enter__(self) -> "_Writer":
        self.lock.__enter__()
        if self.path is not None:
            self.file = self.path.open("r+b", buffering=0)
        return self

    def __exit__(self, *error: object) -> None:
        if self.file is not None:
            self.file.close()
        self.lock.__exit__(*error)

    def __call__(self, at: int, data: bytes) -> None:
        if self.file is None:
            self.mapped[at : at + len(data)] = data
            return
        self.file.seek(at)
        while data:
            data = data[self.file.write(data) :]


__all__ = ["KEY_BYTES", "FeatureTable"]
