"""The stage `spread`: k-means over features, and of each centre the nearest pictures are kept.

As published for the web pictures of the set: 50,000 centres, 300 nearest, hence at most 15 million.
Centres are trained on a sample, so memory follows their number and not that of the pictures.  Easy
to get wrong: features have length 1, and so have the centres (spherical k-means); "nearest" is then
the largest cosine, as it is for the models that were trained with one.
"""

from typing import TYPE_CHECKING

import numpy as np

from eve_vlm.curate.blocks import PIECE, read_unit, with_reasons
from eve_vlm.curate.features import FEATURES, vectors_of
from eve_vlm.curate.ledger import unit_file
from eve_vlm.curate.recipe import SpreadSection
from eve_vlm.curate.tasks import NO_EXTRA, Task, bins

if TYPE_CHECKING:
    from types import ModuleType

    import pyarrow as pa

CENTRES, PLACES, NEAREST = "spread.centres", "spread.places", "spread.nearest"
FULL, ALIKE = "centre is full", "same features"
SIZES = (1, 2, 5, 10, 20, 50, 100, 200, 300, 500, 1000, 2000, 5000, 10_000)


def find_centres(rows: "pa.Table", task: Task) -> "pa.Table":
    """The centres of a sample of all features.

    Raises:
        ValueError: if there are fewer pictures than centres.
    """
    import pyarrow as pa

    section = _section(task)
    faiss = _faiss(task, CENTRES)
    sample = _sample(section, task)
    if len(sample) < section.centres:
        raise ValueError(
            f"spread.centres is {section.centres:,}, but only {len(sample):,} pictures are left; "
            "give fewer centres, or set spread to null."
        )
    kmeans = faiss.Kmeans(
        sample.shape[1],
        section.centres,
        niter=section.rounds,
        seed=task.recipe.seed,
        spherical=True,
        min_points_per_centroid=1,
        max_points_per_centroid=section.sample,
    )
    kmeans.train(sample)
    flat = pa.array(kmeans.centroids.ravel().astype(np.float32))
    return pa.table({"vector": pa.FixedSizeListArray.from_arrays(flat, sample.shape[1])})


def place_pictures(rows: "pa.Table", task: Task) -> "pa.Table":
    """The centre of every picture and how near it is, in pieces by centre."""
    import pyarrow as pa

    section = _section(task)
    faiss = _faiss(task, PLACES)
    centres = vectors_of(read_unit(unit_file(task.folder, CENTRES, "all")))
    near, centre = np.empty((0, 1), np.float32), np.empty((0, 1), np.int64)
    if len(rows):
        index = faiss.IndexFlatIP(centres.shape[1])
        index.add(centres)
        near, centre = index.search(vectors_of(rows), 1)
    table = pa.table(
        {
            "id": rows["id"],
            "centre": pa.array(centre[:, 0], pa.int64()),
            "cosine": pa.array(near[:, 0], pa.float32()),
            "back": pa.array(np.full(len(rows), task.layout.piece_of_block(task.unit), np.int32)),
            PIECE: pa.array((centre[:, 0] % task.layout.buckets).astype(np.int32)),
        }
    )
    if section.duplicate_cosine is not None:
        table = table.append_column("vector", rows["vector"])
    return table


def keep_nearest(rows: "pa.Table", task: Task) -> "pa.Table":
    """The pictures that are not kept, and why, in pieces by their block."""
    import pyarrow as pa

    section = _section(task)
    centres, ids = rows["centre"].to_numpy(), rows["id"].to_numpy(zero_copy_only=False)
    cosines = rows["cosine"].to_numpy()
    order = np.lexsort((ids, -cosines, centres))  # of each centre the nearest first
    starts = np.flatnonzero(np.r_[len(order) > 0, np.diff(centres[order]) != 0])
    vectors = None if section.duplicate_cosine is None or not len(rows) else vectors_of(rows)
    lost: list[tuple[int, str, str]] = []
    sizes, left = [], []
    for group in np.split(order, starts[1:]) if len(order) else []:
        alike: dict[int, int] = {}
        if vectors is not None and section.duplicate_cosine is not None:
            alike = _alike(group, vectors, section.duplicate_cosine)
            lost += [(one, ALIKE, str(ids[other])) for one, other in alike.items()]
        kept = [one for one in group.tolist() if one not in alike]
        place = f"centre {centres[group[0]]}"
        for one in kept[section.nearest :] if section.nearest is not None else []:
            lost.append((one, FULL, f"{place}, cosine {cosines[one]:.3f}"))
        sizes.append(len(group))
        left.append(len(kept[: section.nearest]))
    task.counts["pictures of a centre"] += bins(np.array(sizes, int), SIZES)
    task.counts["pictures kept of a centre"] += bins(np.array(left, int), SIZES)
    return pa.table(
        {
            "id": pa.array([ids[one] for one, _, _ in lost], pa.string()),
            "reason": pa.array([reason for _, reason, _ in lost], pa.string()),
            "cause": pa.array([cause for _, _, cause in lost], pa.string()),
            PIECE: rows["back"].take(pa.array([one for one, _, _ in lost], pa.int64())),
        }
    )


def drop_far(rows: "pa.Table", task: Task) -> "pa.Table":
    """The rows, each with why it is dropped or None."""
    found = {one["id"]: one for one in task.sent_back(NEAREST).to_pylist()}
    verdicts = [found.get(id) for id in rows["id"].to_pylist()]
    return with_reasons(
        rows,
        [None if one is None else one["reason"] for one in verdicts],
        [None if one is None else one["cause"] for one in verdicts],
    )


def _alike(group: np.ndarray, vectors: np.ndarray, most: float) -> dict[int, int]:
    """Pictures of a centre that are too like a nearer one that stays: each with that one."""
    kept: list[int] = []
    alike = {}
    for one in group.tolist():
        if kept:
            cosines = vectors[kept] @ vectors[one]
            best = int(cosines.argmax())
            if cosines[best] > most:
                alike[one] = kept[best]
                continue
        kept.append(one)
    return alike


def _sample(section: SpreadSection, task: Task) -> np.ndarray:
    """At most `sample` features for each centre, drawn alike from all blocks."""
    files = task.files(FEATURES, "blocks")
    wanted = section.sample * section.centres
    counts = [_rows_in(file) for file in files]
    share = min(1.0, wanted / max(sum(counts), 1))
    parts = []
    for number, (file, count) in enumerate(zip(files, counts, strict=True)):
        if not count:
            continue
        dice = np.random.default_rng([task.recipe.seed, number])
        chosen = np.sort(dice.permutation(count)[: int(np.ceil(share * count))])
        parts.append(vectors_of(read_unit(file).take(chosen)))
    return np.concatenate(parts) if parts else np.empty((0, 1), np.float32)


def _rows_in(file: object) -> int:
    import pyarrow.parquet as pq

    return int(pq.read_metadata(file).num_rows)


def _faiss(task: Task, step: str) -> "ModuleType":
    """FAISS with as many threads as the worker has cores.

    Raises:
        ValueError: if it is not installed.
    """
    try:
        import faiss
    except ImportError:
        raise ValueError(NO_EXTRA) from None
    faiss.omp_set_num_threads(max(int(task.recipe.worker(step).cpus), 1))
    return faiss


def _section(task: Task) -> SpreadSection:
    assert task.recipe.spread is not None, "the stage is left out without its section"
    return task.recipe.spread


__all__ = [
    "CENTRES",
    "NEAREST",
    "PLACES",
    "drop_far",
    "find_centres",
    "keep_nearest",
    "place_pictures",
]
