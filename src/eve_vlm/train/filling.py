"""The teacher asked about all pictures of a recipe ahead of its training: `eve data features`.

Pictures are laid out by the training's own encoder, so they have the very keys that it will look
for.  Easy to get wrong: a record is used several times in an epoch, but its pictures need to be
asked about once, so the records are walked by source and number and not by epoch.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from eve_vlm.data.encode import Encoder, TeacherShare
from eve_vlm.data.feature_table import FeatureTable
from eve_vlm.data.sources import Mixture
from eve_vlm.train.build import build_processor, build_records, build_teacher
from eve_vlm.train.data import build_encoder
from eve_vlm.train.sections import Recipe
from eve_vlm.train.teacher import FrozenTeacher
from eve_vlm.train.teacher_cache import open_table


@dataclass(kw_only=True, slots=True)
class Filled:
    """What was done."""

    records: int = 0
    """Records that were looked at."""
    unusable: int = 0
    """Records that training would leave out too, and name."""
    pictures: int = 0
    """Pictures in them."""
    asked: int = 0
    """Pictures that the teacher was asked about, because they were not kept yet."""
    kept: int = 0
    """Pictures in the table at the end, of other recipes too."""
    taken: int = 0
    """Bytes that they take."""


def fill_ahead(
    recipe: Recipe,
    *,
    device: torch.device,
    batch: int = 32,
    workers: int = 0,
    begin: Callable[[int], object] = lambda records: None,
    tick: Callable[[int], object] = lambda records: None,
) -> Filled:
    """Keeps the teacher's features of every picture of a recipe.

    Args:
        recipe: with `stage.alignment.cache: disk`.
        device: where the teacher runs.
        batch: records at a time.
        workers: processes that open pictures.
        begin: told how many records there are.
        tick: told after each batch how many records it had.

    Raises:
        ValueError: if nothing is kept on disk, the sources are streams, or the table is too small.
    """
    section = recipe.stage.alignment
    if section is None or section.cache != "disk":
        raise ValueError(
            "stage.alignment.cache of the recipe is not disk, so no later run would find the "
            "features; add stage.alignment.cache=disk."
        )
    records = build_records(recipe)
    if not isinstance(records, Mixture):
        raise ValueError(
            "data.sources are streams, which are not counted; leave out streaming, or let training "
            "keep the features as they come."
        )
    teacher = build_teacher(recipe)
    table = open_table(recipe, teacher)
    assert teacher is not None and table is not None
    encoder = build_encoder(
        recipe.data, build_processor(recipe, records), view=teacher.view, table=table
    )
    # An epoch takes a record several times or leaves some out; each that it takes comes once.
    places = list(dict.fromkeys(records.locate(index) for index in range(len(records))))
    begin(len(places))
    return _fill(_Shares(records, places, encoder), teacher, table, device, batch, workers, tick)


class Share(NamedTuple):
    """What of one record is for the teacher."""

    share: TeacherShare
    """Canvases and keys."""
    cells: list[tuple[int, int]]
    """Rows and columns of cells of each picture."""


class _Shares(Dataset):
    """By number what of a record is for the teacher; None where it cannot be used."""

    def __init__(self, records: Mixture, places: list[tuple[int, int]], encoder: Encoder):
        self.records, self.places, self.encoder = records, places, encoder

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> Share | None:
        number, place = self.places[index]
        try:
            share, grids = self.encoder.teacher_share(self.records.sources[number][place])
        except ValueError:
            return None
        unit = self.encoder.processor.image_processor.size_multiple
        return Share(share, [(grid.height // unit, grid.width // unit) for grid in grids])


def _fill(
    shares: _Shares,
    teacher: FrozenTeacher,
    table: FeatureTable,
    device: torch.device,
    batch: int,
    workers: int,
    tick: Callable[[int], object],
) -> Filled:
    done = Filled()
    loader: DataLoader = DataLoader(
        shares, batch_size=batch, num_workers=workers, collate_fn=lambda items: items
    )
    for items in loader:
        usable = [item for item in items if item is not None]
        done.records += len(items)
        done.unusable += len(items) - len(usable)
        done.pictures += sum(len(item.cells) for item in usable)
        asked = list(_to_ask(usable))
        if asked:
            canvases = np.concatenate([item.share.pixel_values for item in usable])
            parts = _features(teacher, canvases, [cells for _, cells in asked], device)
            table.put([key for key, _ in asked], parts)
            done.asked += len(asked)
        if table.full:
            raise ValueError(
                f"The features of {table.counts[0]:,} pictures are kept and no more fit; give more "
                "than the recipe's stage.alignment.cache_gb "
                f"({table.limit / 1e9:g}), for which the file {table.path} has to be removed."
            )
        tick(len(items))
    done.kept, done.taken = table.counts
    return done


def _to_ask(items: list[Share]) -> Iterator[tuple[bytes, tuple[int, int]]]:
    """Keys and cells of the pictures that have a canvas, in the order of these."""
    for item in items:
        for key, kept, cells in zip(item.share.keys, item.share.kept, item.cells, strict=True):
            if kept is None:
                yield key, cells


def _features(
    teacher: FrozenTeacher,
    canvases: np.ndarray,
    cells: list[tuple[int, int]],
    device: torch.device,
) -> list[np.ndarray]:
    """(cells, W) float16 for each canvas."""
    grids = torch.tensor([(1, rows, cols) for rows, cols in cells])  # one patch a cell
    numbers = teacher.cells(grids, side=1).to(device)
    features = teacher.features_of_cells(torch.from_numpy(canvases).to(device), numbers)
    ends = np.cumsum([rows * cols for rows, cols in cells])[:-1]
    return np.split(features.half().cpu().numpy(), ends)


__all__ = ["Filled", "fill_ahead"]
