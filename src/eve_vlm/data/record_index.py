"""What is known of a file's records without decoding: pictures, their sizes, letters of text.

`eve data index` makes it on all cores and keeps it in the cache folder; sources that find one put
the sizes into their picture refs, and planning packed rows opens no picture file at all.  Easy to
get wrong: it is kept by the state of the data file, not of the pictures; whoever replaces pictures
has to index again with `--again`.
"""

import dataclasses
import logging
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from eve_vlm.data.kept_files import kept_file
from eve_vlm.data.picture_ref import PictureRef, size_of_image
from eve_vlm.data.records import Record, text_of
from eve_vlm.output_folder import written_whole

logger = logging.getLogger(__name__)

UNREAD = -1  # pictures of a record that cannot be read itself


class RecordIndex(NamedTuple):
    """Facts of all records of a file, by number."""

    ends: np.ndarray
    """(records,) int64: pictures of all records up to and with each."""
    characters: np.ndarray
    """(records,) int32: letters of text, -1 for a record that cannot be read."""
    sizes: np.ndarray
    """(pictures, 2) int32: upright width and height, zeros for one that cannot be read."""

    def sizes_of(self, number: int) -> np.ndarray:
        """The sizes of one record's pictures, (pictures, 2)."""
        return self.sizes[self.ends[number - 1] if number else 0 : self.ends[number]]

    def with_sizes(self, number: int, images: Sequence[Any]) -> list[Any]:
        """The pictures of a record with their sizes; as they are where the index does not fit."""
        sizes = self.sizes_of(number).tolist()
        if len(sizes) != len(images):
            return list(images)
        return [
            dataclasses.replace(image, known_size=tuple(size))
            if isinstance(image, PictureRef) and size[0]
            else image
            for image, size in zip(images, sizes, strict=True)
        ]


class Facts(NamedTuple):
    """What is found out about one record."""

    characters: int
    """Letters of text; -1 if it cannot be read."""
    sizes: list[tuple[int, int]]
    """Width and height of its pictures, zeros where they cannot be read."""


def facts_of(records: Any, numbers: Iterable[int]) -> Iterator[Facts]:
    """Facts of some records of a source, from texts and picture headers."""
    for number in numbers:
        try:
            record: Record = records[number]
        except ValueError:
            yield Facts(UNREAD, [])
            continue
        letters = sum(len(text_of(message)) for message in record.messages)
        yield Facts(letters, [_size(image) for image in record.images])


def _size(image: Any) -> tuple[int, int]:
    try:
        return image.header_size() if isinstance(image, PictureRef) else size_of_image(image)
    except ValueError:
        return (0, 0)


def joined(facts: Sequence[Facts]) -> RecordIndex:
    """Facts of records in order as one index."""
    counts = np.array([len(one.sizes) for one in facts], np.int64)
    sizes = [size for one in facts for size in one.sizes]
    return RecordIndex(
        np.cumsum(counts),
        np.array([one.characters for one in facts], np.int32),
        np.array(sizes, np.int32).reshape(-1, 2),
    )


def stacked(parts: Sequence[RecordIndex]) -> RecordIndex:
    """Indices of neighbouring ranges of records as one."""
    before = np.cumsum([0, *(len(part.sizes) for part in parts)])
    return RecordIndex(
        np.concatenate([part.ends + start for part, start in zip(parts, before, strict=False)]),
        np.concatenate([part.characters for part in parts]),
        np.concatenate([part.sizes for part in parts]),
    )


def _files(fingerprint: str) -> list[Path]:
    return [kept_file(f"index-{field}", fingerprint) for field in RecordIndex._fields]


def kept_index(fingerprint: str) -> RecordIndex | None:
    """The index of a source, mapped into memory; None where it was not made yet."""
    files = _files(fingerprint)
    if not all(file.is_file() for file in files):
        return None
    return RecordIndex(*(np.load(file, mmap_mode="r", allow_pickle=False) for file in files))


def keep_index(fingerprint: str, index: RecordIndex) -> None:
    """Keeps the index of a source in the cache folder."""
    for file, array in zip(_files(fingerprint), index, strict=True):
        file.parent.mkdir(parents=True, exist_ok=True)
        with written_whole(file) as part, part.open("wb") as stream:
            np.save(stream, array)


__all__ = [
    "Facts",
    "RecordIndex",
    "facts_of",
    "joined",
    "keep_index",
    "kept_index",
    "stacked",
]
