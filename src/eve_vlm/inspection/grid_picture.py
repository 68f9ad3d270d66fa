"""Draws what a picture becomes: its cells, row-end tokens and class token, over its own pixels.

The background is the picture as the model sees it, resized by the model's own image processor and
enlarged by a whole number, never blurred.  Easy to get wrong: tokens are counted along rows with
each row's end token in between, so the cell below cell k is k + columns + 1.

Legend: `s` enlargement, a whole number; all other lengths are pixels of the drawing.
"""

import inspect
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont, features

from eve_vlm.image_processing_eve import EveGrid, EveImageProcessor, num_image_tokens
from eve_vlm.output_folder import written_whole

# The longer side of the picture in the drawing, in pixels: 1344 shows the HD model 1 : 1.
LONGEST = 1344
# Small cells are enlarged up to this many pixels, enough for an index of four digits.
CELL = 64
# Next to each other on every border, so that one of them shows on any picture.
DARK, LIGHT = (20, 20, 20), (255, 255, 255)
ROW_END, CLASS, PAPER, UNSEEN = (37, 99, 180), (200, 80, 20), (246, 246, 244), (128, 128, 128)
MARGIN, GAP, MARK_HEIGHT, INDEX_SIZE, LEGEND_SIZE = 12, 6, 20, 10, 14


class GridPicture(NamedTuple):
    """A drawing, and where things are in it.

    Cell (row, column) covers `cell` x `cell` pixels from (left + column * cell, top + row * cell).
    """

    image: Image.Image
    grid: EveGrid
    left: int
    top: int
    cell: int
    scale: int
    """Pixels of the drawing, each way, for one pixel that the model sees."""


def token_index(row: int, col: int, cols: int) -> int:
    """The place of a cell among its picture's tokens; `col == cols` is the row-end token.

    >>> token_index(0, 0, 24), token_index(0, 24, 24), token_index(1, 0, 24)
    (1, 25, 26)
    """
    return 1 + row * (cols + 1) + col


def draw_grid(picture: Image.Image, *, pictures: EveImageProcessor, title: str = "") -> GridPicture:
    """Draws the token grid of an upright RGB picture.

    Args:
        picture: as `open_picture` returns it.
        pictures: the image processor of the model.
        title: first line of the legend, such as the names of picture and model.
    """
    grid = pictures.grid_of(picture.height, picture.width)
    cell_px = pictures.patch_size * pictures.merge_size
    scale = max(1, min(LONGEST // max(grid.height, grid.width), CELL // cell_px))
    cell, width, height = cell_px * scale, grid.width * scale, grid.height * scale
    legend = _legend(picture, grid, pictures, title)
    small, large = load_font(INDEX_SIZE), load_font(LEGEND_SIZE)
    last = str(num_image_tokens(grid.rows, grid.cols) - 1)
    mark_width = max(int(small.getbbox(last)[2]) + 8, 24)
    line_height = LEGEND_SIZE + 8
    text_width = max(int(large.getbbox(text)[2]) for _, text in legend) + line_height
    left, top = MARGIN, MARGIN + MARK_HEIGHT + GAP
    size = (
        left + max(width + GAP + mark_width, text_width) + MARGIN,
        top + height + MARGIN + line_height * len(legend) + MARGIN,
    )
    canvas = Image.new("RGB", size, PAPER)
    canvas.paste(_seen(picture, grid, pictures, cell_px).resize((width, height), 0), (left, top))
    draw = ImageDraw.Draw(canvas)
    drawn = GridPicture(canvas, grid, left, top, cell, scale)
    _draw_borders(draw, drawn)
    _draw_indices(draw, drawn, small, int(small.getbbox(last)[2]))
    _draw_marks(draw, drawn, small, mark_width)
    for number, (colour, text) in enumerate(legend):
        y = top + height + MARGIN + number * line_height
        if colour is not None:
            draw.rectangle((left, y + 2, left + LEGEND_SIZE, y + 2 + LEGEND_SIZE), colour, DARK)
        draw.text((left + (0 if colour is None else line_height), y), text, DARK, large)
    return drawn


def save_grid(drawn: GridPicture, file: str | Path) -> Path:
    """Writes the drawing as PNG, whole or not at all; folders above it are made.

    Raises:
        ValueError: if the name does not end in `.png`.
    """
    return save_png(drawn.image, file)


def save_png(image: Image.Image, file: str | Path) -> Path:
    """Writes any drawing as PNG, whole or not at all; folders above it are made.

    Raises:
        ValueError: if the name does not end in `.png`.
    """
    file = Path(file)
    if file.suffix.lower() != ".png":
        raise ValueError(
            f"{file} does not end in .png, and drawings are written as PNG; rename it."
        )
    file.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(file) as part:
        image.save(part, format="PNG")
    return file


def load_font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """Pillow's own font: in any size with FreeType and Pillow 10.1, else its one bitmap size."""
    sizes = "size" in inspect.signature(ImageFont.load_default).parameters
    if sizes and features.check("freetype2"):
        return ImageFont.load_default(size)
    return ImageFont.load_default()


def _seen(
    picture: Image.Image, grid: EveGrid, pictures: EveImageProcessor, cell_px: int
) -> Image.Image:
    """The resized picture; strips that fill no cell, which the model never sees, turned grey."""
    pixels = np.array(pictures.resize_to_grid(picture))
    for strip in (pixels[grid.rows * cell_px :], pixels[:, grid.cols * cell_px :]):
        strip[...] = (strip.astype(np.uint16) + 3 * np.array(UNSEEN, np.uint16)) // 4
    return Image.fromarray(pixels)


def _draw_borders(draw: ImageDraw.ImageDraw, drawn: GridPicture) -> None:
    """A border is two lines: dark on a cell's first pixels, light on the pixels before them."""
    left, top, cell, grid = drawn.left, drawn.top, drawn.cell, drawn.grid
    right, bottom = left + grid.cols * cell, top + grid.rows * cell
    for offset, colour in ((-1, LIGHT), (0, DARK)):
        for col in range(grid.cols + 1):
            x = left + col * cell + offset
            draw.line((x, top, x, bottom - 1), colour)
        for row in range(grid.rows + 1):
            y = top + row * cell + offset
            draw.line((left, y, right - 1, y), colour)


def _draw_indices(
    draw: ImageDraw.ImageDraw,
    drawn: GridPicture,
    font: ImageFont.FreeTypeFont | ImageFont.ImageFont,
    width: int,
) -> None:
    """Token indices in every cell where they cover little of it, else in each row's first cell."""
    if width + 6 > drawn.cell:
        return
    every = 2 * (width + 4) <= drawn.cell
    for row in range(drawn.grid.rows):
        for col in range(drawn.grid.cols if every else 1):
            x, y = drawn.left + col * drawn.cell + 2, drawn.top + row * drawn.cell + 2
            text = str(token_index(row, col, drawn.grid.cols))
            _, _, right, bottom = draw.textbbox((x + 1, y), text, font)
            draw.rectangle((x, y, int(right) + 1, int(bottom) + 1), DARK)
            draw.text((x + 1, y), text, LIGHT, font)


def _draw_marks(
    draw: ImageDraw.ImageDraw,
    drawn: GridPicture,
    font: ImageFont.FreeTypeFont | ImageFont.ImageFont,
    width: int,
) -> None:
    """The class token above the first cell, and a row-end token beside the end of each row."""
    left, top, cell, grid = drawn.left, drawn.top, drawn.cell, drawn.grid
    draw.rectangle((left, MARGIN, left + width - 1, MARGIN + MARK_HEIGHT - 1), CLASS)
    draw.text((left + 4, MARGIN + 4), "0", LIGHT, font)
    start = left + grid.width * drawn.scale + GAP
    for row in range(grid.rows):
        y = top + row * cell
        draw.rectangle((start, y + 1, start + width - 1, y + cell - 2), ROW_END)
        if cell >= INDEX_SIZE + 6:
            middle = y + (cell - INDEX_SIZE) // 2 - 1
            draw.text((start + 4, middle), str(token_index(row, grid.cols, grid.cols)), LIGHT, font)


def _legend(
    picture: Image.Image, grid: EveGrid, pictures: EveImageProcessor, title: str
) -> list[tuple[tuple[int, int, int] | None, str]]:
    """Lines below the picture, each with the colour that it explains."""
    cell = pictures.patch_size * pictures.merge_size
    merge, patch = pictures.merge_size, pictures.patch_size
    tokens = num_image_tokens(grid.rows, grid.cols)
    lines: list[tuple[tuple[int, int, int] | None, str]] = [(None, title)] if title else []
    lines += [
        (
            None,
            f"{picture.width} x {picture.height} pixels, resized to {grid.width} x {grid.height}",
        ),
        (
            LIGHT,
            f"{grid.rows} rows x {grid.cols} columns = {grid.rows * grid.cols} cells of "
            f"{cell} x {cell} pixels ({merge} x {merge} patches of {patch})",
        ),
        (ROW_END, f"{grid.rows} row-end tokens"),
        (CLASS, "1 class token"),
        (None, f"{tokens:,} tokens: 1 + {grid.rows} x ({grid.cols} + 1)"),
    ]
    if (grid.rows * cell, grid.cols * cell) != (grid.height, grid.width):
        lines.append((UNSEEN, "grey edges fill no cell and are not seen"))
    return lines


__all__ = [
    "GridPicture",
    "draw_grid",
    "load_font",
    "save_grid",
    "save_png",
    "token_index",
]
