"""The teacher asked once per picture: its features are kept, and joined with those just computed.

A worker finds kept features by a picture's content and lays out only the others; the trainer asks
the teacher about these, joins the two, and keeps what is new when the step is made.  Easy to get
wrong: features that were just computed are rounded to float16 too, or the same picture would have
other features the first time than every time after.
"""

import hashlib
import json
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from eve_vlm.cache import cache_folder
from eve_vlm.data.feature_table import FeatureTable
from eve_vlm.train.sections import Recipe
from eve_vlm.train.teacher import FrozenTeacher

FOLDER = "teacher_features"
# What a configuration says of where a model comes from, and not of what it computes.
_NOT_COMPUTED = ("_name_or_path", "transformers_version", "architectures", "dtype", "torch_dtype")


def open_table(recipe: Recipe, teacher: FrozenTeacher | None) -> FeatureTable | None:
    """The table of a recipe's teacher; None where its features are not kept.

    Raises:
        ValueError: see `FeatureTable`.
    """
    section = recipe.stage.alignment
    if teacher is None or section is None or section.cache is None:
        return None
    fingerprint = fingerprint_of(teacher)
    path = None
    if section.cache == "disk":
        path = cache_folder() / FOLDER / f"{fingerprint[:32]}.features"
    return FeatureTable(
        path,
        fingerprint=fingerprint,
        width=teacher.hidden_size,
        most_cells=teacher.view.cells**2,
        limit=round(section.cache_gb * 1e9),
    )


def fingerprint_of(teacher: FrozenTeacher) -> str:
    """Changes with whatever the features depend on beside the picture; 0.1 s for 100 MB of weights.

    Weights, settings, layer, canvas and normalisation are in it, the teacher's name is not.
    """
    assert isinstance(teacher.model, PreTrainedModel)
    settings = teacher.model.config.to_dict()
    about = {
        "model": type(teacher.model).__name__,
        "config": {name: settings[name] for name in settings if name not in _NOT_COMPUTED},
        "layer": teacher.layer,
        "view": [teacher.view.cells, teacher.view.cell_pixels, *teacher.view.fill],
        "normalisation": [teacher.mean.flatten().tolist(), teacher.std.flatten().tolist()],
    }
    digest = hashlib.sha256(json.dumps(about, sort_keys=True, default=str).encode())
    for name, value in sorted(teacher.model.state_dict().items()):
        digest.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
        digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


class TeacherFeatures:
    """What a trainer asks for the teacher's features of a batch.

    Args:
        teacher: the frozen teacher.
        side: patches of the student along one alignment cell.
        table: where features are kept; None asks the teacher about every picture.
    """

    def __init__(self, teacher: FrozenTeacher, *, side: int, table: FeatureTable | None = None):
        self.teacher, self.side, self.table = teacher, side, table
        self._new: list[tuple[list[tuple[bytes, int]], torch.Tensor]] = []

    def prepare(self, batch: dict[str, Any], *, pin: bool = False) -> None:
        """Adds to a batch of the collator, before it goes to a device, what shapes depend on.

        `teacher_cells` says which cells of the canvases hold pictures.  With a table `teacher_kept`
        becomes (Z, W) with rows to be filled in, which `teacher_rows` numbers, and `teacher_asked`
        names the pictures that they belong to.

        Args:
            pin: puts them where a GPU can fetch them by itself.
        """
        if "teacher_pixel_values" not in batch:
            return
        grids = batch["image_grid_thw"]
        new: dict[str, torch.Tensor] = {}
        if self.table is not None:
            grids = self._join(batch, new)
        new["teacher_cells"] = self.teacher.cells(grids, side=self.side)
        batch |= {name: value.pin_memory() if pin else value for name, value in new.items()}

    def _join(self, batch: dict[str, Any], new: dict[str, torch.Tensor]) -> torch.Tensor:
        """Puts kept features in their rows; returns the grids of the pictures to be asked about."""
        assert self.table is not None
        grids = batch["image_grid_thw"]
        cells = ((grids[:, 1] // self.side) * (grids[:, 2] // self.side)).numpy()
        known = batch.pop("teacher_is_kept").numpy()
        keys = [key.tobytes() for key in batch.pop("teacher_keys").numpy()]
        joined = np.zeros((cells.sum(), self.table.width), np.float16)
        joined[np.repeat(known, cells)] = (
            batch.pop("teacher_kept").numpy().reshape(-1, self.table.width)
        )
        # A worker looked some batches ago, and one that was not forked sees no memory of ours.
        starts, late = np.cumsum(cells) - cells, np.zeros_like(known)
        for index in np.flatnonzero(~known):
            found = self.table.get(keys[index], int(cells[index]))
            if found is not None:
                joined[starts[index] : starts[index] + cells[index]] = found
                late[index] = True
        if late.any():
            still = torch.from_numpy(~late[~known])
            batch["teacher_pixel_values"] = batch["teacher_pixel_values"][still]
        asked = ~(known | late)
        batch["teacher_asked"] = [
            (keys[index], int(cells[index])) for index in np.flatnonzero(asked)
        ]
        new["teacher_kept"] = torch.from_numpy(joined)
        new["teacher_rows"] = torch.from_numpy(np.flatnonzero(np.repeat(asked, cells)))
        return grids[torch.from_numpy(asked)]

    def __call__(self, inputs: dict[str, Any]) -> torch.Tensor | None:
        """(Z, W) float32 for the pictures of a prepared batch, whose entries it takes out of it.

        None where the batch brings nothing for a teacher.
        """
        views = inputs.pop("teacher_pixel_values", None)
        if views is None:
            return None
        cells, kept = inputs.pop("teacher_cells"), inputs.pop("teacher_kept", None)
        rows, pictures = inputs.pop("teacher_rows", None), inputs.pop("teacher_asked", None)
        if kept is None:
            return self.teacher.features_of_cells(views, cells)
        if pictures:
            asked = self.teacher.features_of_cells(views, cells).half()
            self._new.append((pictures, asked))
            kept = kept.index_copy(0, rows, asked)
        return kept.float()

    def keep(self) -> None:
        """Puts new features into the table.

        It waits for the device, so it should be called where the host has just waited anyway.

        Raises:
            ValueError: if features do not fit float16.
        """
        new, self._new = self._new, []
        for pictures, features in new:
            assert self.table is not None
            ends = np.cumsum([cells for _, cells in pictures])[:-1]
            parts = np.split(features.cpu().numpy(), ends)
            self.table.put([key for key, _ in pictures], parts)


__all__ = ["TeacherFeatures", "fingerprint_of", "open_table"]
