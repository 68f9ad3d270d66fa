"""The patch embedding layer and its projector: packed patches to tokens of the decoder's width.

For each picture: the class token, then every row of cells with its row-end token.  There is no loop
over pictures, rows or patches, and pictures of any mix of sizes share one pass.

Easy to get wrong: everything here is computed in float32 even when the weights are half precision,
because encoder-free models overflow there (lmdeploy#2727, llama.cpp#24146).

Legend: `P` patches, `K` cells (tokens before class and row-end tokens), `N` image tokens, `I`
pictures, `C` patch embedding width, `D` decoder width, `m` merge size, `p` patch size.
"""

from dataclasses import dataclass
from os import PathLike
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoModel, GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers import initialization as init

from .cache_name_eve import NAMES
from .configuration_eve import EveConfig, EveVisionConfig
from .errors import check_loaded
from .image_processing_eve import num_image_tokens
from .pooled_attention_eve import (
    EveCellMean,
    EveClassAttention,
    EveLoneClassToken,
    EveMergeAttention,
    Float32Linear,
    at_least_float32,
    weight_of,
)
from .published_eve import DROPPED, KEY_MAPPING, hub_arguments, published_config_of


def on_host(tensor: torch.Tensor) -> torch.Tensor:
    """A copy on the host, the one wait for the device that reading its values costs.

    Also made where the values are on the host already, so that a CPU counts what a GPU waits for.
    """
    return tensor.to("cpu", copy=True)


def on_device(device: torch.device, *indices: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Tensors of one type made on the host, in one copy that the host does not wait for."""
    together = torch.cat([one.flatten() for one in indices])
    if device.type == "cuda":
        together = together.pin_memory()  # else the host waits until it is copied
    parts = together.to(device, non_blocking=True, copy=True).split([i.numel() for i in indices])
    return tuple(part.view(one.shape) for part, one in zip(parts, indices, strict=True))


def tokens_of_pictures(image_grid_thw: torch.Tensor, merge_size: int) -> torch.Tensor:
    """Tokens of each picture, (I,), from its patch grid (I, 3)."""
    return num_image_tokens(image_grid_thw[:, 1] // merge_size, image_grid_thw[:, 2] // merge_size)


def sample_of_picture(
    input_ids: torch.Tensor, image_grid_thw: torch.Tensor, config: EveConfig
) -> torch.Tensor:
    """Which sample of the batch each picture belongs to, (I,), found by counting placeholders."""
    tokens = tokens_of_pictures(image_grid_thw, config.vision_config.merge_size)
    # Placeholders up to and with each sample, (B,).
    ends = (input_ids == config.image_token_id).sum(1).cumsum(0)
    return torch.searchsorted(ends, tokens.cumsum(0).to(ends.device))


@dataclass
class PackedGrid:
    """Where every token of every picture lies in the packed row; made without a loop, on the host.

    `cols` and `image_of_cell` are per cell; `class_position` is per picture, `cell_position` per
    cell. A position that neither names is a row-end token.
    """

    rows: torch.Tensor  # (I,)
    cols: torch.Tensor  # (I,)
    image_of_cell: torch.Tensor  # (K,)
    cell_position: torch.Tensor  # (K,)
    class_position: torch.Tensor  # (I,)
    tokens_per_image: torch.Tensor  # (I,)
    first_cell: torch.Tensor  # (I,)
    num_tokens: int

    @classmethod
    def from_grid_thw(cls, image_grid_thw: torch.Tensor, merge_size: int) -> "PackedGrid":
        """Reads (I, 3) patch grids; `repeat_interleave` and `cumsum` stand in for a loop.

        They should be `on_host`: on a GPU the host would wait three times.
        """
        rows = image_grid_thw[:, 1] // merge_size
        cols = image_grid_thw[:, 2] // merge_size
        cells = rows * cols
        tokens = tokens_of_pictures(image_grid_thw, merge_size)
        class_position = tokens.cumsum(0) - tokens
        image_of_cell = torch.repeat_interleave(
            torch.arange(len(cells), device=cells.device), cells
        )
        first_cell = cells.cumsum(0) - cells
        within = (
            torch.arange(image_of_cell.shape[0], device=cells.device) - first_cell[image_of_cell]
        )
        row_ends_before = within // cols[image_of_cell]
        cell_position = class_position[image_of_cell] + 1 + within + row_ends_before
        return cls(
            *(rows, cols, image_of_cell, cell_position, class_position, tokens, first_cell),
            num_tokens=int(tokens.sum()),
        )


class EvePreTrainedModel(PreTrainedModel):
    """What the library needs to know of every EVE class."""

    config_class = EveConfig
    base_model_prefix = "model"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _no_split_modules = ["EvePatchEmbedding"]
    _skip_keys_device_placement = list(NAMES)
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = False
    # What a published checkpoint holds beyond the model, and training beyond answering: the list of
    # what may be left over.
    _keys_to_ignore_on_load_unexpected = [*DROPPED, r"^aligner\."]
    _from_published = False

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | PathLike | None,
        *args,
        key_mapping: dict[str, str] | None = None,
        **kwargs,
    ) -> Any:
        """The library's, which also reads the published EVE v1 checkpoints, by name or folder.

        Raises:
            ValueError: if a published checkpoint lacks a weight or has a surplus one, unless the
                caller asks for `output_loading_info` to judge by itself.
        """
        name, published = pretrained_model_name_or_path, False
        if key_mapping is None and name is not None:
            published = published_config_of(name, **hub_arguments(kwargs)) is not None
            key_mapping = KEY_MAPPING if published else None
        asked = kwargs.pop("output_loading_info", False)
        model, report = super().from_pretrained(
            name, *args, key_mapping=key_mapping, output_loading_info=True, **kwargs
        )
        model._from_published = published
        if published:
            if not asked:
                # The model without a head may leave one behind.
                allowed = () if model.can_generate() else (r"^lm_head\.weight$",)
                check_loaded(
                    str(name), report["missing_keys"], report["unexpected_keys"], allowed=allowed
                )
            _greedy(model)
        return (model, report) if asked else model

    def save_pretrained(
        self,
        save_directory: str | PathLike,
        *args,
        save_original_format: bool | None = None,
        **kwargs,
    ) -> Any:
        """The library's; in our own layout, also where the weights came from a published file.

        Args:
            save_original_format: the library's, which turns renames of the load back; None means
                yes, but for published checkpoints.
        """
        if save_original_format is None:
            save_original_format = not self._from_published
        return super().save_pretrained(
            save_directory, *args, save_original_format=save_original_format, **kwargs
        )

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Starts new weights as the published training did: torch's own defaults.

        | parameter | distribution |
        |---|---|
        | linear and convolution weights and biases | uniform, +- 1 / sqrt(fan in) |
        | layer norms | 1 and 0 |
        | class and row-end embeddings | standard normal |
        | decoder and `lm_head` | the decoder's own rule (initialised by itself) |
        """
        if isinstance(module, Float32Linear | nn.Conv2d):
            bound = module.weight[0].numel() ** -0.5
            init.uniform_(module.weight, -bound, bound)
            if module.bias is not None:
                init.uniform_(module.bias, -bound, bound)
        elif isinstance(module, EvePatchEmbedding):
            init.normal_(module.class_embedding)
            init.normal_(module.row_end_embedding)
        else:
            super()._init_weights(module)


def _greedy(model: PreTrainedModel) -> None:
    """Leaves only token ids in the generation settings of a published checkpoint.

    Theirs carry sampling values beside `do_sample: false`, which newer versions of the library
    refuse to save; a greedy answer needs none of them.
    """
    if model.can_generate():
        given = model.generation_config.to_dict()
        ids = ("bos_token_id", "eos_token_id", "pad_token_id")
        model.generation_config = GenerationConfig(**{name: given[name] for name in ids})


class EvePatchEmbedding(EvePreTrainedModel):
    """The patch embedding layer before its projector: packed patches to packed tokens.

    There is no loop over pictures, rows or patches, and pictures of any mix of sizes share one
    pass.
    """

    config_class = EveVisionConfig
    main_input_name = "pixel_values"

    def __init__(self, config: EveVisionConfig):
        super().__init__(config)
        width = config.hidden_size
        self.class_embedding = nn.Parameter(torch.empty(width))
        self.row_end_embedding = nn.Parameter(torch.empty(width))
        self.patch_projection = nn.Conv2d(
            config.num_channels,
            width,
            kernel_size=config.patch_size,
            stride=config.patch_size,
            bias=False,
        )
        merge = EveMergeAttention if config.merge_attention else EveCellMean
        self.merge_attention = merge(config)
        self.class_attention = (EveClassAttention if config.class_attention else EveLoneClassToken)(
            config
        )
        self.post_init()

    def forward(self, pixel_values: torch.Tensor, image_grid_thw: torch.Tensor) -> torch.Tensor:
        """Embeds pictures.

        Args:
            pixel_values: (P, 3 * p * p), as the image processor packs them.
            image_grid_thw: (I, 3) integers; the products of its rows add up to P.

        Returns:
            (N, C) float32; picture i takes 1 + rows_i * (cols_i + 1) rows.

        Raises:
            ValueError: if the patches do not have the model's size, or are not as many as the grids
                say.
        """
        image_grid_thw = on_host(image_grid_thw)
        check_packed(self.config, pixel_values, image_grid_thw)
        grid = PackedGrid.from_grid_thw(image_grid_thw, self.config.merge_size)
        image_of_cell, first_cell, cell_position, class_position = on_device(
            pixel_values.device,
            *(grid.image_of_cell, grid.first_cell, grid.cell_position, grid.class_position),
        )
        with torch.autocast(pixel_values.device.type, enabled=False):
            # Stride equals kernel, so the convolution is one matrix product over the packed patches
            # (and a third as far from the float64 value as torch's convolution: 1.3e-6 against
            # 3.9e-6).
            weight = at_least_float32(weight_of(self.patch_projection)).flatten(1)  # (C, 3*p*p)
            patches = F.linear(pixel_values.to(weight.dtype), weight)  # (P, C)
            cells = self.merge_attention(
                patches.unflatten(0, (-1, self.config.merge_size**2))
            )  # (K, C)
            class_tokens = self.class_attention(
                self.class_embedding,
                cells,
                image_of_cell=image_of_cell,
                first_cell=first_cell,
            )  # (I, C)
            tokens = at_least_float32(self.row_end_embedding).expand(grid.num_tokens, -1)  # (N, C)
            tokens = tokens.index_copy(0, cell_position, cells)
            return tokens.index_copy_(0, class_position, class_tokens)


def check_packed(
    config: PreTrainedConfig, pixel_values: torch.Tensor, image_grid_thw: torch.Tensor
) -> None:
    """Compares packed patches with their grids and with the model's patches.

    Raises:
        ValueError: if they do not belong together.
    """
    per_patch = config.num_channels * config.patch_size**2
    if pixel_values.ndim != 2 or pixel_values.shape[1] != per_patch:
        raise ValueError(
            f"pixel_values has the shape {tuple(pixel_values.shape)} but this model takes "
            f"(patches, {per_patch}) for patches of {config.patch_size} pixels; make it with the "
            "model's own image processor."
        )
    expected = int(image_grid_thw.prod(-1).sum())
    if pixel_values.shape[0] != expected:
        raise ValueError(
            f"pixel_values holds {pixel_values.shape[0]} patches but image_grid_thw speaks of "
            f"{expected}; pass both as they came from one call of the image processor."
        )


class EveProjector(nn.Module):
    """The feed-forward at the end of the patch embedding layer; exact GELU between its layers.

    `config.projector_depth` linear layers, `linear_1` to `linear_N`; two in the published models.
    """

    def __init__(self, config: EveConfig):
        super().__init__()
        given, width = config.vision_config.hidden_size, config.text_config.hidden_size
        for place in range(1, config.projector_depth + 1):
            self.add_module(f"linear_{place}", Float32Linear(given, width))
            given = width

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """(N, C) to (N, D), float32."""
        with torch.autocast(tokens.device.type, enabled=False):
            first, *others = self.children()
            tokens = first(tokens)
            for linear in others:
                tokens = linear(F.gelu(tokens))
            return tokens


def vision_tower_of(config: PreTrainedConfig) -> PreTrainedModel:
    """The patch embedding; or what another kind of configuration stands for, a twin's encoder."""
    if config.model_type == EveVisionConfig.model_type:
        return EvePatchEmbedding._from_config(config)
    return AutoModel.from_config(config)


__all__ = ["EvePatchEmbedding", "EvePreTrainedModel", "EveProjector", "PackedGrid"]
