"""Pictures to packed patches: geometry, settings, batches; pixels are in `picture_pixels_eve`.

A picture keeps its aspect ratio: its longer side becomes `longest_edge` pixels, its shorter side
the nearest multiple of `size_multiple` above, so it is stretched by less than one multiple.  What
leaves here is one row per patch of all pictures behind each other, and a grid per picture; there is
no canvas and no mask.  Easy to get wrong: the patches of one merge cell are neighbours in the
packed order, so row k of `pixel_values` is not the k-th patch in reading order.

Legend: `P` patches, `p` patch size in pixels.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from os import PathLike
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from transformers.image_processing_backends import PilBackend
from transformers.image_processing_utils import BatchFeature
from transformers.image_utils import (
    OPENAI_CLIP_MEAN,
    OPENAI_CLIP_STD,
    ImageInput,
    PILImageResampling,
    SizeDict,
)
from transformers.processing_utils import ImagesKwargs, Unpack
from transformers.utils import TensorType

from .picture_pixels_eve import cut_patches, resize_picture, to_rgb, upright, write_patches
from .published_eve import find_preprocessor, hub_arguments, image_settings, published_config_of


class EveGrid(NamedTuple):
    """What becomes of one picture: its size in pixels after resizing, and its tokens."""

    height: int
    width: int
    rows: int
    cols: int


def eve_grid(
    height: int,
    width: int,
    *,
    longest_edge: int,
    size_multiple: int,
    patch_size: int = 14,
    merge_size: int = 2,
    min_image_tokens: int | None = None,
    max_image_tokens: int | None = None,
) -> EveGrid:
    """Returns the resized size and the token grid of a picture of `height` x `width` pixels.

    All in integers, so it is the same on every machine, and equal to the published floating-point
    formula.  Rows and columns of patches that do not fill a merge cell are dropped.

    Without a budget the longer side becomes `longest_edge`.  With `min_image_tokens` or
    `max_image_tokens` it is the picture's own, rounded up to `size_multiple`; it grows until the
    picture takes the least number of tokens and shrinks until it takes no more than the most.  The
    most wins over the least, and `longest_edge` is never passed.

    >>> eve_grid(480, 640, longest_edge=672, size_multiple=28)
    EveGrid(height=504, width=672, rows=18, cols=24)
    >>> eve_grid(480, 640, longest_edge=672, size_multiple=28, max_image_tokens=256)
    EveGrid(height=364, width=476, rows=13, cols=17)

    Raises:
        ValueError: if the picture has no pixels, or the sizes do not fit each other.
    """
    if height < 1 or width < 1:
        raise ValueError(
            f"A picture of {width} x {height} pixels has nothing to look at; give one with pixels."
        )
    cell = patch_size * merge_size
    if longest_edge % size_multiple or size_multiple % patch_size or size_multiple < cell:
        raise ValueError(
            f"longest_edge ({longest_edge}) must be a multiple of size_multiple "
            f"({size_multiple}), and that a "
            f"multiple of patch_size ({patch_size}) of at least {cell} pixels."
        )
    long_side, short_side = max(height, width), min(height, width)

    def grid(units: int) -> EveGrid:
        """The grid whose longer side is so many multiples."""
        long_px = units * size_multiple
        short_px = -(-units * short_side // long_side) * size_multiple  # rounded up
        new_height, new_width = (short_px, long_px) if width > height else (long_px, short_px)
        return EveGrid(new_height, new_width, new_height // cell, new_width // cell)

    most = longest_edge // size_multiple
    if min_image_tokens is None and max_image_tokens is None:
        return grid(most)
    _check_budget(min_image_tokens, max_image_tokens, size_multiple // cell)

    def tokens(units: int) -> int:
        return num_image_tokens(grid(units).rows, grid(units).cols)

    # A longer side never takes fewer tokens, so the bounds are found by halving.
    sizes, units = range(1, most + 1), min(-(-long_side // size_multiple), most)
    if min_image_tokens is not None:
        units = max(units, min(1 + bisect_left(sizes, min_image_tokens, key=tokens), most))
    if max_image_tokens is not None:
        units = min(units, bisect_right(sizes, max_image_tokens, key=tokens))
    return grid(units)


def _check_budget(least: int | None, most: int | None, cells: int) -> None:
    """Refuses budgets that no picture can keep; `cells` lie along one size multiple."""
    smallest = num_image_tokens(cells, cells)
    for name, value in (("max_image_tokens", most), ("min_image_tokens", least)):
        if value is not None and value < smallest:
            raise ValueError(
                f"{name} is {value}, but the smallest picture takes {smallest} tokens; give at "
                "least that many."
            )
    if least is not None and most is not None and least > most:
        raise ValueError(
            f"min_image_tokens ({least}) is above max_image_tokens ({most}); give a smaller least "
            "or a larger most."
        )


def longest_edge_of_budget(max_image_tokens: int, *, size_multiple: int, cell: int) -> int:
    """Pixels of the longest picture of one row of multiples that keeps to the budget.

    A limit above this is never reached; one below it would cut long pictures short.

    >>> longest_edge_of_budget(256, size_multiple=28, cell=28)
    7112

    Raises:
        ValueError: if not even the smallest picture keeps to it.
    """
    cells = size_multiple // cell
    _check_budget(None, max_image_tokens, cells)
    return (((max_image_tokens - 1) // cells - 1) // cells) * size_multiple


def num_image_tokens(rows: Any, cols: Any) -> Any:
    """Tokens of one picture: the class token, and every row of cells with its row-end token.

    Works on integers and, picture by picture, on integer tensors.

    >>> num_image_tokens(18, 24)
    451
    """
    return 1 + rows * (cols + 1)


class EveImageProcessorKwargs(ImagesKwargs, total=False):  # type: ignore[call-arg]
    """Settings of `EveImageProcessor` beyond the library's own.

    patch_size: side of a patch in pixels.
    merge_size: a token stands for merge_size x merge_size patches.
    size_multiple: the shorter side is rounded up to a multiple of this many pixels.
    min_image_tokens, max_image_tokens: a budget for every picture, instead of one size for all
        (`eve_grid`).
    """

    patch_size: int
    merge_size: int
    size_multiple: int
    min_image_tokens: int | None
    max_image_tokens: int | None


class EveImageProcessor(PilBackend):
    """Pictures of any size to `pixel_values` and `image_grid_thw`.

    Returns, for pictures in the order given:
        pixel_values: (P, 3 * p * p) float32, the patches of all pictures; inside a patch channel,
            y, x.
        image_grid_thw: (pictures, 3) int64, 1 and the patch rows and columns of each; the product
            of a row is that picture's number of rows in `pixel_values`.
    """

    do_resize = True
    do_rescale = True
    do_normalize = True
    do_convert_rgb = True
    resample = PILImageResampling.BICUBIC
    size = {"longest_edge": 672}
    default_to_square = False
    image_mean = OPENAI_CLIP_MEAN
    image_std = OPENAI_CLIP_STD
    patch_size = 14
    merge_size = 2
    size_multiple = 28
    min_image_tokens = None
    max_image_tokens = None
    valid_kwargs = EveImageProcessorKwargs
    model_input_names = ["pixel_values", "image_grid_thw"]

    def __init__(self, **kwargs: Unpack[EveImageProcessorKwargs]):
        super().__init__(**kwargs)
        self.grid_of(1, 1)  # refuses sizes that do not fit each other now, not at the first picture

    @classmethod
    def get_image_processor_dict(
        cls, pretrained_model_name_or_path: str | PathLike, **kwargs
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """The library's, which also knows the published checkpoints, whose own file is missing."""
        hub = hub_arguments(kwargs)
        config = published_config_of(pretrained_model_name_or_path, **hub)
        if config is not None:
            return image_settings(
                find_preprocessor(config, pretrained_model_name_or_path, **hub)
            ), {}
        return super().get_image_processor_dict(pretrained_model_name_or_path, **kwargs)

    def grid_of(self, height: int, width: int, *, longest_edge: int | None = None) -> EveGrid:
        """The grid of a picture of this size, without needing the picture.

        Args:
            longest_edge: asks for another limit than the processor's own.
        """
        return eve_grid(
            height,
            width,
            longest_edge=self.size["longest_edge"] if longest_edge is None else longest_edge,
            size_multiple=self.size_multiple,
            patch_size=self.patch_size,
            merge_size=self.merge_size,
            min_image_tokens=self.min_image_tokens,
            max_image_tokens=self.max_image_tokens,
        )

    def square_grid(self) -> EveGrid:
        """The grid of a large square picture, which says how many tokens a picture takes."""
        return self.grid_of(self.size["longest_edge"], self.size["longest_edge"])

    def resize_to_grid(self, image: Image.Image) -> np.ndarray:
        """Resizes one RGB picture to its grid: (height, width, 3) 8-bit pixels."""
        grid = self.grid_of(image.height, image.width)
        return resize_picture(image, grid.height, grid.width, self.resample)

    def process_image(self, image: ImageInput, **kwargs) -> Image.Image:
        """An upright picture, RGB or grey, of a picture or 8-bit array, channels first or last."""
        if isinstance(image, Image.Image):
            return upright(image)
        pixels = np.asarray(image)
        if pixels.dtype != np.uint8:
            raise ValueError(
                f"A picture came as an array of {pixels.dtype}, whose range is unknown; give a "
                "PIL picture or "
                "8-bit values from 0 to 255."
            )
        if pixels.ndim == 3 and pixels.shape[0] in (1, 3, 4) and pixels.shape[2] not in (1, 3, 4):
            pixels = pixels.transpose(1, 2, 0)
        if pixels.ndim == 3 and pixels.shape[2] == 1:
            pixels = pixels[:, :, 0]
        return upright(Image.fromarray(pixels))

    def _preprocess(
        self,
        images: list[Image.Image],
        do_resize: bool,
        size: SizeDict,
        resample: int | None,
        do_rescale: bool,
        rescale_factor: float,
        do_normalize: bool,
        image_mean: list[float],
        image_std: list[float],
        patch_size: int,
        merge_size: int,
        size_multiple: int,
        min_image_tokens: int | None,
        max_image_tokens: int | None,
        return_tensors: str | TensorType | None,
        **kwargs,
    ) -> BatchFeature:
        # (x * rescale - mean) / std as one multiplication and one addition.
        scale, shift = np.full(3, rescale_factor if do_rescale else 1.0), np.zeros(3)
        if do_normalize:
            std = np.asarray(image_std)
            scale, shift = scale / std, -np.asarray(image_mean) / std
        write = partial(
            write_patches,
            scale=scale.astype(np.float32),
            shift=shift.astype(np.float32),
            patch_size=patch_size,
            merge_size=merge_size,
        )
        sizes = [(image.height, image.width) for image in images]
        if do_resize:
            grid_of = partial(
                eve_grid,
                longest_edge=size["longest_edge"],
                size_multiple=size_multiple,
                patch_size=patch_size,
                merge_size=merge_size,
                min_image_tokens=min_image_tokens,
                max_image_tokens=max_image_tokens,
            )
            sizes = [grid_of(*each)[:2] for each in sizes]
        else:
            _check_whole_cells(sizes, patch_size * merge_size)
        # Rows and columns of whole cells.
        cell = patch_size * merge_size
        sides = [(height // cell, width // cell) for height, width in sizes]
        bounds = np.cumsum([0] + [rows * cols * merge_size**2 for rows, cols in sides])
        packed = np.empty((bounds[-1], 3 * patch_size**2), np.float32)

        def fill(index: int) -> None:
            """Resizes one picture and writes it to its place."""
            pixels = resize_picture(images[index], *sizes[index], resample)
            write(pixels, packed[bounds[index] : bounds[index + 1]])

        _for_each(fill, len(images))
        grids = [(1, rows * merge_size, cols * merge_size) for rows, cols in sides]
        data = {"pixel_values": packed, "image_grid_thw": np.array(grids, np.int64).reshape(-1, 3)}
        return BatchFeature(data=data, tensor_type=return_tensors)


def _check_whole_cells(sizes: list[tuple[int, int]], cell: int) -> None:
    """Refuses pictures that are not to be resized, but do not consist of whole merge cells."""
    for height, width in sizes:
        if height % cell or width % cell:
            raise ValueError(
                f"A picture of {width} x {height} pixels with do_resize=False must have sides that "
                f"are multiples of {cell}; leave do_resize on."
            )


def _for_each(work: Callable[[int], None], number: int) -> None:
    """Does the work of every picture, in torch's number of threads.

    That is one inside a DataLoader's workers; OMP_NUM_THREADS and `torch.set_num_threads` set it.
    Resizing and arithmetic run without the interpreter's lock.
    """
    threads = min(number, torch.get_num_threads())
    if threads < 2:
        for index in range(number):
            work(index)
        return
    with ThreadPoolExecutor(threads) as pool:  # none is kept, which a forked process could not use
        for _ in pool.map(work, range(number)):
            pass  # raises what the work raised


__all__ = [
    "EveGrid",
    "EveImageProcessor",
    "cut_patches",
    "eve_grid",
    "longest_edge_of_budget",
    "num_image_tokens",
    "resize_picture",
    "to_rgb",
]
