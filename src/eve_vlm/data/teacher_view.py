"""The teacher's own view of a picture: a square canvas whose cells match the student's, one to one.

The teacher needs a fixed square; the student does not.  So the picture is resized once more, such
that each of the student's alignment cells is exactly one of the teacher's, and is put in the middle
of a canvas of the teacher's mean colour.  Easy to get wrong: the offset is a whole number of cells,
so an odd remainder leaves the extra cell below or right.
"""

from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image

from eve_vlm.image_processing_eve import resize_picture


@dataclass(frozen=True, kw_only=True, slots=True)
class TeacherView:
    """How a picture is laid out for the teacher."""

    cells: int
    """Cells along the canvas, each way: the student's longest_edge / size_multiple."""
    cell_pixels: int
    """Side of one cell in the teacher's pixels: its patch size or stride."""
    fill: tuple[int, int, int]
    """Colour of the canvas around the picture."""

    @property
    def size(self) -> int:
        """Side of the canvas in pixels."""
        return self.cells * self.cell_pixels

    def render(self, image: Image.Image, rows: int, cols: int) -> np.ndarray:
        """Lays an RGB picture of rows x cols cells on the canvas: (size, size, 3) 8-bit pixels."""
        pixels = resize_picture(image, rows * self.cell_pixels, cols * self.cell_pixels)
        if rows == cols == self.cells:
            return pixels
        canvas = np.empty((self.size, self.size, 3), np.uint8)
        canvas[:] = self.fill
        top, left = (
            (self.cells - rows) // 2 * self.cell_pixels,
            (self.cells - cols) // 2 * self.cell_pixels,
        )
        canvas[top : top + pixels.shape[0], left : left + pixels.shape[1]] = pixels
        return canvas

    def cells_of_pictures(self, cell_rows: torch.Tensor, cell_cols: torch.Tensor) -> torch.Tensor:
        """Where pictures of (I,) rows and columns lie on the canvas: (I, cells, cells) booleans."""
        place = torch.arange(self.cells, device=cell_rows.device)
        top, left = (self.cells - cell_rows) // 2, (self.cells - cell_cols) // 2
        in_rows = (place >= top[:, None]) & (place < (top + cell_rows)[:, None])  # (I, cells)
        in_cols = (place >= left[:, None]) & (place < (left + cell_cols)[:, None])
        return in_rows[:, :, None] & in_cols[:, None, :]


__all__ = ["TeacherView"]
