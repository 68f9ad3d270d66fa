"""Picture files as people have them: every bad one is one sentence, every odd but good one works.

Colours through JPEG are compared within 12 of 255, more than its quantisation of a flat colour loses.
"""

import io
import struct
import subprocess
import sys
import threading
import time
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image, ImageFile, PngImagePlugin
from PIL.TiffImagePlugin import TiffImageFile
from PIL.WebPImagePlugin import WebPImageFile

import tiny
from eve_vlm import pictures
from eve_vlm.pictures import FORMATS, MAX_PIXELS, WEB_FORMATS, open_picture, read_picture

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


# --- bytes from strangers -------------------------------------------------------------------------


def saved(picture: Image.Image, kind: str, **settings) -> bytes:
    stream = io.BytesIO()
    picture.save(stream, format=kind, **settings)
    return stream.getvalue()


def refused_bytes(data, **settings) -> str:
    """The message about bad bytes: one sentence, with the name that they were given."""
    text = tiny.refused(lambda: read_picture(data, name="picture 3", **settings), end=".")
    assert text.startswith("picture 3 ")
    return text


def png_with(kind: bytes, data: bytes) -> bytes:
    """An 8 x 8 PNG with one more chunk behind its header."""
    whole = saved(tiny.picture(8, 8), "PNG")
    chunk = struct.pack(">I", len(data)) + kind + data
    chunk += struct.pack(">I", zlib.crc32(kind + data))
    return whole[:33] + chunk + whole[33:]  # 8 of signature, 25 of header


def webp_claiming(width: int, height: int) -> bytes:
    """A lossless WebP of one pixel that announces up to 16383 x 16383."""
    data = bytearray(saved(Image.new("RGB", (1, 1)), "WEBP", lossless=True))
    at = data.index(b"VP8L") + 9  # the kind, its length and a signature byte
    old = struct.unpack_from("<I", data, at)[0]
    new = (width - 1) | (height - 1) << 14 | old & ~(2**28 - 1)
    struct.pack_into("<I", data, at, new)
    return bytes(data)


def gif_claiming(width: int, height: int, *, screen: tuple[int, int]) -> bytes:
    """A GIF with a frame of any size on a screen of any size, and no pixels."""
    head = b"GIF89a" + struct.pack("<HHBBB", *screen, 0x80, 0, 0) + b"\0\0\0\xff\xff\xff"
    return head + b"," + struct.pack("<HHHHB", 0, 0, width, height, 0) + b"\x02\x02\x4c\x01\0;"


def tiff_claiming(size: tuple[int, int], *, tile: tuple[int, int]) -> bytes:
    """A grey TIFF of one deflated tile of zeros."""
    data = zlib.compress(bytes(tile[0] * tile[1]))
    entries = [(256, size[0]), (257, size[1]), (258, 8), (259, 8), (262, 1), (277, 1)]
    entries += [(322, tile[0]), (323, tile[1]), (324, 8 + 2 + 12 * 10 + 4), (325, len(data))]
    tags = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in entries)
    return b"II*\0" + struct.pack("<IH", 8, len(entries)) + tags + bytes(4) + data


def jpeg_claiming(width: int, height: int) -> bytes:
    data = bytearray(saved(tiny.picture(16, 16), "JPEG"))
    at = data.index(b"\xff\xc0") + 5
    data[at : at + 4] = struct.pack(">HH", height, width)
    return bytes(data)


@pytest.mark.parametrize("kind", [kind for kind in FORMATS if kind != "AVIF"])
def test_bytes_and_streams_are_read_like_files(tmp_path, kind):
    data = saved(tiny.picture(20, 30), kind)
    path = tmp_path / "picture"
    path.write_bytes(data)
    expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))  # by Pillow alone
    read = (
        read_picture(data, name="x"),
        read_picture(io.BytesIO(data), name="x"),
        open_picture(path),
    )
    assert all(np.array_equal(np.asarray(picture), expected) for picture in read)


BOMBS = {
    "png": png_claiming(50_000, 50_000),
    "jpeg": jpeg_claiming(65_500, 65_500),
    "bmp": bmp_claiming(50_000, 50_000),
    "webp": webp_claiming(16_383, 16_383),
    "gif": gif_claiming(9, 9, screen=(65_535, 65_535)),
    "gif-frame": gif_claiming(65_535, 65_535, screen=(9, 9)),
    "tiff": tiff_claiming((50_000, 50_000), tile=(16, 16)),
    "ppm": b"P6 50000 50000 255 ",
}


@pytest.mark.parametrize("name", BOMBS)
def test_bombs_are_refused_undecoded(name, monkeypatch):
    for reader in (ImageFile.ImageFile, TiffImageFile, WebPImageFile):
        monkeypatch.setattr(reader, "load", lambda self: pytest.fail("pixels were decoded"))
    # A WebP can be no larger than 16383 x 16383, which is just within the usual limit.
    text = refused_bytes(BOMBS[name], max_pixels=2**27)
    assert "pixels, more than" in text or "too many pixels" in text


def test_a_tile_is_counted_like_a_picture():
    data = tiff_claiming((8, 8), tile=(4096, 4096))
    assert len(data) < 20_000
    assert read_picture(data, name="x").size == (8, 8)
    assert "4096 x 4096 pixels" in refused_bytes(data, max_pixels=2**20)


def test_the_limit_is_the_callers():
    data = saved(tiny.picture(10, 10), "PNG")
    assert read_picture(data, name="x", max_pixels=100).size == (10, 10)
    assert "10 x 10 pixels, more than 99 in all" in refused_bytes(data, max_pixels=99)


def test_bombs_cost_no_memory():
    """All of them take less than 64 MB at once; decoded, the PNG alone would take 7.5 GB."""
    resource = pytest.importorskip("resource", reason="Windows has no getrusage")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for data in BOMBS.values():
        refused_bytes(data, max_pixels=2**27)
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert after - before < 64 * 1024  # kB on Linux; macOS counts bytes, which is stricter


@pytest.mark.parametrize("kind", ["zTXt", "iTXt", "iCCP"])
def test_chunks_that_unpack_to_very_much(kind):
    packed = zlib.compress(bytes(50 * 2**20), 9)  # 50 MB in 50 kB
    head = {"zTXt": b"k\0\0", "iTXt": b"k\0\1\0\0\0", "iCCP": b"k\0\0"}[kind]
    assert "damaged" in refused_bytes(png_with(kind.encode(), head + packed))
    # As small ones they do no harm.
    small = png_with(kind.encode(), head + zlib.compress(bytes(50), 9))
    assert read_picture(small, name="x").size == (8, 8)


def test_very_many_texts():
    text = PngImagePlugin.PngInfo()
    for index in range(80):
        text.add_text(f"k{index}", "0" * 10**6, zip=True)  # each below Pillow's limit of 1 MB
    data = saved(tiny.picture(8, 8), "PNG", pnginfo=text)
    assert len(data) < 200_000 and "damaged" in refused_bytes(data)


def jpeg_with_scans(count: int) -> bytes:
    """A progressive JPEG of one megapixel, whose last scan comes `count` times more."""
    data = saved(Image.new("L", (1024, 1024), 128), "JPEG", progressive=True)
    scan = data[data.rindex(b"\xff\xda") : -2]
    return data[:-2] + scan * count + data[-2:]


def test_a_jpeg_of_very_many_scans():
    """16 megapixels with 1000 more scans, 94 kB, took 15 s before they were counted."""
    start = time.monotonic()
    assert "scans" in refused_bytes(jpeg_with_scans(20_000))
    assert time.monotonic() - start < 1  # seconds; about 20 without the count
    assert read_picture(jpeg_with_scans(20), name="x").size == (1024, 1024)


def test_scans_are_counted_where_they_are():
    """Not in a thumbnail inside a segment, in restart markers, or in a film behind the picture."""
    whole = saved(tiny.picture(64, 64), "JPEG", progressive=True, restart_marker_rows=1)
    scans = pictures._scans_of(whole)
    assert 5 < scans <= 12 and b"\xff\xd0" in whole
    thumbnail = b"\xff\xda\xff\xd9" * 500
    segment = b"\xff\xed" + struct.pack(">H", len(thumbnail) + 2) + thumbnail
    motion = whole[:2] + segment + whole[2:] + b"\xff\xda" * 500
    assert pictures._scans_of(motion) == scans
    assert read_picture(motion, name="x").size == (64, 64)


POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n%%EOF\n"
OTHERS = {
    "eps": POSTSCRIPT,
    "eps-with-preview": struct.pack(">I", 0xC5D0D3C6) + bytes(60) + POSTSCRIPT,
    "ico": saved(tiny.picture(16, 16), "ICO"),
    "icns": b"icns" + bytes(60),
    "pcx": saved(tiny.picture(16, 16), "PCX"),
    "psd": b"8BPS\0\1" + bytes(60),
    "pdf": b"%PDF-1.7\n" + bytes(60),
    "svg": b"<svg xmlns='http://www.w3.org/2000/svg' width='9' height='9'/>",
    "html": b"<!doctype html><title>Sign in</title>",
    "jpeg-2000": b"\0\0\0\x0cjP  \r\n\x87\n" + bytes(60),
    "tga": saved(tiny.picture(16, 16), "TGA"),
    "fits": b"SIMPLE  =                    T" + bytes(60),
    "hdf5": b"\x89HDF\r\n\x1a\n" + bytes(60),
    "wmf": b"\xd7\xcd\xc6\x9a\0\0" + bytes(60),
    "xbm": b"#define im_width 9\n#define im_height 9\n",
    "empty": b"",
    "one-byte": b"P",
}


@pytest.mark.parametrize("name", OTHERS)
def test_formats_that_are_not_read(name, monkeypatch):
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("a program was started"))
    text = refused_bytes(OTHERS[name])
    assert "not a picture of a kind that is read here" in text and "PNG, JPEG" in text


def test_a_server_reads_less():
    for kind in FORMATS:
        if kind in WEB_FORMATS:
            data = saved(tiny.picture(8, 8), kind)
            assert read_picture(data, name="x", formats=WEB_FORMATS).size == (8, 8)
        elif kind != "AVIF":
            data = saved(tiny.picture(8, 8), kind)
            assert "kinds: PNG, JPEG, WEBP, GIF." in refused_bytes(data, formats=WEB_FORMATS)


def test_floating_point_pixels():
    data = saved(Image.fromarray(np.ones((4, 4), np.float32)), "TIFF")
    assert "floating-point" in refused_bytes(data)


def test_too_many_bytes(monkeypatch):
    monkeypatch.setattr(pictures, "MAX_BYTES", 1000)
    assert "more than 1,000 bytes" in refused_bytes(bytes(1001))
    endless = open("/dev/zero", "rb") if sys.platform == "linux" else io.BytesIO(bytes(2000))  # noqa: SIM115
    with endless:
        assert "more than 1,000 bytes" in refused_bytes(endless)


def test_a_file_that_may_not_be_read(tmp_path, monkeypatch):
    path = tmp_path / "mine.png"
    tiny.picture(8, 8).save(path)

    def denied(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("pathlib.Path.open", denied)
    assert "cannot be read (Permission denied)" in refused(path)


@pytest.mark.filterwarnings("ignore")  # Pillow's, about damaged tags
@pytest.mark.parametrize("kind", FORMATS)
def test_damaged_bytes_are_refused_or_read(kind):
    """500 random changes of each format: whatever happens is a picture or one sentence."""
    if kind == "AVIF" and not any(e == "AVIF" for e in Image.registered_extensions().values()):
        pytest.skip("this Pillow has no AVIF")
    rng, whole = np.random.default_rng(5), saved(tiny.picture(24, 24), kind)
    outcomes = set()
    for _ in range(500):
        data = bytearray(whole)
        for at in rng.integers(0, len(data), rng.integers(1, 9)):
            # Most of what can go wrong is in the header.
            data[at if rng.random() < 0.5 else at % 64] = rng.integers(256)
        if rng.random() < 0.2:
            del data[rng.integers(len(data)) :]
        try:
            picture = read_picture(bytes(data), name="picture 3", max_pixels=2**20)
        except ValueError as error:
            text = str(error)
            assert text.startswith("picture 3 ") and text.endswith(".") and "\n" not in text
            outcomes.add("refused")
        else:
            assert picture.mode == "RGB" and min(picture.size) > 0
            outcomes.add("read")
    assert "refused" in outcomes


def test_many_threads_read_while_others_use_pillow(monkeypatch):
    """Pillow's guard is never changed, not even for a moment, and holds nobody's picture back."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    large, bomb = saved(tiny.picture(40, 40), "PNG"), png_claiming(60_000, 60_000)
    stop, seen = threading.Event(), set()

    def watch():
        while not stop.is_set():
            seen.add(Image.MAX_IMAGE_PIXELS)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        with ThreadPoolExecutor(8) as pool:
            reads = [pool.submit(read_picture, large, name="x") for _ in range(200)]
            bombs = [pool.submit(refused_bytes, bomb) for _ in range(200)]
            assert all(read.result().size == (40, 40) for read in reads)
            assert all("60000 x 60000" in bomb.result() for bomb in bombs)
    finally:
        stop.set()
        watcher.join()
    assert seen == {100}
