"""A source: a finite, ordered set of records with a name; files, parts of others, and joins.

Records are read only when asked for, their pictures later still.  Easy to get wrong: nothing is
dropped here; a record that cannot be read raises when it is asked for, and whoever asks counts it.
"""

import bisect
import dataclasses
import hashlib
import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

from eve_vlm.data.files import is_url
from eve_vlm.data.picture_folder import PictureFolder
from eve_vlm.data.record_index import RecordIndex, kept_index
from eve_vlm.data.records import Record
from eve_vlm.data.sources.forms import Form
from eve_vlm.data.sources.tables import Table, open_table


class Source(Protocol):
    """A finite, ordered set of records."""

    name: str
    """Names the data set in logs."""

    def __len__(self) -> int:
        """Number of records."""

    def __getitem__(self, index: int) -> Record:
        """Record `index`."""

    @property
    def fingerprint(self) -> str:
        """Changes when the records or their order change."""


@runtime_checkable
class Outlined(Protocol):
    """Records that are slow to draw, and whose sizes are known before."""

    def outline(self, index: int) -> Record:
        """Record `index` for measuring: the same texts, and pictures that only know their size."""


def outline_of(records: Any, index: int) -> Record:
    """Record `index` for measuring, not drawn where that can be avoided."""
    found: Record = records.outline(index) if isinstance(records, Outlined) else records[index]
    return found


def digest(*parts: Any) -> str:
    """A short name for what was given."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


class FileSource:
    """The records of one file or data set.

    Args:
        table: its samples.
        form: what they look like.
        pictures: finds their pictures.
        name: names the data set.
        prefix: put before the number of a record that has no id.
    """

    def __init__(
        self, table: Table, form: Form, pictures: PictureFolder, *, name: str, prefix: str = ""
    ):
        self.table, self.form, self.pictures = table, form, pictures
        self.name, self.prefix = name, prefix
        self.fingerprint = digest(
            table.stamp, form.kind, dict(form.columns), pictures.place, prefix
        )
        self._index: RecordIndex | None = kept_index(self.fingerprint)

    def __len__(self) -> int:
        """Number of samples."""
        return len(self.table)

    def __getitem__(self, index: int) -> Record:
        """Record `index`, its pictures not opened yet.

        Raises:
            ValueError: with its place, if it cannot be read or is not of the form.
        """
        if not 0 <= index < len(self.table):
            raise IndexError("record index out of range")
        record = self.form.record(
            self.table[index],
            place=lambda: self.table.place(index),
            number=f"{self.prefix}{index}",
            pictures=self.pictures,
            source=self.name,
        )
        if self._index is None:
            return record
        return dataclasses.replace(record, images=self._index.with_sizes(index, record.images))


class LlavaSource(FileSource):
    """Records of a JSON or JSON Lines file in the published LLaVA form.

    A sample is `{"id", "image" (one name, several, or none), "conversations": [{"from", "value"},
    ...]}`. As in the published preprocessing `<image>` marks go to the front of their turn, and an
    assistant turn before the first user turn is left out.
    """

    def __init__(self, path: str | Path, image_folder: str | Path | None = None):
        form = Form("llava", {})
        folder = Path(path).parent if image_folder is None else image_folder
        table = open_table(str(path), form)
        super().__init__(table, form, PictureFolder(folder), name=Path(path).stem)


class JoinedSource:
    """The files of one data set behind one another."""

    def __init__(self, sources: Sequence[Source], *, name: str):
        self.sources, self.name = list(sources), name
        self._ends = list(itertools.accumulate(len(source) for source in sources))
        self.fingerprint = digest([source.fingerprint for source in sources])

    def __len__(self) -> int:
        """Records of all of them."""
        return self._ends[-1]

    def __getitem__(self, index: int) -> Record:
        """Record `index`."""
        if not 0 <= index < len(self):
            raise IndexError("record index out of range")
        number = bisect.bisect_right(self._ends, index)
        return self.sources[number][index - (self._ends[number - 1] if number else 0)]


class PartSource:
    """Some records of a source, by their numbers."""

    def __init__(self, source: Source, numbers: Sequence[int] | np.ndarray):
        self.source, self.name = source, source.name
        self.numbers = numbers if isinstance(numbers, range) else np.asarray(numbers, np.int64)
        held = [numbers.start, numbers.stop] if isinstance(numbers, range) else None
        of = hashlib.sha256(np.asarray(numbers).tobytes()).hexdigest() if held is None else held
        self.fingerprint = digest(source.fingerprint, of)

    def __len__(self) -> int:
        """How many they are."""
        return len(self.numbers)

    def __getitem__(self, index: int) -> Record:
        """Record `index` of the part."""
        if not 0 <= index < len(self.numbers):
            raise IndexError("record index out of range")
        return self.source[int(self.numbers[index])]


class NamedSource:
    """A source that knows no name of its own, such as scenes.

    Args:
        records: records by number.
        name: names the data set.
        settings: all that its records depend on.
    """

    def __init__(self, records: Any, *, name: str, settings: Any):
        self.records, self.name = records, name
        self.fingerprint = digest(settings)

    def __len__(self) -> int:
        """Number of records."""
        return len(self.records)

    def __getitem__(self, index: int) -> Record:
        """Record `index`."""
        if not 0 <= index < len(self.records):
            raise IndexError("record index out of range")
        return dataclasses.replace(self.records[index], source=self.name)

    def outline(self, index: int) -> Record:
        """Record `index` for measuring."""
        return outline_of(self.records, index)


def folder_of(path: str) -> str:
    """The folder or URL in which a file lies."""
    return path.rpartition("/")[0] if is_url(path) else str(Path(path).parent)


__all__ = [
    "FileSource",
    "JoinedSource",
    "LlavaSource",
    "NamedSource",
    "Outlined",
    "PartSource",
    "Source",
    "digest",
    "folder_of",
    "outline_of",
]
