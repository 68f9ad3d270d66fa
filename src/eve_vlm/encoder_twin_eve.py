"""The encoder-based twin: EVE with a frozen vision encoder in place of the patch embedding layer.

For fair comparisons only.  Everything else is EVE's own: decoder, projector, processor, packed
rows, and the sequence itself.  Each cell of EVE's grid is one feature of the encoder, the class
token is their mean, and every row ends in a learned token, so a picture takes as many tokens, in
the same order.  `config.vision_config` alone says that a model is a twin.

Easy to get wrong: the encoder sees the pixels that EVE sees, after EVE's resizing, made again from
the packed patches, and not the picture as it was.

Legend: as in `patch_embedding_eve.py`, with `C` the encoder's width, and `G` pictures of one grid.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import CONFIG_MAPPING, AutoModel, PreTrainedConfig
from transformers import initialization as init
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from .configuration_eve import EveVisionConfig
from .efficientnet_lite import EfficientNetLite0Config
from .modeling_eve import EveForConditionalGeneration
from .patch_embedding_eve import (
    EvePreTrainedModel,
    EveProjector,
    PackedGrid,
    check_packed,
    on_device,
    on_host,
)
from .vision_encoder import EncoderFacts, load_encoder, patch_features, read_encoder

ABOUT = {"role": "encoder", "key": "model.encoder"}  # in errors about encoders


class EveEncoderConfig(PreTrainedConfig):
    """A frozen encoder as the vision part of an EVE model.

    `patch_size` and `merge_size` are those of the packed patches, which were normalised by
    `image_mean` and `image_std`; the encoder wants its own `encoder_mean` and `encoder_std`, and
    its hidden state `layer` is taken.  `encoder_name` is what the recipe called it.
    """

    model_type = "eve_encoder"
    base_config_key = "vision_config"
    # No `sub_configs`: what the decoder is told, its attention say, is not for the encoder.

    # Given as a dict or None; a configuration object after construction.
    encoder_config: Any = None
    encoder_name: str = "efficientnet-lite0"
    layer: int = -2
    encoder_mean: list[float] | tuple[float, ...] = tuple(OPENAI_CLIP_MEAN)
    encoder_std: list[float] | tuple[float, ...] = tuple(OPENAI_CLIP_STD)
    image_mean: list[float] | tuple[float, ...] = tuple(OPENAI_CLIP_MEAN)
    image_std: list[float] | tuple[float, ...] = tuple(OPENAI_CLIP_STD)
    patch_size: int = EveVisionConfig.patch_size
    merge_size: int = EveVisionConfig.merge_size
    num_channels: int = 3

    def __post_init__(self, **kwargs):
        if self.encoder_config is None:
            self.encoder_config = EfficientNetLite0Config()
        elif isinstance(self.encoder_config, dict):
            given = dict(self.encoder_config)
            self.encoder_config = CONFIG_MAPPING[given.pop("model_type")](**given)
        super().__post_init__(**kwargs)

    @property
    def hidden_size(self) -> int:
        """Width of a feature, which the projector is given."""
        return self.encoder_config.hidden_size

    @classmethod
    def of(cls, facts: EncoderFacts, **settings: Any) -> "EveEncoderConfig":
        """The configuration for an encoder; `settings` are those of the packed patches."""
        return cls(
            encoder_config=facts.config,
            encoder_name=facts.name,
            layer=facts.layer,
            encoder_mean=facts.mean,
            encoder_std=facts.std,
            **settings,
        )


class EveEncoder(EvePreTrainedModel):
    """The frozen encoder with EVE's layout of tokens: packed patches to packed tokens.

    The encoder takes no gradients, and stays in eval mode when the model goes into training.
    """

    config_class = EveEncoderConfig
    main_input_name = "pixel_values"
    _no_split_modules = ["EveEncoder"]

    def __init__(self, config: EveEncoderConfig):
        super().__init__(config)
        self.encoder = AutoModel.from_config(config.encoder_config)
        self.row_end_embedding = nn.Parameter(torch.empty(config.hidden_size))
        self.post_init()
        self.train(self.training)

    def train(self, mode: bool = True) -> "EveEncoder":
        """As every module's, but the encoder stays frozen and in eval mode.

        Frozen again here, because the library makes new parameters when it loads weights, and calls
        `eval()` behind that.
        """
        super().train(mode)
        self.encoder.requires_grad_(False).eval()
        return self

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if module is self:
            init.normal_(self.row_end_embedding)
        else:
            super()._init_weights(module)

    def forward(self, pixel_values: torch.Tensor, image_grid_thw: torch.Tensor) -> torch.Tensor:
        """Encodes pictures; arguments and result as `EvePatchEmbedding.forward` has them."""
        image_grid_thw = on_host(image_grid_thw)
        check_packed(self.config, pixel_values, image_grid_thw)
        grid = PackedGrid.from_grid_thw(image_grid_thw, self.config.merge_size)
        cells = self._features(pixel_values, image_grid_thw, grid.image_of_cell)  # (K, C)
        image_of_cell, number, cell_position, class_position = on_device(
            cells.device,
            *(grid.image_of_cell, grid.rows * grid.cols, grid.cell_position, grid.class_position),
        )
        sums = cells.new_zeros(len(number), cells.shape[1])
        sums = sums.index_add(0, image_of_cell, cells)  # (I, C)
        means = sums / number.unsqueeze(1)
        tokens = self.row_end_embedding.to(cells.dtype).expand(grid.num_tokens, -1)  # (N, C)
        tokens = tokens.index_copy(0, cell_position, cells)
        return tokens.index_copy(0, class_position, means)

    @torch.no_grad()
    def _features(
        self, pixel_values: torch.Tensor, image_grid_thw: torch.Tensor, image_of_cell: torch.Tensor
    ) -> torch.Tensor:
        """Features of all cells, (K, C) float32; pictures of equal grids go together.

        Grids and `image_of_cell` are on the host.
        """
        patches_of = image_grid_thw.prod(-1)
        cells = pixel_values.new_empty(
            len(image_of_cell), self.config.hidden_size, dtype=torch.float32
        )
        with torch.autocast(pixel_values.device.type, enabled=False):
            for thw in image_grid_thw.unique(dim=0):
                chosen = (image_grid_thw == thw).all(-1)  # (I,)
                places = (
                    one.nonzero().squeeze(1)
                    for one in (chosen.repeat_interleave(patches_of), chosen[image_of_cell])
                )
                of_patches, of_cells = on_device(cells.device, *places)
                pixels = self._pixels(pixel_values[of_patches], *thw[1:].tolist())
                found = patch_features(self.encoder, pixels, self.config.layer)  # (G, R*C, C)
                cells[of_cells] = found.flatten(0, 1).float()
        return cells

    def _pixels(self, patches: torch.Tensor, rows: int, cols: int) -> torch.Tensor:
        """Packed patches of pictures of rows x cols patches, as the encoder wants them.

        Values are made 8-bit again after each step, width first, which gives what `resize_picture`
        gives (measured: one of 8,000 values differs, by at most 2 of 255).
        """
        config, merge, size = self.config, self.config.merge_size, self.config.patch_size
        rows, cols, side = rows // merge, cols // merge, config.encoder_config.patch_size
        pictures = patches.view(-1, rows, cols, merge, merge, config.num_channels, size, size)
        pictures = pictures.permute(0, 5, 1, 3, 6, 2, 4, 7)  # (G, 3, R, m, p, C, m, p)
        pictures = pictures.flatten(5).flatten(2, 4).float()  # (G, 3, height, width)

        def look(name: str) -> torch.Tensor:
            return pictures.new_tensor(getattr(config, name)).view(1, -1, 1, 1)

        pictures = ((pictures * look("image_std") + look("image_mean")) * 255).round()
        for to in ((pictures.shape[2], cols * side), (rows * side, cols * side)):
            pictures = F.interpolate(pictures, to, mode="bicubic", antialias=True)
            pictures = pictures.round().clamp(0, 255)
        pictures = (pictures / 255 - look("encoder_mean")) / look("encoder_std")
        return pictures.to(self.encoder.dtype)


def encoder_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Every parameter of a model that belongs to a frozen encoder; none for EVE itself."""
    towers = [module for module in model.modules() if isinstance(module, EveEncoder)]
    return [parameter for tower in towers for parameter in tower.encoder.parameters()]


def encoder_config(name: str, layer: int, **settings: Any) -> EveEncoderConfig:
    """The configuration for an encoder by name, without its weights; see `EveEncoderConfig.of`.

    Raises:
        ValueError: if it cannot be read, has no patches or no such layer.
    """
    return EveEncoderConfig.of(read_encoder(name, layer, **ABOUT), **settings)


def put_encoder(model: EveForConditionalGeneration, name: str, layer: int, **settings: Any) -> None:
    """Makes a twin of a model: an encoder by name instead of its patch embedding, a new projector.

    Args:
        model: is changed; its decoder stays.
        name, layer: see `read_encoder`.
        settings: of the packed patches, see `EveEncoderConfig`.

    Raises:
        ValueError: if there is no such encoder.
    """
    facts = read_encoder(name, layer, **ABOUT)
    encoder = load_encoder(facts, **ABOUT)
    dtype, device = model.dtype, model.device
    model.config.vision_config = EveEncoderConfig.of(facts, **settings)
    tower = EveEncoder._from_config(model.config.vision_config)
    tower.encoder.load_state_dict(encoder.state_dict())
    projector = EveProjector(model.config)
    model.model.vision_tower = tower.to(device, dtype)
    model.model.multi_modal_projector = projector.to(device, dtype)


__all__ = ["EveEncoder", "EveEncoderConfig", "encoder_config", "encoder_parameters", "put_encoder"]
