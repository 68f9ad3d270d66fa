"""The stage `write`: shards with pictures, captions and where each came from.

A tar holds `KEY.jpg`, `KEY.txt` and `KEY.json` for each record, as WebDataset reads it; a Parquet
file holds the same as columns.  Both are read here as sources of kind `captions`.  Easy to get
wrong: the checksum of a record is that of the bytes in the shard; where pictures are made smaller,
`sha256_found` is that of the file it was made from.
"""

import hashlib
import io
import json
import tarfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from PIL import Image

from eve_vlm.curate.blocks import written_once
from eve_vlm.curate.places import as_png, open_bytes, read_bytes
from eve_vlm.curate.tasks import Task

if TYPE_CHECKING:
    import pyarrow as pa

SHARDS = "shards"
ENDINGS = {"webdataset": "tar", "parquet": "parquet"}
GROUP = 100  # rows of a Parquet row group: read by number, a picture costs one of them


class Written(NamedTuple):
    """A record as it goes into a shard."""

    picture: bytes
    """Its picture file."""
    ending: str
    """The kind of that file."""
    facts: dict[str, Any]
    """The rest."""


def shard_name(number: int, form: str) -> str:
    """The file of a shard."""
    return f"{SHARDS}/{number:06d}.{ENDINGS[form]}"


def write_shard(rows: "pa.Table", task: Task) -> "pa.Table":
    """Writes one shard; the result is its line of the manifest."""
    import pyarrow as pa

    form = task.recipe.write.form
    name = shard_name(int(task.unit), form)
    file = task.folder / name
    licences: Counter[str] = Counter()

    def records() -> Iterator[Written]:
        for batch in rows.to_batches(max_chunksize=GROUP):
            for row in batch.to_pylist():
                licences[row["licence"]] += 1
                yield written(row, task)

    with written_once(file) as part:
        (_write_tar if form == "webdataset" else _write_parquet)(part, records(), task.unit)
        line = {
            "file": name,
            "records": len(rows),
            "bytes": part.stat().st_size,
            "sha256": _sha256(part),
            "licences": json.dumps(licences),
        }
    task.facts["records"] = len(rows)
    return pa.Table.from_pylist([line])


def written(row: dict[str, Any], task: Task) -> Written:
    """A row as a record of a shard.

    Raises:
        ValueError: if its picture is not there any more, or another one.
    """
    data = read_bytes(row)
    if hashlib.sha256(data).digest() != row["sha256"]:
        raise ValueError(
            f"The picture {row['id']} has changed since it was read; put the old one back, or "
            "begin again in a new output_dir."
        )
    section, ending = task.recipe.write, row["format"]
    size = (row["width"], row["height"])
    too_long = section.longest_edge is not None and max(size) > section.longest_edge
    if row["redrawn"] or too_long:
        picture = open_bytes(data, row, task.recipe.decode).picture
        data, ending = _smaller(picture, section.longest_edge, section.quality)
        size = _size_of(data)
    facts = {
        "id": row["id"],
        "caption": row["caption"],
        "source": row["source"],
        "licence": row["licence"],
        "from": row["path"] if row["member"] is None else f"{row['path']}:{row['member']}",
        "text": row["text"],  # the words that it came with
        "captioner": row.get("captioner"),
        "width": size[0],
        "height": size[1],
        "sha256": hashlib.sha256(data).hexdigest(),
        "sha256_found": row["sha256"].hex(),
        "hash": f"{row['hash']:016x}",
    }
    return Written(data, ending, facts)


def _smaller(picture: Image.Image, longest: int | None, quality: int) -> tuple[bytes, str]:
    """A picture whose longer side is at most `longest`, as JPEG; a drawing that fits, as PNG."""
    if longest is None or max(picture.size) <= longest:
        return as_png(picture), "png"
    picture.thumbnail((longest, longest), Image.Resampling.LANCZOS)
    stream = io.BytesIO()
    picture.save(stream, "JPEG", quality=quality)
    return stream.getvalue(), "jpg"


def _size_of(data: bytes) -> tuple[int, int]:
    with Image.open(io.BytesIO(data)) as picture:
        return picture.size


def _write_tar(file: Path, records: Iterator[Written], unit: str) -> None:
    with tarfile.open(file, "w", format=tarfile.GNU_FORMAT) as tar:
        for number, one in enumerate(records):
            members = {
                one.ending: one.picture,
                "txt": one.facts["caption"].encode(),
                "json": json.dumps(one.facts, ensure_ascii=False).encode(),
            }
            for ending, data in members.items():
                member = tarfile.TarInfo(f"{unit}-{number:06d}.{ending}")
                member.size = len(data)  # and time 0: the same records make the same bytes
                tar.addfile(member, io.BytesIO(data))


def _write_parquet(file: Path, records: Iterator[Written], unit: str) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    names = ("id", "caption", "source", "licence", "from", "text", "captioner")
    schema = pa.schema(
        [
            ("image", pa.binary()),
            *((name, pa.string()) for name in names),
            *((name, pa.int32()) for name in ("width", "height")),
            *((name, pa.string()) for name in ("sha256", "sha256_found", "hash")),
        ]
    )
    with pq.ParquetWriter(file, schema, compression="zstd") as writer:
        group: list[dict[str, Any]] = []
        for one in records:
            group.append(one.facts | {"image": one.picture})
            if len(group) == GROUP:
                writer.write_table(pa.Table.from_pylist(group, schema=schema))
                group = []
        if group:
            writer.write_table(pa.Table.from_pylist(group, schema=schema))


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


__all__ = ["SHARDS", "Written", "shard_name", "write_shard", "written"]
