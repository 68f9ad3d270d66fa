"""`eve init`: new models on tiny decoders of many families, against the bare decoder.

Every family is made with its own class and a tokenizer of its own, saved, turned into an EVE model,
loaded again, trained and asked. Text must be the bare decoder's to the last bit, since the same
operations run in the same order; where a tolerance is given, its reason stands beside it. One thing
a reader would get wrong: the bare decoder is loaded from its folder once more, never shared.
"""

import json
import math
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    CLIPVisionConfig,
    Gemma3Config,
    T5Config,
)
from typer.testing import CliRunner

import tiny
from eve_vlm import EveConfig, EveForPreTraining, EveImageProcessor, EveProcessor, EveVisionConfig
from eve_vlm.cli import app
from eve_vlm.data.collator import EveCollator
from eve_vlm.data.encode import Encoder
from eve_vlm.data.records import Record
from eve_vlm.data.teacher_view import TeacherView
from eve_vlm.decoders.initialize import initialize
from eve_vlm.decoders.joining import check_same_logits
from eve_vlm.decoders.loading import load_decoder, read_decoder_config
from eve_vlm.decoders.text import CODE_MARKS, add_placeholder, with_pictures
from eve_vlm.image_processing_eve import eve_grid, longest_edge_of_budget, num_image_tokens
from eve_vlm.loading import load_model, load_processor
from eve_vlm.patch_embedding_eve import EveProjector
from eve_vlm.serve.engine import EveEngine, user_message
from eve_vlm.train.run import describe, train
from eve_vlm.train.teacher import FrozenTeacher
from small_decoders import CHATML, FAMILIES, RESERVED, decoder_folder, words

SMALL = EveVisionConfig(
    patch_size=tiny.PATCH, merge_size=tiny.MERGE, hidden_size=24, num_attention_heads=4
)
SIZES = ("--patch-size=4", "--merge-size=2", "--width=24", "--heads=4", "--longest-edge=32")
TALK = [{"role": "user", "content": "What is this?"}]


def begin(llm: Path, out: Path, **settings):
    """`initialize` with the small sizes of these tests."""
    settings = {"vision": SMALL, "longest_edge": 32} | settings
    return initialize(llm, out, **settings)


@pytest.fixture(scope="module", params=FAMILIES)
def made(request, tmp_path_factory):
    """A family's decoder, and the EVE model that was made on it and loaded again; read-only."""
    here = tmp_path_factory.mktemp(request.param)
    decoder = decoder_folder(here / "decoder", request.param)
    result = begin(decoder, here / "new")
    return SimpleNamespace(
        kind=request.param,
        result=result,
        decoder=decoder,
        folder=here / "new",
        bare=AutoModelForCausalLM.from_pretrained(decoder).eval(),
        plain=AutoTokenizer.from_pretrained(decoder),
        engine=EveEngine(load_model(here / "new"), load_processor(here / "new")),
    )


def records(count: int = 4) -> list[Record]:
    """Questions about pictures of several shapes, with answers; the last has no picture."""
    made = []
    for index in range(count):
        pictures = 0 if index == count - 1 else 1 + index % 2
        messages = tiny.conversation(
            tiny.QUESTIONS[index % 4], tiny.ANSWERS[index % 4], pictures=pictures
        )
        images = [tiny.picture(20 + 9 * index, 33, seed=place) for place in range(pictures)]
        made.append(Record(id=str(index), messages=messages, images=images))
    return made


# --- every family ---------------------------------------------------------------------------------


def test_weights_are_the_decoders(made):
    """Saved and loaded, every weight of the decoder is there, and one row more where it grew."""
    model, bare = made.engine.model, made.bare
    rows = bare.get_input_embeddings().weight.shape[0]
    grown = model.get_input_embeddings().weight.shape[0] - rows
    assert grown == (made.result.placeholder.kind == "added")
    ours, theirs = model.model.language_model.state_dict(), bare.base_model.state_dict()
    assert ours.keys() == theirs.keys()
    for name, weight in theirs.items():
        assert torch.equal(ours[name][: weight.shape[0]], weight), name
    assert torch.equal(model.lm_head.weight[:rows], bare.get_output_embeddings().weight)
    if grown:
        for layer in (model.get_input_embeddings(), model.lm_head):
            mean = layer.weight[:rows].mean(0)
            # 1e-6: a mean of 300 numbers of size 1, added up in another order at most.
            assert torch.allclose(layer.weight[rows], mean, atol=1e-6)
    tied = model.lm_head.weight is model.get_input_embeddings().weight
    assert tied == FAMILIES[made.kind][1] == model.config.tie_word_embeddings
    assert made.result.parameters["decoder"] == sum(
        p.numel() for p in model.model.language_model.parameters()
    )
    assert sum(made.result.parameters.values()) == model.num_parameters()


@torch.no_grad()
def test_text_is_the_bare_decoders(made):
    for text in ("The quick brown fox", "<|im_start|>user\nWhat is this?<|im_end|>\n"):
        ids = torch.tensor([made.plain.encode(text, add_special_tokens=False)])
        expected = made.bare(input_ids=ids).logits
        found = made.engine.model(input_ids=ids).logits[..., : expected.shape[-1]]
        if made.result.placeholder.kind == "added":
            # Another number of columns in the head's product: sums in another order.
            assert torch.allclose(found, expected, rtol=0, atol=1e-5)
        else:
            assert torch.equal(found, expected)


def test_text_answers_are_the_bare_decoders(made):
    """The same prompt by its own template, the same tokens, the same end."""
    answers = made.engine.generate(
        [TALK, tiny.conversation("Say more.", pictures=0)], max_new_tokens=12
    )
    for question, answer in zip(("What is this?", "Say more."), answers, strict=True):
        prompt = made.plain.apply_chat_template(
            [{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True
        )
        ids = made.plain(prompt, return_tensors="pt", add_special_tokens=False)["input_ids"]
        bare = made.bare.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=12,
            do_sample=False,
            suppress_tokens=[made.result.placeholder.id]
            if made.result.placeholder.id < made.bare.config.vocab_size
            else None,
        )[0, ids.shape[1] :]
        assert made.plain.decode(bare, skip_special_tokens=True).strip() == answer


def test_placeholder_and_settings_agree(made):
    kind, token = FAMILIES[made.kind][5]
    chosen, processor = made.result.placeholder, made.engine.processor
    assert (chosen.kind, chosen.token) == (kind, token)
    assert processor.image_token == token and processor.image_token_id == chosen.id
    config = made.engine.model.config
    assert config.image_token_id == chosen.id < config.text_config.vocab_size
    generation = made.engine.model.generation_config
    assert generation.eos_token_id == [4, 2] and chosen.id in generation.suppress_tokens
    # The tokenizer's own words and names are as they were.
    assert processor.tokenizer.special_tokens_map == made.plain.special_tokens_map
    assert made.plain.get_vocab().items() <= processor.tokenizer.get_vocab().items()


def test_own_template_writes_the_same_bytes(made):
    messages = [
        {"role": "user", "content": " What is  this?\n"},
        {"role": "assistant", "content": "a hat\n\n"},
        {"role": "user", "content": "<b>{{ x }}</b>"},
    ]
    ours, plain = made.engine.processor, made.plain
    assert ours.tokenizer.chat_template.endswith(plain.chat_template)
    for prompt in (False, True):
        for part in (messages[:1], messages):
            expected = plain.apply_chat_template(part, tokenize=False, add_generation_prompt=prompt)
            for one in (ours.tokenizer, ours):
                assert expected == one.apply_chat_template(
                    part, tokenize=False, add_generation_prompt=prompt
                )


def test_pictures_stand_in_front_of_their_words(made):
    """As parts, and as the same thing written out by hand: one text."""
    token = made.result.placeholder.token
    for pictures in (1, 2):
        parts = tiny.conversation("What is this?", "a hat", pictures=pictures)
        by_hand = [
            {"role": "user", "content": f"{token}\n" * pictures + "What is this?"},
            {"role": "assistant", "content": "a hat"},
        ]
        expected = made.plain.apply_chat_template(by_hand, tokenize=False)
        for one in (made.engine.processor, made.engine.processor.tokenizer):
            assert one.apply_chat_template(parts, tokenize=False) == expected


def test_a_step_teaches_both_parts(made):
    """Encoded with pictures, one optimizer step: finite, and every new weight has a gradient."""
    processor = made.engine.processor
    encoder = Encoder(processor, format="chat", max_length=300)
    batch = EveCollator(processor.tokenizer.pad_token_id)([[encoder(one)] for one in records()])
    assert batch["bad_records"] == []
    batch = tiny.for_model(batch)
    learnt = batch["labels"][0][batch["labels"][0] != -100]
    assert "a red square" in processor.tokenizer.decode(learnt)
    model = load_model(made.folder).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    first = model(**batch).loss
    first.backward()
    assert math.isfinite(first.item())
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and bool(parameter.grad.isfinite().all()), name
    for part in ("model.vision_tower.", "model.multi_modal_projector.", "model.language_model."):
        grads = [p.grad.abs().max() for n, p in model.named_parameters() if n.startswith(part)]
        assert max(grads) > 0
    optimizer.step()
    assert model(**batch).loss.item() < first.item()


def test_batch_is_single(made):
    engine = made.engine
    conversations = [
        user_message("What is this?", [tiny.picture(40, 24, seed=1)]),
        user_message("Say more.", []),
        user_message(
            "Where is it? It is far, far away.", [tiny.picture(9, 50), tiny.picture(30, 30)]
        ),
    ]
    together = engine.generate(conversations, max_new_tokens=8)
    alone = [engine.generate([one], max_new_tokens=8)[0] for one in conversations]
    assert together == alone


@torch.no_grad()
def test_pictures_are_seen(made):
    engine = made.engine
    text = engine.processor.apply_chat_template(
        tiny.conversation("What is this?"), tokenize=False, add_generation_prompt=True
    )
    logits = []
    for seed in (1, 2):
        inputs = engine.processor(
            text=[text], images=[tiny.picture(32, 32, seed=seed)], return_tensors="pt"
        )
        given = {
            name: inputs[name]
            for name in ("input_ids", "attention_mask", "pixel_values", "image_grid_thw")
        }
        assert int((given["input_ids"] == engine.processor.image_token_id).sum()) == 21
        logits.append(engine.model(**given).logits[0, -1])
    assert not torch.allclose(*logits, atol=1e-3)


# --- one family each ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A Llama decoder; read-only."""
    return decoder_folder(tmp_path_factory.mktemp("llama") / "decoder", "llama")


@pytest.mark.parametrize(("kind", "tied"), [("llama", False), ("olmo2", True), ("mistral", True)])
def test_the_other_way_of_tying(tmp_path, kind, tied):
    begin(decoder_folder(tmp_path / "decoder", kind, tied=tied), tmp_path / "new")
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "new")
    assert (model.lm_head.weight is model.get_input_embeddings().weight) is tied


def test_the_decoder_is_moved_and_not_copied(tmp_path, llama, monkeypatch):
    """Memory is the decoder's and the patch embedding's: the storages are the same ones."""
    import eve_vlm.decoders.initialize as module

    seen = {}
    load, put = module.load_decoder, module.put_decoder
    monkeypatch.setattr(
        module, "load_decoder", lambda *a, **k: seen.setdefault("decoder", load(*a, **k))
    )
    monkeypatch.setattr(
        module, "put_decoder", lambda *a, **k: seen.setdefault("model", put(*a, **k))
    )
    begin(llama, tmp_path / "new")
    there = {p.data_ptr() for p in seen["decoder"].model.parameters()}
    ours = {p.data_ptr() for p in seen["model"].model.language_model.parameters()}
    assert ours == there and not any(p.is_meta for p in seen["model"].parameters())


def test_the_seed_decides_new_weights_alone(tmp_path, llama):
    state = torch.get_rng_state()
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        begin(llama, tmp_path / name, seed=seed)
    a, b, c = (load_model(tmp_path / name).state_dict() for name in "abc")
    assert all(torch.equal(a[name], b[name]) for name in a)
    different = {name for name in a if not torch.equal(a[name], c[name])}
    assert different and not any("language_model" in name for name in different)
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_projector_depth(tmp_path, llama, depth):
    begin(llama, tmp_path / "new", projector_depth=depth)
    model = load_model(tmp_path / "new")
    projector, x = model.model.multi_modal_projector, torch.randn(5, 24)
    names = [f"linear_{place}" for place in range(1, depth + 1)]
    assert [name for name, _ in projector.named_children()] == names
    expected = x
    for place, name in enumerate(names):
        weight, bias = (projector.state_dict()[f"{name}.{part}"] for part in ("weight", "bias"))
        expected = expected @ weight.T + bias
        if place + 1 < depth:
            expected = expected * 0.5 * (1 + torch.erf(expected / 2**0.5))
    assert torch.allclose(projector(x), expected, atol=1e-5)  # sums in another order
    # The recipe's dry run knows the depth too.
    data = tiny.recipe_data(tmp_path / "x.json", tmp_path / "run", init_from=tmp_path / "new")
    data["model"]["vision"] |= {"hidden_size": 24, "num_attention_heads": 4}
    assert f"{model.num_parameters():,} parameters" in describe(
        tiny.recipe(tmp_path / "recipe.yaml", data)
    )


def test_depth_two_keeps_the_published_names():
    with torch.device("meta"):
        names = [name for name, _ in EveProjector(tiny.config()).named_parameters()]
    assert names == ["linear_1.weight", "linear_1.bias", "linear_2.weight", "linear_2.bias"]


def test_dtype(tmp_path, llama):
    begin(llama, tmp_path / "new", dtype="bfloat16")
    model = load_model(tmp_path / "new")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model.config.text_config.dtype == torch.bfloat16


def test_a_trained_stage_follows(tmp_path, llama):
    """Through the real trainer, from the folder that `eve init` wrote."""
    begin(llama, tmp_path / "new")
    file = tiny.llava_file(tmp_path / "data", records=6)
    data = tiny.recipe_data(file, tmp_path / "run", init_from=tmp_path / "new")
    data["model"]["vision"] |= {"hidden_size": 24, "num_attention_heads": 4}
    data["training"]["max_steps"] = 2
    result = train(tiny.recipe(tmp_path / "recipe.yaml", data))
    assert result.steps == 2 and all(math.isfinite(entry["loss"]) for entry in result.losses)
    engine = EveEngine.from_pretrained(tmp_path / "run")
    assert engine.processor.image_token == RESERVED[-1]
    assert engine.model.generation_config.eos_token_id == [4, 2]
    assert isinstance(engine.ask("What is this?", [tiny.picture(9, 9)], max_new_tokens=4), str)


def test_a_recipe_makes_the_same_choice(tmp_path, llama):
    """`model.decoder` in a recipe goes through the same code; only it never grows a decoder."""
    file = tiny.llava_file(tmp_path / "data", records=6)
    data = tiny.recipe_data(file, tmp_path / "run")
    data["model"] |= {"text_config": None, "decoder": str(llama)}
    data["training"]["max_steps"] = 1
    train(tiny.recipe(tmp_path / "recipe.yaml", data))
    processor = load_processor(tmp_path / "run")
    assert processor.image_token == RESERVED[-1]
    assert load_model(tmp_path / "run").generation_config.suppress_tokens == [
        processor.image_token_id
    ]


def test_an_answer_ends_at_every_end(tmp_path, llama):
    """The generation configuration has ends that the tokenizer does not name."""
    begin(llama, tmp_path / "new")
    engine = EveEngine.from_pretrained(tmp_path / "new")
    asked = [user_message("What is this?", [])]
    [plain] = engine.answer(asked, max_new_tokens=6)
    end = plain.token_ids[-1]
    engine.model.generation_config.eos_token_id = [2, end]
    assert engine.ends() == [2, end, engine.processor.tokenizer.eos_token_id]
    assert engine.never() == [engine.processor.image_token_id]
    [ended] = engine.answer(asked, max_new_tokens=6)
    assert ended.finish_reason == "stop"
    assert ended.token_ids == plain.token_ids[: plain.token_ids.index(end) + 1]


def test_settings_of_sampling_that_are_not_used_are_mended(tmp_path, llama):
    """As in Vicuna 1.5, whose settings the library refuses to save once they are touched."""
    folder = shutil.copytree(llama, tmp_path / "decoder")
    file = folder / "generation_config.json"
    settings = json.loads(file.read_text()) | {"temperature": 0.9, "top_p": 0.6}
    file.write_text(json.dumps(settings))
    result = begin(folder, tmp_path / "new")
    assert any("sampling" in note for note in result.notes)
    assert load_model(tmp_path / "new").generation_config.eos_token_id == [4, 2]


def test_a_penalty_on_a_placeholder_without_a_row_is_left_out(tmp_path):
    """A recipe leaves a decoder's shape alone, and the library would look its logit up."""
    folder = decoder_folder(tmp_path / "decoder", "olmo2")
    file = folder / "generation_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"repetition_penalty": 1.2}))
    data = tiny.recipe_data(tiny.llava_file(tmp_path / "data", records=6), tmp_path / "run")
    data["model"] |= {"text_config": None, "decoder": str(folder)}
    data["training"]["max_steps"] = 1
    train(tiny.recipe(tmp_path / "recipe.yaml", data))
    engine = EveEngine.from_pretrained(tmp_path / "run")
    assert engine.processor.image_token_id == engine.model.config.text_config.vocab_size
    assert isinstance(engine.ask("What?", [tiny.picture(9, 9)], max_new_tokens=2), str)
    begin(folder, tmp_path / "new")  # which gives it a row, and so keeps the penalty
    engine = EveEngine.from_pretrained(tmp_path / "new")
    assert engine.model.generation_config.repetition_penalty == 1.2
    assert isinstance(engine.ask("What?", [tiny.picture(9, 9)], max_new_tokens=2), str)


def test_a_tokenizer_without_padding_gets_one(tmp_path, llama):
    folder = shutil.copytree(llama, tmp_path / "decoder")
    plain = AutoTokenizer.from_pretrained(folder)
    plain.pad_token = None
    plain.save_pretrained(folder)
    result = begin(folder, tmp_path / "new")
    assert any("Padding" in note for note in result.notes)
    assert load_processor(tmp_path / "new").tokenizer.pad_token == plain.eos_token


# --- placeholders ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "free",
    [
        *(
            "<|reserved_special_token_9|>",
            "<unused3>",
            "<|extra_id_0|>",
            "[control_8]",
            "<SPECIAL_20>",
        ),
        *(
            "<|placeholder1|>",
            ">>UNUSED_4<<",
            "[UNUSED_TOKEN_1]",
            "<|dummy_3|>",
            "<|reserved_200001|>",
        ),
        "<\uff5cplace\u2581holder\u2581no\u25811\uff5c>",
    ],
)
def test_names_of_free_ids(free):
    tokenizer = words(template=CHATML, more=(free,))
    assert add_placeholder(tokenizer, rows=len(tokenizer)).token == free


@pytest.mark.parametrize("used", ["<tool_call>", "<think>", "<|special|>", "<|system|>", "unused"])
def test_other_tokens_are_left_alone(used):
    tokenizer = words(template=CHATML, more=(used,))
    chosen = add_placeholder(tokenizer, rows=len(tokenizer))
    assert chosen.token == "<image>" and chosen.kind == "added"


def test_ids_that_mean_something_are_left_alone():
    """Ends of an answer, and tokens that the chat template writes."""
    tokenizer = words(
        template="{{ '<unused2>' }}{{ messages[0]['content'] }}",
        more=("<unused1>", "<unused2>", "<unused3>"),
    )
    end = tokenizer.convert_tokens_to_ids("<unused3>")
    assert add_placeholder(tokenizer, rows=len(tokenizer), taken=[end]).token == "<unused1>"


def test_a_known_placeholder_without_a_row_comes_after_a_free_id():
    """Gemma 3's text models: `<image_soft_token>` lies behind the embedding."""
    tokenizer = words(template=CHATML, more=("<unused1>", "<image_soft_token>"))
    assert add_placeholder(tokenizer, rows=len(tokenizer) - 1).token == "<unused1>"
    tokenizer = words(template=CHATML, more=("<image_soft_token>",))
    chosen = add_placeholder(tokenizer, rows=len(tokenizer) - 1)
    assert (chosen.token, chosen.kind) == ("<image_soft_token>", "added")


def test_marks_of_code_are_taken_only_where_they_never_learnt():
    tokenizer = words(template=CHATML, more=CODE_MARKS)
    torch.manual_seed(0)
    rows = torch.randn(len(tokenizer), 16)
    assert add_placeholder(tokenizer, rows=len(rows), embedding=rows).token == "<image>"
    tokenizer = words(template=CHATML, more=CODE_MARKS)
    ids = tokenizer.convert_tokens_to_ids(list(CODE_MARKS[1:3]))
    rows[ids[0]] = rows[ids[1]] * 1.001  # as far apart as quantisation brings them
    chosen = add_placeholder(tokenizer, rows=len(rows), embedding=rows)
    assert chosen.id == ids[0] and chosen.kind == "unused"


# --- chat templates -------------------------------------------------------------------------------


def test_templates_that_take_pictures_are_left_as_they_are():
    own = tiny.tokenizer()
    assert (
        with_pictures(own.chat_template, own, image_token="<image>", name="x") == own.chat_template
    )


def test_unknown_parts_are_refused(llama, tmp_path):
    begin(llama, tmp_path / "new")
    tokenizer = load_processor(tmp_path / "new").tokenizer
    with pytest.raises(Exception, match="part of type video"):
        tokenizer.apply_chat_template([{"role": "user", "content": [{"type": "video"}]}])


@pytest.mark.parametrize(
    ("given", "begins"),
    [("vicuna", "A chat between"), ("chatml", "<|im_start|>user\n"), ("file", "Q:")],
)
def test_a_decoder_without_a_template_gets_one(tmp_path, llama, given, begins):
    folder = shutil.copytree(llama, tmp_path / "decoder")
    (folder / "chat_template.jinja").unlink()
    text = tiny.refused(lambda: begin(folder, tmp_path / "new"))
    assert "no chat template" in text and "--chat-template vicuna" in text and "FILE" in text
    if given == "file":
        given = str(tmp_path / "t.jinja")
        Path(given).write_text("{% for m in messages %}Q:{{ m['content'] }}{% endfor %}")
    begin(folder, tmp_path / "new", chat_template=given)
    engine = EveEngine.from_pretrained(tmp_path / "new")
    rendered = engine.processor.apply_chat_template(tiny.conversation("What?"), tokenize=False)
    assert begins in rendered and rendered.count(RESERVED[-1]) == 1 and "<image>" not in rendered
    assert isinstance(engine.ask("What?", [tiny.picture(9, 9)], max_new_tokens=2), str)


# --- budgets --------------------------------------------------------------------------------------


def by_hand(height, width, *, edge, unit, cell, least, most):
    """The grid by trying every size, in exact fractions."""
    from fractions import Fraction

    def grid(units):
        short = math.ceil(Fraction(units * min(height, width), max(height, width)))
        rows, cols = (short, units) if width > height else (units, short)
        rows, cols = rows * unit // cell, cols * unit // cell
        return rows, cols, 1 + rows * (cols + 1)

    sizes = range(1, edge // unit + 1)
    units = min(math.ceil(Fraction(max(height, width), unit)), edge // unit)
    while least is not None and grid(units)[2] < least and units < sizes[-1]:
        units += 1
    while most is not None and grid(units)[2] > most:
        units -= 1
    return grid(units)


def test_budget_grids_against_trying_every_size():
    generator = torch.Generator().manual_seed(0)

    def draw(low, high):
        return int(torch.randint(low, high, (1,), generator=generator))

    grown = shrunk = 0
    for _ in range(4000):
        patch, merge, times = draw(2, 9), draw(1, 4), draw(1, 3)
        cell = patch * merge
        unit = cell * times
        edge = unit * draw(1, 25)
        largest = 40 if draw(0, 2) else 900
        height, width = draw(1, largest), draw(1, largest)
        smallest = 1 + times * (times + 1)
        most = None if draw(0, 4) == 0 else draw(smallest, 700)
        least = None if draw(0, 3) == 0 else draw(smallest, (most or 700) + 1)
        if least is None and most is None:
            most = 100
        settings = {
            "longest_edge": edge,
            "size_multiple": unit,
            "patch_size": patch,
            "merge_size": merge,
        }
        found = eve_grid(height, width, min_image_tokens=least, max_image_tokens=most, **settings)
        rows, cols, tokens = by_hand(
            height, width, edge=edge, unit=unit, cell=cell, least=least, most=most
        )
        assert (found.rows, found.cols) == (rows, cols)
        assert num_image_tokens(found.rows, found.cols) == tokens <= (most or tokens)
        assert max(found.height, found.width) <= edge
        own = -(-max(height, width) // unit) * unit
        grown += max(found.height, found.width) > own
        shrunk += max(found.height, found.width) < min(own, edge)
    assert min(grown, shrunk) > 300  # both sides were tried


def test_longest_edge_of_a_budget_is_the_longest_row():
    for times in (1, 2, 3):
        for most in range(1 + times * (times + 1), 200):
            edge = longest_edge_of_budget(most, size_multiple=28 * times, cell=28)
            units = edge // (28 * times)
            tokens = [1 + times * (times * n + 1) for n in (units, units + 1)]
            assert tokens[0] <= most < tokens[1]


def test_without_a_budget_nothing_changes():
    plain = EveImageProcessor()
    assert "min_image_tokens" not in plain.to_dict() and "max_image_tokens" not in plain.to_dict()
    assert plain.grid_of(20, 40) == eve_grid(20, 40, longest_edge=672, size_multiple=28)


def test_every_path_counts_a_budget_alike(tmp_path, llama):
    begin(llama, tmp_path / "new", longest_edge=None, min_image_tokens=6, max_image_tokens=30)
    processor = load_processor(tmp_path / "new")
    pictures = processor.image_processor
    assert (pictures.min_image_tokens, pictures.max_image_tokens) == (6, 30)
    assert pictures.size["longest_edge"] == 28 * 8
    encoder = Encoder(processor, format="chat", max_length=300)
    for height, width in ((3, 3), (100, 7), (40, 40), (9, 300), (16, 24)):
        image = tiny.picture(height, width)
        grid = pictures.grid_of(height, width)
        tokens = num_image_tokens(grid.rows, grid.cols)
        assert 6 <= tokens <= 30
        assert processor._get_num_multimodal_tokens([(height, width)]).num_image_tokens == [tokens]
        text = f"a{processor.image_token}"
        inputs = processor(text=[text], images=[image], return_tensors="pt")
        placeholders = int((inputs["input_ids"] == processor.image_token_id).sum())
        record = Record(id="x", messages=tiny.conversation("What?", "a"), images=[image])
        encoded = int((encoder(record).input_ids == processor.image_token_id).sum())
        assert placeholders == encoded == tokens
        assert inputs["image_grid_thw"].tolist() == [[1, 2 * grid.rows, 2 * grid.cols]]
    engine = EveEngine(load_model(tmp_path / "new"), processor)
    assert isinstance(engine.ask("What?", [tiny.picture(90, 300)], max_new_tokens=2), str)
    text = tiny.refused(
        lambda: engine.ask("What?", [tiny.picture(90, 300)] * 16, max_new_tokens=100)
    )
    assert "longest_edge" in text


def test_a_budget_keeps_to_the_teachers_canvas(tmp_path, llama, teacher_folder):
    """Pictures below the longest edge lie inside, and features fit student cells one to one."""
    begin(llama, tmp_path / "new", max_image_tokens=12)
    processor = load_processor(tmp_path / "new")
    teacher = FrozenTeacher.from_pretrained(str(teacher_folder), cells=4)
    encoder = Encoder(processor, format="chat", max_length=300, teacher_view=teacher.view)
    assert isinstance(teacher.view, TeacherView)
    batch = EveCollator(0)([[encoder(one)] for one in records()])
    features = teacher.features(batch["teacher_pixel_values"], batch["image_grid_thw"], side=2)
    config = EveConfig.from_pretrained(tmp_path / "new")
    config.alignment_config = tiny.config(aligned=True).alignment_config
    model = load_model(tmp_path / "new", config=config, new=[r"aligner\."]).train()
    assert isinstance(model, EveForPreTraining)
    batch.pop("teacher_pixel_values")
    loss = model(**batch, teacher_features=features).loss
    assert math.isfinite(loss.item())


def test_a_canvas_beyond_any_teacher_is_refused(tmp_path, teacher_folder):
    file = tiny.llava_file(tmp_path / "data")
    data = tiny.recipe_data(file, tmp_path / "run", teacher=teacher_folder)
    data["model"]["image"]["longest_edge"] = 8 * 129
    text = tiny.refused(lambda: train(tiny.recipe(tmp_path / "recipe.yaml", data)))
    assert "129 x 129 cells" in text and "longest_edge" in text


@pytest.mark.parametrize(
    ("budget", "part"),
    [
        ({"min_image_tokens": 2}, "min_image_tokens is 2"),
        ({"max_image_tokens": 2}, "smallest picture takes 3 tokens"),
        ({"min_image_tokens": 9, "max_image_tokens": 8}, "above max_image_tokens (8)"),
    ],
)
def test_impossible_budgets(budget, part):
    assert part in tiny.refused(lambda: EveImageProcessor(**budget))
    if "max_image_tokens" in budget and len(budget) == 1:
        tiny.refused(lambda: longest_edge_of_budget(2, size_multiple=28, cell=28))


# --- bad input ------------------------------------------------------------------------------------


def config_folder(folder: Path, config) -> Path:
    config.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("make", "part"),
    [
        (lambda: BertConfig(), "an encoder (bert)"),
        (lambda: T5Config(), "an encoder-decoder (t5)"),
        (lambda: Gemma3Config(), "multimodal already (gemma3)"),
        (lambda: CLIPVisionConfig(), "clip_vision_model model, which is no language model"),
        (lambda: tiny.config(), "an EVE model already"),
        (lambda: of("gemma2"), "final_logit_softcapping"),
        (lambda: of("gemma3n_text"), "looks up every word again"),
        (lambda: of("mamba"), "takes no position_ids"),
        (lambda: of("bloom"), "takes no position_ids"),
        (
            lambda: of("llama", quantization_config={"quant_method": "gptq", "bits": 4}),
            "quantised (gptq)",
        ),
    ],
)
def test_models_that_cannot(tmp_path, make, part):
    folder = config_folder(tmp_path / "other", make())
    text = tiny.refused(lambda: begin(folder, tmp_path / "new"))
    assert (part in text and str(folder) in text) or "text_config" in text
    assert not (tmp_path / "new").exists()


def of(kind: str, **settings):

    return CONFIG_MAPPING[kind](**settings)


def test_a_saved_encoder_is_refused(tmp_path):
    BertForMaskedLM(
        BertConfig(
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=16,
            vocab_size=50,
        )
    ).save_pretrained(tmp_path / "bert")
    assert "encoder" in tiny.refused(lambda: begin(tmp_path / "bert", tmp_path / "new"))


def test_a_head_with_a_bias_is_refused(tmp_path):
    """Phi adds a bias to its logits."""
    settings = {
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    AutoModelForCausalLM.from_config(of("phi", vocab_size=50, **settings)).save_pretrained(
        tmp_path / "phi"
    )
    assert "bias" in tiny.refused(lambda: load_decoder(tmp_path / "phi"))


@pytest.mark.parametrize("name", ["./nowhere", "/no/where/at/all", "nobody/nothing-here", "x.gguf"])
def test_a_name_that_is_nothing(tmp_path, name):
    text = tiny.refused(lambda: begin(name, tmp_path / "new"))
    assert name in text
    if name == "nobody/nothing-here":
        assert "folders work without" in text  # and the network is to be looked at


def test_a_folder_without_a_decoder(tmp_path, llama):
    (tmp_path / "empty").mkdir()
    assert "holds no decoder" in tiny.refused(lambda: begin(tmp_path / "empty", tmp_path / "new"))
    for name in "ab":
        (tmp_path / "empty" / f"{name}.gguf").write_bytes(b"GGUF")
    assert "a.gguf, b.gguf" in tiny.refused(lambda: begin(tmp_path / "empty", tmp_path / "new"))


def test_code_in_a_folder_is_not_run(tmp_path):
    settings = {"model_type": "mine", "auto_map": {"AutoConfig": "mine.Mine"}}
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "config.json").write_text(json.dumps(settings))
    (tmp_path / "mine" / "mine.py").write_text("raise SystemExit")
    tiny.refused(lambda: begin(tmp_path / "mine", tmp_path / "new"))


def test_weights_that_are_not_whole(tmp_path, llama):
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(llama, tmp_path / "decoder")
    file = folder / "model.safetensors"
    weights = load_file(file)
    weights.pop("model.norm.weight")
    save_file(weights, file, metadata={"format": "pt"})
    text = tiny.refused(lambda: begin(folder, tmp_path / "new"))
    assert "lacks 1 weights" in text and "model.norm.weight" in text
    file.write_bytes(file.read_bytes()[:-100])
    assert "cut off or corrupt" in tiny.refused(lambda: begin(folder, tmp_path / "new"))
    file.unlink()
    assert "no weights" in tiny.refused(lambda: begin(folder, tmp_path / "new"))


def test_a_decoder_without_a_tokenizer(tmp_path, llama):
    folder = shutil.copytree(llama, tmp_path / "decoder")
    for file in folder.glob("tokenizer*"):
        file.unlink()
    text = tiny.refused(lambda: begin(folder, tmp_path / "new"))
    assert "tokenizer" in text and str(folder) in text


def test_a_place_that_is_taken(tmp_path, llama):
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "holiday.jpg").write_bytes(b"")
    assert "is there already" in tiny.refused(lambda: begin(llama, tmp_path / "new"))
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["holiday.jpg"]


def test_too_little_disk(tmp_path, llama, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=10**6))
    text = tiny.refused(lambda: begin(llama, tmp_path / "new"))
    assert "0.00 GB free" in text and "another disk" in text
    assert not list(tmp_path.glob("*new*")) + list(tmp_path.glob(".*new*"))


@pytest.mark.parametrize(
    ("settings", "part"),
    [
        ({"longest_edge": 30}, "24 or 32 would do"),
        ({"longest_edge": 0}, "8 would do"),
        ({"projector_depth": 0}, "projector_depth is 0"),
        ({"dtype": "float64"}, "float64 is unknown"),
        ({"longest_edge": None, "max_image_tokens": 5000}, "takes up to 5000 tokens"),
        ({"longest_edge": 320}, "takes up to 1641 tokens"),
        ({"longest_edge": None, "max_image_tokens": 2}, "smallest picture takes 3"),
        ({"chat_template": "llama9"}, "neither vicuna nor chatml"),
    ],
)
def test_options_that_do_not_fit(tmp_path, llama, settings, part):
    assert part in tiny.refused(lambda: begin(llama, tmp_path / "new", **settings))
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("text", ["{{ messages", "{{ raise_exception('no') }}", "nothing"])
def test_templates_that_cannot_be_used(tmp_path, llama, text):
    (tmp_path / "t.jinja").write_text(text)
    said = tiny.refused(
        lambda: begin(llama, tmp_path / "new", chat_template=str(tmp_path / "t.jinja"))
    )
    assert "t.jinja" in said and "--chat-template" in said


def test_another_path_to_the_logits_is_noticed(llama):
    """The guard against decoders that do something that nobody thought of."""
    model = tiny.model()
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        logits = model(input_ids=ids).logits
    check_same_logits(model, ids, logits)
    assert "away from those" in tiny.refused(lambda: check_same_logits(model, ids, logits * 1.001))
    assert "away" in tiny.refused(lambda: check_same_logits(model, ids, logits * math.nan))


def test_configurations_alone_are_read(llama):
    assert read_decoder_config(llama).model_type == "llama"


# --- the command ----------------------------------------------------------------------------------


def test_the_command_says_what_it_made(tmp_path, llama):
    out = tmp_path / "new"
    result = CliRunner().invoke(app, ["init", "--llm", str(llama), "--out", str(out), *SIZES])
    assert result.exit_code == 0, result.output
    for part in ("a llama decoder", RESERVED[-1], "32 x 32 pixels, 4 x 4 cells, 21 tokens"):
        assert part in result.output
    assert f"{load_model(out).num_parameters():,}" in result.output
    assert f"eve train eve_7b/1_prealign model.init_from={out}" in result.output
    assert EveProcessor.from_pretrained(out).chat_template


def test_the_next_step_is_a_command_that_works(tmp_path, llama):
    made = begin(llama, tmp_path / "new")
    line = made.next_step.split()[1:]
    result = CliRunner().invoke(app, [*line, "--dry-run"])
    assert result.exit_code == 0, result.output
    assert "4 x 4 cells = 21 tokens" in result.output


# --- a real decoder -------------------------------------------------------------------------------

GGUF_FILE = "assets/smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def real_decoder() -> Path:
    """The user's own cache, which the tests' environment otherwise hides."""
    places = [os.environ.get("EVE_USER_CACHE"), Path.home() / ".cache" / "eve-vlm"]
    for place in filter(None, places):
        if (Path(place) / GGUF_FILE).is_file():
            return Path(place) / GGUF_FILE
    pytest.skip("SmolLM2 is not in the cache; `eve assets fetch smollm2` puts it there")


@pytest.mark.slow
def test_smollm2_answers_as_before(tmp_path):
    """The pretrained SmolLM2-135M-Instruct: the same tokens after `eve init` as before."""
    from transformers import GgufConfig

    file = real_decoder()
    made = initialize(file, tmp_path / "new", vision=EveVisionConfig(hidden_size=64))
    assert made.placeholder.token == "<empty_output>" and made.placeholder.kind == "unused"
    assert made.parameters["decoder"] == 134_515_008
    engine = EveEngine(load_model(tmp_path / "new"), load_processor(tmp_path / "new"))
    bare = AutoModelForCausalLM.from_pretrained(
        file.parent,
        gguf_file=file.name,
        dtype=torch.float32,
        quantization_config=GgufConfig(dequantize=True),
    ).eval()
    plain = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    questions = (
        "What is the capital of France?",
        "Name three colours.",
        "How many legs does a spider have?",
        "Write one line about the sea.",
        "What is 2 + 3?",
    )
    for question in questions:
        talk = [{"role": "user", "content": question}]
        prompt = plain.apply_chat_template(talk, tokenize=False, add_generation_prompt=True)
        ours = engine.processor.tokenizer
        assert prompt == ours.apply_chat_template(talk, tokenize=False, add_generation_prompt=True)
        ids = plain(prompt, return_tensors="pt", add_special_tokens=False)["input_ids"]
        given = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 24, "do_sample": False}
        expected = bare.generate(ids, **given, eos_token_id=2, pad_token_id=2)
        found = engine.model.generate(ours(prompt, return_tensors="pt")["input_ids"], **given)
        assert torch.equal(found, expected), question
    assert "Paris" in engine.ask(questions[0], max_new_tokens=12)
    answer = engine.ask("What is this?", [tiny.picture(90, 60)], max_new_tokens=2)
    assert isinstance(answer, str)
