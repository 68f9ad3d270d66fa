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
from transformers import AutoConfig, AutoModel, PreTrainedConfig
from transformers.image_processing_base import ImageProcessingMixin

from eve_vlm.data.teacher_view import TeacherView
from eve_vlm.errors import first_line
from eve_vlm.train.efficientnet_lite import load_efficientnet_lite0

EFFICIENTNET = "efficientnet-lite0"


class FrozenTeacher:
    """A frozen vision model and how to ask it.

    Attributes:
        view: how pictures are laid out for it.
        hidden_size: width of its features.
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
    ):
        self.model = model.requires_grad_(False).eval()
        self.extract, self.view, self.hidden_size = extract, view, hidden_size
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
        return (
            cls._efficientnet(cells, layer)
            if name == EFFICIENTNET
            else cls._hugging_face(name, cells, layer)
        )

    @classmethod
    def _efficientnet(cls, cells: int, layer: int) -> "FrozenTeacher":
        model = load_efficientnet_lite0(layer)
        view = TeacherView(cells=cells, cell_pixels=model.stride, fill=(127, 127, 127))

        def extract(model: nn.Module, pixels: torch.Tensor) -> torch.Tensor:
            return model(pixels).flatten(2).transpose(1, 2)  # (I, cells * cells, W)

        # The weights were trained on (value - 127) / 128 (measured: daisy 0.36 against 0.13).
        mean, std = (127 / 255,) * 3, (128 / 255,) * 3
        return cls(model, extract, view=view, hidden_size=model.hidden_size, mean=mean, std=std)

    @classmethod
    def _hugging_face(cls, name: str, cells: int, layer: int) -> "FrozenTeacher":
        try:
            config = AutoConfig.from_pretrained(name)
            vision = _vision_config(name, config)
            model = AutoModel.from_pretrained(name, dtype=torch.float32)
            settings, _ = ImageProcessingMixin.get_image_processor_dict(name)
        except OSError as error:
            raise ValueError(
                f"The teacher {name!r} cannot be loaded ({first_line(error)}); give a "
                "Hugging Face vision "
                f"model's folder or name, or {EFFICIENTNET!r}, or set stage.alignment to null."
            ) from None
        if vision is not config:
            model = model.vision_model
        if not -vision.num_hidden_layers - 1 <= layer <= vision.num_hidden_layers:
            raise ValueError(
                f"stage.alignment.layer is {layer} but the teacher {name!r} has "
                f"{vision.num_hidden_layers} layers; give one of them, such as -2."
            )
        mean, std = settings["image_mean"], settings["image_std"]
        view = TeacherView(
            cells=cells,
            cell_pixels=vision.patch_size,
            fill=(int(255 * mean[0]), int(255 * mean[1]), int(255 * mean[2])),
        )
        positions = {} if view.size == vision.image_size else {"interpolate_pos_encoding": True}

        def extract(model: nn.Module, pixels: torch.Tensor) -> torch.Tensor:
            states = model(pixels, output_hidden_states=True, **positions).hidden_states[layer]
            return states[:, states.shape[1] - cells * cells :]  # without class or register tokens

        return cls(model, extract, view=view, hidden_size=vision.hidden_size, mean=mean, std=std)

    @torch.no_grad()
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
        device = teacher_pixel_values.device
        if next(self.model.parameters()).device != device:
            self.model.to(device)
            self.mean, self.std = self.mean.to(device), self.std.to(device)
        pixels = teacher_pixel_values.permute(0, 3, 1, 2).float() / 255
        with torch.autocast(device.type, enabled=False):
            features = self.extract(
                self.model, (pixels - self.mean) / self.std
            )  # (I, cells * cells, W)
        kept = self.view.cells_of_pictures(
            image_grid_thw[:, 1] // side, image_grid_thw[:, 2] // side
        )
        return features[kept.flatten(1)]


def _vision_config(name: str, config: PreTrainedConfig) -> PreTrainedConfig:
    """The vision part of a teacher's configuration, checked to be one that cuts into patches."""
    composite = {"text_config", "vision_config"} <= config.sub_configs.keys()
    vision = config.vision_config if composite else config
    lacking = {"patch_size", "image_size", "num_hidden_layers"} - vision.to_dict().keys()
    if lacking:
        raise ValueError(
            f"The teacher {name!r} is a {config.model_type!r} model without {min(lacking)}; give a "
            f"vision model such as CLIP, SigLIP or DINOv2, or {EFFICIENTNET!r}."
        )
    return vision


__all__ = ["EFFICIENTNET", "FrozenTeacher"]
