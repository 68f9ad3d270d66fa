"""Units of work as files: a table that appears whole or not at all, with facts about how it came.

A finished unit is a Parquet file under its name; there is no other sign of it, so what is done and
what is known to be done cannot differ.  Its facts (counts, seconds) stand in the file's footer.
A table with a column `piece` is written piece by piece, and `gather` reads one piece of all files
of a step: that is how rows that belong together meet without anybody holding all of them.  Easy to
get wrong: names of unfinished files hold a random part, because on a cluster two workers may make
the same unit on two machines under the same process number; both then write the same.
"""

import json
import os
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pyarrow as pa

ENDING = ".parquet"
WHY, BECAUSE, PIECE = "why", "because", "piece"
_FACTS, _PIECES = "eve_facts", "eve_pieces"
_PART = ".part-"


@contextmanager
def written_once(file: Path) -> Iterator[Path]:
    """A name beside `file` to write to; it becomes `file` at the end, and vanishes on any error."""
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_name(f".{file.name}{_PART}{uuid.uuid4().hex}")
    try:
        yield part
        with part.open("rb") as written:
            os.fsync(written.fileno())  # a name must not outlive a power cut that its bytes did not
        os.replace(part, file)
    finally:
        part.unlink(missing_ok=True)


def remove_parts(folder: Path) -> None:
    """Removes what killed workers left unfinished."""
    for file in folder.rglob(f".*{_PART}*"):
        file.unlink(missing_ok=True)


def write_unit(file: Path, table: "pa.Table", facts: dict[str, Any]) -> None:
    """Writes a unit's table and facts; with a column `piece`, a row group for each piece."""
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    with written_once(file) as part:
        if PIECE not in table.column_names:
            groups, pieces = [table], []
        else:
            pieces = sorted(pc.unique(table[PIECE]).to_pylist())
            groups = [table.filter(pc.equal(table[PIECE], pa.scalar(one))) for one in pieces]
            groups = [group.drop_columns([PIECE]) for group in groups]
        at = table.schema.get_field_index(PIECE)
        schema = table.schema if at < 0 else table.schema.remove(at)
        with pq.ParquetWriter(part, schema, compression="zstd") as writer:
            for group in groups:
                # One row group each, or a piece would not be read by its number.
                writer.write_table(group, row_group_size=max(len(group), 1))
            writer.add_key_value_metadata({_FACTS: json.dumps(facts), _PIECES: json.dumps(pieces)})


def read_unit(file: Path, columns: Sequence[str] | None = None) -> "pa.Table":
    """The table of a unit that was not written in pieces."""
    import pyarrow.parquet as pq

    return pq.read_table(file, columns=None if columns is None else list(columns))


def read_kept(file: Path) -> "pa.Table":
    """The rows of a unit that were not dropped, without the columns that say why."""
    import pyarrow.compute as pc

    table = read_unit(file)
    if WHY not in table.column_names:
        return table
    return table.filter(pc.is_null(table[WHY])).drop_columns([WHY, BECAUSE])


def read_facts(file: Path) -> dict[str, Any]:
    """The facts of a unit; reads the footer alone."""
    import pyarrow.parquet as pq

    return json.loads(pq.read_metadata(file).metadata[_FACTS.encode()])


def gather(files: Sequence[Path], piece: int) -> "pa.Table":
    """One piece of all these units, in their order."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    tables = []
    schema = None
    for path in files:
        with pq.ParquetFile(path) as file:
            pieces = json.loads(file.metadata.metadata[_PIECES.encode()])
            schema = file.schema_arrow
            if piece in pieces:
                tables.append(file.read_row_group(pieces.index(piece)))
    assert schema is not None, "a step with pieces has at least one unit"
    return pa.concat_tables(tables) if tables else schema.empty_table()


def with_reasons(
    table: "pa.Table", why: Sequence[str | None], because: Sequence[str | None] | None = None
) -> "pa.Table":
    """A table with columns that say which rows are dropped: a short reason, and its cause."""
    import pyarrow as pa

    table = table.append_column(WHY, pa.array(why, pa.string()))
    words = [None] * len(table) if because is None else because
    return table.append_column(BECAUSE, pa.array(words, pa.string()))


__all__ = [
    "BECAUSE",
    "ENDING",
    "PIECE",
    "WHY",
    "gather",
    "read_facts",
    "read_kept",
    "read_unit",
    "remove_parts",
    "with_reasons",
    "write_unit",
    "written_once",
]
