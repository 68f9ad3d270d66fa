"""Emoji as records: right names, no held-out Noto drawing, the same picture at every look.

Assets made here are coloured squares, one colour a drawing, so a test reads back from the pixels
which drawing a record shows.  With the real assets names are compared with the package `emoji`.
Everything is exact unless a test says otherwise.
"""

import json
import os
import pickle
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from eve_vlm.assets.catalogue import asset_state, assets_folder, find_asset
from eve_vlm.data.emoji_concepts import is_held_out, shared_concepts
from eve_vlm.data.emoji_source import EmojiSource
from eve_vlm.data.emoji_styles import STYLES, emoji_drawings, style_store
from eve_vlm.data.picture_store import LeftOut, kept_pictures, webp
from eve_vlm.data.sources.made import made_source

pytest.importorskip("resvg_py", reason="needs the extra demo")

FAMILIES = {"name": 1}
STYLE_TINTS = dict(zip(STYLES, (250, 190, 130, 70), strict=True))


def write_asset(name, contents):
    """An asset as a fetch leaves it."""
    folder = assets_folder() / name
    for file, content in contents.items():
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        text = content if isinstance(content, str) else json.dumps(content)
        (folder / file).write_text(text, encoding="utf-8")
    manifest = {
        "wanted": find_asset(name).versions,
        "files": {file: [(folder / file).stat().st_size, ""] for file in contents},
        **{"links": {}, "archives": []},
    }
    (folder / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")


def colour(style, number):
    """Of the drawing of one concept in one style: red says the style, green the concept."""
    return (STYLE_TINTS[style], 40 * number + 20, 0)


@pytest.fixture
def small_assets(tmp_path, monkeypatch):
    """Four styles of five concepts as coloured squares; the last looks like a held-out one in Noto.

    Returns (concepts, their names): two held out, two open, and the open twin of the first.
    """
    monkeypatch.setenv("EVE_CACHE", str(tmp_path))
    halves = shared_concepts()
    codes = (*halves["held out"][:2], *halves["open"][:3])
    names = ["first thing", "second thing", "red third", "fourth thing", "twin thing"]
    toned = halves["open"][0] + "-1F3FB"
    for style in STYLES:
        tints = ["#{:02x}{:02x}{:02x}".format(*colour(style, n)) for n in range(5)]
        if style == "noto":
            tints[4] = tints[0]
        bodies = [f'<path fill="{tint}" d="M0 0h36v36H0z"/>' for tint in tints]
        if style == "openmoji":
            svg = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 36 36">{}</svg>'
            entry = {"openmoji_tags": "", "group": "food-drink", "subgroups": "food-fruit"}
            entries = [
                {"hexcode": code, "annotation": name, "tags": "thing, other, thing", **entry}
                for code, name in zip((*codes, toned), [*names, "toned"], strict=True)
            ]
            entries[3] |= {"tags": "", "group": "extras-openmoji", "subgroups": "brand"}
            files = {"openmoji.json": entries}
            files |= {f"svg/{c}.svg": svg.format(b) for c, b in zip(codes, bodies, strict=True)}
            write_asset(style, files)
            continue
        icons = {f"thing-{n}": {"body": body} for n, body in enumerate(bodies)}
        if style == "twemoji":
            icons["thing-3"]["height"] = 18  # half as high as the set says
        chars = {code.lower(): f"thing-{n}" for n, code in enumerate(codes)}
        chars[toned.lower()] = "thing-2"
        table = {"icons": icons, "width": 36, "height": 36}
        write_asset(style, {"icons.json": table, "chars.json": chars})
    return codes, names


def source(size=40, seed=0, **options):
    return EmojiSource.from_options({"size": size, "families": FAMILIES, **options}, seed=seed)


def texts(record):
    return [
        "".join(part["text"] for part in message["content"] if part["type"] == "text")
        for message in record.messages
    ]


def test_drawings_are_the_svgs_with_the_words_of_openmoji(small_assets):
    codes, names = small_assets
    for style in STYLES:
        store = style_store(style)
        assert [facts["code"] for facts in store.facts] == list(codes), "no skin tones"
        assert [facts["name"] for facts in store.facts] == names
        assert store.facts[0]["tags"] == ["thing", "other"]
        for number in range(len(codes)):
            drawing = store.drawing(number)
            assert (drawing.mode, drawing.size) == ("RGBA", (224, 224))
            expected = colour(style, 0 if (style, number) == ("noto", 4) else number)
            assert drawing.getpixel((112, 112)) == (*expected, 255)
    low = style_store("twemoji").drawing(3)
    assert low.getchannel("A").getbbox() == (0, 56, 224, 168), "in the middle, not stretched"


def test_training_never_shows_a_held_out_drawing(small_assets):
    codes, _ = small_assets
    records = source(size=170)
    shown = Counter(tuple(records.outline(n).id.rsplit("-", 1)[0] for n in range(len(records))))
    # Three styles of five concepts; of Noto the two open ones without the twin of a held-out one.
    assert len(shown) == 17 and max(shown.values()) - min(shown.values()) <= 1
    assert {name for name in shown if name.startswith("noto")} == {f"noto-{c}" for c in codes[2:4]}
    held_out = source(size=40, split="held_out")
    assert {held_out.outline(n).id.rsplit("-", 1)[0] for n in range(40)} == {
        f"noto-{code}" for code in codes[:2]
    }


def test_answers_are_the_name_of_what_the_pixels_show(small_assets, monkeypatch):
    """Without the changes of colour the one known colour on a tenth of the pixels says which."""
    for share in ("COLOUR_SHARE", "GREY_SHARE", "BLUR_SHARE"):
        monkeypatch.setattr(f"eve_vlm.data.emoji_source.{share}", 0.0)
    _, names = small_assets
    known = {colour(style, n): n for style in STYLES for n in range(5)}
    records = source(size=100)
    for index in range(len(records)):
        [picture] = records[index].images
        assert (picture.mode, picture.size) == ("RGB", (224, 224))
        found = [c for n, c in picture.getcolors(224 * 224) if c in known and n > 224 * 224 / 10]
        assert len(found) == 1
        assert texts(records[index])[1] == names[known[found[0]]]


def test_a_record_is_a_function_of_options_seed_and_index(small_assets):
    families = {"name": 1, "caption": 1, "tags": 1, "group": 1}
    first, again = (source(size=20, families=families, seed=3) for _ in range(2))
    other = source(size=20, families=families, seed=4)
    backwards = [again[n] for n in reversed(range(len(again)))][::-1]
    sent = pickle.loads(pickle.dumps(first))
    for n, later in enumerate(backwards):
        assert first.outline(n).messages == first[n].messages
        assert first.outline(n).images[0].size() == first[n].images[0].size
        for same in (later, first[n], sent[n]):
            assert (same.id, same.messages) == (first[n].id, first[n].messages)
            assert same.images[0].tobytes() == first[n].images[0].tobytes()
    assert any(first[n].images[0].tobytes() != other[n].images[0].tobytes() for n in range(5))
    with pytest.raises(IndexError):
        first[20]


def test_families_and_their_words(small_assets):
    codes, _ = small_assets
    families = {"name": 1, "caption": 2, "tags": 1, "group": 1}
    records = source(size=300, families=families)
    counts, questions = Counter(), {}
    for n in range(len(records)):
        record, drawing = records.outline(n), records.drawing(n)
        question, answer = texts(record)
        counts[record.family] += 1
        questions.setdefault(record.family, Counter())[question] += 1
        if record.family == "name":
            assert answer == drawing.name
        elif record.family == "caption":
            assert record.format == "plain" and not question and answer.startswith(drawing.name)
            rest = answer.removeprefix(drawing.name)
            assert rest in ("", ": thing, other", ", food fruit", ", brand")
        elif record.family == "tags":
            assert answer == "thing, other" and drawing.code != codes[3], "it has no tags"
        else:
            right = {"food fruit", "food and drink"} if drawing.code != codes[3] else {"brand"}
            assert answer in right
    # A fifth of 300 for a name: five spreads are 35.
    assert set(counts) == set(families) and counts["caption"] > counts["name"] > 25
    # "What is this?" seven times in ten: of about 60 within five spreads (18).
    asked = questions["name"]
    assert abs(asked["What is this?"] - 0.7 * asked.total()) < 18 and len(asked) > 3


def test_what_is_called_by_a_colour_is_never_grey(small_assets, monkeypatch):
    monkeypatch.setattr("eve_vlm.data.emoji_source.GREY_SHARE", 0.9)
    codes, _ = small_assets
    records = source(size=60, styles=["openmoji"])
    grey = Counter()
    for n in range(len(records)):
        red, green, blue = (np.asarray(c, int) for c in records[n].images[0].split())
        if not (np.abs(red - green).max() or np.abs(green - blue).max()):
            grey[records.drawing(n).code] += 1
    assert set(grey) == set(codes) - {codes[2]}


def test_stores_need_no_asset_and_are_mended(small_assets, tmp_path, monkeypatch):
    before = source()[7].images[0].tobytes()
    store = style_store("noto").path
    for name in STYLES:
        (assets_folder() / name / "manifest.json").rename(tmp_path / f"{name}.json")
    monkeypatch.setitem(sys.modules, "resvg_py", None)
    assert source()[7].images[0].tobytes() == before
    store.write_bytes(store.read_bytes()[:1500])
    with pytest.raises(ValueError, match=r"resvg-py, .* `pip install 'eve-vlm\[demo\]'`"):
        source()
    monkeypatch.undo()
    monkeypatch.setenv("EVE_CACHE", str(tmp_path))
    with pytest.raises(ValueError, match="run `eve assets fetch openmoji`"):
        source()
    for name in STYLES:
        (tmp_path / f"{name}.json").rename(assets_folder() / name / "manifest.json")
    assert source()[7].images[0].tobytes() == before
    assert not list(store.parent.glob(".*part*"))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"colour": 1}, "has colour, which emoji does not know"),
        ({"families": {"nam": 1}}, "families has nam"),
        ({"families": {"name": -1}}, "families.name is -1"),
        ({"families": {"name": 0}}, "nothing a weight above 0"),
        ({"size": 0}, "size is 0"),
        ({"size": True}, "size must be given as int"),
        ({"split": "test"}, "split of emoji is 'test'"),
        ({"styles": ["apple"]}, "no emoji style 'apple'"),
        ({"styles": ["twemoji"], "split": "held_out"}, "no drawing in split held_out"),
    ],
)
def test_wrong_options_are_refused(small_assets, options, words):
    with pytest.raises(ValueError, match=words):
        source(**options)


def test_the_mixture_table_knows_it(small_assets):
    line = made_source("emoji", {"size": 5, "families": FAMILIES}, seed=0, name="icons")
    assert len(line) == 5 and line[2].source == "icons"
    with pytest.raises(ValueError, match="families is missing"):
        made_source("emoji", {"size": 5}, seed=0, name="icons")


# --- stores ---------------------------------------------------------------------------------------


def _draw_square(number):
    if number % 10 == 3:
        return LeftOut("a three")
    return webp(Image.new("RGB", (number + 1, 4), (number, 0, 0)), {"n": number}, lossless=True)


@pytest.mark.parametrize("number", [7, 130])
def test_a_store_keeps_order_and_says_what_it_left_out(tmp_path, monkeypatch, caplog, number):
    """130 jobs go through worker processes, 7 do not."""
    monkeypatch.setenv("EVE_CACHE", str(tmp_path))
    store = kept_pictures("squares", [number], lambda: range(number), _draw_square)
    kept = [n for n in range(number) if n % 10 != 3]
    assert [facts["n"] for facts in store.facts] == kept and len(store) == len(kept)
    for place in (0, 4, len(kept) - 1):
        part = store.picture(place)
        assert part.size() == part.header_size() == (kept[place] + 1, 4)
        assert part.open().getpixel((0, 0)) == (kept[place], 0, 0)
    assert f"{number - len(kept)} pictures left out: a three" in caplog.text


# --- real assets ----------------------------------------------------------------------------------


@pytest.fixture
def real_drawings(monkeypatch):
    """Drawings of training from the user's own cache, if they are drawn already."""
    own = os.environ.get("EVE_USER_CACHE") or str(Path.home() / ".cache" / "eve-vlm")
    if len(list((Path(own) / "pictures").glob("emoji-*.tar"))) < len(STYLES):
        pytest.skip(f"the four styles are not drawn in {own}; a recipe with emoji draws them")
    monkeypatch.setenv("EVE_CACHE", own)
    for style in STYLES:
        if asset_state(style) != "present":
            pytest.skip(f"the asset {style} is not in {own}; `eve assets fetch {style}`")
    return emoji_drawings(STYLES, split="train")


def test_real_names_agree_with_another_list(real_drawings):
    """CLDR's short names in the package `emoji`, which OpenMoji's annotations come from too."""
    emoji = pytest.importorskip("emoji", reason="needs the package emoji")
    names = {
        "-".join(f"{ord(c):X}" for c in text if ord(c) != 0xFE0F): data["en"].strip(":")
        for text, data in emoji.EMOJI_DATA.items()
    }
    known = [d for d in real_drawings if d.code in names]
    assert len(known) > 5000

    def plain(name):
        return "".join(c for c in name.lower() if c.isalnum())

    same = sum(plain(d.name) == plain(names[d.code]) for d in known)
    assert same / len(known) > 0.9  # the rest differ in wording: "flag: Chad", "Chad"


def test_real_training_shows_no_held_out_drawing(real_drawings):
    counts = Counter(drawing.style for drawing in real_drawings)
    assert counts.pop("noto") < 1000 and min(counts.values()) > 1500
    assert not [d for d in real_drawings if d.style == "noto" and is_held_out(d.code)]
    closed = emoji_drawings(["noto"], split="held_out")
    closed_pixels = {drawing.open().tobytes() for drawing in closed}
    assert not [
        d.code for d in real_drawings if d.style == "noto" and d.open().tobytes() in closed_pixels
    ]
