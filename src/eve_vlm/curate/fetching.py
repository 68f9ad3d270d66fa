"""The stage `fetch`: brings pictures that are named by URL to where the other stages read them.

Bytes are put behind one another into a file for each try of a unit, and the journal says where each
picture lies, so a try that was killed gives its pictures to the next.  http and https are fetched
as the server fetches (`serve/fetch.py`): a list from the web must not lead workers to addresses
that only they can reach.  Easy to get wrong: without a network every picture fails, and that must
stop the run and not empty the set, hence `fetch.most_failed`.
"""

import ipaddress
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, NamedTuple

from eve_vlm.curate.blocks import with_reasons
from eve_vlm.curate.journal import Journal
from eve_vlm.curate.ledger import WORK
from eve_vlm.curate.places import Row
from eve_vlm.curate.recipe import CurateRecipe, FetchSection
from eve_vlm.curate.tasks import Task
from eve_vlm.data.files import open_file, place_is_said
from eve_vlm.serve.fetch import fetch_picture_bytes

if TYPE_CHECKING:
    import pyarrow as pa

PICTURES = "fetch.pictures"
FEW = 3  # failures of a block that say nothing about the network
MEGABYTE = 10**6


class _Fetched(NamedTuple):
    row: Row
    data: bytes | None
    error: str | None


def fetch(rows: "pa.Table", task: Task) -> "pa.Table":
    """The rows with the place of each picture; what cannot be fetched is dropped."""
    import pyarrow as pa

    listed = rows.to_pylist()
    journal = Journal(task.folder, "fetch", task.unit)
    least = task.recipe.filter.shorter_side_above
    small = {row["id"] for row in listed if _is_small(row, least)}
    known = small | set(journal.finished)
    lacking = [row for row in listed if row["member"] and row["path"] is None]
    lacking = [row for row in lacking if row["id"] not in known]
    if lacking:
        _fetch_all(lacking, task, journal)
    why: list[str | None] = []
    because: list[str | None] = []
    for row in listed:
        entry = journal.finished.get(row["id"], {})
        error = entry.get("error")
        if row["path"] is None and not row["member"]:
            error = "its list has no URL for it"
        if row["id"] in small:
            why.append("too small")
            because.append(f"{row['listed_side']} in its list against {least}")
            continue
        why.append("cannot be fetched" if error else None)
        because.append(error)
        if entry and not error:
            path = str(task.folder / WORK / PICTURES / entry["file"])
            row |= {"path": path, "offset": entry["offset"], "length": entry["length"]}
    task.afterwards.append(journal.remove)
    return with_reasons(pa.Table.from_pylist(listed, schema=rows.schema), why, because)


def _is_small(row: Row, least: int | None) -> bool:
    """Whether the filter would drop a picture, by the size that its list gives."""
    side = row["listed_side"]
    return row["path"] is None and None not in (least, side) and side <= least


def _fetch_all(rows: list[Row], task: Task, journal: Journal) -> None:
    """Fetches pictures and notes each as soon as its bytes stand.

    Raises:
        ValueError: if so many fail that something else must be wrong.
    """
    name = f"{task.unit}.{journal.attempt}.bin"
    file = task.folder / WORK / PICTURES / name
    file.parent.mkdir(parents=True, exist_ok=True)
    section = task.recipe.fetch
    failed: list[_Fetched] = []
    with file.open("wb") as out:
        for one in _in_threads(rows, section):
            if one.data is None:
                failed.append(one)
                continue
            offset = out.tell()
            out.write(one.data)
            out.flush()
            journal.add(
                {"id": one.row["id"], "file": name, "offset": offset, "length": len(one.data)}
            )
    if len(failed) > max(FEW, section.most_failed * len(rows)):
        raise ValueError(
            f"{len(failed)} of {len(rows)} pictures of one block could not be fetched, the last "
            f"one because: {failed[-1].error} Check the network; if the list is that old, raise "
            "fetch.most_failed."
        )
    for one in failed:  # noted last: if the network was away they are to be tried again
        journal.add({"id": one.row["id"], "error": one.error})


def _in_threads(rows: list[Row], section: FetchSection) -> Iterator[_Fetched]:
    with ThreadPoolExecutor(section.threads) as pool:
        yield from pool.map(lambda row: _fetched(row, section), rows)


def _fetched(row: Row, section: FetchSection) -> _Fetched:
    error = ""
    for attempt in range(section.tries):
        time.sleep(2.0 ** (attempt - 1) if attempt else 0.0)
        try:
            return _Fetched(row, _bytes_of(row["member"], section), None)
        except ValueError as problem:
            error = str(problem)
    return _Fetched(row, None, error)


def _bytes_of(url: str, section: FetchSection) -> bytes:
    most = int(section.most_megabytes * MEGABYTE)
    if url.startswith(("http://", "https://")):
        return fetch_picture_bytes(
            url,
            max_bytes=most,
            timeout=section.timeout,
            allow_http=True,
            ports=section.ports,
            networks=[ipaddress.ip_network(one) for one in section.networks],
        )
    with open_file(url) as file, place_is_said(url):
        data = file.read(most + 1)
    if len(data) > most:
        raise ValueError(
            f"{url} has more than {section.most_megabytes:g} MB; raise most_megabytes."
        )
    return data


def settings_of(recipe: CurateRecipe) -> Any:
    """What the results depend on: not how patient or how parallel fetching is."""
    return recipe.fetch.most_megabytes, recipe.filter.shorter_side_above


__all__ = ["PICTURES", "fetch", "settings_of"]
