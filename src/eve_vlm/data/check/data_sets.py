"""Data sets to check, as the workers of a data loader read them: by number, or in order (streams).

Easy to get wrong: a stream has one place, so only one process can read it in order; it is read from
its beginning again when records of it are asked for by number, to name or to show them.
"""

from collections.abc import Iterable, Iterator
from typing import Any, Protocol

from torch.utils.data import Dataset, IterableDataset

from eve_vlm.data.check.looking import digest_of
from eve_vlm.data.check.problems import MALFORMED, Problem
from eve_vlm.data.check.record import Facts, RecordChecker, named
from eve_vlm.data.check.tally import Part, part_of
from eve_vlm.data.check.unread import why_unread
from eve_vlm.data.records import Record
from eve_vlm.data.sources import Source
from eve_vlm.data.sources.streams import BrokenFile, StreamSource

AT_ONCE = 64  # records that a worker checks before it reports
Found = tuple[Facts | None, bytes, list[Problem]]


class DataSet(Protocol):
    """Records to check."""

    name: str
    """The data set."""
    records: int | None
    """How many; None where that is not known before they were read."""

    def parts(self, checker: RecordChecker) -> "Dataset[Part | str]":
        """What a data loader takes: all records, checked; a text says why the rest is lost."""

    def fetch(self, numbers: Iterable[int]) -> dict[int, Record]:
        """Some records by their numbers; without those that cannot be read."""

    def read(self, number: int) -> Record:
        """One record by its number; a ValueError if it cannot be read or is not there."""

    def find(self, id: str) -> int | None:
        """The number of the first record with this id."""


class Numbered:
    """A source whose records can be read by number, by many processes."""

    def __init__(self, source: Source):
        self.source, self.name = source, source.name
        self.records: int | None = len(source)

    def parts(self, checker: RecordChecker) -> "Dataset[Part | str]":
        """Ranges of records."""
        return _Ranges(self.source, checker)

    def fetch(self, numbers: Iterable[int]) -> dict[int, Record]:
        """Some records by their numbers."""
        found = {}
        for number in numbers:
            try:
                found[number] = self.source[number]
            except ValueError:
                continue  # its reason is in the report
        return found

    def read(self, number: int) -> Record:
        """One record by its number."""
        if number >= len(self.source):
            raise ValueError(_none(self.name, len(self.source), number))
        return self.source[number]

    def find(self, id: str) -> int | None:
        """The number of the first record with this id."""
        for number in range(len(self.source)):
            if any(record.id == id for record in self.fetch([number]).values()):
                return number
        return None


class _Ranges(Dataset):
    def __init__(self, source: Source, checker: RecordChecker):
        self.source, self.checker = source, checker

    def __len__(self) -> int:
        return -(-len(self.source) // AT_ONCE)

    def __getitem__(self, number: int) -> Part:
        end = min((number + 1) * AT_ONCE, len(self.source))
        return part_of([self._checked(index) for index in range(number * AT_ONCE, end)])

    def _checked(self, index: int) -> Found:
        try:
            record = self.source[index]
        except ValueError as error:
            return None, b"", [why_unread(self.source, index, error)]
        return _found(self.checker, record, index)


def _found(checker: RecordChecker, record: Record, index: int) -> Found:
    facts = checker(record)
    return facts, digest_of(record.id.encode()), named(facts, index, record.id)


class Streamed:
    """A source that is read in order, by one process."""

    records: int | None = None

    def __init__(self, stream: StreamSource):
        self.stream, self.name = stream, stream.name

    def parts(self, checker: RecordChecker) -> "Dataset[Part | str]":
        """All records in order."""
        return _InOrder(self.stream.shard(0, 1), checker)

    def fetch(self, numbers: Iterable[int]) -> dict[int, Record]:
        """Some records by their numbers; reads up to the last of them."""
        wanted = set(numbers)
        last = max(wanted, default=-1)
        found = {}
        for index, record in enumerate(_records(self.stream.shard(0, 1))):
            if index > last or isinstance(record, BrokenFile):
                break
            if index in wanted and isinstance(record, Record):
                found[index] = record
        return found

    def read(self, number: int) -> Record:
        """One record by its number; reads up to it."""
        index = -1
        for index, record in enumerate(_records(self.stream.shard(0, 1))):
            if index == number or isinstance(record, BrokenFile):
                if not isinstance(record, Record):
                    raise ValueError(str(record))
                return record
        raise ValueError(_none(self.name, index + 1, number))

    def find(self, id: str) -> int | None:
        """The number of the first record with this id."""
        for index, record in enumerate(_records(self.stream.shard(0, 1))):
            if isinstance(record, Record) and record.id == id:
                return index
        return None


def _none(name: str, records: int, number: int) -> str:
    return f"{name} has {records:,} records, so there is no record {number}; count from 0."


def _records(stream: StreamSource) -> Iterator[Record | ValueError | BrokenFile]:
    """Records of a stream, and errors in the place of those that cannot be read."""
    while True:
        try:
            yield next(stream)
        except StopIteration:
            return
        except BrokenFile as error:
            yield error
            return
        except ValueError as error:
            yield error


class _InOrder(IterableDataset):
    def __init__(self, stream: StreamSource, checker: RecordChecker):
        self.stream, self.checker = stream, checker

    def __iter__(self) -> Iterator[Any]:
        found: list[Found] = []
        for index, record in enumerate(_records(self.stream)):
            if isinstance(record, BrokenFile):
                yield part_of(found)
                yield str(record)
                return
            if isinstance(record, Record):
                found.append(_found(self.checker, record, index))
            else:
                problem = Problem(MALFORMED.name, index, str(index), str(record))
                found.append((None, b"", [problem]))
            if len(found) == AT_ONCE:
                yield part_of(found)
                found = []
        yield part_of(found)


__all__ = ["DataSet", "Numbered", "Streamed"]
