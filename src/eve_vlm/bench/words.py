"""What is asked about which pictures, and what of it the model is given: counts.

Pictures of mixed aspect ratios, as users have them, made of noise so that no file is needed and
nothing compresses well.  Easy to get wrong: what must be done is counted from sizes alone
(`work_of`), never read off what the code happened to do, or waste would count as work.
"""

from collections.abc import Sequence

import numpy as np
from PIL import Image

from eve_vlm.data.records import Record
from eve_vlm.image_processing_eve import EveGrid, num_image_tokens
from eve_vlm.processing_eve import EveProcessor

QUESTION = (
    "Describe the picture as well as you can: say what is in the foreground and what is behind it, "
    "which colours there are, and whether there is any text to be read in it."
)
CAPTION = (
    "A wide street on a bright morning with two parked cars, a yellow tram that comes around the "
    "corner, and a row of old houses behind tall trees; a woman in a red coat waits for the light "
    "while a small brown dog looks at a bird on the wall beside her, and above the door of a shop "
    "there is a sign with large white letters on blue ground."
)
ANSWER = "A yellow tram on a wide street; the sign says bakery."

# Width and height in pixels: a square, a panorama of 3 : 1, a column of 1 : 2, a photograph.
MIXED = ((640, 640), (1920, 640), (320, 640), (640, 480))
SQUARE = (672, 672)


def picture(size: tuple[int, int], *, seed: int = 0) -> Image.Image:
    """Noise of a width and height."""
    width, height = size
    noise = np.random.default_rng([seed, *size]).integers(0, 256, (height, width, 3), np.uint8)
    return Image.fromarray(noise)


def mixed(count: int) -> list[Image.Image]:
    """Pictures of mixed aspect ratios, no two alike."""
    return [picture(MIXED[index % len(MIXED)], seed=index) for index in range(count)]


def records(count: int, stage: str) -> list[Record]:
    """What a stage learns from: captions, or in finetune conversations."""
    image, text = {"type": "image"}, {"type": "text", "text": QUESTION}
    chat = stage == "finetune"
    said = ANSWER if chat else CAPTION
    return [
        Record(
            id=str(index),
            messages=[
                {"role": "user", "content": [image, text] if chat else [image]},
                {"role": "assistant", "content": [{"type": "text", "text": said}]},
            ],
            images=[one],
            format="chat" if chat else "plain",
        )
        for index, one in enumerate(mixed(count))
    ]


def grids_of(processor: EveProcessor, pictures: Sequence[Image.Image]) -> list[EveGrid]:
    """The grid of each picture, from its size."""
    return [processor.image_processor.grid_of(one.height, one.width) for one in pictures]


def patches_of(grids: Sequence[EveGrid], merge: int) -> list[tuple[int, int]]:
    """Rows and columns of patches of each picture, as `work_of` wants them."""
    return [(grid.rows * merge, grid.cols * merge) for grid in grids]


def tokens_of(grids: Sequence[EveGrid]) -> int:
    """Image tokens of all pictures together."""
    return sum(num_image_tokens(grid.rows, grid.cols) for grid in grids)


__all__ = [
    "ANSWER",
    "CAPTION",
    "MIXED",
    "QUESTION",
    "SQUARE",
    "grids_of",
    "mixed",
    "patches_of",
    "picture",
    "records",
    "tokens_of",
]
