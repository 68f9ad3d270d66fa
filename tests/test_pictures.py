"""Picture files as people have them: every bad one is one sentence, every odd but good one works.

Colours through JPEG are compared within 12 of 255, more than its quantisation of a flat colour loses.
"""

import struct
import zlib

import numpy as np
import pytest
from PIL import Image

import tiny
from eve_vlm.pictures import MAX_PIXELS, open_picture

JPEG = 12


def png_claiming(width: int, height: int) -> bytes:
    """A PNG of a few bytes that announces any size."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        checked = kind + data
        return struct.pack(">I", len(data)) + checked + struct.pack(">I", zlib.crc32(checked))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = chunk(b"IDAT", zlib.compress(b"\0" * 100))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + body + chunk(b"IEND", b"")


def bmp_claiming(width: int, height: int) -> bytes:
    header = struct.pack("<2sIHHI", b"BM", 54, 0, 0, 54)
    return header + struct.pack("<IiiHHIIiiII", 40, width, height, 1, 24, 0, 0, 0, 0, 0, 0)


def refused(path) -> str:
    """The message about a bad file: one sentence, with the file's name."""
    with pytest.raises(ValueError) as caught:
        open_picture(path)
    text = str(caught.value)
    assert str(path) in text and "\n" not in text and text.endswith(".")
    return text


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"])
def test_truncated_files(tmp_path, kind):
    whole = tmp_path / f"whole.{kind.lower()}"
    tiny.picture(120, 120).save(whole, format=kind)
    data = whole.read_bytes()
    for share in (0.1, 0.5, 0.9):
        path = tmp_path / f"cut_{share}.{kind.lower()}"
        path.write_bytes(data[: int(len(data) * share)])
        assert "damaged or cut short" in refused(path) or "not a picture" in refused(path)


def test_broken_checksum(tmp_path):
    path = tmp_path / "broken.png"
    tiny.picture(40, 40).save(path)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0xFF
    path.write_bytes(data)
    refused(path)


@pytest.mark.parametrize(
    "data",
    [b"", b"hello, this is no picture", b"%PDF-1.7\n", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff\xe0"],
    ids=["empty", "text", "pdf", "png-magic-only", "jpeg-magic-only"],
)
def test_files_that_are_no_pictures(tmp_path, data):
    path = tmp_path / "notes.png"
    path.write_bytes(data)
    assert "not a picture" in refused(path) or "damaged or cut short" in refused(path)


def test_files_that_are_not_there(tmp_path):
    assert "is not a file" in refused(tmp_path / "missing.png")
    assert "is not a file" in refused(tmp_path)  # a folder


@pytest.mark.parametrize("make", [png_claiming, bmp_claiming])
@pytest.mark.parametrize(("width", "height"), [(0, 0), (0, 5), (5, 0)])
def test_pictures_without_pixels(tmp_path, make, width, height):
    path = tmp_path / "nothing.png"
    path.write_bytes(make(width, height))
    refused(path)


@pytest.mark.parametrize("size", [(60_000, 60_000), (2**28 + 1, 1), (1, 2**28 + 1)])
def test_pictures_that_are_too_large_are_refused_before_they_are_read(tmp_path, size):
    path = tmp_path / "huge.png"
    path.write_bytes(png_claiming(*size))
    text = refused(path)
    assert f"{size[0]} x {size[1]} pixels" in text and f"{MAX_PIXELS:,}" in text


def test_pillows_own_limit_is_put_back(tmp_path):
    before = Image.MAX_IMAGE_PIXELS
    path = tmp_path / "huge.png"
    path.write_bytes(png_claiming(60_000, 60_000))
    refused(path)
    assert before == Image.MAX_IMAGE_PIXELS


def test_large_pictures_below_the_limit_are_no_bomb(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)  # as if Pillow's own limit were low
    tiny.picture(50, 50).save(tmp_path / "fine.png")
    assert open_picture(tmp_path / "fine.png").size == (50, 50)


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF"])
def test_animations_give_their_first_frame(tmp_path, kind):
    frames = [Image.new("RGB", (12, 8), colour) for colour in ("red", "lime", "blue")]
    path = tmp_path / f"moving.{kind.lower()}"
    settings = {"lossless": True} if kind == "WEBP" else {}
    frames[0].save(path, format=kind, save_all=True, append_images=frames[1:], **settings)
    picture = open_picture(path)
    assert picture.mode == "RGB" and picture.getpixel((5, 5)) == (255, 0, 0)


def test_cmyk_jpeg(tmp_path):
    path = tmp_path / "print.jpg"
    Image.new("RGB", (16, 16), (200, 30, 60)).convert("CMYK").save(path, quality=95)
    assert Image.open(path).mode == "CMYK"
    picture = open_picture(path)
    assert picture.mode == "RGB"
    assert np.abs(np.array(picture.getpixel((8, 8))) - (200, 30, 60)).max() <= JPEG


def test_sixteen_bit_png(tmp_path):
    path = tmp_path / "scan.png"
    Image.fromarray(np.full((6, 9), 0x8040, np.uint16)).save(path)
    picture = open_picture(path)
    assert picture.mode == "RGB" and picture.size == (9, 6)
    assert picture.getpixel((0, 0)) == (128, 128, 128)


def test_palette_png_with_transparency(tmp_path):
    path = tmp_path / "icon.png"
    picture = Image.new("RGBA", (8, 8), (250, 120, 10, 255)).convert("P")
    picture.save(path, transparency=0)
    assert Image.open(path).mode == "P"
    red, green, blue = open_picture(path).getpixel((3, 3))
    assert (
        max(abs(red - 250), abs(green - 120), abs(blue - 10)) <= 26
    )  # the web palette's steps of 51


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_exif_rotated_pictures_come_upright(tmp_path, kind):
    picture = Image.new("RGB", (32, 16), "white")
    picture.paste((255, 0, 0), (0, 0, 16, 16))  # the left half is red
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    path = tmp_path / f"phone.{kind.lower()}"
    settings = {"lossless": True} if kind == "WEBP" else {}
    picture.save(path, format=kind, exif=exif, **settings)
    upright = open_picture(path)
    assert upright.size == (16, 32)
    top, bottom = (np.array(upright.getpixel((8, y))) for y in (4, 28))
    assert np.abs(top - (255, 0, 0)).max() <= JPEG and np.abs(bottom - 255).max() <= JPEG


def test_the_file_is_closed(tmp_path):
    path = tmp_path / "cat.png"
    tiny.picture(8, 8).save(path)
    picture = open_picture(path)
    path.unlink()  # Windows would refuse this for an open file
    assert picture.copy().size == (8, 8)
