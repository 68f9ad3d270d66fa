"""A picture drawn small with coloured letters, in any terminal that has colours.

A letter shows two pixels: the upper half block in one colour on the other.  Easy to get wrong: a
terminal that is told a 24-bit colour and knows only 256 shows any colour, so those get the nearest
of the 216 that all of them share.
"""

from collections.abc import Mapping
from typing import Literal

import numpy as np
from PIL import Image

MAX_COLUMNS, MAX_ROWS = 40, 12  # letters; small enough that the conversation stays in sight
Colours = Literal[0, 256, 16_777_216]


def colours_of(environment: Mapping[str, str], *, terminal: bool) -> Colours:
    """How many colours may be used where the environment says so and `terminal` is true.

    >>> colours_of({"TERM": "xterm-256color"}, terminal=True)
    256
    >>> colours_of({"TERM": "xterm-256color", "NO_COLOR": "1"}, terminal=True)
    0
    """
    term = environment.get("TERM", "dumb")
    if not terminal or environment.get("NO_COLOR") or term == "dumb":
        return 0
    if environment.get("COLORTERM") in ("truecolor", "24bit") or term.endswith("-direct"):
        return 16_777_216
    return (
        256 if term.endswith("256color") else 0
    )  # the custom of terminals; there is no other sign


def draw_small(
    picture: Image.Image, *, colours: Colours, columns: int = MAX_COLUMNS, rows: int = MAX_ROWS
) -> str:
    """The picture as lines of half blocks, at most so many columns and rows; "" without colours."""
    if not colours:
        return ""
    scale = min(columns / picture.width, 2 * rows / picture.height, 1)
    width = max(1, round(picture.width * scale))
    height = max(2, 2 * round(picture.height * scale / 2))
    small = picture.convert("RGB").resize((width, height), Image.Resampling.BOX)
    pixels = np.asarray(small).tolist()  # lines of [red, green, blue]
    return "\n".join(
        "".join(
            f"\x1b[38;{_code(upper, colours)};48;{_code(lower, colours)}m▀"
            for upper, lower in zip(pixels[y], pixels[y + 1], strict=True)
        )
        + "\x1b[0m"
        for y in range(0, height, 2)
    )


def _code(colour: list[int], colours: Colours) -> str:
    if colours > 256:
        return "2;{};{};{}".format(*colour)
    # Levels 0, 95, 135, 175, 215 and 255, in the middle between which the nearest one changes.
    red, green, blue = (0 if v < 48 else 1 if v < 115 else (v - 35) // 40 for v in colour)
    return f"5;{16 + 36 * red + 6 * green + blue}"


__all__ = ["MAX_COLUMNS", "MAX_ROWS", "Colours", "colours_of", "draw_small"]
