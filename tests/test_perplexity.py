"""Perplexity of texts beside the decoder as it was: one plain pass over each text is the witness.

The witness reads prompt and answer at once, without cache, batch or padding, in float32; sums over
thirty tokens agree to 1e-4 of the perplexity, a hundred times what rounding does.
"""

import json
import math

import pytest
import torch
from typer.testing import CliRunner

import tiny
from eve_vlm.cli import app
from eve_vlm.eval.perplexity import Talk, plain_english, read_talks, text_perplexity
from eve_vlm.serve.engine import EveEngine

TALKS = [
    Talk([{"role": "user", "content": question}], answer)
    for question, answer in zip(tiny.QUESTIONS, tiny.ANSWERS, strict=True)
]


def witness(model, processor, talks):
    """(sum of surprise, tokens) over the answers with the token that ends each."""
    words, total, number = processor.tokenizer, 0.0, 0
    for talk in talks:
        answer = {"role": "assistant", "content": talk.answer}
        texts = [
            words.apply_chat_template(
                messages,
                chat_template=processor.chat_template,
                tokenize=False,
                add_generation_prompt=prompted,
            )
            for messages, prompted in ((talk.messages, True), ([*talk.messages, answer], False))
        ]
        before, whole = (words(text, add_special_tokens=False)["input_ids"] for text in texts)
        end = whole.index(words.eos_token_id, len(before))
        ids = torch.tensor([whole[: end + 1]])
        with torch.inference_mode():
            logits = model(input_ids=ids).logits[0].double()
        surprise = torch.nn.functional.cross_entropy(
            logits[len(before) - 1 : -1], ids[0, len(before) :], reduction="none"
        )
        total, number = total + float(surprise.sum()), number + len(surprise)
    return total, number


def test_both_perplexities_are_those_of_a_plain_pass(model, processor):
    other = tiny.model(seed=1)
    found = text_perplexity(EveEngine(model, processor), EveEngine(other, processor), TALKS)
    expected = [witness(one, processor, TALKS) for one in (model, other)]
    ours, theirs = (math.exp(total / tokens) for total, tokens in expected)
    assert found.tokens == expected[0][1] and found.model.units == len(TALKS)
    assert found.model.value == pytest.approx(ours, rel=1e-4)
    assert found.base.value == pytest.approx(theirs, rel=1e-4)
    assert found.worse.value == pytest.approx(100 * (ours / theirs - 1), abs=0.02)
    assert found.worse.low <= found.worse.value <= found.worse.high


def test_a_model_beside_itself_is_not_worse(model, processor):
    engine = EveEngine(model, processor)
    found = text_perplexity(engine, engine, TALKS)
    assert (found.worse.low, found.worse.value, found.worse.high) == (0, 0, 0)


def test_the_shipped_texts_are_plain_and_different():
    talks = plain_english()
    assert len(talks) == 24 == len({talk.answer for talk in talks})
    for talk in talks:
        assert talk.answer.isascii() and 30 <= len(talk.answer.split()) <= 70
        assert talk.answer.endswith(".") and talk.messages[0]["content"][-1] in ".?"


def test_conversations_come_from_a_file(tmp_path):
    file = tmp_path / "talk.jsonl"
    turns = [("user", "Hi."), ("assistant", "Hello."), ("user", "And?"), ("assistant", "Fine.")]
    messages = [{"role": role, "content": content} for role, content in turns]
    file.write_text(json.dumps({"id": "1", "messages": messages}), encoding="utf-8")  # no line end
    assert read_talks(file) == [Talk(messages[:3], "Fine.")]
    for line in (
        "not json",
        json.dumps({"text": "a"}),
        json.dumps({"messages": messages[:3]}),
        json.dumps({"messages": [{"role": "user", "content": [{"type": "image"}]}, messages[1]]}),
    ):
        file.write_text(json.dumps({"messages": messages}) + f"\n\n{line}\n", encoding="utf-8")
        with pytest.raises(ValueError, match="line 3: it has no messages"):
            read_talks(file)
    file.write_text("\n", encoding="utf-8")
    with pytest.raises(ValueError, match="holds no conversations"):
        read_talks(file)


def test_the_command_prints_both_and_how_much_worse(saved_model, tmp_path):
    file = tmp_path / "talk.jsonl"
    lines = [
        {"messages": [*talk.messages, {"role": "assistant", "content": talk.answer}]}
        for talk in TALKS
    ]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    given = ["eval", "perplexity", str(saved_model), "--beside", str(saved_model)]
    given += ["--texts", str(file), "--device", "cpu"]
    done = CliRunner().invoke(app, [*given, "--json"], catch_exceptions=False)
    said = json.loads(done.stdout.splitlines()[-1])
    assert said["worse"]["value"] == 0 and said["texts"] == 4 and said["tokens"] > 20
    done = CliRunner().invoke(app, given, catch_exceptions=False)
    assert "worse by  0.00 %  [0.00, 0.00]" in done.stdout
