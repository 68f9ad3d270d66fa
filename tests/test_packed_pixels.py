"""Fast pictures are the same pictures: bits, threads, memory, and the published shape of work.

Bits are compared exactly with slow loops (`oracle/packed_pixels.py`).  What the published way makes
in float64 and then float32 may differ by 1e-6, as in `test_image_processing.py`.  Easy to get
wrong: peak memory never falls, so it is measured in a process of its own.
"""

import io
import pickle
import random
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

import tiny
from eve_vlm import EveImageProcessor
from eve_vlm import image_processing_eve as product
from eve_vlm.picture_pixels_eve import cut_patches, to_rgb, upright
from eve_vlm.pictures import read_picture
from oracle import geometry, packed_pixels, preprocess, published_pixels

PIXELS = 1e-6
MODES = ["RGB", "L", "RGBA", "P", "1", "CMYK", "LA", "I;16", "YCbCr"]
SMALL = {"longest_edge": 112}


def settings_of(processor: EveImageProcessor) -> dict:
    """The processor's settings by the published names."""
    edge, multiple = processor.size["longest_edge"], processor.size_multiple
    return {
        "image_size": edge,
        "image_size_clip": edge * 14 // multiple,
        "patch_stride": processor.patch_size,
        "patch_stride_clip": 14,
        "conv_stride": processor.merge_size,
        "image_mean": processor.image_mean,
        "image_std": processor.image_std,
    }


def in_mode(picture: Image.Image, mode: str) -> Image.Image:
    if mode == "I;16":
        values = np.asarray(picture.convert("L")).astype(np.uint16) * 257
        return Image.fromarray(values)
    return picture.convert("L").convert(mode) if mode == "LA" else picture.convert(mode)


def random_pictures(number: int, seed: int) -> list[Image.Image]:
    """All modes and orientations; sides from 1 to 900 pixels, small ones as often as large ones."""
    rng = random.Random(seed)
    pictures = []
    for index in range(number):
        height, width = (round(2 ** rng.uniform(0, 9.8)) for _ in range(2))
        picture = in_mode(tiny.picture(height, width, seed=index), MODES[index % len(MODES)])
        if rng.random() < 0.4:
            picture.getexif()[0x0112] = rng.randint(1, 8)
        pictures.append(picture)
    return pictures


# --- bits -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("edge", "multiple"), [(112, 28), (224, 56), (672, 28)])
def test_every_bit_is_as_in_slow_loops(edge, multiple):
    images = EveImageProcessor(size={"longest_edge": edge}, size_multiple=multiple)
    pictures = random_pictures(12 if edge == 672 else 45, seed=edge)
    made = images(pictures, return_tensors="np")
    expected = [packed_pixels.packed_picture(picture, settings_of(images)) for picture in pictures]
    assert made["image_grid_thw"].prod(-1).tolist() == [len(one) for one in expected]
    assert made["pixel_values"].dtype == np.float32
    assert np.array_equal(made["pixel_values"], np.concatenate(expected))
    alone = [images(picture, return_tensors="np")["pixel_values"] for picture in pictures]
    assert np.array_equal(made["pixel_values"], np.concatenate(alone))


def test_without_pictures_nothing_comes():
    made = EveImageProcessor()([], return_tensors="pt")
    assert made["pixel_values"].shape == (0, 588) and made["image_grid_thw"].shape == (0, 3)


def test_large_pictures_are_not_copied():
    picture = tiny.picture(30, 40)
    assert upright(picture) is picture and EveImageProcessor().process_image(picture) is picture
    # Who keeps a picture asks for one of its own, which later changes do not reach.
    kept = to_rgb(picture)
    picture.putpixel((0, 0), (1, 2, 3))
    assert kept is not picture and kept.getpixel((0, 0)) != (1, 2, 3)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF"])
def test_pictures_that_were_read_are_plain_ones(kind, monkeypatch):
    """Their pixels are those that were decoded, but no file, decoder or class of it hangs on."""
    file = io.BytesIO()
    tiny.picture(20, 30).save(file, kind)
    with Image.open(io.BytesIO(file.getvalue())) as opened:
        expected = opened.convert("RGB")
    monkeypatch.setattr(Image.Image, "copy", lambda self: pytest.fail("pixels were copied"))
    made = read_picture(file.getvalue(), name="picture")
    assert type(made) is Image.Image and made.mode == "RGB"
    assert made.tobytes() == expected.tobytes()
    made.putpixel((0, 0), (1, 2, 3))  # it may be drawn on
    assert pickle.loads(pickle.dumps(made)).getpixel((0, 0)) == (1, 2, 3)


# --- threads --------------------------------------------------------------------------------------


def watched(monkeypatch) -> set[int]:
    """The threads that resize, filled while they do."""
    seen, resize = set(), product.resize_picture

    def watching(*arguments):
        seen.add(threading.get_ident())
        return resize(*arguments)

    monkeypatch.setattr(product, "resize_picture", watching)
    return seen


def test_threads_change_nothing(monkeypatch):
    images, pictures = EveImageProcessor(size=SMALL), random_pictures(24, seed=3)
    seen = watched(monkeypatch)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    alone = images(pictures, return_tensors="np")
    assert seen == {threading.get_ident()}
    seen.clear()
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    together = images(pictures, return_tensors="np")
    assert threading.get_ident() not in seen and 1 <= len(seen) <= 4
    assert all(np.array_equal(alone[name], together[name]) for name in alone)


def test_threads_work_at_the_same_time(monkeypatch):
    """Two pictures wait for each other, which they never could one after the other."""
    meeting, resize = threading.Barrier(2, timeout=30), product.resize_picture

    def meet(*arguments):
        meeting.wait()
        return resize(*arguments)

    monkeypatch.setattr(product, "resize_picture", meet)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    made = EveImageProcessor(size=SMALL)([tiny.picture(9, 9), tiny.picture(5, 30)])
    assert len(made["image_grid_thw"]) == 2


def test_what_fails_in_a_thread_is_said(monkeypatch):
    def fail(image, *_):
        raise ValueError(f"{image.width} pixels")

    monkeypatch.setattr(product, "resize_picture", fail)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    with pytest.raises(ValueError, match="7 pixels"):
        EveImageProcessor(size=SMALL)([tiny.picture(9, 7), tiny.picture(5, 7)])


class ThreadsSeen(Dataset):
    """Says how many threads resized the pictures of an item, and whether it was its own alone."""

    def __len__(self):
        return 2

    def __getitem__(self, index):
        with pytest.MonkeyPatch.context() as patch:
            seen = watched(patch)
            EveImageProcessor(size=SMALL)([tiny.picture(30, 20)] * 4)
        return len(seen), seen == {threading.get_ident()}


def test_workers_of_a_data_loader_start_no_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        items = list(DataLoader(ThreadsSeen(), num_workers=1, batch_size=None))
    finally:
        torch.set_num_threads(before)
    assert items == [[1, True], [1, True]]


# --- memory ---------------------------------------------------------------------------------------

PEAK = """
from pathlib import Path
from PIL import Image
from eve_vlm import EveImageProcessor


def resident(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field))


images = EveImageProcessor()
large = Image.new("RGB", (4000, 3000), (1, 2, 3))
images(Image.new("RGB", (64, 48)))  # whatever is allocated once
before = resident("VmRSS")
Path("/proc/self/clear_refs").write_text("5")  # from here on VmHWM counts anew
made = images(large, return_tensors="pt")
print(resident("VmHWM") - before, made["pixel_values"].nbytes // 1024)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="only Linux counts it")
def test_a_large_picture_takes_little_memory():
    """12 megapixels take less than 32 MiB beside the picture itself, which has 46.

    8 MiB for the narrowed picture, 1.3 for the resized one and 1 for each of two 8-bit copies, 4
    for the result; the rest is for allocators, whose blocks are up to 16 MiB.  One copy of the
    picture would be too much; there were three.
    """
    done = subprocess.run([sys.executable, "-c", PEAK], capture_output=True, text=True, check=True)
    peak, result = (int(number) for number in done.stdout.split())  # KiB
    assert result == 672 * 504 * 3 * 4 // 1024
    assert peak < 32 * 1024


# --- the published shape of work ------------------------------------------------------------------

WIDTHS_AND_HEIGHTS = [(640, 480), (200, 600), (97, 97), (500, 90), (31, 33)]


@pytest.mark.parametrize(("edge", "multiple"), [(112, 28), (224, 56)])
def test_the_published_shape_of_work_has_the_same_pixels(edge, multiple):
    images = EveImageProcessor(size={"longest_edge": edge}, size_multiple=multiple)
    settings, pictures = settings_of(images), []
    for index, (width, height) in enumerate(WIDTHS_AND_HEIGHTS):
        pictures.append(tiny.picture(height, width, seed=index))
    published = published_pixels.published_tensor(pictures, settings)
    ours, start = images(pictures, return_tensors="np")["pixel_values"], 0
    for picture, tensor in zip(pictures, published, strict=True):
        canvas, valid = preprocess.student_canvas(picture, settings)
        slow = preprocess.with_mask(canvas, valid, settings)
        assert abs(tensor.numpy() - slow).max() <= PIXELS
        assert valid == geometry.box(picture.height, picture.width, settings)
        area = published_pixels.picture_area(tensor, valid)
        patches, _, _ = cut_patches(area, patch_size=14, merge_size=2)
        own = ours[start : start + len(patches)]
        assert abs(own - patches.reshape(own.shape)).max() <= PIXELS
        start += len(patches)
    assert start == len(ours)
