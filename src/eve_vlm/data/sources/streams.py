"""Sources that are read in the order of their files, with an exact place to go on from.

Nothing is counted or indexed first, so a stream begins at once, however much data there is: JSON
Lines (also .gz), Parquet, tar shards and Hugging Face data sets.  Easy to get wrong: a stream is an
iterator that goes on behind a bad record; `next` raises ValueError for it once, with its place, and
whoever asks counts it.
"""

import logging
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

from eve_vlm.data.picture_folder import PictureFolder
from eve_vlm.data.records import Record
from eve_vlm.data.sources.build import SourceSettings, name_of
from eve_vlm.data.sources.forms import FIELDS, Form
from eve_vlm.data.sources.hub import PREFIX
from eve_vlm.data.sources.paths import expand, read_place, read_split
from eve_vlm.data.sources.quarantine import Quarantine
from eve_vlm.data.sources.readers import Reader, open_reader
from eve_vlm.data.sources.source import folder_of

logger = logging.getLogger(__name__)


class StreamSource(Protocol):
    """Records in order, with a place."""

    name: str
    """Names the data set in logs."""

    def __iter__(self) -> Iterator[Record]:
        """Itself."""

    def __next__(self) -> Record:
        """The next record; a ValueError for a bad one, behind which it goes on."""

    def state_dict(self) -> dict[str, Any]:
        """The place behind the record that came last."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes to a place."""

    def shard(self, index: int, count: int) -> "StreamSource":
        """Share `index` of `count`, from the beginning: what one process reads."""


class BrokenFile(OSError):
    """A file of a stream is damaged or not there: what is behind that place would be lost."""


class FileStream:
    """The records of files in their order.

    A share of it is every `count`-th file where there are enough of them, else every `count`-th
    record of each file.

    Args:
        files: names of files, or the one name of a Hugging Face data set.
        form: what their samples look like.
        pictures: finds pictures; None looks beside each file.
        name: names the data set.
        split: of a Hugging Face data set.
        endless: begins again after the last file.
        quarantine: records to leave out, by id.
        part: number of the share, and how many there are.
    """

    def __init__(
        self,
        files: Sequence[str],
        form: Form,
        pictures: PictureFolder | None,
        *,
        name: str,
        split: str = "",
        endless: bool = False,
        quarantine: Quarantine | None = None,
        part: tuple[int, int] = (0, 1),
    ):
        self.files, self.form, self.pictures, self.name = list(files), form, pictures, name
        self.split, self.endless, self.quarantine, self.part = split, endless, quarantine, part
        index, count = part
        self._by_files = len(self.files) >= count
        self._mine = self.files[index::count] if self._by_files else self.files
        self.epoch = self.left_out = 0
        self._file = self._seen = 0  # the file that is read, and the samples taken from it
        self._place: Any = None  # in that file, while no reader is open
        self._reader: Reader | None = None
        self._idle = True  # nothing came since the last beginning

    def shard(self, index: int, count: int) -> "FileStream":
        """Share `index` of `count` of this share, from the beginning."""
        assert 0 <= index < count
        mine, of = self.part
        return FileStream(
            self.files,
            self.form,
            self.pictures,
            name=self.name,
            split=self.split,
            endless=self.endless,
            quarantine=self.quarantine,
            part=(mine + of * index, of * count),
        )

    def state_dict(self) -> dict[str, Any]:
        """The place behind the record that came last, and what it is a place in."""
        place = self._place if self._reader is None else self._reader.place()
        return {
            "epoch": self.epoch,
            "file": self._file,
            "place": place,
            "seen": self._seen,
            "left_out": self.left_out,
            "files": self.files,
            "part": list(self.part),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes to a place.

        Raises:
            ValueError: if it is a place in other files or in another share.
        """
        for key, own in (("files", self.files), ("part", list(self.part))):
            if state[key] != own:
                raise ValueError(
                    f"{self.name}: the saved place has the {key} {str(state[key])[:80]}, but now "
                    f"they are {str(own)[:80]}; go on with the data and the number of processes "
                    "that the run began with."
                )
        self.epoch, self._file, self._place = state["epoch"], state["file"], state["place"]
        self._seen, self.left_out = state["seen"], state["left_out"]
        self._reader, self._idle = None, False

    def __iter__(self) -> "FileStream":
        """Itself; a stream has one place."""
        return self

    def __next__(self) -> Record:
        """The next record, its pictures not opened yet.

        Raises:
            ValueError: for a record that cannot be read; the next call goes on behind it.
            BrokenFile: for a file that cannot be; no call goes on.
        """
        while True:
            if self._file == len(self._mine):
                self._begin_again()
            try:
                if self._reader is None:
                    path = self._mine[self._file]
                    self._reader = open_reader(path, self.split, self.form, self._place)
                taken = next(self._reader)
            except ValueError as error:
                raise BrokenFile(str(error)) from None
            except StopIteration:
                self._file, self._seen, self._place, self._reader = self._file + 1, 0, None, None
                continue
            number, self._seen = self._seen, self._seen + 1
            index, count = self.part
            if not self._by_files and number % count != index:
                continue
            self._idle = False
            if taken.error:
                raise ValueError(taken.error)
            record = self._record(taken.sample, taken.where, number)
            if self.quarantine is not None and (self.name, record.id) in self.quarantine:
                self.left_out += 1
                continue
            return record

    def _begin_again(self) -> None:
        """The next epoch, or the end."""
        if self.left_out:
            logger.warning(
                "%s: %d records are left out by the quarantine list so far",
                self.name,
                self.left_out,
            )
        if not self.endless:
            raise StopIteration
        if self._idle:
            raise StopIteration  # an endless stream of nothing would never come back
        self.epoch, self._file, self._idle = self.epoch + 1, 0, True

    def _record(self, sample: Any, where: str, number: int) -> Record:
        path = self._mine[self._file]
        free = path.startswith(PREFIX)
        pictures = self.pictures or PictureFolder("." if free else folder_of(path), free=free)
        prefix = f"{name_of(path)}:" if len(self.files) > 1 else ""
        return self.form.record(
            sample,
            place=lambda: where,
            number=f"{prefix}{number}",
            pictures=pictures,
            source=self.name,
        )


class StreamMixture:
    """Several streams as one: whichever is furthest behind its share comes next.

    Args:
        streams: where records come from.
        weights: their shares, in any unit.
    """

    name = "mixture"

    def __init__(self, streams: Sequence[StreamSource], weights: Sequence[float]):
        self.streams, self.weights = list(streams), list(weights)
        self._taken = [0] * len(self.streams)
        self._ended = [False] * len(self.streams)

    @property
    def names(self) -> list[str]:
        """Names of the streams, in their order."""
        return [stream.name for stream in self.streams]

    def __iter__(self) -> "StreamMixture":
        """Itself; a stream has one place."""
        return self

    def __next__(self) -> Record:
        """The next record; a stream that ends leaves its share to the others.

        Raises:
            ValueError: for a record that cannot be read; the next call goes on behind it.
        """
        while not all(self._ended):
            number = min(
                (number for number, ended in enumerate(self._ended) if not ended),
                key=lambda number: (self._taken[number] + 1) / self.weights[number],
            )
            try:
                record = next(self.streams[number])
            except StopIteration:
                self._ended[number] = True
                continue
            except ValueError:
                self._taken[number] += 1  # it had its turn
                raise
            self._taken[number] += 1
            return record
        raise StopIteration

    def state_dict(self) -> dict[str, Any]:
        """The places of all streams, and whose turn it is."""
        return {
            "taken": list(self._taken),
            "ended": list(self._ended),
            "streams": [stream.state_dict() for stream in self.streams],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes to a place.

        Raises:
            ValueError: if it belongs to other streams.
        """
        if len(state["streams"]) != len(self.streams):
            raise ValueError(
                f"The saved place is one of {len(state['streams'])} streams, but there are "
                f"{len(self.streams)}; give the sources that the run began with."
            )
        self._taken, self._ended = list(state["taken"]), list(state["ended"])
        for stream, place in zip(self.streams, state["streams"], strict=True):
            stream.load_state_dict(place)

    def shard(self, index: int, count: int) -> "StreamMixture":
        """Share `index` of `count` of every stream, from the beginning."""
        return StreamMixture([stream.shard(index, count) for stream in self.streams], self.weights)


def build_stream(
    sections: Sequence[Any],
    *,
    endless: bool = True,
    quarantine: Quarantine | None = None,
) -> StreamMixture:
    """The streams that a recipe's sources describe, mixed by `weight`, or by `repeat` without one.

    Raises:
        ValueError: for what a user can mend in the recipe.
    """
    streams = [_stream(section, endless, quarantine) for section in sections]
    weights = [one.repeat if one.weight is None else one.weight for one in sections]
    return StreamMixture(streams, weights)


def _stream(section: SourceSettings, endless: bool, quarantine: Quarantine | None) -> FileStream:
    place, part = read_place(section.path or ""), read_split(section.split)
    if not section.streaming or section.kind not in FIELDS:
        raise ValueError(
            f"{section.path or section.kind} is not read in order, but other sources are; set "
            "data.sources.streaming alike for all of them (scenes cannot)."
        )
    if place.cap is not None or part.begin or part.end:
        raise ValueError(
            f"{section.path} with the split {section.split!r} takes a part by number, which needs "
            "the records counted; leave out streaming, the number behind # or the slice."
        )
    form = Form(section.kind, dict(section.columns)).checked()
    hub = place.path.startswith(PREFIX)
    if part.name and not hub:
        raise ValueError(f"{place.path} has no named splits; leave out split.")
    return FileStream(
        [place.path] if hub else expand(place.path),
        form,
        None if section.image_folder is None else PictureFolder(section.image_folder),
        name=section.name or (place.path if hub else name_of(place.path)),
        split=part.name,
        endless=endless,
        quarantine=quarantine,
    )


__all__ = ["BrokenFile", "FileStream", "StreamMixture", "StreamSource", "build_stream"]
