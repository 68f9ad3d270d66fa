"""What a user may name as a picture, from folders to the pages of a PDF.

The PDFs are written here byte by byte, with one colour for each page, so that the test knows what a
page shows without the library that draws it.  Colours are compared exactly: a page is one
rectangle, and nothing on it is smoothed.
"""

import importlib.util
import io
import itertools
import logging
import os
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

import tiny
from eve_vlm.serve.asking import picture_sources
from eve_vlm.serve.asking.picture_sources import PAGE_PIXELS, SUFFIXES, find_pictures

COLOURS = {"red": "1 0 0", "lime": "0 1 0", "blue": "0 0 1", "white": "1 1 1"}


def names_of(*names, **settings) -> list[str]:
    return [source.name for source in find_pictures(names, **settings)]


def only(*names, **settings):
    (source,) = find_pictures(names, **settings)
    return source


def refused(action) -> str:
    return tiny.refused(action, end=".")


def save(path, seed=0, **settings):
    path.parent.mkdir(parents=True, exist_ok=True)
    tiny.picture(8, 10, seed=seed).save(path, **settings)
    return path


def pdf(*pages: str, size=(200, 100), encrypted=False) -> bytes:
    """A PDF with a page of each colour."""
    kids = " ".join(f"{3 + 2 * index} 0 R" for index in range(len(pages)))
    objects = [
        "<</Type/Catalog/Pages 2 0 R>>",
        f"<</Type/Pages/Kids[{kids}]/Count {len(pages)}>>",
    ]
    for index, colour in enumerate(pages):
        box = f"0 0 {size[0]} {size[1]}"
        drawn = f"{COLOURS[colour]} rg {box} re f"
        objects += [
            f"<</Type/Page/Parent 2 0 R/MediaBox[{box}]/Contents {4 + 2 * index} 0 R>>",
            f"<</Length {len(drawn)}>>\nstream\n{drawn}\nendstream",
        ]
    trailer = f"/Root 1 0 R/Size {len(objects) + 1}"
    if encrypted:  # no password fits these hashes
        objects.append(
            f"<</Filter/Standard/V 1/R 2/P -1/O<{'41' * 32}>/U<{'42' * 32}>>>",
        )
        trailer += f"/Encrypt {len(objects)} 0 R/ID[<41><41>]"
    data, starts = b"%PDF-1.4\n", []
    for number, body in enumerate(objects, 1):
        starts.append(len(data))
        data += f"{number} 0 obj\n{body}\nendobj\n".encode()
    table = "".join(f"{start:010} 00000 n \n" for start in starts)
    head = f"xref\n0 {len(objects) + 1}\n0000000000 65535 f \n{table}"
    return data + f"{head}trailer<<{trailer}>>\nstartxref\n{len(data)}\n%%EOF".encode()


def pdf_file(path, *pages, **settings):
    path.write_bytes(pdf(*pages, **settings))
    return path


needs_pdfium = pytest.mark.skipif(
    importlib.util.find_spec("pypdfium2") is None, reason="needs the extra pdf"
)


# --- files and folders ----------------------------------------------------------------------------


def test_a_file(tmp_path):
    path = save(tmp_path / "cat.png")
    source = only(str(path))
    assert source.name == path.as_posix()
    assert np.array_equal(np.asarray(source.open()), np.asarray(Image.open(path)))


def test_order_and_names_are_as_given(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("b.png", "a.png", "folder/z.png", "folder/y.png"):
        save(tmp_path / name)
    expected = ["b.png", "folder/y.png", "folder/z.png", "a.png", "b.png"]
    for folder in ("folder", "folder/", "./folder"):
        assert names_of("b.png", folder, "./a.png", "b.png") == expected


def test_a_folder_without_and_with_its_folders(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("b.JPG", "a.png", "10.webp", "2.tiff", "in/c.gif", "in/deep/d.bmp", "also/e.ppm"):
        save(tmp_path / "all" / name)
    top = ["all/10.webp", "all/2.tiff", "all/a.png", "all/b.JPG"]
    assert names_of("all") == top
    assert names_of("all", recursive=True) == [
        *top,
        *("all/also/e.ppm", "all/in/c.gif", "all/in/deep/d.bmp"),
    ]


def test_nothing_but_pictures_is_taken_and_the_rest_is_counted(tmp_path, caplog):
    save(tmp_path / "a.png")
    for name in ("answers.jsonl", "notes.txt", "Makefile"):
        (tmp_path / name).write_text("words", encoding="utf-8")
    for name in (".hidden.png", "._a.png"):
        (tmp_path / name).write_bytes(b"")
    save(tmp_path / ".cache" / "b.png")
    with caplog.at_level(logging.WARNING):
        assert names_of(str(tmp_path), recursive=True) == [f"{tmp_path.as_posix()}/a.png"]
    assert f"{tmp_path}: 3 files are left out" in caplog.text


def test_bad_pictures_in_a_folder_are_given_and_say_what_is_wrong(tmp_path):
    bad = {
        "a.png": b"",
        "b.jpg": b"not a picture",
        "c.heic": b"\0\0\0\x18ftypheic" + bytes(40),
        "d.eps": b"%!PS-Adobe-3.0 EPSF-3.0\n",
        "e.svg": b"<svg/>",
        "f.pdf": b"%PDF-1.4 and nothing",
        "g.gif": b"GIF89a",
    }
    for name, data in bad.items():
        (tmp_path / name).write_bytes(data)
    (tmp_path / "h.png").symlink_to(tmp_path / "gone.png")
    save(tmp_path / "z.png")
    sources = list(find_pictures([str(tmp_path)]))
    assert [os.path.basename(source.name) for source in sources] == [*bad, "h.png", "z.png"]
    for source in sources[:-1]:
        assert os.path.basename(source.name) in refused(source.open)
    assert sources[-1].open().size == (10, 8)


def test_pictures_that_pillow_saves_are_found_by_their_suffix(tmp_path):
    for suffix in (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm"):
        assert suffix in SUFFIXES
        save(tmp_path / f"x{suffix}")
    assert all(source.open().mode == "RGB" for source in find_pictures([str(tmp_path)]))


def test_nothing_is_opened_before_its_turn(tmp_path, monkeypatch):
    for index in range(5):
        save(tmp_path / f"{index}.png", seed=index)
    opened = []
    monkeypatch.setattr(
        picture_sources,
        "open_picture",
        lambda path, **_: opened.append(path.name) or Image.new("RGB", (1, 1)),
    )
    sources = list(find_pictures([str(tmp_path)]))
    assert opened == []
    sources[3].open()
    assert opened == ["3.png"]


def test_folders_are_listed_one_at_a_time(tmp_path, monkeypatch):
    """The first picture of many folders comes before the second folder is read."""
    for index in range(20):
        save(tmp_path / f"{index:02}" / "x.png")
    listed, scandir = [], os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: listed.append(path) or scandir(path))
    sources = find_pictures([str(tmp_path)], recursive=True)
    assert listed == []
    assert [source.name[-8:] for source in itertools.islice(sources, 2)] == ["00/x.png", "01/x.png"]
    assert len(listed) == 3


def test_names_that_lead_nowhere_are_refused_at_once(tmp_path):
    good = str(save(tmp_path / "a.png"))
    for name in ("missing.png", "missing", "file:///etc/hostname", "ftp://a.test/x.png", ""):
        text = refused(lambda name=name: find_pictures([good, str(tmp_path / "no" / name)]))
        assert "neither a file nor a folder" in text
    assert "neither a file nor a folder" in refused(lambda: find_pictures(["ftp://a.test/x.png"]))


def test_folders_without_pictures(tmp_path):
    save(tmp_path / "in" / "a.png")
    (tmp_path / "notes.txt").write_text("words", encoding="utf-8")
    text = refused(lambda: names_of(str(tmp_path)))
    assert "has no pictures" in text and "were not looked into" in text
    (tmp_path / "empty").mkdir()
    assert refused(lambda: names_of(str(tmp_path / "empty"), recursive=True)).endswith("pictures.")


def test_a_folder_that_cannot_be_listed(tmp_path, monkeypatch):
    save(tmp_path / "a.png")

    def denied(path):
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr(os, "scandir", denied)
    text = refused(lambda: names_of(str(tmp_path)))
    assert f"{tmp_path} cannot be listed (Permission denied)" in text


def test_links_to_folders_are_not_followed(tmp_path):
    save(tmp_path / "a.png")
    (tmp_path / "loop").symlink_to(tmp_path)
    assert len(names_of(str(tmp_path), recursive=True)) == 1


@pytest.mark.skipif(sys.platform != "linux", reason="names of any bytes are Linux's")
def test_file_names_that_are_not_utf_8(tmp_path):
    path = os.fsencode(tmp_path) + b"/caf\xe9.png"
    tiny.picture(8, 10).save(os.fsdecode(path), format="PNG")
    source = only(str(tmp_path))
    assert source.name == f"{tmp_path.as_posix()}/caf\\udce9.png".encode().decode()
    assert source.open().size == (10, 8)


def test_the_limit_of_pixels_reaches_every_kind(tmp_path):
    path = save(tmp_path / "a.png")
    data = io.BytesIO(path.read_bytes())
    for names in ([str(path)], [str(tmp_path)], ["-"]):
        source = only(*names, max_pixels=79, stdin=data)
        assert "10 x 8 pixels" in refused(source.open)


# --- standard input and URLs ----------------------------------------------------------------------


def test_standard_input(tmp_path, monkeypatch):
    data = save(tmp_path / "a.png").read_bytes()
    source = only("-", stdin=io.BytesIO(data))
    assert source.name == "-"
    assert source.open().size == source.open().size == (10, 8)  # it can be opened again
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
    assert only("-").open().size == (10, 8)
    assert "standard input is not a picture" in refused(only("-", stdin=io.BytesIO(b"words")).open)
    assert "only once" in refused(lambda: find_pictures(["-", str(tmp_path), "-"]))


def test_urls(tmp_path, monkeypatch):
    data, asked = save(tmp_path / "a.png").read_bytes(), []

    def fetched(url, **settings):
        asked.append((url, settings))
        if "gone" in url:
            raise ValueError(f"The picture at {url} is not fetched: its host answers 404.")
        return data

    monkeypatch.setattr(picture_sources, "fetch_picture_bytes", fetched)
    urls = ["https://a.test/cat.png?size=2", "HTTP://a.test:8080/x", "https://a.test/gone"]
    sources = list(find_pictures(urls))
    assert [source.name for source in sources] == urls and not asked
    assert sources[0].open().size == sources[1].open().size == (10, 8)
    assert [url for url, _ in asked] == urls[:2]
    # A user may name http and any port; what is private stays closed.
    settings = asked[1][1]
    assert settings["allow_http"] and 8080 in settings["ports"] and "networks" not in settings
    assert "404" in refused(sources[2].open)


def test_a_private_url_is_refused_when_it_is_opened():
    source = only("http://127.0.0.1:9/cat.png")
    assert "no public address" in refused(source.open)


# --- PDFs -----------------------------------------------------------------------------------------


@needs_pdfium
def test_every_page_is_a_picture(tmp_path):
    path = pdf_file(tmp_path / "slides.PDF", "red", "lime", "blue")
    sources = list(find_pictures([str(path)]))
    assert [source.name for source in sources] == [f"{path.as_posix()}#{n}" for n in (1, 2, 3)]
    for source, colour in zip(sources, ("red", "lime", "blue"), strict=True):
        picture = source.open()
        expected = Image.new("RGB", (PAGE_PIXELS, PAGE_PIXELS // 2), colour)
        assert picture.mode == "RGB" and np.array_equal(np.asarray(picture), np.asarray(expected))


@needs_pdfium
def test_one_page_has_a_number_too(tmp_path):
    path = pdf_file(tmp_path / "one.pdf", "red")
    assert names_of(str(path)) == [f"{path.as_posix()}#1"]


@needs_pdfium
@pytest.mark.parametrize(
    ("asked", "numbers"),
    {"#2": [2], "#2-4": [2, 3, 4], "#1-1": [1], "#5": [5], "#1-5": [*range(1, 6)]}.items(),
)
def test_pages_are_picked(tmp_path, asked, numbers):
    path = pdf_file(tmp_path / "a.pdf", "red", "lime", "blue", "red", "lime")
    assert names_of(f"{path}{asked}") == [f"{path.as_posix()}#{number}" for number in numbers]


@needs_pdfium
@pytest.mark.parametrize("asked", ["0", "4", "3-4", "2-1", "0-2", "9" * 9, "9" * 99])
def test_pages_that_are_not_there(tmp_path, asked):
    path = pdf_file(tmp_path / "a.pdf", "red", "lime", "blue")
    source = only(f"{path}#{asked}")
    assert source.name == f"{path.as_posix()}#{asked}"
    text = refused(source.open)
    assert "choose from 1 to 3" in text or "names no pages" in text


@needs_pdfium
@pytest.mark.parametrize("asked", ["x", "-1", "1-", "1,2", "1-2-3", "\u0662", " 1", "1.0"])
def test_what_is_no_page(tmp_path, asked):
    path = pdf_file(tmp_path / "a.pdf", "red", "lime")
    assert "names no pages" in refused(only(f"{path}#{asked}").open)


def test_a_mark_in_a_file_name(tmp_path):
    path = save(tmp_path / "cat #2.png")
    assert only(str(path)).open().size == (10, 8)
    assert "neither" in refused(lambda: find_pictures([f"{tmp_path}/missing.pdf#2"]))
    assert "neither" in refused(lambda: find_pictures([f"{path}#2"]))


@needs_pdfium
def test_pdfs_in_a_folder(tmp_path):
    save(tmp_path / "a.png")
    pdf_file(tmp_path / "b.pdf", "red", "lime")
    (tmp_path / "c.pdf").write_bytes(b"%PDF-1.4 broken")
    save(tmp_path / "d.png")
    sources = list(find_pictures([str(tmp_path)]))
    names = [os.path.basename(source.name) for source in sources]
    assert names == ["a.png", "b.pdf#1", "b.pdf#2", "c.pdf", "d.png"]
    assert "damaged" in refused(sources[3].open)


@needs_pdfium
@pytest.mark.parametrize(
    ("data", "reason"),
    {
        "empty": (b"", "damaged"),
        "words": (b"not a PDF", "damaged"),
        "cut": (pdf("red")[:100], "damaged"),
        "without pages": (pdf(), "no pages"),
        "password": (pdf("red", encrypted=True), "has a password"),
    }.values(),
)
def test_bad_pdfs(tmp_path, data, reason):
    path = tmp_path / "a.pdf"
    path.write_bytes(data)
    text = refused(only(str(path)).open)
    assert reason in text and str(path) in text


@needs_pdfium
@pytest.mark.parametrize(
    ("size", "expected"),
    {
        (200, 100): (300, 150),
        (100, 200): (150, 300),
        (1, 1): (300, 300),
        (14_400, 14_400): (300, 300),
        (1_000_000, 10): (300, 1),
        (1e9, 1e9): (300, 300),
    }.items(),
)
def test_pages_of_any_size_cost_the_same(tmp_path, size, expected):
    path = pdf_file(tmp_path / "a.pdf", "red", size=size)
    picture = only(str(path), page_pixels=300).open()
    assert np.abs(np.subtract(picture.size, expected)).max() <= 1  # PDFium rounds up


@needs_pdfium
def test_a_missing_package_is_named(tmp_path, monkeypatch):
    path = pdf_file(tmp_path / "a.pdf", "red")
    monkeypatch.setitem(sys.modules, "pypdfium2", None)
    assert 'pip install "eve-vlm[pdf]"' in refused(only(str(path)).open)


@needs_pdfium
def test_a_pdf_that_goes_away_or_may_not_be_read(tmp_path):
    path = pdf_file(tmp_path / "a.pdf", "red")
    source = only(str(path))
    path.unlink()
    assert "cannot be read" in refused(source.open)


@needs_pdfium
def test_pages_are_drawn_by_one_thread_at_a_time(tmp_path):
    path = pdf_file(tmp_path / "a.pdf", *["red", "lime", "blue"] * 4)
    sources = list(find_pictures([str(path)], page_pixels=64))
    with ThreadPoolExecutor(8) as pool:
        pictures = list(pool.map(lambda source: source.open(), sources * 4))
    colours = [picture.getpixel((9, 9)) for picture in pictures]
    assert colours == [(255, 0, 0), (0, 255, 0), (0, 0, 255)] * 16
    assert not picture_sources._PDFIUM.locked() and threading.active_count() < 50
