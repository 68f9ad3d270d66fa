"""Text-only conversations: prompts of two kinds of topics, answers that are the decoder's own.

Greedy answers are compared with a loop of this file, which reads one prompt without padding and
without a cache; a run that was stopped with one that was not, byte for byte.  The decoder is tiny
and random, so its answers are noise with an end now and then, in float32; nothing has a tolerance.
"""

import hashlib
import json
from dataclasses import replace

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

import small_decoders
from eve_vlm.cli import app
from eve_vlm.conversing import ConverseSettings, _whole, converse
from eve_vlm.data import talk_prompts as talk
from eve_vlm.data.sources.build import build_source
from eve_vlm.data.talk_prompts import talk_prompts, topics

SETTINGS = ConverseSettings(number=14, max_new_tokens=40, batch_size=4, seed=3)


@pytest.fixture(scope="module")
def words():
    return small_decoders.words(template=small_decoders.CHATML)


@pytest.fixture(scope="module")
def decoder(words):
    """Its two ends are a little likelier than other tokens, so some answers end; read-only."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(words),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.3,
        tie_word_embeddings=False,
        eos_token_id=words.eos_token_id,
        bos_token_id=None,
        pad_token_id=None,
    )
    model = LlamaForCausalLM(config).eval()
    for end in ("<|im_end|>", "</s>"):
        row = words.convert_tokens_to_ids(end)
        model.lm_head.weight.data[row] *= 1.5
    model.generation_config.eos_token_id = [
        words.convert_tokens_to_ids("<|im_end|>"),
        words.convert_tokens_to_ids("</s>"),
    ]
    return model


def lines(file):
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


# --- prompts --------------------------------------------------------------------------------------


def test_prompts_are_many_different_and_do_not_depend_on_how_many_are_wanted():
    many = talk_prompts(8000)
    assert len(set(many)) == 8000
    assert many[:500] == talk_prompts(500) and many[:500] != talk_prompts(500, seed=1)
    sums = sum(any(sign in prompt for sign in (" plus ", " minus ", " times ")) for prompt in many)
    assert 200 < sums < 8000 / 12  # sums are a twelfth, and three of seven forms say so


def test_no_topic_of_the_held_out_prompts_is_trained_on():
    """The whole of both splits, by the hash restated."""
    train, held_out = (
        set(talk_prompts(n, split=s)) for n, s in ((8000, "train"), (1700, "held_out"))
    )
    assert not train & held_out
    every = {*topics("train"), *topics("held_out")}
    for topic in every:
        digest = hashlib.sha256(f"eve-vlm talk 1 {topic}".encode()).digest()
        assert (digest[0] % 5 == 0) == (topic in topics("held_out"))
    for topic in topics("held_out"):
        assert not {template.format(t=topic) for template in talk.TEMPLATES} & train
    # A fifth of about two hundred; three standard deviations.
    assert abs(len(topics("held_out")) - len(every) / 5) < 18


def test_more_prompts_than_there_are_is_said():
    with pytest.raises(ValueError, match="9000 prompts are wanted, but there are 1 to 8"):
        talk_prompts(9000)


# --- answers --------------------------------------------------------------------------------------


def greedy(decoder, words, prompt, limit):
    """One token after another, each from the whole text before it."""
    text = words.apply_chat_template(
        [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
    )
    ids = words(text, add_special_tokens=False)["input_ids"]
    said = []
    for _ in range(limit):
        with torch.inference_mode():
            best = int(decoder(torch.tensor([ids + said])).logits[0, -1].argmax())
        if words.convert_ids_to_tokens(best) in ("<|im_end|>", "</s>"):
            return words.decode(said, skip_special_tokens=True), True
        said.append(best)
    return words.decode(said, skip_special_tokens=True), False


def test_greedy_answers_are_those_of_a_plain_loop(decoder, words, tmp_path):
    file = tmp_path / "talk.jsonl"
    settings = replace(SETTINGS, temperature=0.0, max_new_tokens=30)
    done = converse(decoder, words, file, settings, name="tiny")
    expected, cut = {}, 0
    for place, prompt in enumerate(talk_prompts(14, seed=3)):
        text, ended = greedy(decoder, words, prompt, 30)
        kept = _whole(text, ended=ended)
        if len(kept) >= 2:
            expected[f"talk-train-3-{place}"] = (prompt, kept)
            cut += not ended
    found = {
        entry["id"]: tuple(message["content"] for message in entry["messages"])
        for entry in lines(file)
    }
    assert found == expected
    assert done == (len(expected), cut, 14 - len(expected)) and 0 < len(expected) < 14


@pytest.mark.parametrize(
    ("text", "ended", "kept"),
    [
        ("It is so. And th", False, "It is so."),
        ('He said "go!" and', False, 'He said "go!"'),
        ("Two things:\n\n1. Bread is good.\n\n2.", False, "Two things:\n\n1. Bread is good."),
        ("no end in sight", False, ""),
        ("  no end in sight ", True, "no end in sight"),
        ("About 3.5 litres (or more.) The", False, "About 3.5 litres (or more.)"),
    ],
)
def test_answers_that_reached_the_limit_end_with_a_sentence(text, ended, kept):
    assert _whole(text, ended=ended) == kept


class Stopped(Exception):
    pass


@pytest.mark.parametrize("left_behind", ["", '{"id": "talk-train-3-99", "mess'])
def test_a_stopped_run_goes_on_to_the_same_file(decoder, words, tmp_path, left_behind):
    """Stopped after two batches of four, with half a line behind them or not."""
    whole, stopped = tmp_path / "whole.jsonl", tmp_path / "stopped.jsonl"
    told = []
    done = converse(decoder, words, whole, SETTINGS, name="tiny", progress=told.append)
    assert told == [0, 4, 4, 4, 2] and 2 < done.written < 14

    def stop(prompts, seen=[]):  # noqa: B006
        seen.append(prompts)
        if len(seen) == 3:
            raise Stopped

    with pytest.raises(Stopped):
        converse(decoder, words, stopped, SETTINGS, name="tiny", progress=stop)
    with stopped.open("a", encoding="utf-8") as out:
        out.write(left_behind)
    torch.manual_seed(99)  # what others draw does not matter
    again = []
    assert converse(decoder, words, stopped, SETTINGS, name="tiny", progress=again.append) == done
    assert again == [8, 4, 2]
    assert stopped.read_bytes() == whole.read_bytes()
    assert converse(decoder, words, stopped, SETTINGS, name="tiny") == done  # nothing is left to do
    assert stopped.read_bytes() == whole.read_bytes()


def test_seeds_draw_other_answers_and_the_random_state_stays(decoder, words, tmp_path):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    answers = []
    for number, seed in enumerate((3, 3, 4)):
        file = tmp_path / f"{number}.jsonl"
        converse(decoder, words, file, replace(SETTINGS, seed=seed), name="tiny")
        answers.append([entry["messages"][1]["content"] for entry in lines(file)])
    assert answers[0] == answers[1] != answers[2]
    assert torch.equal(torch.get_rng_state(), before)


def test_the_file_is_a_data_source_without_pictures(decoder, words, tmp_path):
    file = tmp_path / "talk.jsonl"
    done = converse(decoder, words, file, SETTINGS, name="tiny")
    source = build_source("messages", path=str(file), seed=0)
    assert len(source) == done.written
    for number in range(len(source)):
        record = source[number]
        assert not record.images
        assert [message["role"] for message in record.messages] == ["user", "assistant"]
    note = json.loads((tmp_path / "talk.jsonl.made.json").read_text(encoding="utf-8"))
    assert note["made"]["decoder"] == "tiny" and note["made"]["dtype"] == "float32"
    assert note["made"]["seed"] == 3 and note["state"]["written"] == done.written


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"seed": 4}, r"another seed \(3, now 4\)"),
        ({"batch_size": 5}, r"another batch_size \(4, now 5\)"),
    ],
)
def test_a_file_of_other_settings_is_not_mixed_with_these(decoder, words, tmp_path, change, said):
    file = tmp_path / "talk.jsonl"
    converse(decoder, words, file, replace(SETTINGS, number=4), name="tiny")
    before = file.read_bytes()
    with pytest.raises(ValueError, match=said):
        converse(decoder, words, file, replace(SETTINGS, number=4, **change), name="tiny")
    assert file.read_bytes() == before


def test_files_of_others_and_settings_that_cannot_be_are_refused(decoder, words, tmp_path):
    file = tmp_path / "talk.jsonl"
    file.write_text("mine\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"without talk\.jsonl\.made\.json"):
        converse(decoder, words, file, SETTINGS, name="tiny")
    assert file.read_text(encoding="utf-8") == "mine\n"
    with pytest.raises(ValueError, match="temperature is -1"):
        converse(decoder, words, file, replace(SETTINGS, temperature=-1), name="tiny")
    silent = small_decoders.words(template=None)
    with pytest.raises(ValueError, match="no chat template"):
        converse(decoder, silent, file, SETTINGS, name="tiny")


def test_the_command_answers_with_any_decoder_folder(decoder, words, tmp_path):
    folder, file = tmp_path / "decoder", tmp_path / "talk.jsonl"
    decoder.save_pretrained(folder)
    words.save_pretrained(folder)
    given = ["--decoder", str(folder), "--number", "6", "--max-new-tokens", "60", "--device", "cpu"]
    done = CliRunner().invoke(app, ["data", "converse", str(file), *given], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    assert f"{len(lines(file))} conversations" in done.output
    asked = {entry["messages"][0]["content"] for entry in lines(file)}
    assert asked and asked <= set(talk_prompts(6))
