"""Text of an answer while it comes: pieces add up to the whole, stop texts cut, letters stay whole.

Independent side: the tokenizer's own decoding of all tokens at once, and `str.find` on it.
"""

import random

import pytest

import tiny
from eve_vlm.published_tokenizer_eve import published_tokenizer
from eve_vlm.serve.answer_text import AnswerText
from golden_files import FOLDER


@pytest.fixture(scope="module", params=["bytes", "sentencepiece"])
def tokenizer(request):
    """Byte-level pieces, and the published kind, whose first blank belongs to the first word."""
    if request.param == "bytes":
        return tiny.tokenizer()
    return published_tokenizer(FOLDER / "tokenizer" / "tokenizer.json", chat_template="")


def spoken(tokenizer, ids, stop=()):
    text = AnswerText(tokenizer, stop)
    pieces = []
    for id in ids:
        pieces.append(text.push(id))
        if text.stopped:
            break
    pieces.append(text.finish())
    assert "".join(pieces) == text.text
    return text


def whole(tokenizer, ids):
    return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


SAYINGS = (
    "a red square",
    "  two \n",
    "Grüße, 你好! 🙂🙃 and so on",
    "line\n\nline   three",
    "",
    "   ",
    "x",
)


@pytest.mark.parametrize("saying", SAYINGS)
def test_sayings(tokenizer, saying):
    ids = tokenizer(saying, add_special_tokens=False)["input_ids"]
    assert spoken(tokenizer, ids).text == whole(tokenizer, ids).strip()


def test_random_tokens(tokenizer):
    """Random bytes too, which are mostly no letters; special tokens among them are left out.

    Bytes that are no letter may change letters before them in the tokenizer's own decoding, when
    those came as bytes too (`=` behind <0x3D> and <0xB1>), and what was shown stays shown.
    """
    rng = random.Random(0)
    whole_letters = 0
    for _ in range(600):
        ids = [rng.randrange(len(tokenizer)) for _ in range(rng.choice([0, 1, 2, 3, 5, 30]))]
        text, expected = spoken(tokenizer, ids).text, whole(tokenizer, ids).strip()
        if "\ufffd" in expected:
            assert len(text) > 0
        else:
            whole_letters += 1
            assert text == expected
    assert whole_letters > 150


def test_a_letter_of_several_tokens_comes_whole(tokenizer):
    ids = tokenizer("a 🙂 b", add_special_tokens=False)["input_ids"]
    text = AnswerText(tokenizer)
    shown = ""
    for id in ids:
        shown += text.push(id)
        assert "\ufffd" not in shown and "a 🙂 b".startswith(shown)


def test_stop_texts_cut_where_the_first_begins(tokenizer):
    """Random stop texts, also ones that overlap themselves or span tokens; nothing too early."""
    rng = random.Random(1)
    cut = 0
    for _ in range(400):
        saying = "".join(rng.choices("ab\n .", k=rng.randint(1, 40)))
        ids = tokenizer(saying, add_special_tokens=False)["input_ids"]
        stop = tuple("".join(rng.choices("ab\n .", k=rng.randint(1, 4))) for _ in range(2))
        text, said = spoken(tokenizer, ids, stop), whole(tokenizer, ids)
        places = [said.find(one) for one in stop if one in said]
        assert text.stopped == bool(places)
        # Tokens of several letters: the stop that was seen first need not be the leftmost one of
        # the whole saying, but what is said has none of them.
        assert not any(one in text.text for one in stop)
        assert said.strip().startswith(text.text)
        if places:
            cut += 1
            assert text.text == said[: min(places)].strip()
        else:
            assert text.text == said.strip()
    assert 100 < cut < 400


def test_nothing_is_shown_that_is_taken_back(tokenizer):
    """What was shown after each token is a beginning of the final text."""
    rng = random.Random(2)
    for _ in range(200):
        saying = "".join(rng.choices("ab\n .é", k=rng.randint(1, 30)))
        ids = tokenizer(saying, add_special_tokens=False)["input_ids"]
        final = spoken(tokenizer, ids, ("ab\n", "..")).text
        text, shown = AnswerText(tokenizer, ("ab\n", "..")), ""
        for id in ids:
            shown += text.push(id)
            assert final.startswith(shown)
            if text.stopped:
                break


def test_little_is_held_back(tokenizer):
    """A word is shown when its blank comes at the latest, not when the answer ends."""
    ids = tokenizer("one two three four", add_special_tokens=False)["input_ids"]
    text = AnswerText(tokenizer, ("\n",))
    shown = "".join(text.push(id) for id in ids)
    assert shown == "one two three four"
