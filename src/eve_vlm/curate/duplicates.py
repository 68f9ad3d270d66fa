"""The stage `duplicates`: of equal files and alike pictures one is kept, in linear time.

Two hashes of 64 bits that differ in at most d bits agree in at least two of d + 2 stretches of
bits, whichever bits differ.  So every picture is filed under each pair of its stretches (10 keys of
about 25 bits for d = 3), and only pictures under one key are compared: 33 million pictures have
about one unrelated neighbour under each key.  Easy to get wrong: a picture goes if a *better* one
(more pixels, then the smaller id) is near it, whether or not that one stays; so the result depends
on no order, and in a chain of near pictures more than one may go.
"""

import itertools
from typing import TYPE_CHECKING

import numpy as np

from eve_vlm.curate.blocks import PIECE, with_reasons
from eve_vlm.curate.hashes import BITS, bits_apart, fine_apart
from eve_vlm.curate.recipe import DuplicatesSection
from eve_vlm.curate.tasks import Task

if TYPE_CHECKING:
    import pyarrow as pa
    from numpy.typing import NDArray

KEYS, PAIRS = "duplicates.keys", "duplicates.pairs"
SAME, NEAR = "same file", "near duplicate"
AT_ONCE = 2**20  # pairs that are compared at once: at most 170 MB of signatures


def bit_stretches(distance: int) -> list[tuple[int, int]]:
    """First bit and number of bits of each stretch.

    >>> bit_stretches(3)
    [(0, 12), (12, 13), (25, 13), (38, 13), (51, 13)]
    """
    ends = [BITS * place // (distance + 2) for place in range(distance + 3)]
    return [(low, high - low) for low, high in itertools.pairwise(ends)]


def band_keys(hashes: "NDArray[np.uint64]", distance: int) -> "NDArray[np.uint64]":
    """(n, keys): hashes within `distance` bits of one another share at least one key."""
    parts = [
        (hashes >> np.uint64(low)) & np.uint64((1 << width) - 1)
        for low, width in bit_stretches(distance)
    ]
    keys = []
    for number, (one, other) in enumerate(itertools.combinations(parts, 2)):
        # The pair's number in the highest bits: equal stretches at other places are no match.
        keys.append((np.uint64(number) << np.uint64(56)) | (one << np.uint64(28)) | other)
    return np.stack(keys, axis=1)


def file_keys(rows: "pa.Table", task: Task) -> "pa.Table":
    """A row for each key of each picture, in pieces by key."""
    import pyarrow as pa

    section = _section(task)
    sums = np.array([int.from_bytes(one[:8]) for one in rows["sha256"].to_pylist()], np.uint64)
    near = section.near
    keys = band_keys(rows["hash"].to_numpy(), section.distance) if near else sums[:, None]
    count = keys.shape[1]
    pieces = _mixed(keys) % np.uint64(task.layout.buckets)
    pixels = rows["width"].to_numpy().astype(np.int64) * rows["height"].to_numpy()
    again = pa.array(np.repeat(np.arange(len(rows)), count))
    kept = rows.select(["id", "hash", "sha256", "signature"]).take(again)
    kept = kept.append_column("key", pa.array(keys.ravel()))
    kept = kept.append_column("pixels", pa.array(np.repeat(pixels, count)))
    back = np.full(len(kept), task.layout.piece_of_block(task.unit), np.int32)
    kept = kept.append_column("back", pa.array(back))
    return kept.append_column(PIECE, pa.array(pieces.ravel().astype(np.int32)))


def find_pairs(rows: "pa.Table", task: Task) -> "pa.Table":
    """Pictures that a better one is near to, in pieces by their block."""
    import pyarrow as pa
    import pyarrow.compute as pc

    section = _section(task)
    keys, hashes = rows["key"].to_numpy(), rows["hash"].to_numpy()
    sums, signatures = _as_bytes(rows["sha256"]), _as_bytes(rows["signature"])
    # Under each key the best first.  Two million rows as Python objects would take a gigabyte.
    by = [("key", "ascending"), ("pixels", "descending"), ("id", "ascending")]
    order = pc.sort_indices(rows, by).to_numpy().astype(np.int64)
    starts = np.flatnonzero(np.r_[len(order) > 0, np.diff(keys[order]) != 0])
    found: dict[int, tuple[int, bool]] = {}
    for start, end in itertools.pairwise([*starts, len(order)]):
        if end - start < 2:
            continue
        group = order[start:end]
        # An equal file is the better reason, so it comes first.
        pairs = _equal(group, sums)
        if section.near:
            pairs += _near(group, hashes, signatures, section)
        for loser, winner in pairs:
            found.setdefault(loser, (winner, bool((sums[loser] == sums[winner]).all())))
    losers = sorted(found)
    winners = [found[one][0] for one in losers]
    return pa.table(
        {
            "id": rows["id"].take(pa.array(losers, pa.int64())),
            "winner": rows["id"].take(pa.array(winners, pa.int64())),
            "same": pa.array([found[one][1] for one in losers], pa.bool_()),
            PIECE: rows["back"].take(pa.array(losers, pa.int64())),
        }
    )


def drop_duplicates(rows: "pa.Table", task: Task) -> "pa.Table":
    """The rows, each with why it is dropped or None."""
    found: dict[str, tuple[bool, str]] = {}
    for one in task.sent_back(PAIRS).to_pylist():
        # Several keys may have found it; an equal file is the better reason, then the first id.
        reason = (not one["same"], one["winner"])
        found[one["id"]] = min(reason, found.get(one["id"], reason))
    why: list[str | None] = []
    because: list[str | None] = []
    for id in rows["id"].to_pylist():
        near, winner = found.get(id, (None, None))
        why.append(None if near is None else NEAR if near else SAME)
        because.append(winner)
    return with_reasons(rows, why, because)


def _near(
    group: "NDArray[np.int64]",
    hashes: "NDArray[np.uint64]",
    signatures: "NDArray[np.uint8]",
    section: DuplicatesSection,
) -> list[tuple[int, int]]:
    """(loser, winner) of alike pictures of one key, which are given best first."""
    pairs = []
    # Of wholly equal pictures only the best is compared with others.
    best: dict[bytes, int] = {}
    for one in group.tolist():
        winner = best.setdefault(hashes[one].tobytes() + signatures[one].tobytes(), one)
        if winner != one:
            pairs.append((one, winner))
    group = np.fromiter(best.values(), np.int64)
    ours = hashes[group]
    step = max(AT_ONCE // len(group), 1)
    for first in range(0, len(group), step):
        part = ours[first : first + step]
        near = bits_apart(part[:, None], ours[None, :]) <= section.distance
        losers, winners = np.nonzero(near)
        losers = losers + first
        better = winners < losers
        losers, winners = group[losers[better]], group[winners[better]]
        bits, colours = fine_apart(signatures[losers], signatures[winners])
        sure = (bits <= section.fine_distance) & (colours <= section.colour_distance)
        pairs += zip(losers[sure].tolist(), winners[sure].tolist(), strict=True)
    return pairs


def _equal(group: "NDArray[np.int64]", sums: "NDArray[np.uint8]") -> list[tuple[int, int]]:
    """(loser, winner) of equal files."""
    best: dict[bytes, int] = {}
    pairs = []
    for one in group.tolist():
        winner = best.setdefault(sums[one].tobytes(), one)
        if winner != one:
            pairs.append((one, winner))
    return pairs


def _mixed(keys: "NDArray[np.uint64]") -> "NDArray[np.uint64]":
    """Numbers that are spread evenly, for the choice of a piece."""
    mixed = keys * np.uint64(0x9E3779B97F4A7C15)  # wraps around; Fibonacci hashing
    return mixed >> np.uint64(40)


def _as_bytes(column: "pa.ChunkedArray") -> "NDArray[np.uint8]":
    """A column of bytes of one length as (rows, bytes), not copied."""
    import pyarrow as pa

    joined = pa.concat_arrays(column.chunks) if column.num_chunks else pa.array([], column.type)
    width, first = column.type.byte_width, joined.offset
    data = np.frombuffer(joined.buffers()[1] or b"", np.uint8)
    return data.reshape(-1, width)[first : first + len(joined)]


def _section(task: Task) -> DuplicatesSection:
    assert task.recipe.duplicates is not None, "the stage is left out without its section"
    return task.recipe.duplicates


__all__ = [
    "KEYS",
    "PAIRS",
    "band_keys",
    "bit_stretches",
    "drop_duplicates",
    "file_keys",
    "find_pairs",
]
