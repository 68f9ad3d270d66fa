"""Picture to canvas, the published way: resize to the box, paste, normalise, add the mask.

The product has no canvas and no mask; this is here to show that its packed patches are the same
numbers. One thing a reader would get wrong: Pillow 13 swaps the two passes of a resize for some
tall pictures, so the width is resized first and the height in a second call.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from PIL import Image

from .geometry import Box, box, teacher_box


def background(settings: dict[str, Any]) -> tuple[int, ...]:
    """Colour of the border: the mean colour, cut to whole numbers."""
    return tuple(int(mean * 255) for mean in settings["image_mean"])


def draw(image: Image.Image, valid: Box, side: int, colour: tuple[int, ...]) -> np.ndarray:
    """The 8-bit canvas (side, side, 3)."""
    height, width = valid.bottom - valid.top, valid.right - valid.left
    image = image.convert("RGB")
    image = image.resize((width, image.height), Image.Resampling.BICUBIC)
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    canvas = Image.new("RGB", (side, side), colour)
    canvas.paste(image, (valid.left, valid.top))
    return np.asarray(canvas)


def mask(valid: Box, side: int) -> np.ndarray:
    """One on the picture, zero on the border: (side, side)."""
    canvas = np.zeros((side, side), dtype=np.uint8)
    for row in range(valid.top, valid.bottom):
        for column in range(valid.left, valid.right):
            canvas[row, column] = 1
    return canvas


def normalise(pixels: np.ndarray, settings: dict[str, Any]) -> np.ndarray:
    """8-bit (height, width, 3) to float32 (3, height, width)."""
    channels = []
    for index, (mean, std) in enumerate(
        zip(settings["image_mean"], settings["image_std"], strict=True)
    ):
        channels.append((pixels[:, :, index].astype(np.float64) / 255 - mean) / std)
    return np.stack(channels).astype(np.float32)


def student_canvas(image: Image.Image, settings: dict[str, Any]) -> tuple[np.ndarray, Box]:
    """The student's 8-bit canvas and the picture's box on it."""
    valid = box(image.height, image.width, settings)
    return draw(image, valid, settings["image_size"], background(settings)), valid


def teacher_canvas(image: Image.Image, settings: dict[str, Any]) -> tuple[np.ndarray, Box]:
    """The teacher's 8-bit canvas and the picture's box on it."""
    valid = teacher_box(image.height, image.width, settings)
    return draw(image, valid, settings["image_size_clip"], background(settings)), valid


def with_mask(pixels: np.ndarray, valid: Box, settings: dict[str, Any]) -> np.ndarray:
    """The published float tensor (4, side, side)."""
    layers = [normalise(pixels, settings), mask(valid, pixels.shape[0])[None].astype(np.float32)]
    return np.concatenate(layers)
