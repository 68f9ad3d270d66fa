"""The published programme's way from pictures to tensors, in its shape of work, to be timed against.

Every picture is resized, put on a square canvas, given a mask channel, and rescaled and normalised
by the library's functions in float64 and float32, one picture after the other.  `preprocess` has
the same numbers in slow loops; this is what the programme spends.  Easy to get wrong: the pictures
must come in RGB, or a copy is timed that only a file's reader makes.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers.image_transforms import normalize, rescale, to_channel_dimension_format
from transformers.image_utils import ChannelDimension

from .geometry import Box, box
from .preprocess import background


def picture_tensor(image: Image.Image, settings: dict[str, Any]) -> torch.Tensor:
    """One RGB picture on its canvas with its mask: (4, side, side) float32."""
    side = settings["image_size"]
    valid = box(image.height, image.width, settings)
    height, width = valid.bottom - valid.top, valid.right - valid.left
    # Two calls, as newer Pillows would swap the passes otherwise; one call makes both passes, too.
    resized = image.resize((width, image.height), Image.Resampling.BICUBIC)
    resized = resized.resize((width, height), Image.Resampling.BICUBIC)
    mask = np.ones((1, side, side), np.float32)
    if (height, width) != (side, side):
        canvas = Image.new("RGB", (side, side), background(settings))
        canvas.paste(resized, (valid.left, valid.top))
        resized, mask = canvas, np.zeros((1, side, side), np.float32)
        mask[:, valid.top : valid.bottom, valid.left : valid.right] = 1
    pixels = np.array(resized)
    last, first = ChannelDimension.LAST, ChannelDimension.FIRST
    pixels = rescale(pixels, 1 / 255, input_data_format=last)
    mean, std = settings["image_mean"], settings["image_std"]
    pixels = normalize(pixels, mean, std, input_data_format=last)
    pixels = to_channel_dimension_format(pixels, first, input_channel_dim=last)
    # The library makes a list an array, and the array a tensor: two copies.
    return torch.cat([torch.tensor(np.array([pixels]))[0], torch.from_numpy(mask)])


def published_tensor(images: list[Image.Image], settings: dict[str, Any]) -> torch.Tensor:
    """All pictures: (pictures, 4, side, side) float32."""
    return torch.stack([picture_tensor(image, settings) for image in images])


def picture_area(tensor: torch.Tensor, valid: Box) -> np.ndarray:
    """What is picture of a tensor, without its mask: (height, width, 3)."""
    area = tensor[:3, valid.top : valid.bottom, valid.left : valid.right]
    return area.permute(1, 2, 0).numpy()
