"""A rendered page as data: texts at places, rules, boxes, and the paper beneath; and its drawing.

What is asked of a page comes from the same texts, so an answer is always on it.  Easy to get wrong:
only characters of ASCII may be written, because Pillow's own font has no others (not even a euro
or pound sign) and draws an empty box for them.
"""

from functools import lru_cache
from math import ceil, floor
from typing import Literal, NamedTuple

from PIL import Image, ImageDraw, ImageFont

from eve_vlm.data.phrases import Box
from eve_vlm.data.splits import Colour

Align = Literal["left", "middle", "right"]
ANCHORS: dict[Align, str] = {"left": "ls", "middle": "ms", "right": "rs"}  # on the base line
BOLD = 1  # pixels by which a letter is drawn again beside itself; Pillow's own font has one weight


class Question(NamedTuple):
    """What can be asked of a page or a chart."""

    text: str
    answers: tuple[str, ...]
    """What counts as right, as written first."""
    kind: str


class Text(NamedTuple):
    """One line of writing."""

    words: str
    x: int
    """Of its left end, middle or right end."""
    base: int
    """Of its base line."""
    size: int
    """Pixels of the em."""
    align: Align = "left"
    bold: bool = False


class Shape(NamedTuple):
    """A filled box, or its frame."""

    box: Box
    colour: Colour
    frame: int = 0
    """Pixels of a frame; 0 fills the box."""


class Page(NamedTuple):
    """A document, enough to draw it and to check every answer."""

    kind: str
    canvas: tuple[int, int]
    """(height, width)."""
    paper: Colour
    ink: Colour
    shapes: tuple[Shape, ...]
    texts: tuple[Text, ...]
    questions: tuple[Question, ...]


def draw_page(page: Page) -> Image.Image:
    """A page as an RGB picture: shapes first, in their order, then texts."""
    height, width = page.canvas
    picture = Image.new("RGB", (width, height), page.paper)
    draw = ImageDraw.Draw(picture)
    for box, colour, frame in page.shapes:
        edges = (box.left, box.top, box.right - 1, box.bottom - 1)  # Pillow's ends belong to it
        if frame:
            draw.rectangle(edges, outline=colour, width=frame)
        else:
            draw.rectangle(edges, fill=colour)
    for text in page.texts:
        for shift in range(0, BOLD + 1) if text.bold else (0,):
            draw.text(
                (text.x + shift, text.base),
                text.words,
                fill=page.ink,
                font=_font(text.size),
                anchor=ANCHORS[text.align],
            )
    return picture


def text_box(text: Text) -> Box:
    """Where the writing stands, as Pillow measures it on this machine."""
    left, top, right, bottom = ImageDraw.Draw(Image.new("L", (1, 1))).textbbox(
        (text.x, text.base),
        text.words,
        font=_font(text.size),
        anchor=ANCHORS[text.align],
    )
    return Box(floor(left), floor(top), ceil(right) + BOLD * text.bold, ceil(bottom))


@lru_cache(maxsize=64)
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


__all__ = ["Page", "Question", "Shape", "Text", "draw_page", "text_box"]
