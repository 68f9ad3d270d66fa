"""Pictures that are not opened yet: sizes and pixels against opening the file outright. Exact."""

import io
import pickle
import tarfile
import zipfile

import numpy as np
import pytest
from PIL import ExifTags, Image, PngImagePlugin

import tiny
from eve_vlm import pictures
from eve_vlm.data.picture_ref import (
    PictureBytes,
    PictureFile,
    PicturePart,
    PictureUrl,
    open_image,
    size_of_image,
)
from eve_vlm.pictures import open_picture, picture_size, read_picture

KINDS = ("PNG", "JPEG", "WEBP", "TIFF", "GIF", "BMP", "PPM")


def picture(width=31, height=17):
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def encoded(kind="PNG", **more):
    file = io.BytesIO()
    picture().save(file, kind, **more)
    return file.getvalue()


def turned(orientation):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    return exif


def png_with_chunk_behind(orientation):
    """EXIF behind the pixels, where Pillow finds it only when it decodes them."""
    data = encoded("PNG")
    exif = io.BytesIO()
    payload = turned(orientation).tobytes().removeprefix(b"Exif\x00\x00")
    PngImagePlugin.putchunk(exif, b"eXIf", payload)
    return data[:-12] + exif.getvalue() + data[-12:]


XMP = (
    '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description '
    'xmlns:tiff="http://ns.adobe.com/tiff/1.0/" tiff:Orientation="6"/></x:xmpmeta>'
)


def png_with_xmp():
    text = PngImagePlugin.PngInfo()
    text.add_itxt("XML:com.adobe.xmp", XMP)
    return encoded("PNG", pnginfo=text)


CASES = {
    **{kind: encoded(kind) for kind in KINDS},
    **{
        f"{kind} turned {orientation}": encoded(kind, exif=turned(orientation))
        for kind in ("PNG", "JPEG", "WEBP", "TIFF")
        for orientation in range(1, 9)
    },
    **{f"PNG turned {turn} behind": png_with_chunk_behind(turn) for turn in (3, 6)},
    "PNG with XMP": png_with_xmp(),
    "JPEG with XMP": encoded("JPEG", xmp=XMP.encode()),
    "TIFF packed": encoded("TIFF", compression="tiff_lzw", exif=turned(8)),
}


@pytest.mark.parametrize("case", CASES)
def test_the_header_gives_the_size_of_the_opened_picture(case):
    data = CASES[case]
    expected = read_picture(data, name="x").size
    assert picture_size(data, name="x") == expected
    assert expected in ((31, 17), (17, 31))


def test_some_of_them_are_turned():
    sizes = {read_picture(data, name="x").size for data in CASES.values()}
    assert sizes == {(31, 17), (17, 31)}


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF", "BMP", "GIF", "PPM"])
def test_no_pixel_is_decoded(kind):
    """The header of a cut file still tells its size, and opening it fails."""
    whole = picture(640, 480)
    file = io.BytesIO()
    whole.save(file, kind)
    # A TIFF keeps its header at the end, so its pixels are what is spoiled there.
    cut = file.getvalue()[:20000] if kind != "TIFF" else file.getvalue()
    assert picture_size(cut, name="x") == (640, 480)
    if kind != "TIFF":
        assert "damaged or cut short" in tiny.refused(lambda: read_picture(cut, name="x"))


@pytest.mark.parametrize(
    "data", [b"", b"hello", CASES["PNG"][:20], CASES["JPEG"][:30], CASES["WEBP"][:18]]
)
def test_a_broken_header_is_told(data):
    assert "x " in tiny.refused(lambda: picture_size(data, name="x"))


def test_a_large_picture_is_refused_from_its_header():
    text = tiny.refused(lambda: picture_size(CASES["PNG"], name="x", max_pixels=500))
    assert "31 x 17" in text


# --- places ---------------------------------------------------------------------------------------


def places(folder):
    """The same picture in every place that a record can name."""
    data = CASES["JPEG turned 6"]
    file = folder / "a.jpg"
    file.write_bytes(data)
    with tarfile.open(folder / "a.tar", "w") as tar:
        tar.add(file, "other.jpg")
        tar.add(file, "a.jpg")
    with tarfile.open(folder / "a.tar") as tar:
        member = tar.getmember("a.jpg")
    with zipfile.ZipFile(folder / "a.zip", "w") as archive:
        archive.write(file, "in/a.jpg")
    return {
        "file": PictureFile(name="a", path=str(file)),
        "url": PictureUrl(name="a", url=f"file://{file}"),
        "zip": PictureUrl(name="a", url=f"zip://in/a.jpg::{folder}/a.zip"),
        "part": PicturePart(
            name="a", path=f"{folder}/a.tar", offset=member.offset_data, length=member.size
        ),
        "part of a url": PicturePart(
            name="a", path=f"file://{folder}/a.tar", offset=member.offset_data, length=member.size
        ),
        "bytes": PictureBytes(name="a", data=data),
        "path": file,
    }


@pytest.mark.parametrize("place", ["file", "url", "zip", "part", "part of a url", "bytes", "path"])
def test_every_place_gives_the_same_picture(tmp_path, place):
    ref = pickle.loads(pickle.dumps(places(tmp_path)[place]))
    expected = open_picture(tmp_path / "a.jpg")
    assert open_image(ref).tobytes() == expected.tobytes()
    assert size_of_image(ref) == expected.size == (17, 31)
    if place != "path":
        assert ref.read() == (tmp_path / "a.jpg").read_bytes()


def test_an_open_picture_stays_as_it_is():
    image = picture()
    assert open_image(image) is image and size_of_image(image) == (31, 17)
    lying = Image.open(io.BytesIO(CASES["JPEG turned 6"]))
    assert size_of_image(lying) == (17, 31)


def test_a_known_size_reads_nothing(tmp_path):
    ref = PictureFile(name="a", path=str(tmp_path / "none.png"), known_size=(3, 4))
    assert ref.size() == size_of_image(ref) == (3, 4)
    assert "is not a file" in tiny.refused(ref.header_size)


@pytest.mark.parametrize(
    ("url", "parts"),
    [
        ("memory://eve/none.png", ("none.png", "is not a file")),
        ("nosuch://a/b.png", ("nosuch://", "fsspec does not know")),
    ],
)
def test_urls_that_lead_nowhere(url, parts):
    for act in (PictureUrl(name="a", url=url).open, PictureUrl(name="a", url=url).size):
        text = tiny.refused(act)
        assert all(part in text for part in parts), text


def test_a_scheme_without_its_package(monkeypatch):
    """As on a machine without s3fs."""
    import sys

    monkeypatch.setitem(sys.modules, "s3fs", None)
    text = tiny.refused(PictureUrl(name="a", url="s3://bucket/a.png").open)
    assert "s3://bucket/a.png" in text and "s3fs" in text and "install" in text


def test_a_part_beyond_the_end_is_told(tmp_path):
    file = tmp_path / "a.tar"
    file.write_bytes(b"x" * 100)
    for path in (str(file), f"file://{file}"):
        ref = PicturePart(name="a", path=path, offset=90, length=20)
        assert "ends 10 bytes too early" in tiny.refused(ref.open)


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("progressive", [False, True])
def test_plain_jpegs_are_read_without_pillow(monkeypatch, mode, progressive):
    """The short way is taken, and gives what Pillow gives."""
    for size in ((1, 1), (640, 480), (31, 17), (17, 5000)):
        file = io.BytesIO()
        Image.new(mode, size).save(file, "JPEG", progressive=progressive, comment=b"\xff\xc0 hi")
        assert Image.open(file).size == size
        with monkeypatch.context() as patched:
            patched.setattr(pictures, "_begin", None)
            assert picture_size(file.getvalue(), name="x") == size
        file.seek(0)
        assert picture_size(file, name="x") == read_picture(file.getvalue(), name="x").size


def test_jpegs_with_bytes_spoiled_never_disagree():
    """Whatever byte of the head is changed: the size of Pillow, or a refusal, or Pillow's refusal."""
    data, agreed = CASES["JPEG"], 0
    dice = np.random.default_rng(0)
    for _ in range(1500):
        spoiled = bytearray(data)
        spoiled[dice.integers(0, 700)] = dice.integers(0, 256)
        try:
            expected = read_picture(bytes(spoiled), name="x").size
        except ValueError:
            continue
        assert picture_size(bytes(spoiled), name="x") == expected
        agreed += 1
    assert agreed > 500
