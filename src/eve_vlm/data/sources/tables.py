"""Samples by number from every kind of file, as plain dicts; pictures inside stay unread.

A table knows nothing of forms: it yields what the file holds, with a `PictureRef` where the file
holds a picture itself.  Easy to get wrong: a table goes to the workers of a data loader, so it must
be small to send and must not share an open file with them.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from eve_vlm.data.files import is_url, open_file, place_is_said, read_range
from eve_vlm.data.json_offsets import JsonRecords, line_spans, parsed
from eve_vlm.data.kept_files import kept_array, stamp_of
from eve_vlm.data.picture_ref import PicturePart
from eve_vlm.data.sources.forms import PICTURE_ENDINGS, Form
from eve_vlm.data.tar_index import PACKED, Member, TarIndex

TEXT_ENDINGS = ("txt", "caption", "json", "cls", "id", "text")


class Table(Protocol):
    """Samples by number."""

    stamp: str
    """Names the state of the file."""

    def __len__(self) -> int:
        """Number of samples."""

    def __getitem__(self, index: int) -> Any:
        """Sample `index`."""

    def place(self, index: int) -> str:
        """Where it stands, for messages."""


class LineTable:
    """The lines of a text file, blank ones left out, each as `{"text": ...}`."""

    def __init__(self, path: str):
        self.path, self.stamp = path, stamp_of(path)
        self._spans = kept_array("lines", self.stamp, lambda: line_spans(path))

    def __reduce__(self) -> tuple[Any, ...]:
        """To another process goes the name alone."""
        return LineTable, (self.path,)

    def __len__(self) -> int:
        """Number of lines that hold something."""
        return len(self._spans) - 1

    def __getitem__(self, index: int) -> dict[str, str]:
        """One line."""
        start, end = self._spans[index].tolist()
        return {"text": _utf8(read_range(self.path, start, end - start), self.place(index)).strip()}

    def place(self, index: int) -> str:
        """The file and the number among its lines that hold something."""
        return f"{self.path}, text {index + 1}"


class WholeFile:
    """A text file as one sample."""

    def __init__(self, path: str):
        self.path, self.stamp = path, stamp_of(path)

    def __len__(self) -> int:
        """One."""
        return 1

    def __getitem__(self, index: int) -> dict[str, str]:
        """The text of the file."""
        with open_file(self.path) as file, place_is_said(self.path):
            return {"text": _utf8(file.read(), self.path)}

    def place(self, index: int) -> str:
        """The file."""
        return self.path


class TarTable:
    """The samples of a WebDataset shard."""

    def __init__(self, path: str):
        self.path = path
        index = TarIndex(path)
        self.stamp, self._samples = index.stamp, index.samples()

    def __reduce__(self) -> tuple[Any, ...]:
        """To another process goes the name alone."""
        return TarTable, (self.path,)

    def __len__(self) -> int:
        """Number of keys."""
        return len(self._samples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Texts and pictures of one key."""
        members = self._samples[index]
        texts = {
            member.name: read_range(self.path, member.offset, member.length)
            for member in members
            if member.ending.rpartition(".")[2] in TEXT_ENDINGS
        }
        return tar_sample(self.path, members, texts)

    def place(self, index: int) -> str:
        """The tar and the key."""
        return f"{self.path}:{self._samples[index][0].key}"


def tar_sample(path: str, members: Sequence[Member], texts: dict[str, bytes]) -> dict[str, Any]:
    """What the members of one key say: fields of its .json, texts by ending, and its pictures.

    Args:
        path: the tar.
        members: those of one key, in the order of the tar.
        texts: the bytes of the texts among them, by name.

    Raises:
        ValueError: if a text is damaged.
    """
    sample: dict[str, Any] = {"id": members[0].key}
    pictures: dict[str, Any] = {}
    for member in members:
        last, place = member.ending.rpartition(".")[2], f"{path}:{member.name}"
        if last in PICTURE_ENDINGS:
            pictures[member.ending] = PicturePart(
                name=place, path=path, offset=member.offset, length=member.length
            )
        elif member.name in texts and last == "json":
            fields = parsed(texts[member.name], lambda place=place: place)
            sample |= fields if isinstance(fields, dict) else {"json": fields}
        elif member.name in texts:
            text = _utf8(texts[member.name], place)
            sample[member.ending] = text
            sample.setdefault("text" if last != "caption" else "caption", text)
    if pictures:
        # The tar's own pictures count, whatever its .json calls them.
        ordered = [pictures[ending] for ending in sorted(pictures)]
        sample |= pictures | {"image": ordered, "images": ordered}
    return sample


def ending_of(path: str) -> str:
    """How a file's name ends, in small letters: `.json`, `.tar.gz`."""
    name = path.rpartition("/")[2].lower()
    for ending in (*PACKED, ".jsonl.gz", ".json.gz", ".txt.gz"):
        if name.endswith(ending):
            return ending
    return Path(name).suffix


def open_table(path: str, form: Form) -> Table:
    """The table of one file, by its ending.

    Raises:
        ValueError: if there is no such file, or it cannot be read by number.
    """
    ending = ending_of(path)
    if not is_url(path) and not Path(path).is_file():
        raise ValueError(f"{path} is not a file; check data.sources.path in the recipe.")
    if ending in (".json", ".jsonl", ".jsonl.gz", ".json.gz"):
        return JsonRecords(path)
    if ending == ".tar" or ending in PACKED:
        return TarTable(path)
    if ending == ".parquet":
        from eve_vlm.data.sources.parquet import ParquetTable

        return ParquetTable(path, form)
    if form.kind == "text":
        return LineTable(path) if ending == ".txt" else WholeFile(path)
    raise ValueError(
        f"{path} is of no kind that holds {form.kind}; give a .json, .jsonl, .parquet or .tar."
    )


def _utf8(data: bytes, place: str) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{place}: not UTF-8 text ({error.reason}); save it as UTF-8.") from None


__all__ = [
    "LineTable",
    "Table",
    "TarTable",
    "WholeFile",
    "ending_of",
    "open_table",
    "tar_sample",
]
