"""Conversations: earlier turns are reused without changing a token, undo, stops, files.

Every turn is compared with an engine that keeps nothing and reads the whole conversation anew
(greedy and seeded draws, float32, equal token ids).  One thing a reader would get wrong: a stopped
answer stays in the conversation as far as it was seen, and no further.
"""

import json
import random
from contextlib import closing
from functools import partial
from pathlib import Path

import pytest
from PIL import Image

import tiny
from eve_vlm.processing_eve import VICUNA_CHAT_TEMPLATE
from eve_vlm.serve.asking.conversation import Conversation, TooLongError
from eve_vlm.serve.cache_rows import LEAST_REUSED
from eve_vlm.serve.engine import EveEngine

refused = partial(tiny.refused, end=".")


@pytest.fixture(scope="module")
def plain():
    """Keeps nothing."""
    return EveEngine(tiny.model(), tiny.processor(chat_template=VICUNA_CHAT_TEMPLATE))


@pytest.fixture
def engine(plain):
    """Keeps the caches of earlier turns."""
    return EveEngine(plain.model, plain.processor, keep_tokens=2048)


def said(conversation, text, **settings):
    """The answer to a question; its pieces are checked to be its text."""
    pieces = list(conversation.say(text, **{"max_new_tokens": 6, **settings}))
    answer = pieces[-1].answer
    assert "".join(piece.text for piece in pieces) == answer.text
    return answer


def anew(engine, messages, **settings):
    """What an engine says that reads all of it; the last message is the answer to compare with."""
    [answer] = engine.answer([messages], **{"max_new_tokens": 6, **settings})
    return answer


def random_picture(rng):
    return tiny.picture(rng.randint(3, 40), rng.randint(3, 40), seed=rng.randrange(10**6))


def test_earlier_turns_are_reused_token_for_token(engine, plain):
    """40 conversations of 2 to 5 turns, pictures in any, with undo, other system words, draws."""
    rng = random.Random(0)
    shares, with_pictures = [], 0
    for number in range(40):
        conversation = Conversation(engine, rng.choice([None, None, "Be brief.", ""]))
        read = []  # tokens of each turn's prompt
        for turn in range(rng.randint(2, 5)):
            count = rng.choice([0, 0, 1, 2])
            for _ in range(count):
                conversation.add_picture(random_picture(rng))
            settings = rng.choice([{}, {"temperature": 1.0, "seed": number}])
            answer = said(conversation, rng.choice(tiny.QUESTIONS), **settings)
            expected = anew(plain, conversation.messages[:-1], **settings)
            assert answer.token_ids == expected.token_ids, (number, turn)
            assert answer.prompt_tokens == expected.prompt_tokens
            assert answer.image_tokens == expected.image_tokens
            if read and read[-1] >= LEAST_REUSED:
                # All that was read before; of the answer as far as its text is the same tokens.
                assert answer.cached_tokens >= read[-1], (number, turn)
                shares.append(answer.cached_tokens / answer.prompt_tokens)
                with_pictures += count > 0
            read.append(answer.prompt_tokens)
            if rng.random() < 0.2:
                conversation.undo()
                read.pop()
                conversation.waiting = []
        if rng.random() < 0.3:
            conversation.clear()
    assert len(shares) > 60 and with_pictures > 30 and sum(shares) / len(shares) > 0.5


def test_messages_are_those_of_the_library(engine):
    conversation = Conversation(engine, "Be brief.")
    conversation.add_picture(tiny.picture(20, 20), name="cat.png")
    answer = said(conversation, "What is <image>?")
    system, question, reply = conversation.messages
    assert system == {"role": "system", "content": "Be brief."}
    assert [part["type"] for part in question["content"]] == ["text", "image", "text"]
    assert question["content"][1]["name"] == "cat.png"
    content = [{"type": "text", "text": answer.text}]
    assert reply == {"role": "assistant", "content": content}
    assert conversation.transcript() == ["> What is?", answer.text]


# --- taken back and stopped -----------------------------------------------------------------------


def test_undo_goes_back_step_by_step(engine):
    conversation = Conversation(engine)
    conversation.add_picture(tiny.picture(20, 20), name="a.png")
    conversation.add_picture(tiny.picture(20, 20), name="b.png")
    first = said(conversation, "What is this?")
    said(conversation, "Where is it?")
    assert conversation.undo() == 'the question "Where is it?"' and len(conversation.turns) == 2
    assert conversation.undo() == 'the question "What is this?"' and conversation.turns == []
    assert said(conversation, "What is this?").token_ids == first.token_ids  # with its pictures
    conversation.undo()
    assert conversation.undo() == "the picture b.png"
    assert conversation.undo() == "the picture a.png"
    assert conversation.undo() is None


def test_clear_forgets_caches_too(engine):
    conversation = Conversation(engine, "Be brief.")
    conversation.add_picture(tiny.picture(20, 20))
    said(conversation, "What is this?")
    conversation.add_picture(tiny.picture(20, 20))
    conversation.clear()
    assert engine.kept.tokens == 0 and conversation.waiting == []
    assert conversation.messages == [{"role": "system", "content": "Be brief."}]


@pytest.mark.parametrize("pieces", [1, 3, 10])
def test_a_stopped_answer_stays_as_far_as_it_was_seen(engine, plain, pieces):
    conversation = Conversation(engine)
    conversation.add_picture(tiny.picture(20, 20))
    seen = ""
    with closing(conversation.say("What is this?", max_new_tokens=60)) as answer:
        while pieces:
            text = next(answer).text
            seen, pieces = seen + text, pieces - bool(text)
    assert conversation.transcript() == ["> What is this?", seen] and not conversation.waiting
    # The same question again, which is no reason to take the first for the second.
    with closing(conversation.say("What is this?", max_new_tokens=60)) as answer:
        while not next(answer).text:
            pass
    assert len(conversation.turns) == 4
    answer = said(conversation, "Say more.")
    assert answer.token_ids == anew(plain, conversation.messages[:-1]).token_ids


def test_stopped_before_the_first_word_nothing_was_said(engine):
    conversation = Conversation(engine)
    conversation.add_picture(tiny.picture(20, 20))
    conversation.say("What is this?").close()
    assert conversation.turns == [] and len(conversation.waiting) == 1


def test_whoever_stops_behind_the_last_piece_has_the_whole_answer(engine):
    conversation = Conversation(engine)
    for piece in conversation.say("What is this?", max_new_tokens=3):
        if piece.answer is not None:
            break
    assert conversation.transcript()[-1] == piece.answer.text


def test_an_empty_answer_is_one(engine, monkeypatch):
    conversation = Conversation(engine)
    monkeypatch.setattr(engine.model.generation_config, "eos_token_id", list(range(300)))
    assert said(conversation, "What is this?").text == ""
    assert len(conversation.turns) == 2


# --- refused --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "settings", "part"),
    [
        ("", {}, "question is empty"),
        ("Is <image> like <image>?", {}, "2 <image> marks but 1 pictures"),
        ("What \udcff?", {}, "lone surrogates"),
        ("What?", {"temperature": -1}, "temperature is -1"),
        ("What?", {"max_image_tokens": 2}, "the smallest picture takes"),
    ],
)
def test_a_refused_question_changes_nothing(engine, text, settings, part):
    conversation = Conversation(engine)
    conversation.add_picture(tiny.picture(20, 20))
    assert part in refused(lambda: list(conversation.say(text, **settings)))
    assert conversation.turns == [] and len(conversation.waiting) == 1


def test_too_long_says_what_takes_the_room(engine):
    """Exactly as long as the model takes is answered, one token more is not."""
    conversation = Conversation(engine)
    conversation.add_picture(tiny.picture(20, 20))
    first = said(conversation, "What is this?")
    room = engine.max_length - anew(engine, [*conversation.messages, ask("Why?")]).prompt_tokens
    with pytest.raises(TooLongError) as caught:
        list(conversation.say("Why?", max_new_tokens=room + 1))
    for number in (engine.max_length - room, first.image_tokens, room + 1, engine.max_length):
        assert f" {number}" in str(caught.value)
    assert len(conversation.turns) == 2
    said(conversation, "Why?", max_new_tokens=room)


def ask(text):
    return {"role": "user", "content": [{"type": "text", "text": text}]}


def test_templates_that_take_no_system_words():
    template = (
        "{% for m in messages %}{% if m.role == 'system' %}"
        "{{ raise_exception('System role not supported') }}{% endif %}"
        "{% for p in m.content %}{{ p.text }}{% endfor %}{% endfor %}"
    )
    engine = EveEngine(tiny.model(), tiny.processor(chat_template=template))
    conversation = Conversation(engine, "Be brief.")
    text = refused(lambda: list(conversation.say("What?")))
    assert "System role not supported" in text and "leave out system words" in text
    conversation.system = None
    said(conversation, "What?")


# --- files ----------------------------------------------------------------------------------------


@pytest.fixture
def talked(engine, tmp_path):
    """Two turns: a picture with a file, one without; a third waits."""
    conversation = Conversation(engine, "Be brief, é 猫.")
    tiny.picture(20, 32, seed=1).save(tmp_path / "cat.png")
    file = Image.open(tmp_path / "cat.png")
    conversation.add_picture(file, name=str(tmp_path / "cat.png"))
    conversation.add_picture(tiny.picture(32, 9, seed=2), name="https://example.org/dog.png")
    said(conversation, "Is <image> like <image>?")
    said(conversation, "Why?")
    conversation.add_picture(tiny.picture(16, 16, seed=3), name="https://example.org/bird.png")
    return conversation


def test_a_saved_conversation_goes_on_the_same(engine, plain, talked, tmp_path):
    path = tmp_path / "talk.json"
    talked.save(path)
    stored = [
        part["image"] for part in json.loads(path.read_text())["messages"][1]["content"][1::2]
    ]
    assert stored[0] == str(tmp_path / "cat.png")
    assert stored[1].startswith("data:image/png;base64,")

    loaded = Conversation(plain)
    loaded.load(path)
    assert loaded.system == talked.system and loaded.transcript() == talked.transcript()
    assert [part["name"] for part in loaded.waiting] == ["https://example.org/bird.png"]
    assert said(loaded, "And this?").token_ids == said(talked, "And this?").token_ids
    talked.save(path)  # over its own kind
    assert [file.name for file in tmp_path.iterdir() if file.name.startswith(".")] == []


def test_pages_of_a_pdf_are_saved_by_name(engine, tmp_path):
    pytest.importorskip("pypdfium2", reason="needs the extra pdf")
    from eve_vlm.serve.asking.picture_sources import find_pictures

    tiny.picture(60, 40).save(tmp_path / "a.pdf")
    conversation = Conversation(engine)
    [source] = find_pictures([str(tmp_path / "a.pdf")])
    conversation.add_picture(source.open(), name=source.name)
    conversation.save(tmp_path / "talk.json")
    assert "a.pdf#1" in (tmp_path / "talk.json").read_text()
    conversation.load(tmp_path / "talk.json")
    assert conversation.waiting[0]["image"] == source.open()


def test_the_librarys_messages_can_be_loaded(engine, tmp_path):
    """Written by hand: plain texts, and a picture that is named from the file's folder."""
    tiny.picture(20, 20).save(tmp_path / "cat.png")
    path = tmp_path / "talk.json"
    messages = [
        {"role": "user", "content": [{"type": "image", "image": "cat.png"}, *ask("W?")["content"]]},
        {"role": "assistant", "content": "A cat."},
        ask("Why?"),
        {"role": "assistant", "content": "It is."},
    ]
    path.write_text(json.dumps({"messages": messages}), encoding="utf-8")
    conversation = Conversation(engine)
    conversation.load(path)
    assert conversation.transcript() == ["> W?", "A cat.", "> Why?", "It is."]
    said(conversation, "Really?")


def write(text):
    return lambda path: path.write_text(text, encoding="utf-8")


def messages(*contents):
    turns = zip(("user", "assistant") * 9, contents, strict=False)
    return write(json.dumps({"messages": [{"role": r, "content": c} for r, c in turns]}))


def with_picture(image):
    return messages([{"type": "image", "image": image}], "A cat.")


@pytest.mark.parametrize(
    ("spoil", "part"),
    [
        (lambda path: None, "cannot be read (No such file"),
        (lambda path: path.mkdir(), "cannot be read (Is a directory"),
        (lambda path: path.write_bytes(b"\xff\xfe"), "is no saved conversation"),
        (write("{"), "is no saved conversation"),
        (write("[]"), 'no "messages"'),
        (write('{"messages": 3}'), 'no "messages"'),
        (write('{"messages": [], "waiting": 3}'), 'no "messages"'),
        (write('{"messages": [3]}'), "in turn"),
        (write('{"messages": [{"role": ["user"]}]}'), "in turn"),
        (messages("What?"), "in turn"),
        (messages("What?", None), "neither texts nor"),
        (messages([{"type": "video", "video": "a"}], "What?"), "neither texts nor"),
        (messages("What?", [{"type": "image", "image": "a.png"}]), "neither texts nor"),
        (messages([{"type": "image", "image": 3}], "A cat."), "neither texts nor"),
        (with_picture("gone.png"), "gone.png is neither a file nor a folder"),
        (with_picture("talk.json"), "is not a picture"),
        (with_picture("data:image/png;base64,!!"), "base64"),
        (with_picture("data:image/png;base64,aGVsbG8="), "not a picture"),
        (with_picture("http://127.0.0.1/a.png"), "neither a file nor a folder"),
        (with_picture("-"), "neither a file nor a folder"),
        (with_picture(""), "no single picture"),
    ],
)
def test_files_that_are_none(talked, tmp_path, spoil, part):
    path = tmp_path / "talk.json"
    tiny.picture(8, 8).save(tmp_path / "dog.png")
    spoil(path)
    before = talked.messages, talked.waiting
    assert part in tiny.refused(lambda: talked.load(path), end=".")
    assert (talked.messages, talked.waiting) == before


def test_save_keeps_what_is_not_its_own(talked, tmp_path):
    for name, content in (("notes.txt", "notes"), ("list.json", "[]")):
        (tmp_path / name).write_text(content)
        assert "is no saved conversation" in refused(lambda n=name: talked.save(tmp_path / n))
        assert (tmp_path / name).read_text() == content
    assert "cannot be written" in refused(lambda: talked.save(tmp_path / "gone" / "a.json"))
    assert "cannot be read" in refused(lambda: talked.save(Path("/")))
