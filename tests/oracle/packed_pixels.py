"""Packed patches the slow way: one picture, one patch and one channel at a time, with copies.

The arithmetic is the product's (one multiplication and one addition in float32), so the bits must
be the same.  Easy to get wrong: factor and offset are made in float64 and rounded once.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from PIL import Image, ImageOps

from .geometry import box


def upright_rgb(image: Image.Image) -> Image.Image:
    """A copy of the picture, turned upright, in RGB; 16 bits lose their lower half."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image).astype(np.int64) // 256).astype(np.uint8))
    return image.convert("RGB")


def resized_pixels(image: Image.Image, height: int, width: int) -> np.ndarray:
    """Width first, then height, from a copy made of the pixels: (height, width, 3)."""
    image = Image.fromarray(np.array(image))
    image = image.resize((width, image.height), Image.Resampling.BICUBIC)
    return np.array(image.resize((width, height), Image.Resampling.BICUBIC))


def packed_picture(image: Image.Image, settings: dict[str, Any]) -> np.ndarray:
    """All patches of one picture, cell by cell: (P, 3 * p * p) float32."""
    image = upright_rgb(image)
    valid = box(image.height, image.width, settings)
    pixels = resized_pixels(image, valid.bottom - valid.top, valid.right - valid.left)
    patch, merge = settings["patch_stride"], settings["conv_stride"]
    cell, rows = patch * merge, []
    for top in range(0, pixels.shape[0] - cell + 1, cell):
        for left in range(0, pixels.shape[1] - cell + 1, cell):
            for y in range(top, top + cell, patch):
                for x in range(left, left + cell, patch):
                    rows.append(normalised_patch(pixels[y : y + patch, x : x + patch], settings))
    return np.stack(rows)


def normalised_patch(area: np.ndarray, settings: dict[str, Any]) -> np.ndarray:
    """One patch: channel after channel, scaled and shifted in float32."""
    channels = []
    for channel in range(3):
        mean, std = settings["image_mean"][channel], settings["image_std"][channel]
        factor, offset = np.float32(1 / 255 / std), np.float32(-mean / std)
        channels.append(area[:, :, channel].astype(np.float32) * factor + offset)
    return np.stack(channels).reshape(-1)
