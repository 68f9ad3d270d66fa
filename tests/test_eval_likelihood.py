"""How likely texts are as answers, against a slow way: one sequence, no cache, all logits, float64.

The slow way renders conversation and answer together, lets the processor make the inputs of the
whole, and takes the tokens between the prompt's and the last end token. Sums are compared within
1e-5 of each other per token: float32 against float64 differed by 2e-6 at most.
"""

import random
from functools import partial

import pytest
import torch

import tiny
from conversations import random_question
from eve_vlm import EveVisionConfig
from eve_vlm.decoders.initialize import initialize
from eve_vlm.processing_eve import VICUNA_CHAT_TEMPLATE
from eve_vlm.serve import scoring
from eve_vlm.serve.engine import EveEngine, TooLongError, picture_parts, user_message
from small_decoders import decoder_folder

refused = partial(tiny.refused, end=".")
PER_TOKEN = 1e-5


@pytest.fixture(scope="module")
def engine():
    return EveEngine(tiny.model(), tiny.processor())


def slowly(engine, messages, text, *, exact):
    """(total without, total with the end token, the ids) of one text, by `exact` in float64."""
    processor = engine.processor
    answer = {"role": "assistant", "content": [{"type": "text", "text": text}]}
    images = [part["image"] for part in picture_parts(messages)] or None

    def inputs(of, **settings):
        rendered = processor.tokenizer.apply_chat_template(
            of, chat_template=processor.chat_template, tokenize=False, **settings
        )
        return processor(
            text=[rendered], images=images, add_special_tokens=False, return_tensors="pt"
        )

    before = inputs(messages, add_generation_prompt=True)["input_ids"].shape[1]
    whole = inputs([*messages, answer])
    ids = whole["input_ids"][0].tolist()
    end = max(place for place, one in enumerate(ids) if one in engine.ends())
    if "pixel_values" in whole:
        whole["pixel_values"] = whole["pixel_values"].double()
    with torch.no_grad():
        logits = exact(**whole).logits[0].log_softmax(-1)
    each = logits[range(end), ids[1 : end + 1]][before - 1 :]
    return float(each[:-1].sum()), float(each.sum()), ids[before:end]


def close(score, total):
    return abs(score.total - total) <= PER_TOKEN * score.tokens


def texts(rng):
    return " ".join(
        rng.choices([*tiny.ANSWERS, "zebra", "7.5 %", "ein Hütchen"], k=rng.randint(1, 3))
    )


# --- against the slow way -------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 3, 32])
def test_totals_are_those_of_the_slow_way_in_order(engine, batch_size):
    rng, exact = random.Random(batch_size), tiny.model().double()
    conversations = [random_question(rng) for _ in range(9)]
    continuations = [texts(rng) for _ in conversations]
    slow = [
        slowly(engine, *one, exact=exact) for one in zip(conversations, continuations, strict=True)
    ]
    settings = {"batch_size": batch_size}
    scores = engine.log_likelihood(conversations, continuations, **settings)
    ended = engine.log_likelihood(conversations, continuations, ends=True, **settings)
    for score, with_end, (total, total_with_end, ids) in zip(scores, ended, slow, strict=True):
        assert score.tokens == len(ids) and close(score, total)
        assert with_end.tokens == len(ids) + 1 and close(with_end, total_with_end)
    assert len({round(total, 2) for total, _, _ in slow}) == len(slow)  # no two are alike


def test_options_of_one_question_share_what_is_read(engine, monkeypatch):
    """Pictures go through the patch embedding once for each conversation, not for each option."""
    rng, exact = random.Random(5), tiny.model().double()
    conversations = [random_question(rng) for _ in range(4)]
    options = ["two", "a red square", "top left", "it is a very long way to the green box"]
    asked = [one for one in conversations for _ in options]
    pictures = []
    seen = engine.model.model.get_image_features
    monkeypatch.setattr(
        engine.model.model,
        "get_image_features",
        lambda pixels, grids: (pictures.append(len(grids)), seen(pixels, grids))[1],
    )
    scores = engine.log_likelihood(asked, options * 4)
    assert sum(pictures) == sum(len(picture_parts(one)) for one in conversations)
    for one, text, score in zip(asked, options * 4, scores, strict=True):
        assert close(score, slowly(engine, one, text, exact=exact)[0])


def test_equal_words_about_other_pictures_are_another_conversation(engine):
    asked = [user_message("What is this?", [tiny.picture(20, 20, seed=seed)]) for seed in (1, 2)]
    together = engine.log_likelihood(asked, ["two", "two"])
    alone = [engine.log_likelihood([one], ["two"])[0] for one in asked]
    assert together[0].total != pytest.approx(together[1].total, abs=1e-2)
    assert [one.total for one in together] == pytest.approx([one.total for one in alone], abs=1e-4)


def test_more_logits_than_fit_are_made_in_chunks(engine, monkeypatch):
    conversations = [random_question(random.Random(3)) for _ in range(4)]
    whole = engine.log_likelihood(conversations, list(tiny.ANSWERS))
    monkeypatch.setattr(scoring, "LOGIT_BYTES", 4 * 300 * 2)  # two rows of 300 words
    parts = engine.log_likelihood(conversations, list(tiny.ANSWERS))
    assert [one.total for one in parts] == pytest.approx([one.total for one in whole], abs=1e-5)
    assert [one[1:] for one in parts] == [one[1:] for one in whole]


# --- tokens at the seam ---------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", ["qwen2", "gemma3_text", "gpt2"])
def test_other_templates_and_decoders(model_type, tmp_path):
    """End tokens that differ from the tokenizer's, line breaks behind them, sliding windows."""
    vision = EveVisionConfig(
        patch_size=tiny.PATCH, merge_size=tiny.MERGE, hidden_size=24, num_attention_heads=4
    )
    decoder = decoder_folder(tmp_path / "decoder", model_type)
    initialize(str(decoder), tmp_path / "model", vision=vision, longest_edge=tiny.EDGE)
    engine = EveEngine.from_pretrained(tmp_path / "model")
    exact = EveEngine.from_pretrained(tmp_path / "model").model.double()
    asked = [
        user_message("What is this?", [tiny.picture(20, 20)]),
        user_message("Where is it?", []),
    ]
    for ends in (False, True):
        scores = engine.log_likelihood(asked, ["two", "a red square"], ends=ends)
        for one, text, score in zip(asked, ["two", "a red square"], scores, strict=True):
            assert close(score, slowly(engine, one, text, exact=exact)[ends])


def test_blanks_around_a_continuation_do_not_count(engine):
    """As harnesses write them: the chat template says what stands in front of an answer."""
    asked = [user_message("What is this?", [tiny.picture(20, 20)])] * 3
    scores = engine.log_likelihood(asked, ["two", " two", "\n two \n"])
    assert scores[0] == scores[1] == scores[2]


def test_a_token_over_the_seam_is_not_used():
    """A prompt that ends with a line break and an answer that begins with one would share a token."""
    words = tiny.tokenizer()
    words.add_tokens(["Q:two"])
    template = "{% for m in messages %}{{ m['content'][0]['text'] }}{% endfor %}"
    template += "{% if add_generation_prompt %}Q:{% endif %}"
    engine = EveEngine(tiny.model(), tiny.processor(chat_template=template))
    engine.processor.tokenizer = words
    asked = user_message("Q:", [])
    # The rendered whole is "Q:two", one token; generation sees "Q:" first.
    assert len(words("Q:two", add_special_tokens=False)["input_ids"]) == 1
    alone = words("two", add_special_tokens=False)["input_ids"]
    assert scoring.continuation_ids(engine, asked, "two") == alone


def test_a_template_that_writes_something_else_behind_its_prompt():
    template = VICUNA_CHAT_TEMPLATE.replace(
        "{{ ' ASSISTANT:' }}{%- endif -%}", "{{ ' ASSISTANT: <think></think>' }}{%- endif -%}"
    )
    assert template != VICUNA_CHAT_TEMPLATE
    engine = EveEngine(tiny.model(), tiny.processor(chat_template=template))
    ids = scoring.continuation_ids(engine, user_message("What?", []), "two")
    assert engine.tokenizer.decode(ids).strip() == "two"


# --- greedy ---------------------------------------------------------------------------------------


def test_greedy_is_what_the_engine_would_say(engine, monkeypatch):
    """For its own tokens, a part of them, and with one of them changed.

    As tokens, because what a random model says is seldom tokenised as it was said.
    """
    rng = random.Random(8)
    conversations = [random_question(rng) for _ in range(20)]
    ids = []
    for answer in engine.answer(conversations, max_new_tokens=4):
        made = answer.token_ids
        changed = [*made[:-1], 40 if made[-1] != 40 else 41]
        ids += [(made, True), (made[:2], True), (changed, False)]
    wanted = iter([one for one, _ in ids])
    monkeypatch.setattr(scoring, "continuation_ids", lambda *_, **__: next(wanted))
    asked = [one for one in conversations for _ in range(3)]
    scores = engine.log_likelihood(asked, ["any"] * len(asked), batch_size=8)
    assert [score.greedy for score in scores] == [greedy for _, greedy in ids]
    assert [score.tokens for score in scores] == [len(one) for one, _ in ids]


def test_what_the_engine_never_says_does_not_hide_the_greedy_answer(engine, monkeypatch):
    """A banned id may be the likeliest; the next one is then the answer, with its own probability."""
    messages = user_message("What is this?", [tiny.picture(20, 20)])
    first = engine.answer([messages], max_new_tokens=1)[0].token_ids[0]
    never = [*engine.never(), first]
    monkeypatch.setattr(engine, "never", lambda: never)
    for word in ("two", "top", "say", "what", "red", "blue"):
        ids = scoring.continuation_ids(engine, messages, word)[:1]
        monkeypatch.setattr(scoring, "continuation_ids", lambda *_, ids=ids, **__: ids)
        [score] = engine.log_likelihood([messages], [word])
        assert score.greedy == (engine.answer([messages], max_new_tokens=1)[0].token_ids == ids)
        monkeypatch.undo()
        monkeypatch.setattr(engine, "never", lambda: never)
    second = engine.answer([messages], max_new_tokens=1)[0].token_ids
    monkeypatch.setattr(scoring, "continuation_ids", lambda *_, **__: second)
    [score] = engine.log_likelihood([messages], ["any"])
    assert score.greedy and second != [first]


# --- refusals -------------------------------------------------------------------------------------


def test_refusals_say_what_to_do(engine, tmp_path):
    asked = [user_message("What is this?", [])]
    assert "is empty" in refused(lambda: engine.log_likelihood(asked, ["  "]))
    assert "image mark" in refused(lambda: engine.log_likelihood(asked, ["<image>"]))
    assert "2 continuations" in refused(lambda: engine.log_likelihood(asked, ["one", "two"]))
    damaged = tmp_path / "damaged.png"
    damaged.write_bytes(b"no picture")
    seen = [user_message("What is this?", [damaged])]
    assert "damaged.png" in refused(lambda: engine.log_likelihood(seen, ["two"]))
    assert engine.log_likelihood([], []) == []


def test_the_longest_continuation_that_fits(engine):
    """512 positions in all; one token more is refused as an answer would be."""
    asked = user_message("What is this?", [tiny.picture(20, 20)])
    room = engine.max_length - len(engine.encode(asked))
    words = "q" * room
    ids = scoring.continuation_ids(engine, asked, words)
    assert len(ids) > 300  # letters that are no word are about one token each
    fitting = words[: len(words) - (len(ids) - room)]
    assert engine.log_likelihood([asked], [fitting])[0].tokens == room
    with pytest.raises(TooLongError, match="answer up to"):
        engine.log_likelihood([asked], [fitting + "q"])
