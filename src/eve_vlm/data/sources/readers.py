"""Samples of one file in their order, with the place behind the last: what streams are made of.

A place is what it costs nothing to go to: a byte of a text or tar, a row of a Parquet file, or what
the library of Hugging Face says.  Easy to get wrong: a sample that cannot be read is handed out as
an error with its place, for a generator that raises could not go on behind it.
"""

import gzip
import itertools
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO, NamedTuple, Protocol, cast

from eve_vlm.data.files import is_url, open_file, place_is_said
from eve_vlm.data.json_offsets import BLANKS, BOM, parsed
from eve_vlm.data.picture_ref import PictureBytes
from eve_vlm.data.sources.forms import PICTURE_ENDINGS, Form
from eve_vlm.data.sources.hub import PREFIX, load_data_set
from eve_vlm.data.sources.names import nearest_names
from eve_vlm.data.sources.parquet import columns_of, parquet_file, read_rows
from eve_vlm.data.sources.tables import TEXT_ENDINGS, ending_of, tar_sample
from eve_vlm.data.tar_index import PACKED, Member, walk_tar

AT_ONCE = 64  # rows of a Parquet file in memory


class Taken(NamedTuple):
    """A sample from a file, or why it cannot be read."""

    where: str
    """Where it stands, for messages."""
    sample: Any = None
    """What the file holds."""
    error: str = ""
    """Why it cannot be read; empty if it can."""


class Reader(Protocol):
    """Samples of one file from a place on."""

    def __next__(self) -> Taken:
        """The next sample."""

    def place(self) -> Any:
        """The place behind the sample that came last; goes into JSON."""


class _FileReader:
    """A generator of samples and places behind them."""

    def __init__(self, samples: Iterator[tuple[Taken, Any]], place: Any):
        self._samples, self._place = samples, place

    def __next__(self) -> Taken:
        taken, self._place = next(self._samples)
        return taken

    def place(self) -> Any:
        return self._place


class HubReader:
    """Samples of a Hugging Face data set, streamed.

    Args:
        path: with `hf:` in front.
        split: name of the split.
        form: says which columns are read.
        place: where to begin, None at the beginning.
    """

    def __init__(self, path: str, split: str, form: Form, place: Any):
        self.path = path
        data = load_data_set(path, split, streaming=True).decode(False)
        if data.column_names is not None:
            data = data.select_columns(columns_of(path, data.column_names, form))
        self._data, self._number = data, 0
        if place is not None:
            self._number = place["number"]
            data.load_state_dict(place["state"])
        self._samples = iter(data)

    def __next__(self) -> Taken:
        """The next row, pictures undecoded."""
        sample = next(self._samples)
        self._number += 1
        return Taken(f"{self.path}, row {self._number - 1}", sample)

    def place(self) -> Any:
        """What the library needs to go on."""
        return {"number": self._number, "state": self._data.state_dict()}


def open_reader(path: str, split: str, form: Form, place: Any) -> Reader:
    """A reader of one file or data set from a place on.

    Raises:
        ValueError: if it is not there, or cannot be read in order.
    """
    if path.startswith(PREFIX):
        return HubReader(path, split, form, place)
    ending = ending_of(path)
    if ending in (".jsonl", ".jsonl.gz"):
        return _FileReader(_lines(path, place or 0, _json_line), place)
    if ending in (".txt", ".txt.gz") and form.kind == "text":
        return _FileReader(_lines(path, place or 0, _text_line), place)
    if ending in (".tar", ".tar.gz", ".tgz"):
        return _FileReader(_tar(path, place or 0), place)
    if ending == ".parquet":
        return _FileReader(_parquet(path, form, place or 0), place)
    kinds = [".jsonl", ".jsonl.gz", ".parquet", ".tar", ".tar.gz", ".txt"]
    raise ValueError(
        f"{path} cannot be read in order ({nearest_names(ending, kinds)}); leave out streaming, or "
        "write it in one of these kinds."
    )


def _open(path: str) -> BinaryIO:
    file = open_file(path)
    packed = path.endswith(".gz") or path.endswith(".tgz")
    return cast(BinaryIO, gzip.GzipFile(fileobj=file)) if packed else file


# --- lines ----------------------------------------------------------------------------------------


def _lines(path: str, start: int, read: Callable[[bytes, str], Any]) -> Iterator[tuple[Taken, int]]:
    with _open(path) as file, place_is_said(path):
        file.seek(start)
        if not start and file.read(len(BOM)) != BOM:
            file.seek(0)
        while True:
            where = f"{path}, byte {file.tell()}"
            line = file.readline()
            if not line:
                return
            if line.strip(BLANKS):
                try:
                    taken = Taken(where, read(line, where))
                except ValueError as error:
                    taken = Taken(where, error=str(error))
                yield taken, file.tell()


def _json_line(line: bytes, where: str) -> Any:
    return parsed(line.strip(BLANKS), lambda: where)


def _text_line(line: bytes, where: str) -> dict[str, str]:
    try:
        return {"text": line.decode("utf-8").strip()}
    except UnicodeDecodeError as error:
        raise ValueError(f"{where}: not UTF-8 text ({error.reason}); save it as UTF-8.") from None


# --- tar and parquet ------------------------------------------------------------------------------


def _tar(path: str, start: int) -> Iterator[tuple[Taken, int]]:
    """Samples of a shard; from afar or packed their pictures come with them."""
    apart = is_url(path) or path.endswith(PACKED)
    kept = {*TEXT_ENDINGS, *(PICTURE_ENDINGS if apart else ())}
    seen: set[str] = set()
    with _open(path) as file, place_is_said(path):
        walk = walk_tar(file, path, start)
        for key, group in itertools.groupby(walk, key=lambda found: found[0].key):
            if key in seen:
                raise ValueError(
                    f"{path} has members of {key!r} in two places, so it is not clear what belongs "
                    "together; give every sample a key of its own."
                )
            seen.add(key)
            members: list[Member] = []
            data: dict[str, bytes] = {}
            behind = start
            for found in group:
                member, behind = found
                if member.name in [one.name for one in members]:
                    raise ValueError(
                        f"{path} holds {member.name!r} twice; give every member a name of its own."
                    )
                members.append(member)
                if member.ending.rpartition(".")[2] in kept:
                    file.seek(member.offset)
                    data[member.name] = file.read(member.length)
            where = f"{path}:{key}"
            try:
                taken = Taken(where, _tar_sample(path, members, data))
            except ValueError as error:
                taken = Taken(where, error=str(error))
            yield taken, behind


def _tar_sample(path: str, members: list[Member], data: dict[str, bytes]) -> dict[str, Any]:
    sample = tar_sample(path, members, data)
    held = {
        member.name: PictureBytes(name=f"{path}:{member.name}", data=data[member.name])
        for member in members
        if member.name in data and member.ending.rpartition(".")[2] in PICTURE_ENDINGS
    }
    if held:
        ordered = [
            held[member.name]
            for member in sorted(members, key=lambda one: one.ending)
            if member.name in held
        ]
        sample |= {"image": ordered, "images": ordered}
        sample |= {member.ending: held[member.name] for member in members if member.name in held}
    return sample


def _parquet(path: str, form: Form, start: int) -> Iterator[tuple[Taken, int]]:
    names = columns_of(path, parquet_file(path).schema_arrow.names, form)
    for number, sample in read_rows(path, names, start=start, at_once=AT_ONCE):
        yield Taken(f"{path}, row {number}", sample), number + 1


__all__ = ["HubReader", "Reader", "Taken", "open_reader"]
