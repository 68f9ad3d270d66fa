"""The stage `read`: which pictures there are, and where each one lies; opens none of them.

First the files of every source are listed, then each file (or folder) becomes blocks of rows.  Easy
to get wrong: ids must name a picture for ever, so they are made of the source's name and of names
inside it, never of numbers that change when a file is added.
"""

import csv
import itertools
import os
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eve_vlm.assets.catalogue import asset_folder
from eve_vlm.curate.places import SVG, row_schema
from eve_vlm.curate.recipe import SourceSection
from eve_vlm.curate.tasks import Task
from eve_vlm.data.files import is_url, open_file
from eve_vlm.data.sources.forms import PICTURE_ENDINGS
from eve_vlm.data.sources.paths import expand
from eve_vlm.data.tar_index import TarIndex

if TYPE_CHECKING:
    import pyarrow as pa

ASSET, PACKAGE = "asset:", "package:"
ENDINGS = (*PICTURE_ENDINGS, SVG.removeprefix("."))
LISTS = (".txt", ".csv", ".tsv", ".parquet")
Fields = dict[str, Any]


def list_inputs(rows: "pa.Table", task: Task) -> "pa.Table":
    """A row for each file or folder that has pictures or names them."""
    import pyarrow as pa

    found = []
    for source in task.recipe.sources:
        paths = _inputs(source)
        names = [Path(path).name for path in paths]
        if len(set(names)) < len(names):  # files of the same name in several folders
            above = os.path.commonpath(paths)
            names = [Path(os.path.relpath(path, above)).as_posix() for path in paths]
        for path, name in zip(paths, names, strict=True):
            found.append({"source": source.name, "input": path, "label": name})
    return pa.Table.from_pylist(found)


def _inputs(source: SourceSection) -> list[str]:
    path = source.path
    if path.startswith(ASSET):
        name, _, inside = path.removeprefix(ASSET).partition("/")
        path = str(asset_folder(name) / inside)
    elif path.startswith(PACKAGE):
        path = _in_package(path.removeprefix(PACKAGE), source.name)
    if source.kind == "folder":
        if not Path(path).is_dir():
            raise ValueError(
                f"{path} is not a folder, but the source {source.name!r} is of kind folder; check "
                "its path."
            )
        return [os.path.abspath(path)]
    files = [file if is_url(file) else os.path.abspath(file) for file in expand(path)]
    wanted = {"tar": (".tar",), "parquet": (".parquet",), "urls": LISTS}[source.kind]
    for file in files:
        if not file.endswith(wanted):
            raise ValueError(
                f"{file} does not end with {' or '.join(wanted)}, but the source {source.name!r} "
                f"is of kind {source.kind}; check its path."
            )
    return files


def _in_package(path: str, source: str) -> str:
    """A folder that an installed Python package brings along."""
    name, _, inside = path.partition("/")
    try:
        return str(Path(str(resources.files(name))) / inside)
    except ModuleNotFoundError:
        raise ValueError(
            f"The source {source!r} takes its pictures from the Python package {name}, which is "
            "not installed; install it, or name a folder."
        ) from None


def list_pictures(rows: "pa.Table", task: Task) -> Iterator["pa.Table"]:
    """Tables of at most a block of rows for the file or folder of one unit."""
    import pyarrow as pa

    given = rows.to_pylist()[0]
    source = next(one for one in task.recipe.sources if one.name == given["source"])
    found: Iterator[Fields] = itertools.islice(
        _READERS[source.kind](given["input"], source), source.limit
    )
    if source.kind in ("urls", "parquet"):
        found = _once_each(found, given["input"])
    # In a folder, names are paths and stand alone.
    before = source.name if source.kind == "folder" else f"{source.name}/{given['label']}"
    made = (
        {"source": source.name, "licence": source.licence, **row, "id": f"{before}/{row['id']}"}
        for row in found
    )
    while block := list(itertools.islice(made, task.recipe.block)):
        yield pa.Table.from_pylist(block, schema=row_schema())


def _once_each(rows: Iterator[Fields], path: str) -> Iterator[Fields]:
    """The rows of a list, whose ids somebody else chose."""
    seen = set()
    for row in rows:
        if row["id"] in seen:
            raise ValueError(
                f"{path} has the id {row['id']!r} twice; name another column in the source's "
                "columns.id, or one that is not there to count rows."
            )
        seen.add(row["id"])
        yield row


def _folder(path: str, source: SourceSection) -> Iterator[Fields]:
    """Picture files, folder by folder in the order of their names."""
    words = source.columns.get("text")

    def walk(folder: str) -> Iterator[str]:
        for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
            if entry.is_dir():
                yield from walk(entry.path)
            elif entry.name.lower().rpartition(".")[2] in ENDINGS:
                yield entry.path

    for file in walk(path):
        beside = Path(file).with_suffix(f".{words}") if words else None
        text = _first_line(beside.read_bytes()) if beside and beside.is_file() else None
        yield {"id": Path(os.path.relpath(file, path)).as_posix(), "path": file, "text": text}


def _first_line(text: bytes) -> str | None:
    """The words that lie beside a picture; further lines are often other languages."""
    return text.decode("utf-8-sig", "replace").strip().partition("\n")[0].strip() or None


def _tar(path: str, source: SourceSection) -> Iterator[Fields]:
    """The pictures of each key of a tar."""
    words = source.columns.get("text")
    with open_file(path) as file:
        for members in TarIndex(path).samples():
            text = None
            for member in members:
                if words and member.ending == words:
                    file.seek(member.offset)
                    text = _first_line(file.read(member.length))
            for member in members:
                if member.ending.rpartition(".")[2] in ENDINGS:
                    yield {
                        "id": member.name,
                        "path": path,
                        "member": member.name,
                        "offset": member.offset,
                        "length": member.length,
                        "text": text,
                    }


def _urls(path: str, source: SourceSection) -> Iterator[Fields]:
    """The URLs of a list, with what stands beside them."""
    keys = ("url", "id", "text", "licence", "width", "height")
    names = {key: source.columns.get(key, key) for key in keys}
    for number, entry in enumerate(_list_rows(path, names, source), start=1):
        url = entry.get(names["url"]) or None
        if url is None and path.endswith(".txt"):
            continue  # an empty line; a row without a URL is dropped where it is counted
        row: Fields = {"id": str(entry.get(names["id"]) or number), "member": url and str(url)}
        for key in ("text", "licence"):
            if entry.get(names[key]) not in (None, ""):
                row[key] = str(entry[names[key]])
        sides = [_pixels(entry.get(names[key])) for key in ("width", "height")]
        if all(sides):
            row["listed_side"] = min(sides)
        yield row


def _pixels(value: Any) -> int:
    """A number of pixels as lists write it (640, 640.0, "640"); 0 where they say nothing."""
    text = str(value).partition(".")[0]
    return int(text) if text.isdigit() else 0


def _list_rows(path: str, names: dict[str, str], source: SourceSection) -> Iterator[Fields]:
    if path.endswith(".parquet"):
        import pyarrow.parquet as pq

        with pq.ParquetFile(path) as table:
            there = table.schema_arrow.names
            _require(path, names["url"], there, source)
            columns = [one for one in names.values() if one in there]
            for batch in table.iter_batches(columns=columns):
                yield from batch.to_pylist()
        return
    with open(path, encoding="utf-8-sig", newline="") as file:
        if path.endswith(".txt"):
            for line in file:
                yield {names["url"]: line.strip()}
            return
        lines = csv.DictReader(file, delimiter="\t" if path.endswith(".tsv") else ",")
        _require(path, names["url"], list(lines.fieldnames or ()), source)
        yield from lines


def _parquet(path: str, source: SourceSection) -> Iterator[Fields]:
    """The pictures in a Parquet file; words are read, pictures are not."""
    import pyarrow.parquet as pq

    names = {key: source.columns.get(key, key) for key in ("image", "id", "text", "licence")}
    with pq.ParquetFile(path) as table:
        there = table.schema_arrow.names
        _require(path, names["image"], there, source)
        beside = {key: name for key, name in names.items() if name in there and key != "image"}
        for group in range(table.num_row_groups):
            count = table.metadata.row_group(group).num_rows
            read = table.read_row_group(group, columns=list(beside.values())).to_pylist()
            for row, entry in enumerate(read if beside else [{}] * count):
                id = entry.get(names["id"])
                fields = {
                    "id": f"{group}-{row}" if id is None else str(id),
                    **{"path": path, "member": names["image"], "offset": group, "length": row},
                }
                for key in ("text", "licence"):
                    if key in beside and entry[names[key]] is not None:
                        fields[key] = str(entry[names[key]])
                yield fields


def _require(path: str, column: str, there: list[str], source: SourceSection) -> None:
    """Checks that a table has the column without which nothing goes, and all that were named."""
    for one in (column, *source.columns.values()):
        if one not in there:
            raise ValueError(
                f"{path} has no column {one!r} (it has {', '.join(there)}); say its name in the "
                "source's columns."
            )


_READERS = {"folder": _folder, "tar": _tar, "urls": _urls, "parquet": _parquet}

__all__ = ["list_inputs", "list_pictures"]
