"""What each split of the synthetic scenes may show, and the dice that draw it.

Training and held-out scenes draw from bins that alternate, so that a held-out picture is new in
size, turn, position, background hue and pair of concepts at once, yet lies *between* things that
training showed. Easy to get wrong: the bins are about what is drawn, not about pixels; a run
between two hues passes other hues.
"""

import colorsys
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple, TypeVar

import numpy as np

Split = Literal["train", "held_out", "unseen"]
Colour = tuple[int, int, int]
Item = TypeVar("Item")

TRAIN_ANGLES = (-16, -8, 0, 8, 16)  # degrees
HELD_OUT_ANGLES = (-12, -4, 4, 12)
MAX_WORD_ANGLE = 8  # degrees; a word turned further is too small to read on its canvas
SIZE_STEP = (
    4  # pixels; training sizes are multiples of it, held-out sizes lie half a step beside them
)
POSITION_STEP = 4  # pixels; side of the squares of the chessboard on which middles of boxes fall
HUE_STEP = 15  # degrees; training has the even bins of the colour circle, held-out the odd ones
PAIR_MODULUS = 5  # a fifth of the pairs of concepts is kept for held-out
WHITE_SHARE = 0.1  # of training backgrounds: the pictures that users bring are often on plain white


class Background(NamedTuple):
    """Colours of the corners (reading order, equal when plain) and the hues that they came from."""

    corners: tuple[Colour, Colour, Colour, Colour]
    hues: tuple[int, ...]


class Dice:
    """Random draws from a key; 64 at a time, since a call of numpy costs more than a number."""

    def __init__(self, *key: int) -> None:
        """Take non-negative integers; equal keys give equal draws."""
        self._generator = np.random.default_rng(np.random.SeedSequence(key))
        self._left: list[float] = []

    def unit(self) -> float:
        """A number in [0, 1)."""
        if not self._left:
            self._left = self._generator.random(64).tolist()
        return self._left.pop()

    def below(self, limit: int) -> int:
        """An integer in [0, limit)."""
        return int(self.unit() * limit)

    def between(self, low: float, high: float) -> float:
        """A number in [low, high)."""
        return low + (high - low) * self.unit()

    def choice(self, items: Sequence[Item]) -> Item:
        """One of the items."""
        return items[int(self.unit() * len(items))]

    def until(self, items: Sequence[Item], accept: Callable[[Item], bool]) -> Item:
        """One of the acceptable items, of which there must be at least one."""
        while True:
            item = self.choice(items)
            if accept(item):
                return item

    def shuffled(self, items: Sequence[Item]) -> list[Item]:
        """The items in random order."""
        return sorted(items, key=lambda _: self.unit())


def is_kept_pair(first: int, second: int) -> bool:
    """Whether two concepts, by their places in the table, never meet in a training scene."""
    return first != second and (first + second) % PAIR_MODULUS == 0


def position_parity(middle: tuple[int, int]) -> int:
    """Colour of the chessboard square that holds the middle: 0 in training, 1 in held-out."""
    return (middle[0] // POSITION_STEP + middle[1] // POSITION_STEP) % 2


def size_rest(split: Split) -> int:
    """What a size of the split leaves when divided by `SIZE_STEP`."""
    return 0 if split == "train" else SIZE_STEP // 2


def draw_angle(dice: Dice, split: Split, *, limit: int = 90) -> int:
    """A turn of the split, at most `limit` degrees either way."""
    angles = TRAIN_ANGLES if split == "train" else HELD_OUT_ANGLES
    return dice.until(angles, lambda angle: abs(angle) <= limit)


def draw_ink(dice: Dice, split: Split) -> Colour:
    """A dark colour for writing."""
    return _draw_colour(dice, split, saturation=(0.2, 1.0), value=(0.1, 0.4))[0]


def draw_background(dice: Dice, split: Split) -> Background:
    """Plain, or a run between two light colours: across, down or slanting."""
    if split == "train" and dice.unit() < WHITE_SHARE:
        return Background(((255, 255, 255),) * 4, ())
    # Light enough for the black outlines of the pictograms to stand out.
    first, hue = _draw_colour(dice, split, saturation=(0.1, 0.5), value=(0.82, 1.0))
    direction = dice.below(4)
    if direction == 0:
        return Background((first,) * 4, (hue,))
    second, second_hue = _draw_colour(dice, split, saturation=(0.1, 0.5), value=(0.82, 1.0))
    between = _mean(first, second)
    corners = {
        1: (first, second, first, second),
        2: (first, first, second, second),
        3: (first, between, between, second),
    }[direction]
    return Background(corners, (hue, second_hue))


def _draw_colour(
    dice: Dice, split: Split, *, saturation: tuple[float, float], value: tuple[float, float]
) -> tuple[Colour, int]:
    """A colour of the split's hue bins, and its hue in degrees."""
    bin_index = 2 * dice.below(180 // HUE_STEP) + (split != "train")
    hue = bin_index * HUE_STEP + dice.below(HUE_STEP)
    red, green, blue = colorsys.hsv_to_rgb(
        hue / 360, dice.between(*saturation), dice.between(*value)
    )
    return (round(255 * red), round(255 * green), round(255 * blue)), hue


def _mean(first: Colour, second: Colour) -> Colour:
    return (
        (first[0] + second[0]) // 2,
        (first[1] + second[1]) // 2,
        (first[2] + second[2]) // 2,
    )


__all__ = [
    "Background",
    "Dice",
    "Split",
    "draw_angle",
    "draw_background",
    "draw_ink",
    "is_kept_pair",
    "position_parity",
    "size_rest",
]
