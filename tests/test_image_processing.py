"""Geometry, cutting and normalising, held against slow loops, at sizes of which there are no goldens.

Integers and bytes are compared exactly. Normalised pixels may differ by 1e-6: they are below 3, and
float32 rounds there by 1.2e-7 in each of the few operations.
"""

import random

import numpy as np
import pytest
import torch
from PIL import Image

import tiny
from eve_vlm import EveImageProcessor, eve_grid, num_image_tokens
from eve_vlm.image_processing_eve import cut_patches, resize_picture, to_rgb
from oracle import geometry, preprocess

PIXELS = 1e-6
STANDARD = {
    "image_size": 672,
    "image_size_clip": 336,
    "patch_stride": 14,
    "patch_stride_clip": 14,
    "conv_stride": 2,
}


def random_sizes(count: int, seed: int) -> list[tuple[int, int]]:
    """Sides from 1 to 20,000 pixels, small ones as often as large ones, and near-squares."""
    rng = random.Random(seed)
    sizes = []
    for _ in range(count):
        height, width = (round(2 ** rng.uniform(0, 14.3)) for _ in range(2))
        if rng.random() < 0.3:
            width = max(1, height + rng.randint(-2, 2))
        sizes.append((height, width))
    return sizes


# --- geometry -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("edge", "multiple", "settings"),
    [
        (672, 28, {}),
        (1344, 56, {"image_size": 1344}),
        (336, 14, {"image_size": 336, "conv_stride": 1}),
        (448, 28, {"image_size": 448, "image_size_clip": 224}),
    ],
)
def test_grid_equals_a_slow_search(edge, multiple, settings):
    settings = STANDARD | settings
    merge = settings["conv_stride"]
    for height, width in random_sizes(2000, seed=edge):
        grid = eve_grid(height, width, longest_edge=edge, size_multiple=multiple, merge_size=merge)
        box = geometry.box(height, width, settings)
        assert (grid.height, grid.width) == (box.bottom - box.top, box.right - box.left)
        assert (grid.rows, grid.cols) == geometry.grid(height, width, settings), (height, width)
        assert num_image_tokens(grid.rows, grid.cols) == geometry.count_tokens(grid.rows, grid.cols)


def test_grid_is_as_large_as_promised_and_no_larger():
    for height, width in random_sizes(3000, seed=1):
        grid = eve_grid(height, width, longest_edge=672, size_multiple=28)
        long, short = max(grid[:2]), min(grid[:2])
        assert long == 672 and 28 <= short <= 672 and short % 28 == 0
        # Stretched by less than one multiple: short - 28 < 672 * min / max <= short, in integers.
        exact = 672 * min(height, width)
        assert (short - 28) * max(height, width) < exact <= short * max(height, width)
        assert (grid.height >= grid.width) == (height >= width) or short == long
        assert num_image_tokens(grid.rows, grid.cols) <= 1 + 24 * 25


def test_turning_a_picture_turns_its_grid():
    for height, width in random_sizes(500, seed=2):
        upright = eve_grid(height, width, longest_edge=672, size_multiple=28)
        turned = eve_grid(width, height, longest_edge=672, size_multiple=28)
        assert turned == (upright.width, upright.height, upright.cols, upright.rows)


@pytest.mark.parametrize(("height", "width"), [(0, 5), (5, 0), (0, 0), (-1, 3)])
def test_pictures_without_pixels_are_refused(height, width):
    with pytest.raises(ValueError, match=f"{width} x {height} pixels"):
        eve_grid(height, width, longest_edge=672, size_multiple=28)


@pytest.mark.parametrize(
    "sizes",
    [
        {"size": {"longest_edge": 670}},
        {"size_multiple": 30},
        {"size_multiple": 14},  # less than a merge cell
        {"patch_size": 16},
    ],
)
def test_sizes_that_do_not_fit_each_other_are_refused_at_once(sizes):
    with pytest.raises(ValueError, match=r"longest_edge \(\d+\) must be a multiple"):
        EveImageProcessor(**sizes)


# --- pixels ---------------------------------------------------------------------------------------


def test_cutting_equals_slow_loops():
    rng = np.random.default_rng(0)
    for height, width, patch, merge in [
        (16, 24, 4, 2),
        (8, 8, 4, 2),
        (27, 19, 3, 3),
        (10, 6, 2, 1),
    ]:
        pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        patches, patch_rows, patch_cols = cut_patches(pixels, patch_size=patch, merge_size=merge)
        expected = []
        cell = patch * merge
        for top in range(0, height // cell * cell, cell):
            for left in range(0, width // cell * cell, cell):
                for y in range(top, top + cell, patch):
                    for x in range(left, left + cell, patch):
                        area = pixels[y : y + patch, x : x + patch]
                        expected.append([area[:, :, channel] for channel in range(3)])
        assert (patches == np.array(expected)).all()
        assert (patch_rows, patch_cols) == (height // cell * merge, width // cell * merge)


def test_normalised_pixels_equal_the_oracle(processor):
    images = processor.image_processor
    picture = tiny.picture(16, 32)  # already has its grid's size
    packed = images(picture, return_tensors="np")
    settings = {"image_mean": images.image_mean, "image_std": images.image_std}
    plain = preprocess.normalise(np.asarray(picture), settings).transpose(1, 2, 0)
    expected, _, _ = cut_patches(plain, patch_size=tiny.PATCH, merge_size=tiny.MERGE)
    assert packed["pixel_values"].dtype == np.float32
    assert abs(packed["pixel_values"] - expected.reshape(len(expected), -1)).max() <= PIXELS


def test_normalising_can_be_switched_off(processor):
    picture = tiny.picture(16, 32)
    raw = processor.image_processor(picture, do_normalize=False, do_rescale=False)["pixel_values"]
    expected, _, _ = cut_patches(np.asarray(picture), patch_size=tiny.PATCH, merge_size=tiny.MERGE)
    assert (np.asarray(raw) == expected.reshape(len(expected), -1)).all()


def test_features_are_as_many_as_the_grid_says():
    images = EveImageProcessor()
    pictures = [tiny.picture(height, width) for height, width in [(3, 5), (120, 77), (40, 40)]]
    both = images(pictures, return_tensors="pt")
    assert (
        both["image_grid_thw"].dtype == torch.int64 and both["pixel_values"].dtype == torch.float32
    )
    assert both["pixel_values"].shape == (int(both["image_grid_thw"].prod(-1).sum()), 3 * 14 * 14)
    for picture, (time, rows, cols) in zip(pictures, both["image_grid_thw"].tolist(), strict=True):
        grid = images.grid_of(picture.height, picture.width)
        assert (time, rows, cols) == (1, 2 * grid.rows, 2 * grid.cols)


def test_batch_equals_single_and_twice_equals_once(processor):
    images = processor.image_processor
    pictures = [tiny.picture(5 + 9 * index, 70 - 8 * index, seed=index) for index in range(8)]
    batch = images(pictures, return_tensors="np")
    again = images(pictures, return_tensors="np")
    singles = [images(picture, return_tensors="np") for picture in pictures]
    for name in ("pixel_values", "image_grid_thw"):
        assert (batch[name] == again[name]).all()
        assert (batch[name] == np.concatenate([single[name] for single in singles])).all()


def test_pictures_are_left_as_they_are(processor):
    picture = tiny.picture(33, 21).convert("RGBA")
    before = picture.tobytes()
    processor.image_processor(picture)
    assert picture.tobytes() == before and picture.size == (21, 33)


def test_width_is_resized_before_height():
    # In one call Pillow 13 takes the other order for some tall pictures (up to 12 of 255 apart).
    picture = tiny.picture(400, 30)
    wide = picture.resize((24, 400), Image.Resampling.BICUBIC)
    expected = np.asarray(wide.resize((24, 32), Image.Resampling.BICUBIC))
    assert (resize_picture(picture, 32, 24) == expected).all()


@pytest.mark.parametrize(
    "mode", ["1", "L", "LA", "P", "PA", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV", "LAB"]
)
def test_every_mode_becomes_rgb(mode, processor):
    grey = tiny.picture(20, 28).convert("L")
    if mode == "LAB":
        picture = Image.new("LAB", (28, 20), (128, 128, 128))
    elif mode == "PA":
        picture = grey.convert("P").convert("PA")
    else:
        picture = grey.convert("RGB").convert(mode) if mode != "LA" else grey.convert("LA")
    assert to_rgb(picture).mode == "RGB" and to_rgb(picture).size == (28, 20)
    assert processor.image_processor(picture)["image_grid_thw"].tolist() == [[1, 6, 8]]


def test_transparent_pixels_keep_their_colour():
    # Published: alpha is dropped, not blended.
    assert to_rgb(Image.new("RGBA", (1, 1), (10, 20, 30, 0))).getpixel((0, 0)) == (10, 20, 30)


@pytest.mark.parametrize("kind", ["I;16", "I;16B", "I"])
def test_sixteen_bits_are_scaled_not_clipped(kind):
    values = np.array([[0, 255, 256, 32768, 65535]])
    if kind == "I":
        picture = Image.fromarray(values.astype(np.int32))
    else:
        order = ">u2" if kind == "I;16B" else "<u2"
        picture = Image.frombytes(kind, (5, 1), values.astype(order).tobytes())
    assert picture.mode == kind
    pixels = np.asarray(to_rgb(picture))[0, :, 0]
    assert pixels.tolist() == [0, 0, 1, 128, 255]


def test_floating_point_pixels_are_refused(processor):
    with pytest.raises(ValueError, match="no known range"):
        to_rgb(Image.new("F", (3, 3)))
    with pytest.raises(ValueError, match="array of float32"):
        processor.image_processor(np.zeros((8, 8, 3), np.float32))


# Where the upper left pixel of the stored picture belongs, by Exif orientation: (right, bottom).
CORNERS = {1: (0, 0), 2: (1, 0), 3: (1, 1), 4: (0, 1), 5: (0, 0), 6: (1, 0), 7: (1, 1), 8: (0, 1)}


@pytest.mark.parametrize("orientation", CORNERS)
def test_every_orientation_is_turned_upright(orientation):
    picture = Image.new("RGB", (6, 3))
    picture.putpixel((0, 0), (255, 0, 0))
    picture.getexif()[0x0112] = orientation
    upright = to_rgb(picture)
    assert upright.size == ((6, 3) if orientation < 5 else (3, 6))
    right, bottom = CORNERS[orientation]
    corner = (right * (upright.width - 1), bottom * (upright.height - 1))
    assert upright.getpixel(corner) == (255, 0, 0)


def test_arrays_and_tensors_are_taken_in_either_order(processor):
    images = processor.image_processor
    picture = tiny.picture(40, 24)
    expected = images(picture, return_tensors="np")["pixel_values"]
    rows_first = np.asarray(picture)
    for given in (
        rows_first,
        rows_first.transpose(2, 0, 1),
        torch.from_numpy(rows_first.copy()),
        torch.from_numpy(rows_first.transpose(2, 0, 1).copy()),
    ):
        assert (images(given, return_tensors="np")["pixel_values"] == expected).all()


def test_without_resizing_only_whole_cells_are_taken(processor):
    images = processor.image_processor
    packed = images(tiny.picture(16, 48), do_resize=False)
    assert packed["image_grid_thw"].tolist() == [[1, 4, 12]]
    with pytest.raises(ValueError, match="20 x 16 pixels with do_resize=False"):
        images(tiny.picture(16, 20), do_resize=False)


def test_saving_and_loading_changes_nothing(tmp_path):
    images = EveImageProcessor(
        size={"longest_edge": 64},
        size_multiple=16,
        patch_size=4,
        merge_size=2,
        image_mean=[0.5] * 3,
    )
    images.save_pretrained(tmp_path)
    again = EveImageProcessor.from_pretrained(tmp_path)
    picture = tiny.picture(30, 50)
    assert (images(picture)["pixel_values"][0] == again(picture)["pixel_values"][0]).all()
    assert again.grid_of(30, 50) == images.grid_of(30, 50)


def test_settings_may_change_for_one_call(processor):
    images = processor.image_processor
    larger = images(tiny.picture(32, 32), size={"longest_edge": 64})
    assert larger["image_grid_thw"].tolist() == [[1, 16, 16]]
    assert images(tiny.picture(32, 32))["image_grid_thw"].tolist() == [[1, 8, 8]]


def test_the_square_that_sizes_are_told_by():
    """A large square: the longest edge, or what a budget makes of it; not a picture of one pixel."""
    plain = EveImageProcessor(size={"longest_edge": 672})
    assert plain.square_grid() == (672, 672, 24, 24)
    budget = EveImageProcessor(size={"longest_edge": 3528}, max_image_tokens=128)
    grid = budget.square_grid()
    assert num_image_tokens(grid.rows, grid.cols) == 111  # one more row and column would be 133
