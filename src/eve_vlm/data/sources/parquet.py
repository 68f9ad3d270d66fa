"""Parquet files as tables: words by row group, pictures only when one is opened.

Parquet cannot fetch a single row: whoever opens one picture reads the pictures of its whole row
group.  In order (streaming) that costs nothing; shuffled it costs a row group for each picture, so
files for shuffled reading want row groups of a hundred rows or less.  Easy to get wrong: a picture
column is not known by its name but by its type, which is binary or a struct with `bytes`.
"""

import bisect
import itertools
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from eve_vlm.data.files import is_url, place_is_said
from eve_vlm.data.kept_files import stamp_of
from eve_vlm.data.picture_ref import PictureRef
from eve_vlm.data.sources.forms import FIELDS, NEEDED, Form
from eve_vlm.data.sources.names import nearest_names

logger = logging.getLogger(__name__)

HEAVY = 64 * 2**20  # bytes of pictures in a row group, above which shuffled reading is slow


@dataclass(frozen=True, kw_only=True, slots=True)
class PictureCell(PictureRef):
    """A picture in a Parquet file."""

    path: str
    """The file."""
    group: int
    """The row group."""
    row: int
    """The row inside of it."""
    column: str
    """The column."""

    def read(self) -> bytes:
        """The bytes of the picture file."""
        value = _column(self.path, self.group, self.column)[self.row].as_py()
        if isinstance(value, Mapping):
            value = value["bytes"]
        if not isinstance(value, bytes):
            raise ValueError(f"{self.name} is empty; mend or remove the row.")
        return value


class ParquetTable:
    """The rows of a Parquet file that a form needs.

    Raises:
        ValueError: if the file cannot be read, or lacks a column.
    """

    def __init__(self, path: str, form: Form):
        import pyarrow as pa

        self.path, self.form, self.stamp = path, form, stamp_of(path)
        file = parquet_file(path)
        schema = file.schema_arrow
        self._columns = columns_of(path, schema.names, form)
        # A cell with one picture stays unread; lists of pictures come with the words.
        self._lazy = [
            name
            for name in self._columns
            if _is_picture(schema.field(name).type, pa) and _never_empty(file.metadata, name)
        ]
        sizes = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
        self._ends = list(itertools.accumulate(sizes))
        heaviest = max((_bytes_of(file.metadata, name) for name in self._lazy), default=0)
        if heaviest > HEAVY:
            logger.warning(
                "%s has row groups with %d MB of pictures; read by number, each picture costs as "
                "much, so read it with streaming: true or write smaller row groups",
                path,
                heaviest // 10**6,
            )

    def __reduce__(self) -> tuple[Any, ...]:
        """To another process go name and form: it opens the file itself."""
        return ParquetTable, (self.path, self.form)

    def __len__(self) -> int:
        """Number of rows."""
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: int) -> dict[str, Any]:
        """One row."""
        group = bisect.bisect_right(self._ends, index)
        row = index - (self._ends[group - 1] if group else 0)
        sample: dict[str, Any] = {
            name: _column(self.path, group, name)[row].as_py()
            for name in self._columns
            if name not in self._lazy
        }
        for name in self._lazy:
            sample[name] = PictureCell(
                name=f"{self.place(index)}, {name}",
                path=self.path,
                group=group,
                row=row,
                column=name,
            )
        return sample

    def place(self, index: int) -> str:
        """The file and the row."""
        return f"{self.path}, row {index}"


def columns_of(path: str, there: list[str], form: Form) -> list[str]:
    """The columns of a table that a form reads.

    Raises:
        ValueError: if one is lacking that `columns` names, or the form cannot do without.
    """
    chosen = []
    for field in FIELDS[form.kind]:
        found = [name for name in form.names(field) if name in there]
        if not found and (field in form.columns or field == NEEDED[form.kind]):
            wanted = form.names(field)
            raise ValueError(
                f"{path} has no column {' or '.join(wanted)} for {field}; "
                f"{nearest_names(wanted[0], there)}, or say its name in data.sources.columns."
            )
        chosen += found[:1]
    return chosen


def _is_picture(kind: Any, pa: Any) -> bool:
    if pa.types.is_struct(kind):
        return "bytes" in [kind.field(number).name for number in range(kind.num_fields)]
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _chunks(metadata: Any, name: str) -> list[Any]:
    """The column chunks of the bytes of a picture column, one per row group."""
    paths = (name, f"{name}.bytes")
    return [
        chunk
        for group in range(metadata.num_row_groups)
        for column in range(metadata.num_columns)
        if (chunk := metadata.row_group(group).column(column)).path_in_schema in paths
    ]


def _never_empty(metadata: Any, name: str) -> bool:
    """Whether every row is known to have bytes; only then a cell needs no look."""
    return all(
        chunk.statistics is not None
        and chunk.statistics.has_null_count
        and chunk.statistics.null_count == 0
        for chunk in _chunks(metadata, name)
    )


def _bytes_of(metadata: Any, name: str) -> int:
    return max((chunk.total_compressed_size for chunk in _chunks(metadata, name)), default=0)


@lru_cache(maxsize=8)
def parquet_file(path: str) -> Any:
    """An open Parquet file; the last few stay open.

    Raises:
        ValueError: if it is not there or not whole.
    """
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ModuleNotFoundError:
        raise ValueError(
            f'{path} needs pyarrow; install it with pip install "eve-vlm[data]".'
        ) from None
    with place_is_said(path):
        try:
            if is_url(path):
                from eve_vlm.data.files import open_file

                return pq.ParquetFile(open_file(path))
            return pq.ParquetFile(path)
        except pa.ArrowInvalid as error:
            reason = str(error).split(".")[0]
            raise ValueError(
                f"{path} is no whole Parquet file ({reason}); get the file again."
            ) from None


@lru_cache(maxsize=16)
def _column(path: str, group: int, name: str) -> Any:
    """One column of a row group; the last few stay, for neighbours are often read together."""
    import pyarrow as pa

    with place_is_said(path):
        try:
            return parquet_file(path).read_row_group(group, columns=[name]).column(name)
        except (pa.ArrowException, OSError) as error:
            reason = " ".join(str(error).split())[:200].rstrip(".")
            raise ValueError(f"{path} is damaged ({reason}); get the file again.") from None


def read_rows(
    path: str, names: list[str], *, start: int, at_once: int
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Rows from a number on, with their numbers; a few are in memory at a time.

    Raises:
        ValueError: if the file is damaged.
    """
    import pyarrow as pa

    file, first = parquet_file(path), 0
    for group in range(file.num_row_groups):
        behind = first + file.metadata.row_group(group).num_rows
        if behind <= start:
            first = behind
            continue
        batches = file.iter_batches(at_once, row_groups=[group], columns=names)
        while True:
            with place_is_said(path):
                try:
                    batch = next(batches, None)
                except pa.ArrowException as error:
                    reason = " ".join(str(error).split())[:200].rstrip(".")
                    raise ValueError(f"{path} is damaged ({reason}); get it again.") from None
            if batch is None:
                break
            skipped = min(max(start - first, 0), len(batch))
            yield from enumerate(batch.slice(skipped).to_pylist(), first + skipped)
            first += len(batch)


__all__ = ["ParquetTable", "PictureCell", "columns_of", "parquet_file", "read_rows"]
