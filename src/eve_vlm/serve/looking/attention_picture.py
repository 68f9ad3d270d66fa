"""Draws where the model looked: heat over the pictures, one panel for each word of an answer.

Heat is drawn cell by cell and not smoothed: a cell is one token and has one weight, and a smooth
hill would claim a place inside it that no number tells.  Easy to get wrong: all panels share one
scale, from 0 to the largest weight of any word, or a word that looked nowhere would glow as
brightly as one that looked hard.

Legend: `level` is a weight's place on the colour scale, 0 to 255; lengths are pixels drawn.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from eve_vlm.image_processing_eve import EveGrid, EveImageProcessor
from eve_vlm.inspection.grid_picture import DARK, MARGIN, PAPER, load_font, save_png
from eve_vlm.serve.looking.attention_map import AttentionMaps, Which
from eve_vlm.serve.messages import processor_within

# Equal steps of lightness (CIELAB L* 8, 18.5, ... 92), so that twice as light is twice as much for
# the eye too, also in grey; the hue goes from blue over red to yellow on the way.
COLOURS = (
    *((1, 21, 60), (63, 29, 88), (122, 27, 102), (179, 19, 102), (228, 34, 89)),
    *((255, 88, 73), (255, 145, 85), (254, 190, 117), (255, 230, 171)),
)
# The picture is turned grey and shines through, so that its own colours are not taken for heat.
OPACITY = 0.65
PANEL, WIDTH, LEAST_WIDTH = (
    240,
    1400,
    640,
)  # longer side of a picture; the drawing, at most, at least
GAP, LARGE, SMALL, BAR = 14, 15, 12, 200
MAX_PANELS = 200  # about 8,000 pixels high

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


def overlay(
    picture: Image.Image,
    heat: np.ndarray,
    *,
    pictures: EveImageProcessor,
    top: float | None = None,
    longest: int | None = None,
    max_image_tokens: int | None = None,
) -> Image.Image:
    """One map over one upright RGB picture, in the picture's own size.

    Args:
        heat: (rows, cols) as `AttentionMaps.map` returns it.
        pictures: the model's image processor.
        top: the weight that the lightest colour stands for; None means the map's own largest.
            `AttentionMaps.largest` is the same for all words.
        longest: shrinks the result to this many pixels, for a page.  A picture that was shrunk
            beforehand may have another shape, and then another grid.
        max_image_tokens: the request's budget, if it had one.

    Raises:
        ValueError: if the map is not of a picture of this size.
    """
    grid, cell = _grid(picture, heat.shape, processor_within(pictures, max_image_tokens))
    if longest is not None and longest < max(picture.size):
        picture = picture.copy()
        picture.thumbnail((longest, longest))
    # Which cell the middle of each pixel lies in; pixels beyond the last cell are not seen.
    rows = (np.arange(picture.height) + 0.5) * grid.height / picture.height // cell
    cols = (np.arange(picture.width) + 0.5) * grid.width / picture.width // cell
    levels = np.pad(_levels(heat, float(heat.max()) if top is None else top), (0, 1))
    places = np.ix_(
        np.minimum(rows, grid.rows).astype(int), np.minimum(cols, grid.cols).astype(int)
    )
    return _heated(picture, levels[places])


def cell_box(
    picture: Image.Image,
    row: int,
    col: int,
    *,
    shape: tuple[int, ...],
    pictures: EveImageProcessor,
    max_image_tokens: int | None = None,
) -> tuple[int, int, int, int]:
    """Left, top, right and bottom of a cell in the picture's own pixels, rounded.

    Args:
        shape: rows and columns of the picture's map.

    Raises:
        ValueError: if the map is not of a picture of this size.
    """
    grid, cell = _grid(picture, shape, processor_within(pictures, max_image_tokens))
    across, down = cell * picture.width / grid.width, cell * picture.height / grid.height
    return (
        round(col * across),
        round(row * down),
        round((col + 1) * across),
        round((row + 1) * down),
    )


def draw_map(
    maps: AttentionMaps,
    images: Sequence[Image.Image],
    *,
    pictures: EveImageProcessor,
    words: Sequence[int | str] | None = None,
    layer: Which = None,
    head: Which = None,
    title: str = "",
    max_image_tokens: int | None = None,
) -> Image.Image:
    """A panel for the whole answer and one for each word, with one scale for all.

    Args:
        images: the prompt's pictures in order, upright and RGB, as `open_picture` returns them.
        pictures: the model's image processor.
        words: those that get a panel; None means all.
        layer, head: see `AttentionMaps.map`.
        title: lines above, such as the question.
        max_image_tokens: the request's budget, if it had one.

    Raises:
        ValueError: if pictures and maps do not belong together, a word, layer or head is not
            there, or the words are too many for one drawing.
    """
    if len(images) != len(maps.grids):
        raise ValueError(
            f"The maps are of {len(maps.grids)} pictures but {len(images)} were given; give the "
            "prompt's own."
        )
    asked = range(len(maps.words)) if words is None else [maps.find(word) for word in words]
    if len(asked) >= MAX_PANELS:
        raise ValueError(
            f"{len(asked)} words are too many for one drawing; choose fewer than {MAX_PANELS}."
        )
    top = maps.largest(layer=layer, head=head)
    seen = [
        _seen(image, shape, processor_within(pictures, max_image_tokens))
        for image, shape in zip(images, maps.grids, strict=True)
    ]
    panels = []
    for word in (None, *asked):
        text = "whole answer" if word is None else maps.words[word].text.strip()
        share = maps.shares(word, layer=layer, head=head).cells
        heats = [
            maps.map(word, layer=layer, head=head, picture=number) for number in range(len(seen))
        ]
        captions = [(text, load_font(LARGE)), (f"{share:.1%} on cells", load_font(SMALL))]
        panels.append(_panel(seen, [_levels(heat, top) for heat in heats], captions))
    return _laid_out(panels, _header(maps, layer, head, title), top, maps.method)


def save_map(drawn: Image.Image, file: str | Path) -> Path:
    """Writes a drawing as PNG, whole or not at all; folders above it are made.

    Raises:
        ValueError: if the name does not end in `.png`.
    """
    return save_png(drawn, file)


def colour_scale() -> np.ndarray:
    """The colours of all levels from 0 to the largest weight, (256, 3) 8-bit."""
    places = np.linspace(0, 255, len(COLOURS))
    parts = [np.interp(np.arange(256), places, part) for part in zip(*COLOURS, strict=True)]
    return np.stack(parts, 1).round().astype(np.uint8)


def _grid(
    picture: Image.Image, shape: tuple[int, ...], pictures: EveImageProcessor
) -> tuple[EveGrid, int]:
    """The picture's grid and the side of its cells, checked to be that of the map."""
    grid = pictures.grid_of(picture.height, picture.width)
    if (grid.rows, grid.cols) != tuple(shape):
        raise ValueError(
            f"The map has {' x '.join(map(str, shape))} cells but a picture of {picture.width} x "
            f"{picture.height} pixels has {grid.rows} x {grid.cols}; give the picture, the image "
            "processor and the budget that the map was made with."
        )
    return grid, pictures.patch_size * pictures.merge_size


def _levels(heat: np.ndarray, top: float) -> np.ndarray:
    """(rows, cols) places on the scale."""
    share = np.clip(heat / top, 0, 1) if top > 0 else np.zeros(heat.shape)
    return (255 * share).round().astype(np.uint8)


def _heated(picture: Image.Image, levels: np.ndarray) -> Image.Image:
    """A picture turned grey under the colours of its pixels' levels."""
    colours = Image.fromarray(colour_scale()[levels])
    return Image.blend(picture.convert("L").convert("RGB"), colours, OPACITY)


def _seen(
    picture: Image.Image, shape: tuple[int, int], pictures: EveImageProcessor
) -> tuple[Image.Image, int]:
    """What the model sees, and the side of a cell in it: a whole number, so that all are alike."""
    grid, cell = _grid(picture, shape, pictures)
    pixels = pictures.resize_to_grid(picture)[: grid.rows * cell, : grid.cols * cell]
    side = max(1, PANEL // max(shape))
    size = (grid.cols * side, grid.rows * side)
    smooth = Image.Resampling.LANCZOS if side < cell else Image.Resampling.NEAREST
    return Image.fromarray(pixels).resize(size, smooth), side


def _panel(
    seen: Sequence[tuple[Image.Image, int]],
    levels: Sequence[np.ndarray],
    captions: Sequence[tuple[str, Font]],
) -> Image.Image:
    """The pictures of a prompt side by side under one word's heat, with lines of text below."""
    parts = [
        _heated(picture, level.repeat(side, 0).repeat(side, 1))
        for (picture, side), level in zip(seen, levels, strict=True)
    ]
    width = max(sum(part.width + 2 for part in parts) - 2, PANEL // 2)
    height = max(part.height for part in parts)
    panel = Image.new("RGB", (width, height + LARGE + SMALL + 14), PAPER)
    draw, left, y = ImageDraw.Draw(panel), 0, height + 3
    for part in parts:
        panel.paste(part, (left, 0))
        left += part.width + 2
    for text, font in captions:
        draw.text((0, y), _fitted(text, font, width), DARK, font)
        y += LARGE + 5
    return panel


def _header(maps: AttentionMaps, layer: Which, head: Which, title: str) -> list[str]:
    """Lines above the panels: what was asked, what is shown, and where the rest went."""
    what = (
        "Attention from the position that chooses each token"
        if maps.method == "attention"
        else "Positive part of attention x gradient of each token's log-probability"
    )
    shares = maps.shares(layer=layer, head=head)
    return [
        *title.splitlines(),
        f"{what}; {_named('layer', maps.layers, layer)}, {_named('head', maps.heads, head)}.",
        f"Whole answer: {shares.cells:.1%} on cells, {shares.class_tokens:.1%} on class tokens, "
        f"{shares.row_ends:.1%} on row-end tokens, {shares.text:.1%} on text.",
    ]


def _named(kind: str, kept: Sequence[int], asked: Which) -> str:
    numbers = list(kept) if asked is None else [asked] if isinstance(asked, int) else list(asked)
    if len(numbers) == 1:
        return f"{kind} {numbers[0]}"
    first, last = numbers[0], numbers[-1]
    run = numbers == list(range(first, last + 1))
    return f"mean of {kind}s {f'{first} to {last}' if run else ', '.join(map(str, numbers))}"


def _laid_out(
    panels: Sequence[Image.Image], header: Sequence[str], top: float, method: str
) -> Image.Image:
    """Header, scale, and the panels in as many columns as fit."""
    width, height = panels[0].size
    fitting = max(1, (WIDTH - 2 * MARGIN + GAP) // (width + GAP))
    columns = min(fitting, len(panels))
    rows = -(-len(panels) // columns)
    line, font = LARGE + 7, load_font(LARGE)
    start = MARGIN + line * (len(header) + 1) + GAP
    inner = max(columns * (width + GAP) - GAP, LEAST_WIDTH)
    size = (inner + 2 * MARGIN, start + rows * (height + GAP) - GAP + MARGIN)
    canvas = Image.new("RGB", size, PAPER)
    draw = ImageDraw.Draw(canvas)
    for number, text in enumerate(header):
        draw.text((MARGIN, MARGIN + number * line), _fitted(text, font, inner), DARK, font)
    y = MARGIN + len(header) * line
    levels = np.linspace(0, 255, BAR).round().astype(np.uint8)
    scale = Image.new("RGB", (BAR, LARGE), (128, 128, 128))
    canvas.paste(_heated(scale, np.tile(levels, (LARGE, 1))), (MARGIN + 16, y + 2))
    unit = f"{top:.2%} of the attention" if method == "attention" else f"{top:.3g}"
    draw.text((MARGIN, y), "0", DARK, font)
    draw.text((MARGIN + BAR + 24, y), f"{unit} on one cell, in all panels", DARK, font)
    for number, panel in enumerate(panels):
        row, column = divmod(number, columns)
        canvas.paste(panel, (MARGIN + column * (width + GAP), start + row * (height + GAP)))
    return canvas


def _fitted(text: str, font: Font, width: int) -> str:
    """The text in one line, cut with dots where it is too long; a bitmap font knows Latin only."""
    text = " ".join(text.split())
    if not isinstance(font, ImageFont.FreeTypeFont):
        text = text.encode("latin-1", "replace").decode("latin-1")
    kept = min(len(text), 400)  # far more than fits; a question may be a page
    while kept and font.getlength(text[:kept] + ("..." if kept < len(text) else "")) > width:
        kept -= 1
    return text[:kept] + ("..." if kept < len(text) else "")


__all__ = ["COLOURS", "cell_box", "colour_scale", "draw_map", "overlay", "save_map"]
