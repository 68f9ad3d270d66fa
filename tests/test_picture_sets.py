"""Pictures of the fetched sets as records: right words, held-out ones apart, pixels on white.

Every set is made here in small, as its package has it, with pictures of one colour each, so that a
test sees from the pixels which picture a record carries.  Colours of lossy WebP files are compared
within 3 of 255; all else is exact.
"""

import io
import json
import os
import struct
import sys
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from eve_vlm.assets.catalogue import assets_folder, find_asset
from eve_vlm.data.picture_sets.gcompris import read_resources
from eve_vlm.data.picture_sets.source import FAMILIES, PictureSetSource, is_held_out
from eve_vlm.data.picture_sets.store import SETS, set_store
from eve_vlm.data.sources.made import made_source

ALL = dict.fromkeys(FAMILIES, 1)


def picture_bytes(colour, size=(60, 50), mode="RGB", kind="PNG"):
    stream = io.BytesIO()
    Image.new(mode, size, colour).save(stream, kind)
    return stream.getvalue()


def write_asset(name, contents, links=()):
    """An asset as a fetch leaves it."""
    folder = assets_folder() / name
    for file, content in contents.items():
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_bytes(content if isinstance(content, bytes) else content.encode())
    manifest = {
        "wanted": find_asset(name).versions,
        "files": {file: [(folder / file).stat().st_size, ""] for file in contents},
        **{"links": {link: "" for link in links}, "archives": []},
    }
    (folder / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("EVE_CACHE", str(tmp_path))


def words_of(store):
    return {
        facts["id"]: (facts["name"], facts["caption"], facts["keywords"], facts["category"])
        for facts in store.facts
    }


# --- openclipart ----------------------------------------------------------------------------------


def clipart(title, description="", keywords=()):
    bag = "".join(f"<rdf:li>{word}</rdf:li>" for word in keywords)
    return (
        f"<svg><metadata><cc:Work><dc:title>{title}</dc:title>\n<dc:description>{description}"
        f"</dc:description><rdf:Bag>{bag}</rdf:Bag><dc:creator><dc:title>An Author</dc:title>"
        "</dc:creator></cc:Work></metadata></svg>"
    )


@pytest.fixture
def openclipart():
    drawings = {
        "animals/bugs/fly_01": clipart(
            "Blue Fly", "A blue fly &amp; its wings.", ["insect", "hash", "blue"]
        ),
        "animals/bugs/ape_archite_01": clipart("Ape", "", ["insect", "architetto francesco"]),
        "food/pear": clipart(
            "Pear (B and W)", "someone@example.org", ["fruit", "", "fruit", "sour_taste"]
        ),
        "signs_and_symbols/flags/europe/norway": clipart("norway", "HASH(0x85a0ae8)", ["flag"]),
        "computer/icons/flat-theme/a": clipart("Part of the Flat Icon Collection"),
        "shapes/stars/s1": clipart("gramastar"),
        "unsorted/x": clipart("Various Cliparts"),
        **{f"people/p{n}": clipart("people", "", ["person", "man"]) for n in range(6)},
    }
    files = {}
    for n, (place, svg) in enumerate(drawings.items()):
        files[f"png/{place}.png"] = picture_bytes((10 * n, 200, 30))
        files[f"svg/{place}.svg"] = svg
    files["png/animals/bugs/again.png"] = picture_bytes("red")
    files["png/food/no_words.png"] = picture_bytes((0, 0, 255, 0), mode="RGBA", size=(900, 300))
    files["png/food/small.png"] = picture_bytes("red", size=(20, 20))
    files["png/food/broken.png"] = b"\x89PNG\r\n\x1a\nnothing"
    write_asset("openclipart", files, links=["png/animals/bugs/again.png"])


def test_openclipart_keeps_names_and_leaves_out_junk(openclipart, caplog):
    store = set_store("openclipart")
    words = words_of(store)
    assert words.pop("animals/bugs/fly_01.png") == (
        "blue fly",
        "A blue fly & its wings.",
        ["insect", "blue"],
        "animals, bugs",
    )
    assert words.pop("animals/bugs/ape_archite_01.png") == ("", "", ["insect"], "animals, bugs")
    assert words.pop("food/pear.png") == ("pear", "", ["fruit", "sour taste"], "food")
    assert words.pop("signs_and_symbols/flags/europe/norway.png") == (
        "flag: Norway",
        "",
        ["flag"],
        "signs and symbols, flags",
    )
    assert words.pop("food/no_words.png") == ("", "", [], "food")
    assert words == {f"people/p{n}.png": ("", "", ["person", "man"], "people") for n in range(6)}
    assert "1 pictures left out: smaller than 41 pixels" in caplog.text
    assert "1 pictures left out: cannot be read" in caplog.text


def test_pictures_are_on_white_and_made_smaller(openclipart):
    store = set_store("openclipart")
    numbers = {facts["id"]: n for n, facts in enumerate(store.facts)}
    clear = store.picture(numbers["food/no_words.png"])
    assert clear.size() == clear.open().size == (448, 149)
    assert np.asarray(clear.open()).min() >= 252, "transparent blue is white paper"
    fly = store.picture(numbers["animals/bugs/fly_01.png"])
    assert fly.size() == fly.header_size() == (60, 50), "never made larger"
    assert np.abs(np.asarray(fly.open(), int) - (0, 200, 30)).max() <= 3


# --- the other sets -------------------------------------------------------------------------------


def test_tuxpaint_has_captions_and_draws_svg():
    pytest.importorskip("resvg_py", reason="needs the extra demo")
    svg = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 40 20"><path fill="#00f" d="M0 0h40v20H0z"/></svg>'
    write_asset(
        "tuxpaint",
        {
            "animals/birds/turkey.txt": "A turkey.\nde.utf8=Ein Truthahn.\n",
            "animals/birds/turkey.png": picture_bytes("red"),
            "animals/birds/turkey_mirror.png": picture_bytes("green"),
            "clothes/hat.txt": "Two hats, one of them green.\n",
            "clothes/hat.svg": svg,
            "clothes/odd.txt": "An odd hat.\n",
            "clothes/odd.svg": svg.replace("viewBox", "view").replace("<svg", '<svg width="0"'),
            "clothes/gone.txt": "A gift.\n",
        },
    )
    store = set_store("tuxpaint")
    assert words_of(store) == {
        "animals/birds/turkey.png": ("turkey", "A turkey.", [], "animals, birds"),
        "clothes/hat.svg": ("", "Two hats, one of them green.", [], "clothes"),
    }
    hat = store.picture(1).open()
    assert hat.size == (448, 224)
    assert np.abs(np.asarray(hat, int) - (0, 0, 255)).max() <= 3


def test_gimp_help_joins_title_and_caption_and_takes_a_picture_once():
    def figure(source, title, caption=""):
        caption = f'<div class="caption"><p>{caption}</p></div>' if caption else ""
        return f'<div class="figure"><p class="title"><strong>Figure 1.2. {title}</strong></p><div class="mediaobject"><img src="{source}" alt="{title}" />{caption}</div></div>'

    page = (
        figure("images/filters/examples/taj.png", "Example for the “Glow” filter", 'Filter <span>“<span>Glow</span>”</span>\n   applied')
        + figure("images/using/window.png", "A &amp; B")
        + figure("images/filters/examples/taj.png", "Another figure")
        + figure("images/using/one.png", "Result")
        + figure("images/dialogs/gone.png", "A dialog")
        + '<img src="images/using/icon.png" alt="An icon in a text" />'
    )  # fmt: skip
    files = {
        f"html/images/{name}.png": picture_bytes("red")
        for name in ("filters/examples/taj", "using/window", "using/one", "using/icon")
    }
    write_asset("gimp-help", {"html/a.html": page, **files})
    assert words_of(set_store("gimp-help")) == {
        "images/filters/examples/taj.png": (
            "",
            "Example for the “Glow” filter: Filter “Glow” applied",
            [],
            "example of a filter",
        ),
        "images/using/window.png": ("", "A & B", [], ""),
    }


def resources(files):
    """A Qt resource file of version 3, written from its description: tree, names, data."""
    names, data = b"", b""
    nodes = [{}]  # folders as dictionaries, files as (flags, content)
    for place, content in files.items():
        folder = nodes[0]
        *parts, last = place.strip("/").split("/")
        for part in parts:
            folder = folder.setdefault(part, {})
        folder[last] = content
    rows, queue = [], [("", nodes[0])]
    while queue:
        name, node = queue.pop(0)
        rows.append([name, node])
        if isinstance(node, dict):
            rows[-1].append(len(rows) + len(queue))
            queue += list(node.items())
    tree = b""
    for name, node, *first in rows:
        encoded = name.encode("utf-16-be")
        at, names = len(names), names + struct.pack(">HI", len(name), 0) + encoded
        if isinstance(node, dict):
            tree += struct.pack(">IHIIQ", at, 2, len(node), first[0], 0)
            continue
        flags, content = node
        packed = struct.pack(">I", len(content)) + zlib.compress(content) if flags & 1 else content
        tree += struct.pack(">IHHHIQ", at, flags, 0, 0, len(data), 0)
        data += struct.pack(">I", len(packed)) + packed
    head = struct.calcsize(">4siiiii")
    places = (head, head + len(tree), head + len(tree) + len(data))
    return struct.pack(">4siiiii", b"qres", 3, *places, 0) + tree + data + names


@pytest.fixture
def gcompris():
    root = "/gcompris/src/activities"
    guide = (
        'QtObject { property var tab: [ { "title": qsTr("Old \\"Fort\\""), "text": qsTr("It is old. '
        f'It is large."), "image2": "qrc:{root}/explore_monuments/fort.webp" }}, {{ "title": '
        f'qsTr("Gone"), "text": qsTr("It."), "image2": "qrc:{root}/explore_monuments/no.webp" }} ] }}'
    )
    painting = 'QtObject { property string instruction: qsTr("A Painter, Fields - 1888") property var levels: [ { "pixmapfile" : "image/Fields_background.webp" } ] }'
    webp = [picture_bytes((40 * n, 0, 100), kind="WEBP") for n in range(4)]
    lang = f"{root}/lang/resource"
    files = {
        "lang": {
            f"{lang}/content-en.json": (1, b'{"U0030.ogg": "zero", "air_horn.ogg": "air horn"}'),
            f"{lang}/words_sample/U0030.webp": (0, webp[0]),
            f"{lang}/words_sample/air_horn.webp": (1, webp[1]),
        },
        "explore_monuments": {
            f"{root}/explore_monuments/resource/board/board1.qml": (1, guide.encode()),
            f"{root}/explore_monuments/fort.webp": (0, webp[2]),
        },
        "explore_farm_animals": {"/a": (0, b"")},
        "explore_world_animals": {"/a": (0, b"")},
        "details": {
            f"{root}/details/resource/board/board1_0.qml": (0, painting.encode()),
            f"{root}/details/resource/image/Fields_background.webp": (0, webp[3]),
        },
    }
    write_asset("gcompris", {f"{name}.rcc": resources(tree) for name, tree in files.items()})


def test_gcompris_finds_words_descriptions_and_titles(gcompris):
    store = set_store("gcompris")
    assert list(words_of(store).values()) == [
        ("zero", "zero", [], ""),
        ("air horn", "air horn", [], ""),
        ('Old "Fort"', 'Old "Fort". It is old.', [], "monument"),
        ("", "A Painter, Fields - 1888", [], ""),
    ]
    for number in range(4):
        shown = np.asarray(store.picture(number).open(), int)
        assert np.abs(shown - (40 * number, 0, 100)).max() <= 6  # lossy twice


def test_other_files_are_no_resources(tmp_path):
    path = tmp_path / "a.rcc"
    path.write_bytes(b"qrez" + bytes(30))
    with pytest.raises(ValueError, match=r"a\.rcc is no Qt resource file"):
        read_resources(path)
    path.write_bytes(resources({"/a": (4, b"packed")}))
    with pytest.raises(ValueError, match=r"a\.rcc/a is packed with zstd"):
        read_resources(path)


# --- records --------------------------------------------------------------------------------------


@pytest.fixture
def many():
    """160 stamps called by their number, each of its own colour, two of every name."""
    files = {}
    for n in range(160):
        files[f"things/t{n:03}.txt"] = f"A number {n // 2}.\n"
        files[f"things/t{n:03}.png"] = picture_bytes((n, 255 - n, 90), size=(48, 48))
    write_asset("tuxpaint", files)


def source(size=50, families=ALL, seed=0, name="tuxpaint", **options):
    given = {"set": name, "size": size, "families": families, **options}
    return PictureSetSource.from_options(given, seed=seed)


def said(record):
    return [
        "".join(part["text"] for part in message["content"] if part["type"] == "text")
        for message in record.messages
    ]


def test_splits_share_no_picture_and_no_name(many):
    train, held_out = source(size=160), source(size=160, split="held_out")
    shown = [{said(s[n])[1] for n in range(160)} for s in (source(160, {"name": 1}), source(160, {"name": 1}, split="held_out"))]  # fmt: skip
    assert len(shown[0] | shown[1]) == 80 and not shown[0] & shown[1]
    assert not {*train.numbers} & {*held_out.numbers}
    assert sorted([*train.numbers, *held_out.numbers]) == list(range(160))
    # A twentieth of 80 names is 4; five spreads are 10.
    assert 1 <= len(shown[1]) <= 14
    assert all(is_held_out("tuxpaint", train.store.facts[n]) for n in held_out.numbers)


def test_records_say_what_the_pixels_show_and_come_evenly(many):
    records = source(size=400)
    counts, families = Counter(), Counter()
    for n in range(len(records)):
        record = records[n]
        [picture] = record.images
        number = int(record.id.split("/t")[-1].split(".")[0])
        assert abs(np.asarray(picture.open(), float)[..., 0].mean() - number) <= 3
        question, answer = said(record)
        families[record.family] += 1
        counts[record.id.rsplit("-", 1)[0]] += 1
        stamp = number // 2
        if record.family == "name":
            assert question in ("What is this?", "Name this.", "What does the picture show?", "What do you see?")  # fmt: skip
            assert answer == f"number {stamp}"
        elif record.family == "caption":
            assert not question and record.format == "plain"
            assert answer in (f"number {stamp}", f"A number {stamp}.")
        elif record.family == "describe":
            assert answer == f"A number {stamp}." and record.format == "chat"
        else:
            assert (record.family, answer) == ("category", "things"), "there are no keywords"
    assert max(counts.values()) - min(counts.values()) <= 1
    assert set(families) == {"name", "caption", "describe", "category"}
    assert min(families.values()) > 60  # a quarter of 400; five spreads are 43


def test_a_record_is_a_function_of_options_seed_and_index(many):
    first, again, other = source(seed=3), source(seed=3), source(seed=4)
    backwards = [again[n] for n in reversed(range(50))][::-1]
    assert [(r.id, r.messages, list(r.images)) for r in backwards] == [
        (first[n].id, first[n].messages, list(first[n].images)) for n in range(50)
    ]
    assert [first[n].id for n in range(50)] != [other[n].id for n in range(50)]
    with pytest.raises(IndexError):
        first[50]


def test_a_made_set_needs_no_asset(many, tmp_path, monkeypatch):
    before = source()[3].messages
    (assets_folder() / "tuxpaint" / "manifest.json").unlink()
    monkeypatch.setitem(sys.modules, "resvg_py", None)
    assert source()[3].messages == before
    set_store("tuxpaint").path.unlink()
    with pytest.raises(ValueError, match="run `eve assets fetch tuxpaint`"):
        source()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"name": "clip"}, "no picture set 'clip'"),
        ({"split": "test"}, "split of picture_set is 'test'"),
        ({"families": {"keywords": 1}}, "No picture of tuxpaint in split train has keywords"),
        ({"families": {"title": 1}}, "families has title"),
        ({"styles": []}, "has styles, which picture_set does not know"),
    ],
)
def test_wrong_options_are_refused(many, options, words):
    with pytest.raises(ValueError, match=words):
        source(**options)


def test_the_mixture_table_knows_it(many):
    options = {"set": "tuxpaint", "size": 7, "families": ALL}
    assert len(made_source("picture_set", options, seed=0, name="stamps")) == 7


# --- real sets ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "least", "known"),
    [
        ("openclipart", 3300, ("transportation/vehicles/bicycle_01.png", "bicycle")),
        ("tuxpaint", 890, ("animals/birds/turkey.png", "turkey")),
        ("gimp-help", 1500, None),
        ("gcompris", 200, ("lang/resource/words_sample/giraffe.webp", "giraffe")),
    ],
)
def test_real_sets_are_what_was_counted(name, least, known, monkeypatch):
    own = os.environ.get("EVE_USER_CACHE") or str(Path.home() / ".cache" / "eve-vlm")
    if not list((Path(own) / "pictures").glob(f"set-{name}-*.tar")):
        pytest.skip(f"{name} is not made in {own}; a recipe with it makes it")
    monkeypatch.setenv("EVE_CACHE", own)
    store = set_store(name)
    assert len(store) >= least and name in SETS
    names = {facts["id"]: facts["name"] for facts in store.facts}
    assert known is None or names[known[0]] == known[1]
    for number in range(0, len(store), len(store) // 10):
        assert store.picture(number).open().size == store.picture(number).size()
