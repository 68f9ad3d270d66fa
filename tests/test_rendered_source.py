"""Training's rendered words, documents and charts: nothing held out, right answers, even shares.

What the tasks `reading`, `documents` and `charts` ask is read from the tasks themselves and looked
for in the records of whole sources; shares are counted here.  Texts are exact; shares may be off by
1 %, since the sequence that draws them is even to a few records in any window.
"""

import re
import string
from collections import Counter

import gguf
import numpy as np
import pytest
from PIL import Image

from eve_vlm.data.phrases import SEEN_WORDS, UNSEEN_WORDS
from eve_vlm.data.rendered import english, source, word_pictures
from eve_vlm.data.rendered.chart_figure import draw_chart
from eve_vlm.data.rendered.page import draw_page
from eve_vlm.data.rendered.source import RenderedSource
from eve_vlm.data.rendered.vocabulary import VOCABULARY
from eve_vlm.data.sources.build import build_source
from eve_vlm.eval.offline import build_offline

SIZE = 4000
DICTIONARY = ("boulevard", "sky", "scissors", "orchard", "window", "telegraph", "north", "abbey")


@pytest.fixture(scope="module")
def asked():
    """{group: what the task `reading` wants read}; single digits and seen words are in both."""
    answers = {}
    for sample in build_offline("reading").samples():
        answers.setdefault(sample.group, set()).add(sample.answers[0])
    answers["number"] = {text for text in answers["number"] if len(text) > 1}
    return answers


def make(seed=3, **options):
    return RenderedSource.from_options(options, seed=seed)


def pairs_of(record):
    """(question, answer) of each turn, and the numbers of pictures in user turns."""
    texts = [
        "".join(part.get("text", "") for part in message["content"]) for message in record.messages
    ]
    marks = [sum(p["type"] == "image" for p in message["content"]) for message in record.messages]
    assert [message["role"] for message in record.messages] == ["user", "assistant"] * (
        len(texts) // 2
    )
    assert marks == [1] + [0] * (len(marks) - 1) and len(record.images) == 1
    return list(zip(texts[::2], texts[1::2], strict=True))


# --- words ----------------------------------------------------------------------------------------


def held_out_texts(asked):
    """All that must not be written: asked words, and every word of the held-out lists."""
    lists = VOCABULARY["held_out"]
    named = [*lists.long_words, *lists.first_names, *lists.last_names, *lists.towns, *lists.goods]
    return asked["unseen"] | asked["long"] | asked["number"] | set(named) | set(UNSEEN_WORDS)


def test_no_held_out_word_or_number_is_written(asked, monkeypatch):
    """Over every index, with a dictionary that is full of held-out words."""
    monkeypatch.setattr(word_pictures, "english_words", lambda asset: DICTIONARY)
    words = make(what="words", size=SIZE, dictionary="smollm2").records
    written = [words.text(index) for index in range(SIZE)]
    lower = {text.lower() for text in held_out_texts(asked)}
    assert not {text.lower() for text in written} & lower
    for text in written:
        if re.fullmatch(r"\d\d+", text):
            assert sum(map(int, text)) % 5, text  # a fifth of the numbers, by their sum of digits
    assert {"orchard", "window", "telegraph"} <= set(written)  # so the dictionary is used
    assert asked["seen"] == set(SEEN_WORDS) <= set(written)
    assert set(VOCABULARY["train"].long_words) <= set(written)


def test_words_are_many_and_in_even_shares():
    words = make(what="words", size=SIZE).records
    written = [words.text(index) for index in range(SIZE)]
    known = set(SEEN_WORDS) | set(VOCABULARY["train"].long_words)
    shares = Counter(
        "number" if text.isdigit() else "known" if text in known else "other" for text in written
    )
    # Of 21 parts: 12 known, 4 numbers, 3 letters and 2 phrases.
    for name, parts in {"known": 12, "number": 4, "other": 5}.items():
        assert abs(shares[name] / SIZE - parts / 21) < 0.01, shares
    digits = Counter(len(text) for text in written if text.isdigit())
    assert set(digits) == {1, 2, 3, 4}
    assert max(digits.values()) - min(digits.values()) < 0.01 * SIZE
    letters = {text for text in written if text.islower()} - known
    assert len(letters) > 0.95 * shares["other"] * 3 / 5  # nearly every string is a new one
    assert set("".join(letters)) == set("abcdefghijklmnopqrstuvwxyz")


def test_written_words_have_the_bins_of_training():
    """Turns, sizes and places of middles by the rules of `splits.py`, restated."""
    words = make(what="words", size=400).records
    for index in range(400):
        (placement,) = words.part(index).scene(index).placements
        x, y = placement.box.middle
        assert placement.angle in (-8, 0, 8) and placement.size % 4 == 0
        assert (x // 4 + y // 4) % 2 == 0


def test_a_word_record_says_what_is_written_in_the_asked_form():
    words = make(what="words", size=200, families={"word": 1, "caption_word": 1})
    forms = Counter()
    for index in range(200):
        record, text = words[index], words.records.text(index)
        ((question, answer),) = pairs_of(record)
        forms[question] += 1
        if question:
            assert record.format == "chat" and answer == text
        else:
            assert record.format == "plain" and answer == f"the word {text}"
    # Half captions, and two ways to ask, each a quarter; 8 % is four standard deviations of 200.
    assert abs(forms[""] - 100) <= 4 and abs(forms["What does it say?"] - 50) <= 16
    assert set(forms) == {"", "What does it say?", "Read the word."}


def test_held_out_words_are_those_of_the_task(asked):
    words = make(what="words", size=300, split="held_out", groups={"short": 1, "long": 1}).records
    written = {words.text(index) for index in range(300)}
    assert written <= set(UNSEEN_WORDS) | set(VOCABULARY["held_out"].long_words)


def test_characters_are_written_where_they_are_asked_for():
    words = make(what="words", size=SIZE).records
    assert min(len(words.text(index)) for index in range(SIZE) if words.text(index).isalpha()) > 1
    single = make(what="words", size=620, groups={"character": 1}).records
    written = Counter(single.text(index) for index in range(620))
    assert set(written) == set(string.ascii_letters + string.digits)
    assert max(written.values()) - min(written.values()) <= 2, "even shares"


def test_words_come_from_the_tokens_of_a_gguf_file(tmp_path, monkeypatch):
    monkeypatch.setenv("EVE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(english, "asset_folder", lambda name: tmp_path)
    writer = gguf.GGUFWriter(tmp_path / "tokens.gguf", "llama")
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(["<s>", "Ġthe", "the", "ĠTown", "Ġa", "Ġwindow", "Ġx1", "Ġé", "Ġof"])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    assert english.english_words("smollm2") == ("the", "window", "of")
    (tmp_path / "tokens.gguf").unlink()
    assert english.english_words("smollm2") == ("the", "window", "of")  # kept


def test_a_dictionary_that_is_not_there_says_how_to_fetch_it(tmp_path, monkeypatch):
    monkeypatch.setenv("EVE_CACHE", str(tmp_path))
    with pytest.raises(ValueError, match="eve assets fetch smollm2"):
        make(what="words", size=5, dictionary="smollm2")
    with pytest.raises(ValueError, match="'noto', which holds no words"):
        make(what="words", size=5, dictionary="noto")


# --- documents and charts -------------------------------------------------------------------------


def test_no_page_or_chart_of_a_task_is_trained_on():
    """Neither layouts nor names: the words of held-out lists that training lists lack."""
    lists = VOCABULARY["held_out"]
    names = {*lists.first_names, *lists.last_names, *lists.towns, *lists.goods, *lists.events}
    pages = make(what="documents", size=300).records
    for index in range(300):
        said = "\n".join(text.words for text in pages.layout(index).texts)
        found = {name for name in names if re.search(rf"\b{re.escape(name)}\b", said)}
        assert not found, found
    charts = make(what="charts", size=300).records
    kept = {name for items in lists.categories.values() for name in items} | set(lists.series)
    for index in range(300):
        drawn = charts.layout(index)
        assert not kept & {*drawn.categories, *drawn.series} and drawn.theme not in lists.themes


def test_documents_ask_for_what_they_say():
    """Up to four questions, each with an answer that stands on the page or is a part of one."""
    pages = make(what="documents", size=60, questions=4)
    firsts = set()
    for index in range(60):
        said = [text.words for text in pages.records.layout(index).texts]
        pairs = pairs_of(pages[index])
        assert len(pairs) == 4 and len({question for question, _ in pairs}) == 4
        for question, answer in pairs:
            assert any(answer in line for line in said), (question, answer)
        firsts.add(pairs[0][0])
    assert len(firsts) > 20  # any question comes first at times


def test_transcripts_begin_at_the_top_and_are_captions():
    pages = make(what="documents", size=40, families={"transcript": 1})
    for index in range(40):
        record, texts = pages[index], pages.records.layout(index).texts
        ((question, answer),) = pairs_of(record)
        assert question == "" and record.format == "plain"
        top = min(texts, key=lambda text: (text.base, text.x))
        assert answer.startswith(top.words) and 1 < answer.count("\n") + 1 <= 8
        words = Counter(answer.split())
        assert not words - Counter(" ".join(text.words for text in texts).split())


def test_a_chart_transcript_holds_every_value():
    charts = make(what="charts", size=24).records
    for index in range(24):
        drawn = charts.layout(index)
        text = source.chart_transcript(drawn)
        assert text.startswith(drawn.theme.title + "\n")
        for values in drawn.values:
            for name, value in zip(drawn.categories, values, strict=True):
                assert re.search(rf"\b{name} {value:g}\b", text), (name, value, text)


def test_families_come_in_their_shares():
    pages = make(what="documents", size=40, families={"questions": 3, "transcript": 1})
    kinds = Counter(pages[index].family for index in range(40))
    assert kinds.keys() == {"document", "document_transcript"}
    assert 20 <= kinds["document"] <= 38  # 30 expected; a draw for each, 3 standard deviations


@pytest.mark.parametrize(
    ("what", "draw"), [("documents", draw_page), ("charts", draw_chart)], ids=["pages", "charts"]
)
def test_kept_pictures_are_those_that_are_drawn(what, draw, tmp_path, monkeypatch):
    """Bit for bit: drawn, kept, and drawn again after what was kept was damaged."""
    pytest.importorskip("matplotlib", reason="needs the extra demo")
    monkeypatch.setenv("EVE_CACHE", str(tmp_path))
    records = make(what=what, size=3)
    whole = np.asarray(draw(records.records.layout(1)))
    for _ in range(2):
        assert np.array_equal(np.asarray(records[1].images[0]), whole)
    (file,) = (tmp_path / "rendered").rglob("*.png")
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    assert np.array_equal(np.asarray(records[1].images[0]), whole)
    with Image.open(file) as kept:
        assert np.array_equal(np.asarray(kept), whole)


# --- the source -----------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["words", "documents"])
def test_records_depend_on_number_and_seed_alone(what):
    first, second = make(what=what, size=30), make(what=what, size=30)
    other = make(what=what, size=30, seed=4)
    texts, changed = [], 0
    for index in range(30):
        texts.append(first[index].messages)
        changed += texts[-1] != other[index].messages
    for index in reversed(range(30)):
        record = second[index]
        assert record.messages == texts[index]
        assert np.array_equal(np.asarray(record.images[0]), np.asarray(first[index].images[0]))
    assert changed > 20
    with pytest.raises(IndexError):
        first[30]


def test_a_recipe_line_gives_the_source():
    made = build_source(
        "rendered", path=None, options={"what": "words", "size": 5}, seed=1, name="words"
    )
    assert len(made) == 5 and made[2].source == "words"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"size": 5}, "what is None"),
        ({"what": "books", "size": 5}, "'books'"),
        ({"what": "words"}, "size must be a whole number"),
        ({"what": "words", "size": 0}, "but it is 0"),
        ({"what": "words", "size": 5, "split": "test"}, "split is 'test'"),
        ({"what": "words", "size": 5, "questions": 2}, "questions, which rendered words"),
        ({"what": "words", "size": 5, "groups": {"tall": 1}}, "groups must give"),
        ({"what": "words", "size": 5, "families": {"word": 0}}, "families must give"),
        ({"what": "documents", "size": 5, "families": ["questions"]}, "families must give"),
        ({"what": "documents", "size": 5, "questions": "all"}, "questions must be"),
        ({"what": "charts", "size": 5, "dictionary": "smollm2"}, "dictionary, which rendered"),
    ],
)
def test_options_that_do_not_fit_are_refused(options, said):
    with pytest.raises(ValueError, match=said):
        RenderedSource.from_options(options, seed=1)
