"""The frozen vision teacher: pictures on canvases to one feature per cell.

The teacher belongs to training alone.  It is not a part of any model, so no checkpoint can hold it,
no optimizer can move it, and `model.train()` does not reach it.  Any Hugging Face vision model with
one token per patch will do (CLIP, SigLIP, DINOv2, ...), and EfficientNet-Lite0 from its package.

Easy to get wrong: only the cells that hold the picture are compared, but the teacher sees the
padding.
"""

from collections.abc import Callable

import torch
from torch import nn

from eve_vlm.data.teacher_view import TeacherView
from eve_vlm.vision_encoder import EFFICIENTNET, load_encoder, patch_features, read_encoder


class FrozenTeacher:
    """A frozen vision model and how to ask it.

    Attributes:
        view: how pictures are laid out for it.
        hidden_size: width of its features.
        layer: the hidden state that they are.
    """

    def __init__(
        self,
        model: nn.Module,
        extract: Callable[[nn.Module, torch.Tensor], torch.Tensor],
        *,
        view: TeacherView,
        hidden_size: int,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        layer: int = -2,
    ):
        self.model = model.requires_grad_(False).eval()
        self.extract, self.view, self.hidden_size = extract, view, hidden_size
        self.layer = layer
        self.mean = torch.tensor(mean).view(1, 3, 1, 1)
        self.std = torch.tensor(std).view(1, 3, 1, 1)

    @classmethod
    def from_pretrained(cls, name: str, *, cells: int, layer: int = -2) -> "FrozenTeacher":
        """Loads a teacher whose canvas is `cells` x `cells` of its patches.

        Args:
            name: `efficientnet-lite0`, or a Hugging Face vision model, folder or name.
            cells: alignment cells along the longer side of a picture.
            layer: which hidden state; for EfficientNet -1, -2, -3 are strides 32, 16, 8.
        """
        about = {"role": "teacher", "key": "stage.alignment"}
        facts = read_encoder(name, layer, **about)
        fill = (127, 127, 127)
        if name != EFFICIENTNET:
            fill = (int(255 * facts.mean[0]), int(255 * facts.mean[1]), int(255 * facts.mean[2]))
        return cls(
            load_encoder(facts, **about),
            lambda model, pixels: patch_features(model, pixels, layer),
            view=TeacherView(cells=cells, cell_pixels=facts.config.patch_size, fill=fill),
            hidden_size=facts.config.hidden_size,
            mean=facts.mean,
            std=facts.std,
            layer=layer,
        )

    def features(
        self, teacher_pixel_values: torch.Tensor, image_grid_thw: torch.Tensor, *, side: int
    ) -> torch.Tensor:
        """Features of the cells that hold the pictures.

        Args:
            teacher_pixel_values: (I, size, size, 3) uint8 canvases from `view.render`.
            image_grid_thw: (I, 3) the student's patch grids of the same pictures.
            side: patches of the student along one alignment cell (merge_size x pool_size).

        Returns:
            (Z, W) float32, picture by picture, in reading order.
        """
        cells = self.cells(image_grid_thw, side=side)
        return self.features_of_cells(teacher_pixel_values, cells.to(teacher_pixel_values.device))

    def cells(self, image_grid_thw: torch.Tensor, *, side: int) -> torch.Tensor:
        """(Z,) numbers of the cells that hold pictures, counted through all canvases.

        How many there are depends on the grids: on a GPU the host waits for that, so grids should
        be where the collator made them.
        """
        held = self.view.cells_of_pictures(
            image_grid_thw[:, 1] // side, image_grid_thw[:, 2] // side
        )
        return held.flatten().nonzero().squeeze(1)

    @torch.no_grad()
    def features_of_cells(
        self, teacher_pixel_values: torch.Tensor, cells: torch.Tensor
    ) -> torch.Tensor:
        """(Z, W) float32 features of (Z,) cells, numbered as `cells` gives them."""
        device = teacher_pixel_values.device
        if next(self.model.parameters()).device != device:
            self.model.to(device)
            self.mean, self.std = self.mean.to(device), self.std.to(device)
        pixels = teacher_pixel_values.permute(0, 3, 1, 2).float() / 255
        with torch.autocast(device.type, enabled=False):
            features = self.extract(
                self.model, (pixels - self.mean) / self.std
            )  # (I, cells * cells, W)
        return features.flatten(0, 1)[cells]


__all__ = ["EFFICIENTNET", "FrozenTeacher"]
