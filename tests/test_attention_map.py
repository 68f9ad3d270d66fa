"""Attention maps: a planted gaze is found, rows equal the full square, gradients equal differences.

The planted model is set by hand to look at the brightest cell with one head of one layer; where
that cell lies in the original picture is worked out here, by counting, not by the code under test.
One thing a reader would get wrong: the library's eager softmax rounds to float32 even in a float64
model, so two ways to the same weight agree to 1e-6 and not to 1e-15.
"""

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
import typer
from PIL import Image
from transformers.models.llama import modeling_llama
from typer.testing import CliRunner

import golden_files as golden
import tiny
from eve_vlm import EveConfig, EveVisionConfig
from eve_vlm.cli.looking_where import look as look_command
from eve_vlm.patch_embedding_eve import PackedGrid
from eve_vlm.processing_eve import VICUNA_CHAT_TEMPLATE
from eve_vlm.published_tokenizer_eve import published_tokenizer
from eve_vlm.serve.engine import EveEngine, user_message
from eve_vlm.serve.looking import attention_rows
from eve_vlm.serve.looking.answer_words import tokens_of, words_of
from eve_vlm.serve.looking.attention_map import AttentionMaps, Word, attention_maps, look
from eve_vlm.serve.looking.attention_picture import (
    cell_box,
    colour_scale,
    draw_map,
    overlay,
    save_map,
)
from oracle.geometry import cover
from small_decoders import FAMILIES, words
from tiny import refused

SAME = 1e-6  # of weights up to 1; float32 softmax inside
ANSWER = "there is a small blue ball"
CELL = tiny.PATCH * tiny.MERGE

# --- a planted gaze -------------------------------------------------------------------------------

LAYER, HEAD = 1, 2  # the one that looks at the brightest cell
# Largest width, and the multiple that shorter sides are rounded up to; 12 leaves strips unseen.
SETTINGS = ((64, 8), (60, 12))


def planted_model():
    """A Llama of two layers whose states are the input: brightness, a constant 1, nothing else.

    Keys read the brightness, queries are constant (a bias).  Both use the slowest rotary pair at a
    base of 1e9, which turns by 2e-5 over the longest prompt here, so position does not matter.
    Words have no state at all, hence score 0; so have class and row-end tokens, whose brightness is
    0, between dark (-1.8) and bright (2.0) cells.
    """
    model = tiny.model(
        EveConfig(
            text_config=tiny.config(
                num_hidden_layers=2,
                attention_bias=True,
                rope_parameters={"rope_type": "default", "rope_theta": 1e9},
            ).text_config.to_dict(),
            vision_config=EveVisionConfig(
                patch_size=tiny.PATCH,
                merge_size=tiny.MERGE,
                hidden_size=tiny.VISION_WIDTH,
                num_attention_heads=8,
            ),
            projector_depth=1,
            image_token_id=3,
        )
    )
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.fill_(1.0 if name.endswith("norm.weight") else 0.0)
        model.model.vision_tower.patch_projection.weight[0] = 1 / (3 * tiny.PATCH**2)
        projector = model.model.multi_modal_projector.linear_1
        projector.weight[0, 0], projector.bias[1] = 1.0, 1.0
        for number, layer in enumerate(model.model.language_model.layers):
            slowest = slice(3, None, 8)  # element 3 of each head, paired with element 7
            layer.self_attn.k_proj.weight[slowest, 0] = 1.0
            layer.self_attn.q_proj.bias[slowest] = -4.0  # every other head looks away
            if number == LAYER:
                layer.self_attn.q_proj.bias[HEAD * 8 + 3] = 4.0
    return model


@pytest.fixture(scope="module")
def planted():
    """Engines of the planted model, one for each of `SETTINGS`."""
    model = planted_model()
    return [EveEngine(model, tiny.processor(edge=edge, multiple=unit)) for edge, unit in SETTINGS]


class Spot:
    """A dark noisy picture of random size; with a place, one cell of it is white."""

    def __init__(self, rng, settings):
        edge, unit = settings
        short = rng.randint(30, 90)
        long = int(short * rng.choice([1, 1.1, 1.5, 2, 3.3, 5]))
        self.width, self.height = rng.choice([(long, short), (short, long)])
        covered = cover(edge, min(self.width, self.height), max(self.width, self.height), unit)
        resized = (edge, covered * unit) if self.width > self.height else (covered * unit, edge)
        self.across = CELL * self.width / resized[0]  # original pixels of a cell
        self.down = CELL * self.height / resized[1]
        self.rows, self.cols = resized[1] // CELL, resized[0] // CELL
        noise = np.random.default_rng(rng.randrange(2**31))
        self.pixels = noise.integers(0, 40, (self.height, self.width, 3), dtype=np.uint8)
        self.row, self.col = rng.randrange(self.rows), rng.randrange(self.cols)

    @property
    def box(self):
        left, top = self.col * self.across, self.row * self.down
        return tuple(map(round, (left, top, left + self.across, top + self.down)))

    def picture(self, *, lit=True):
        if lit:
            left, top, right, bottom = self.box
            self.pixels[top:bottom, left:right] = 255
        return Image.fromarray(self.pixels)


def hottest(picture, heat, pictures):
    """Booleans (height, width): where the overlay is brightest compared with one without heat."""
    hot = np.asarray(overlay(picture, heat, pictures=pictures), np.int32)
    cold = np.asarray(overlay(picture, 0 * heat, pictures=pictures, top=1.0), np.int32)
    gained = (hot - cold).sum(-1)
    return gained >= gained.max() - 6  # blending rounds each of three channels twice


@pytest.mark.parametrize("seed", range(40))
def test_a_planted_gaze_is_found(planted, seed):
    """Random shapes, sizes and cells, one or two pictures, words before and between them."""
    rng = random.Random(seed)
    which = seed % 2
    engine, settings = planted[which], SETTINGS[which]
    spots = [Spot(rng, settings) for _ in range(rng.choice([1, 1, 2]))]
    lit = rng.randrange(len(spots))
    images = [spot.picture(lit=place == lit) for place, spot in enumerate(spots)]
    before = rng.choices(tiny.QUESTIONS, k=len(spots))
    question = "".join(f"{text if rng.random() < 0.7 else ''}<image>" for text in before) + " Why?"
    maps = look(engine, user_message(question, images), answer=ANSWER)
    assert maps.grids == tuple((spot.rows, spot.cols) for spot in spots)
    spot, picture = spots[lit], images[lit]
    for word in (None, *range(len(maps.words))):
        best = maps.strongest(word, layer=LAYER, head=HEAD)
        assert (best.picture, best.row, best.col) == (lit, spot.row, spot.col)
        assert best.weight > 0.5 and maps.shares(word, layer=LAYER, head=HEAD).cells > 0.5
    heat = maps.map(0, layer=LAYER, head=HEAD, picture=lit)
    left, top, right, bottom = spot.box
    assert cell_box(
        picture, spot.row, spot.col, shape=heat.shape, pictures=engine.processor.image_processor
    ) == (left, top, right, bottom)
    drawn = overlay(picture, heat, pictures=engine.processor.image_processor)
    assert drawn.size == picture.size
    # Exactly the cell's pixels; its borders are rounded, so they may be one pixel off.
    hot = hottest(picture, heat, engine.processor.image_processor)
    assert hot[top + 1 : bottom - 1, left + 1 : right - 1].all()
    hot[max(top - 1, 0) : bottom + 1, max(left - 1, 0) : right + 1] = False
    assert not hot.any()


@pytest.mark.parametrize("seed", range(6))
def test_only_the_planted_head_looks_there(planted, seed):
    rng = random.Random(seed)
    engine, settings = planted[0], SETTINGS[0]
    spot = Spot(rng, settings)
    maps = look(engine, user_message("Where is it?", [spot.picture()]), answer=ANSWER)
    for layer in range(2):
        for head in range(4):
            heat = maps.map(layer=layer, head=head)
            if (layer, head) == (LAYER, HEAD):
                assert np.unravel_index(heat.argmax(), heat.shape) == (spot.row, spot.col)
            else:
                assert heat[spot.row, spot.col] == heat.min() < 0.001
    # Selections that hold the head find it, those that do not do not.
    here = (spot.row, spot.col)
    for layers, heads in ((None, None), (LAYER, None), ([0, LAYER], [1, HEAD]), (None, HEAD)):
        heat = maps.map(layer=layers, head=heads)
        assert np.unravel_index(heat.argmax(), heat.shape) == here
    for layers, heads in ((0, None), (LAYER, [0, 1, 3]), ([0], [HEAD])):
        heat = maps.map(layer=layers, head=heads)
        assert np.unravel_index(heat.argmax(), heat.shape) != here


# --- the same rows as the full square -------------------------------------------------------------


def decoder_model(kind, **change):
    """A tiny float64 EVE model around a decoder of the family."""
    settings = dict(FAMILIES[kind][0])
    if "layer_types" in settings:
        settings["num_hidden_layers"] = len(settings["layer_types"])
    return tiny.model(tiny.config(model_type=kind, **settings, **change)).double()


def prompt(grids=((3, 4), (2, 1)), *, seed=0):
    """Words, pictures and words, longer than the windows of 16; and an answer of eight tokens."""
    generator = torch.Generator().manual_seed(seed)

    def some(count):
        return torch.randint(10, 256, (count,), generator=generator).tolist()

    ids = [1, *some(2)]
    for rows, cols in grids:
        ids += [3] * (1 + rows * (cols + 1)) + some(2)
    inputs = {"input_ids": torch.tensor([ids])} | tiny.packed(list(grids), seed=seed)
    return inputs, some(8)


def full_rows(model, inputs, answer):
    """(layers, heads, answer tokens, positions) from one forward pass that keeps every square."""
    ids = torch.cat([inputs["input_ids"], torch.tensor([answer[:-1]])], 1)
    pixels = {name: inputs[name] for name in ("pixel_values", "image_grid_thw")}
    decoder = model.model.language_model
    decoder.set_attn_implementation("eager")
    with torch.no_grad():
        attentions = model(input_ids=ids, output_attentions=True, **pixels).attentions
    decoder.set_attn_implementation("sdpa")
    return torch.stack([one[0] for one in attentions])[:, :, inputs["input_ids"].shape[1] - 1 :]


@pytest.mark.parametrize("kind", FAMILIES)
def test_rows_equal_those_of_the_full_square(kind):
    model = decoder_model(kind)
    inputs, answer = prompt()
    maps = attention_maps(model, inputs, answer, tokenizer=tiny.tokenizer())
    rows = full_rows(model, inputs, answer).numpy()
    is_picture = np.zeros(rows.shape[-1], bool)
    is_picture[: inputs["input_ids"].shape[1]] = inputs["input_ids"][0].numpy() == 3
    np.testing.assert_allclose(maps.weights, rows[..., is_picture], rtol=0, atol=SAME)
    np.testing.assert_allclose(maps.text, rows[..., ~is_picture].sum(-1), rtol=0, atol=SAME)
    assert maps.weights.dtype == np.float32 and maps.weights.std() > 0.005
    # Places of cells against the model's own packing.
    grid = PackedGrid.from_grid_thw(inputs["image_grid_thw"], tiny.MERGE)
    cells = np.concatenate([maps.cell_tokens(picture).ravel() for picture in range(2)])
    assert cells.tolist() == grid.cell_position.tolist()
    first = rows[1, 3][:, is_picture][:, maps.cell_tokens(1)]
    one = maps.words[0].tokens
    np.testing.assert_allclose(
        maps.map(0, layer=1, head=3, picture=1), first[list(one)].mean(0), rtol=0, atol=SAME
    )


def test_windows_reach_no_further():
    """A window of 16 positions leaves out the first picture; a full layer does not."""
    maps = attention_maps(decoder_model("gemma3_text"), *prompt(), tokenizer=tiny.tokenizer())
    last = maps.words[-1].tokens[-1]
    first_picture = maps.cell_tokens(0)
    assert (maps.weights[0, :, last, first_picture] == 0).all()
    assert (maps.weights[1, :, last, first_picture] > 0).any()


@pytest.mark.parametrize("method", ["attention", "gradient"])
def test_averages_and_selections_equal_those_of_everything(method):
    model, (inputs, answer) = decoder_model("llama"), prompt()

    def made(**settings):
        return attention_maps(
            model, inputs, answer, tokenizer=tiny.tokenizer(), method=method, **settings
        )

    whole = made()
    scale = whole.weights.max()
    for layers, heads in ((None, None), ([2, 0], None), (1, [3, 1]), (None, 2)):
        both = made(layers=layers, heads=heads, average=("layers", "heads"))
        assert both.weights.shape[:2] == (1, 1)
        some = made(layers=layers, heads=heads, average=("heads",))
        assert some.weights.shape[1] == 1
        for word in (None, 0):
            expected = whole.map(word, layer=layers, head=heads)
            for maps in (both, some, made(layers=layers, heads=heads)):
                found = maps.map(word)
                np.testing.assert_allclose(found, expected, rtol=0, atol=SAME * scale)
                np.testing.assert_allclose(
                    maps.shares(word)[:4],
                    whole.shares(word, layer=layers, head=heads)[:4],
                    rtol=0,
                    atol=1e-5,  # float32 sums of some 30 numbers, divided by their total
                )
    assert "averaged" in refused(lambda: both.map(layer=0), end=".")
    assert made(layers=[2, 0]).layers == (2, 0)
    np.testing.assert_array_equal(made(layers=[2, 0]).map(layer=2), made(layers=2).map())


@pytest.mark.parametrize("method", ["attention", "gradient"])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma3_text"])
def test_shares_sum_to_one(kind, method):
    inputs, answer = prompt()
    maps = attention_maps(
        decoder_model(kind), inputs, answer, tokenizer=tiny.tokenizer(), method=method
    )
    for word in (None, *range(len(maps.words))):
        for layer, head in ((None, None), (1, 0), (0, [1, 2])):
            shares = maps.shares(word, layer=layer, head=head)
            assert sum(shares[:4]) == pytest.approx(1, abs=1e-9)  # float64 sums
            assert min(shares[:4]) >= 0 and sum(shares.by_picture) == pytest.approx(shares.cells)
    if method == "attention":
        # Each part by the names of its positions, counted one by one.
        weights = maps.weights.mean((0, 1, 2), dtype=np.float64)
        kinds = ["class"]
        for _ in range(3):
            kinds += ["cell"] * 4 + ["end"]
        kinds += ["class", "cell", "end", "cell", "end"]
        shares = maps.shares()
        # All eight tokens are in words here, so the answer's shares are those of all rows.
        assert sum(len(word.tokens) for word in maps.words) == 8
        for part, kind in zip(shares[:3], ("cell", "class", "end"), strict=True):
            told = sum(weight for weight, one in zip(weights, kinds, strict=True) if one == kind)
            assert part == pytest.approx(told, abs=SAME)


def test_many_small_blocks_equal_one_large(monkeypatch):
    model, (inputs, answer) = decoder_model("mistral"), prompt()
    whole = attention_maps(model, inputs, answer, tokenizer=tiny.tokenizer())
    for size in (1, 3 * 4 * 3 * 4 * (inputs["input_ids"].shape[1] + 7)):  # one row, three rows
        monkeypatch.setattr(attention_rows, "BLOCK_BYTES", size)
        parts = attention_maps(model, inputs, answer, tokenizer=tiny.tokenizer())
        np.testing.assert_allclose(parts.weights, whole.weights, rtol=0, atol=SAME)


# --- gradients ------------------------------------------------------------------------------------


def norm(self, hidden):
    """RMS norm in the dtype given; the library's rounds to float32, too coarse for differences."""
    return self.weight * hidden * (hidden.pow(2).mean(-1, keepdim=True) + 1e-6).rsqrt()


def told_with(model, inputs, answer, monkeypatch, layer, head, token, column, change):
    """log p of one answer token when one attention weight of the full square is changed."""
    length = inputs["input_ids"].shape[1]

    def attend(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
        key = key.repeat_interleave(module.num_key_value_groups, 1)
        value = value.repeat_interleave(module.num_key_value_groups, 1)
        scores = query @ key.transpose(2, 3) * scaling
        hidden = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
        weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
        if module.layer_idx == layer:
            weights[0, head, length - 1 + token, column] += change
        return (weights @ value).transpose(1, 2).contiguous(), weights

    with monkeypatch.context() as patch, torch.no_grad():
        patch.setattr(modeling_llama, "eager_attention_forward", attend)
        model.model.language_model.set_attn_implementation("eager")
        ids = torch.cat([inputs["input_ids"], torch.tensor([answer[:-1]])], 1)
        pixels = {name: inputs[name] for name in ("pixel_values", "image_grid_thw")}
        logits = model(input_ids=ids, **pixels).logits
        model.model.language_model.set_attn_implementation("sdpa")
    return float(logits[0, length - 1 + token].log_softmax(-1)[answer[token]])


def test_gradients_equal_finite_differences(monkeypatch):
    """A x dlogp/dA of a token's own row, by changing that weight in a full pass in float64."""
    monkeypatch.setattr(modeling_llama.LlamaRMSNorm, "forward", norm)
    model, (inputs, answer) = decoder_model("llama"), prompt()
    maps = attention_maps(model, inputs, answer, tokenizer=tiny.tokenizer(), method="gradient")
    rows = full_rows(model, inputs, answer).numpy()
    columns = np.flatnonzero(inputs["input_ids"][0].numpy() == 3)
    rng, step, positive = random.Random(0), 1e-4, 0
    assert (maps.weights >= 0).all()
    for _ in range(60):
        layer, head = rng.randrange(3), rng.randrange(4)
        token, place = rng.randrange(8), rng.randrange(len(columns))
        around = [
            told_with(
                *(model, inputs, answer, monkeypatch, layer, head, token, columns[place], change)
            )
            for change in (step, -step)
        ]
        slope = (around[0] - around[1]) / (2 * step)
        expected = max(0.0, rows[layer, head, token, columns[place]] * slope)
        # Attention is right to 1e-7 (float32 softmax), slopes are up to about 10.
        assert maps.weights[layer, head, token, place] == pytest.approx(expected, abs=SAME)
        positive += expected > 1e-3
    assert positive > 10  # it was not all zero


def test_gradients_need_no_trainable_weights_and_leave_none():
    model, (inputs, answer) = tiny.model(), prompt()
    given = {"tokenizer": tiny.tokenizer(), "method": "gradient"}
    expected = attention_maps(model, inputs, answer, **given).weights
    assert all(weight.grad is None and weight.requires_grad for weight in model.parameters())
    frozen = model.requires_grad_(False)
    np.testing.assert_array_equal(attention_maps(frozen, inputs, answer, **given).weights, expected)
    for mode in (torch.inference_mode, torch.no_grad):
        with mode():
            inside = attention_maps(frozen, inputs, answer, **given).weights
        np.testing.assert_array_equal(inside, expected)


# --- the model afterwards -------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["sdpa", "eager"])
def test_the_model_answers_the_same_afterwards(kind, monkeypatch):
    model = tiny.model(attn_implementation=kind)
    inputs, answer = prompt()

    def state():
        kinds = [part.config._attn_implementation for part in (model, model.model.language_model)]
        with torch.no_grad():
            return kinds, model(**inputs).logits

    before = state()
    for method in ("attention", "gradient"):
        attention_maps(model, inputs, answer, tokenizer=tiny.tokenizer(), method=method)
        after = state()
        assert after[0] == before[0] and torch.equal(after[1], before[1])

    def broken(*args, **kwargs):
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(model.lm_head, "forward", broken)
        with pytest.raises(RuntimeError, match="out of memory"):
            attention_maps(model, inputs, answer, tokenizer=tiny.tokenizer())
    after = state()
    assert after[0] == before[0] and torch.equal(after[1], before[1])


def test_the_engine_answers_the_same_afterwards():
    engine = EveEngine(tiny.model(), tiny.processor())
    messages = user_message("What is this?", [tiny.picture(20, 32)])
    before = engine.answer([messages], max_new_tokens=8)[0].token_ids
    maps = look(engine, messages, max_new_tokens=8)
    assert maps.weights.shape[2] == len(before)
    assert engine.answer([messages], max_new_tokens=8)[0].token_ids == before


# --- words ----------------------------------------------------------------------------------------

TEXTS = (
    "a red square",
    "there is a small blue ball below the green box",
    "Größe: 3 × 4 m², naïve café",  # noqa: RUF001
    "两只猫 on a mat",
    "one\n two\n\nthree  four\t five",
    "a 🐈‍⬛ sits",
    "word",
    "x" * 40,
)


def tokenizers():
    vicuna = published_tokenizer(
        golden.FOLDER / "tokenizer" / "tokenizer.model", chat_template=VICUNA_CHAT_TEMPLATE
    )
    return [tiny.tokenizer(), words(template=None, more=("<unused>",)), vicuna]


@pytest.mark.parametrize("which", range(3))
@pytest.mark.parametrize("text", TEXTS)
def test_words_are_the_text_cut_at_blanks(which, text):
    tokenizer = tokenizers()[which]
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    found = words_of(tokenizer, [*ids, tokenizer.eos_token_id])
    whole = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    assert "".join(word.text for word in found) == whole
    assert [word.text.split() for word in found] == [[one] for one in text.split()]
    # Every token but the end in one word, in order.
    assert [place for word in found for place in word.tokens] == list(range(len(ids)))


def test_words_of_odd_tokens():
    tokenizer = tiny.tokenizer()
    blank, red = (
        tokenizer.convert_tokens_to_ids("Ġ"),
        tokenizer(" red", add_special_tokens=False)["input_ids"],
    )
    # A blank of its own belongs to what follows it, or to the last word at the end.
    assert words_of(tokenizer, [blank, *red]) == (Word("  red", tuple(range(len(red) + 1))),)
    assert words_of(tokenizer, [*red, blank]) == (Word(" red ", tuple(range(len(red) + 1))),)
    assert words_of(tokenizer, [blank]) == words_of(tokenizer, []) == ()
    assert words_of(tokenizer, [1, 2, 0, 3]) == ()
    # Special tokens in the middle are in no word.
    assert words_of(tokenizer, [*red, 2, *red])[1].tokens[0] == len(red) + 1
    # Bytes that never become a letter stay where they are.
    half = tokenizer.convert_tokens_to_ids("Ã")
    assert words_of(tokenizer, [*red, half])[0].tokens == tuple(range(len(red) + 1))
    assert words_of(tokenizer, [half]) == (Word("\N{REPLACEMENT CHARACTER}", (0,)),)


@pytest.mark.parametrize("which", range(3))
def test_a_given_answer_has_the_tokens_of_training(which):
    """Those that the tokenizer makes of the whole conversation, behind the prompt's."""
    tokenizer = tokenizers()[which]
    template = tokenizer.chat_template or FAMILIES["llama"][4]
    processor = tiny.processor()
    if which:
        if which == 1:
            tokenizer.add_tokens(["<image>"], special_tokens=True)
        processor = type(processor)(
            processor.image_processor, tokenizer, chat_template=template, image_token="<image>"
        )
    messages = [{"role": "user", "content": "What is this?"}]
    said = [*messages, {"role": "assistant", "content": "a red square"}]
    settings = {"chat_template": processor.chat_template, "tokenize": False}
    before = tokenizer.apply_chat_template(messages, add_generation_prompt=True, **settings)
    whole = tokenizer.apply_chat_template(said, **settings)
    all_ids = tokenizer(whole, add_special_tokens=False)["input_ids"]
    head = tokenizer(before, add_special_tokens=False)["input_ids"]
    ids = tokens_of(processor, messages, " a red square\n")
    assert tokenizer.decode(ids).strip() == "a red square"
    assert all_ids[: len(head) + len(ids)] == head + ids
    assert all_ids[len(head) + len(ids)] in [*tokenizer.all_special_ids, 4]
    for text in ("a <image>", f"a {tokenizer.eos_token} b"):
        assert "no text" in refused(lambda text=text: tokens_of(processor, messages, text), end=".")


def test_words_by_text_or_number():
    engine = EveEngine(tiny.model(), tiny.processor())
    messages = user_message("What is this?", [tiny.picture(20, 32)])
    maps = look(engine, messages, answer="a red square, a ball.")
    assert [maps.find(one) for one in (0, "red", "square,", "square", "ball", "ball.")] == [
        *(0, 1, 2, 2, 4, 4)
    ]
    np.testing.assert_array_equal(maps.map("red"), maps.map(1))
    assert maps.answer == "a red square, a ball."
    assert "2 times" in refused(lambda: maps.find("a"), end=".")


# --- refusals -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def some_maps():
    inputs, answer = prompt()
    return attention_maps(tiny.model(), inputs, answer, tokenizer=tiny.tokenizer())


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"word": "zebra"}, "no word 'zebra'"),
        ({"word": 99}, "no word 99"),
        ({"word": -1}, "no word -1"),
        ({"layer": 3}, "there are 3, from 0 to 2"),
        ({"layer": [0, 7, -1]}, "(7, -1)"),
        ({"layer": []}, "(none)"),
        ({"head": 4}, "heads"),
        ({"picture": 2}, "no picture 2"),
        ({"picture": -1}, "no picture -1"),
    ],
)
def test_what_a_map_does_not_have_is_refused(some_maps, asked, said):
    assert said in refused(lambda: some_maps.map(**asked), end=".")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"answer": []}, "has no words"),
        ({"answer": [2]}, "has no words"),
        ({"answer": [20, 3]}, "token 3"),
        ({"answer": [20, 300]}, "token 300"),
        ({"answer": [20] * 500}, "512"),
        ({"method": "rollout"}, "'rollout'"),
        ({"average": "heads"}, "'heads'"),
        ({"layers": 3}, "layers"),
        ({"heads": [0, 9]}, "(9)"),
        ({"input_ids": torch.tensor([[1, 20, 30]])}, "no picture"),
        ({"input_ids": torch.ones(2, 9, dtype=torch.long)}, "one bare prompt"),
        ({"attention_mask": torch.tensor([[0, 1]])}, "padded"),
        ({"image_grid_thw": None}, "no picture"),
    ],
)
def test_what_gives_no_map_is_refused(change, said):
    inputs, answer = prompt()
    model, answer = tiny.model(), change.pop("answer", answer)
    settings = {
        key: change.pop(key) for key in ("method", "average", "layers", "heads") if key in change
    }
    inputs = inputs | change
    text = refused(
        lambda: attention_maps(model, inputs, answer, tokenizer=tiny.tokenizer(), **settings),
        end=".",
    )
    assert said in text


def test_prompts_and_models_that_give_no_map_are_refused():
    inputs, answer = prompt()

    def made(model, inputs):
        return refused(
            lambda: attention_maps(model, inputs, answer, tokenizer=tiny.tokenizer()), end="."
        )

    assert "training mode" in made(tiny.model().train(), inputs)
    cut = inputs | {"input_ids": inputs["input_ids"][:, :-2]}
    assert "ends in a picture" in made(tiny.model(), cut)
    odd = tiny.model()
    odd.config.text_config.layer_types = ["full_attention", "linear_attention", "full_attention"]
    assert "linear_attention" in made(odd, inputs)


def test_attention_that_is_not_whole_is_refused(monkeypatch):
    """As in decoders that attend to a learned sink too, or that do not tell their weights."""
    plain = modeling_llama.eager_attention_forward
    for change, said in (
        (lambda one: 0.9 * one, "something beside"),
        (lambda one: None, "not tell"),
    ):

        def attend(*args, change=change, **kwargs):
            output, weights = plain(*args, **kwargs)
            return output, change(weights)

        monkeypatch.setattr(modeling_llama, "eager_attention_forward", attend)
        text = refused(
            lambda: attention_maps(tiny.model(), *prompt(), tokenizer=tiny.tokenizer()), end="."
        )
        assert said in text and "llama" in text


# --- drawings -------------------------------------------------------------------------------------


def lightness(colours):
    """CIELAB L* of 8-bit sRGB colours, by its definition."""
    share = np.asarray(colours) / 255
    linear = np.where(share <= 0.04045, share / 12.92, ((share + 0.055) / 1.055) ** 2.4)
    luminance = linear @ [0.2126, 0.7152, 0.0722]
    return 116 * np.cbrt(luminance) - 16  # all are above the linear part near black


def test_the_colours_get_lighter_in_equal_steps():
    light = lightness(colour_scale())
    assert (np.diff(light) > 0).all()
    # 2 of 100, below what the eye sees; from interpolating in sRGB between nine colours.
    assert np.abs(light - np.linspace(8, 92, 256)).max() < 2


def hand_made(pictures=1):
    """Two words, one layer and head, pictures of 2 x 3 cells, weights of two cells."""
    weights = np.zeros((1, 1, 2, 9 * pictures), np.float32)
    weights[..., 0, 1 + 1 * 4 + 2] = 0.5  # first word: row 1, column 2
    weights[..., 1, 1] = 0.25  # second word: row 0, column 0
    return AttentionMaps(
        method="attention",
        weights=weights,
        text=1 - weights.sum(-1),
        words=(Word("one", (0,)), Word(" two", (1,))),
        grids=((2, 3),) * pictures,
        layers=(0,),
        heads=(0,),
        averaged=(),
    )


def count(drawn, level, grey):
    """Pixels of exactly the colour that a level has over a grey."""
    over = Image.new("RGB", (1, 1), (grey,) * 3)
    from eve_vlm.serve.looking.attention_picture import OPACITY

    colour = Image.new("RGB", (1, 1), tuple(colour_scale()[level].tolist()))
    wanted = np.asarray(Image.blend(over, colour, OPACITY))[0, 0]
    return int((np.asarray(drawn) == wanted).all(-1).sum())


def test_all_panels_share_one_scale():
    processor = tiny.processor(edge=24).image_processor
    picture = Image.new("RGB", (90, 60), (90, 90, 90))
    side = 240 // 3  # pixels of a cell in a panel
    drawn = draw_map(hand_made(), [picture], pictures=processor, title="What is this?\nA hat.")
    # The largest weight is 0.5: in the first word's panel; 0.25 is in the second's and, as its
    # mean, in that of the whole answer; so is 0.125.
    assert count(drawn, 255, 90) == side**2
    assert count(drawn, 128, 90) == 2 * side**2
    assert count(drawn, 64, 90) == side**2
    assert count(drawn, 0, 90) == (6 * 3 - 4) * side**2
    second = draw_map(hand_made(), [picture], pictures=processor, words=["two"])
    assert count(second, 255, 90) == 0  # the scale is that of all words, shown or not
    assert count(second, 128, 90) == 2 * side**2


def test_two_pictures_stand_side_by_side():
    processor = tiny.processor(edge=24).image_processor
    greys = [Image.new("RGB", (90, 60), (grey,) * 3) for grey in (90, 60)]
    drawn = draw_map(hand_made(2), greys, pictures=processor)
    assert count(drawn, 255, 90) == 80**2 and count(drawn, 0, 60) == 3 * 6 * 80**2


def test_panels_wrap_and_long_words_fit():
    processor = tiny.processor(edge=24).image_processor
    picture = Image.new("RGB", (90, 60), (90, 90, 90))
    weights = np.full((1, 1, 60, 9), 1 / 18, np.float32)
    maps = AttentionMaps(
        method="gradient",
        weights=weights,
        text=np.full((1, 1, 60), 0.5, np.float32),
        words=tuple(Word(" w" * 1 + "ö" * place, (place,)) for place in range(60)),
        grids=((2, 3),),
        layers=(0, 1, 2),
        heads=(4, 6),
        averaged=("layers", "heads"),
    )
    drawn = draw_map(maps, [picture], pictures=processor, title="long " * 2000)
    assert drawn.width <= 1400 and drawn.height > drawn.width
    assert count(drawn, 255, 90) == 61 * 6 * 80**2


def test_an_overlay_keeps_to_the_pixels(tmp_path):
    """A cell is one flat colour over a flat picture, with sharp borders."""
    processor = tiny.processor(edge=24).image_processor
    picture = Image.new("RGB", (90, 60), (90, 90, 90))
    heat = hand_made().map(0)
    drawn = np.asarray(overlay(picture, heat, pictures=processor))
    assert len(np.unique(drawn[30:, 60:].reshape(-1, 3), axis=0)) == 1
    assert count(drawn, 255, 90) == 30 * 30 and count(drawn, 0, 90) == 5 * 30 * 30
    small = overlay(picture, heat, pictures=processor, longest=45)
    assert small.size == (45, 30) and count(small, 255, 90) == 15 * 15
    half = overlay(picture, heat, pictures=processor, top=1.0)
    assert count(half, 128, 90) == 30 * 30
    assert count(overlay(picture, 0 * heat, pictures=processor), 0, 90) == 90 * 60
    file = save_map(half, tmp_path / "new" / "map.png")
    assert Image.open(file).size == (90, 60)
    assert [one.name for one in file.parent.iterdir()] == ["map.png"]
    assert "PNG" in refused(lambda: save_map(half, tmp_path / "map.jpg"), end=".")


def test_a_request_with_a_budget_is_drawn_with_it():
    engine = EveEngine(tiny.model(), tiny.processor())
    picture, pictures = tiny.picture(32, 20), engine.processor.image_processor
    messages = user_message("What is this?", [picture])
    maps = look(engine, messages, answer=ANSWER, max_image_tokens=10)
    assert maps.weights.shape[-1] <= 10
    assert overlay(picture, maps.map(), pictures=pictures, max_image_tokens=10).size == (20, 32)
    draw_map(maps, [picture], pictures=pictures, max_image_tokens=10)
    assert "budget" in refused(lambda: overlay(picture, maps.map(), pictures=pictures), end=".")
    assert pictures.max_image_tokens is None


def test_drawings_of_other_things_are_refused(some_maps):
    processor = tiny.processor().image_processor
    picture = tiny.picture(24, 32)  # 3 x 4 cells
    message = refused(lambda: draw_map(some_maps, [picture], pictures=processor), end=".")
    assert "2 pictures" in message
    message = refused(lambda: draw_map(some_maps, [picture, picture], pictures=processor), end=".")
    assert "2 x 1" in message
    message = refused(
        lambda: draw_map(
            hand_made(), [Image.new("RGB", (90, 60))], pictures=processor, words=[0] * 200
        )
    )
    assert "too many" in message


# --- the command ----------------------------------------------------------------------------------


@pytest.fixture
def run(saved_model, tmp_path, monkeypatch):
    """Runs `eve look` in a folder with two pictures."""
    monkeypatch.chdir(tmp_path)
    tiny.picture(60, 90).save("cat.png")
    tiny.picture(30, 20).save("dog.png")
    app = typer.Typer(pretty_exceptions_enable=False)
    app.command()(look_command)

    def run(*arguments):
        return CliRunner().invoke(app, [*map(str, arguments), "--model", str(saved_model)])

    return run


def test_the_command_draws_and_tells(run, tmp_path):
    done = run("cat.png", "What is this?", "--answer", "a red square", "--out", "new/map.png")
    assert done.exit_code == 0, done.output
    lines = done.stdout.splitlines()
    assert lines[0] == "a red square"
    assert [line.split()[:2] for line in lines[3:6]] == [["0", "a"], ["1", "red"], ["2", "square"]]
    assert Image.open("new/map.png").width >= 640
    done = run(
        "cat.png", "dog.png", "Which?", "--answer", "a red square", "--word", "red", "--word", 2
    )
    assert done.exit_code == 0 and len(done.stdout.splitlines()) == 7
    assert "picture " in done.stdout and (tmp_path / "map.png").is_file()


def test_the_command_explains_the_models_own_answer(run, saved_model):
    picture = tiny.picture(60, 90)
    expected = EveEngine.from_pretrained(saved_model).ask(
        "What is it?", [picture], max_new_tokens=6
    )
    done = run("cat.png", "What is it?", "--max-new-tokens", 6, "--method", "gradient")
    assert done.exit_code == 0, done.output
    assert done.stdout.startswith(expected + "\n\n")


def test_the_numbers_are_those_of_the_maps(run, saved_model):
    arguments = ("cat.png", "dog.png", "Which?", "--answer", "a red square", "--layer", 1)
    assert run(*arguments, "--numbers", "raw.json").exit_code == 0
    assert run(*arguments, "--numbers", "raw.npz").exit_code == 0
    engine = EveEngine.from_pretrained(saved_model)
    pictures = [tiny.picture(60, 90), tiny.picture(30, 20)]
    maps = look(engine, user_message("Which?", pictures), answer="a red square")
    told = json.loads(Path("raw.json").read_text(encoding="utf-8"))
    assert told["layers"] == [1] and told["question"] == "Which?" and told["method"] == "attention"
    assert [word["text"].strip() for word in told["words"]] == ["a", "red", "square"]
    with np.load("raw.npz") as raw:
        np.testing.assert_allclose(raw["weights"][0], maps.weights[1], rtol=0, atol=SAME)
        for picture in range(2):
            expected = maps.map("red", layer=1, picture=picture)
            found = raw["weights"][:, :, raw["word_of_token"] == 1].mean((0, 1, 2))
            np.testing.assert_allclose(found[raw[f"cells_{picture}"]], expected, rtol=0, atol=SAME)
            np.testing.assert_allclose(
                told["words"][1]["maps"][picture], expected, rtol=0, atol=SAME
            )


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("cat.png", "dog.png"), "no question"),
        (("What is this?",), "no picture"),
        (("cat.png", "What?", "--out", "map.jpg"), ".png"),
        (("cat.png", "What?", "--numbers", "raw.csv"), ".npz"),
        (("cat.png", "What?", "--answer", "a hat", "--word", "shoe"), "no word 'shoe'"),
        (("cat.png", "What?", "--answer", "a hat", "--layer", "9"), "from 0 to 2"),
        (("cat.png", "What?", "--answer", " "), "no words"),
        (("mouse.png", "What?"), "not a file"),
    ],
)
def test_what_the_command_refuses(run, tmp_path, arguments, said):
    done = run(*arguments)
    assert isinstance(done.exception, ValueError) and said in str(done.exception)
    assert "\n" not in str(done.exception)
    assert sorted(one.name for one in tmp_path.iterdir()) == ["cat.png", "dog.png"]


def test_words_of_bytes_that_are_no_letters():
    """A model may say anything; every token of an answer is in a word or special."""
    tokenizer = published_tokenizer(
        golden.FOLDER / "tokenizer" / "tokenizer.json", chat_template=""
    )
    rng = random.Random(0)
    for _ in range(300):
        ids = [rng.randrange(3, 700) for _ in range(rng.randint(1, 20))]
        places = [place for word in words_of(tokenizer, ids) for place in word.tokens]
        assert places == sorted(set(places)) and set(places) <= set(range(len(ids)))
