"""Other models asked as EVE is: LLaVA-1.5, LLaVA-1.6, Fuyu and Idefics3 classes with random weights.

The slow way writes each prompt by hand, calls the library's processor for that one alone and takes
the likeliest token from a whole forward pass, without a cache, again and again.  Answers are
compared as text: ties within float32 rounding could go either way, and the large weights keep the
best two far apart.  Sums of log-probabilities are compared within 1e-4 per token: float32 over a
cache and padding against float64 without differed by 3e-5 at most.
"""

import json
import shutil
from functools import partial

import numpy as np
import pytest
import torch
import transformers
from packaging.version import Version
from PIL import Image
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor

import other_models
import published
import tiny
from eve_vlm.eval.other_models import TransformersEngine, model_facts, open_answerer
from eve_vlm.serve.engine import EveEngine, user_message

refused = partial(tiny.refused, end=".")
PER_TOKEN = 1e-4
OLD = Version(transformers.__version__) < Version("5.20")
KINDS = [
    pytest.param(
        kind,
        marks=pytest.mark.skipif(
            kind == "idefics3" and OLD, reason="needs torchvision in this transformers"
        ),
    )
    for kind in other_models.KINDS
]


@pytest.fixture(scope="module", params=KINDS)
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def folder(kind, tmp_path_factory):
    return other_models.save(kind, tmp_path_factory.mktemp(kind) / "model")


@pytest.fixture(scope="module")
def engine(folder):
    return TransformersEngine.from_pretrained(folder)


@pytest.fixture(scope="module")
def exact(folder):
    """The same model in float64, and a processor of its own."""
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float64)
    return model.eval(), AutoProcessor.from_pretrained(folder)


# --- the slow way ---------------------------------------------------------------------------------


def asked(kind):
    """(messages, the prompt's words as written by hand, pictures) of many forms."""
    small, wide, tall = tiny.picture(9, 12), tiny.picture(20, 61), tiny.picture(50, 18)
    system = {"role": "system", "content": "Answer shortly."}
    long = "How many red squares are there in the picture?"
    single = [
        (user_message("What is this?", [small]), "What is this?", [small]),
        (user_message(long, [wide]), long, [wide]),
        (user_message("Where is it?", [tall]), "Where is it?", [tall]),
        (user_message("Say more.", []), "Say more.", []),
        (user_message(long, []), long, []),
    ]
    if kind == "fuyu":
        # `<s>` and the mark of the answer are the processor's where there is a picture.
        forms = [(one, f"{words}\n", pictures) for one, words, pictures in single]
        return [
            *forms,
            ([system, *single[0][0]], "Answer shortly.\nWhat is this?\n", [small]),
        ]
    turns = [
        *user_message("What is this?", [tall]),
        {"role": "assistant", "content": "a red square"},
        *user_message("Where is it?", []),
    ]
    two = user_message("Which is red?", [small, wide])
    if kind == "idefics3":
        forms = [
            (one, f"User:{'<image>' * len(pictures)} {words}\nAssistant:", pictures)
            for one, words, pictures in single
        ]
        return [
            *forms,
            ([system, *single[0][0]], f"System: Answer shortly.\n{forms[0][1]}", [small]),
            (two, "User:<image><image> Which is red?\nAssistant:", [small, wide]),
            (
                turns,
                "User:<image> What is this?\nAssistant: a red square\nUser: Where is it?\n"
                "Assistant:",
                [tall],
            ),
        ]
    forms = [
        (one, "USER: " + "<image>\n" * len(pictures) + words + " ASSISTANT:", pictures)
        for one, words, pictures in single
    ]
    return [
        *forms,
        ([system, *single[0][0]], f"Answer shortly. {forms[0][1]}", [small]),
        (two, "USER: <image>\n<image>\nWhich is red? ASSISTANT:", [small, wide]),
        (
            turns,
            "USER: <image>\nWhat is this? ASSISTANT: a red square USER: Where is it? ASSISTANT:",
            [tall],
        ),
    ]


def slow_inputs(kind, exact, words, pictures):
    _, processor = exact
    if kind == "fuyu":
        return fuyu_inputs(processor, words, pictures)
    inputs = processor(
        text=f"<s>{words}", images=pictures or None, add_special_tokens=False, return_tensors="pt"
    )
    inputs.pop("token_type_ids", None)
    return inputs.to(dtype=torch.float64)


def fuyu_inputs(processor, words, pictures):
    """Rows of patches with a line mark behind each, `<s>`, the words, the answer's mark."""
    tokens, size = processor.tokenizer, other_models.PATCH
    ids, patches = [], []
    for picture in pictures:
        bound = processor.image_processor.size
        scale = min(bound.height / picture.height, bound.width / picture.width, 1)
        height, width = int(picture.height * scale), int(picture.width * scale)
        if scale < 1:
            picture = picture.resize((width, height), Image.Resampling.BILINEAR)
        # Padded by 1 of 255 in the library, before values are scaled.
        rows, cols = -(-height // size), -(-width // size)
        pixels = np.ones((rows * size, cols * size, 3))
        pixels[:height, :width] = np.asarray(picture)
        for row in range(rows):
            for col in range(cols):
                patch = pixels[row * size : (row + 1) * size, col * size : (col + 1) * size]
                patches.append(torch.tensor(patch.reshape(-1) / 255 * 2 - 1))
                ids.append(tokens.convert_tokens_to_ids("|SPEAKER|"))
            ids.append(tokens.convert_tokens_to_ids("|NEWLINE|"))
    ids.append(tokens.convert_tokens_to_ids("<s>"))
    ids += tokens(words, add_special_tokens=False)["input_ids"]
    ids.append(tokens.convert_tokens_to_ids("<0x04>"))
    seen = {} if not patches else {"image_patches" if OLD else "pixel_values": torch.stack(patches)}
    return {
        "input_ids": torch.tensor([ids]),
        "attention_mask": torch.ones(1, len(ids)).long(),
    } | seen


@torch.no_grad()
def continued(model, inputs, ids):
    """Logits behind a prompt and some ids, by one pass over all of it."""
    more = torch.tensor([ids], dtype=torch.long)
    whole = dict(inputs)
    whole["input_ids"] = torch.cat([inputs["input_ids"], more], dim=1)
    whole["attention_mask"] = torch.ones_like(whole["input_ids"])
    return model(**whole).logits[0, inputs["input_ids"].shape[1] - 1 :].double()


def slow_answer(kind, exact, words, pictures, count):
    """(text, ids) of a greedy answer."""
    model, processor = exact
    inputs, ids = slow_inputs(kind, exact, words, pictures), []
    while len(ids) < count and (not ids or ids[-1] != processor.tokenizer.eos_token_id):
        ids.append(int(continued(model, inputs, ids)[-1].argmax()))
    return processor.tokenizer.decode(ids, skip_special_tokens=True).strip(), ids


# --- answers --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def slow(kind, exact):
    """The slow way's (text, ids, prompt ids) of each question."""
    return [
        (
            *slow_answer(kind, exact, words, pictures, 5),
            slow_inputs(kind, exact, words, pictures)["input_ids"][0],
        )
        for _, words, pictures in asked(kind)
    ]


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_answers_are_those_of_the_slow_way(kind, engine, slow, batch_size):
    answers = engine.answer(
        [messages for messages, _, _ in asked(kind)], max_new_tokens=5, batch_size=batch_size
    )
    for answer, (text, ids, prompt) in zip(answers, slow, strict=True):
        assert (answer.token_ids, answer.text) == (ids, text)
        assert answer.prompt_tokens == len(prompt)
        assert answer.image_tokens == int((prompt == engine.model.config.image_token_id).sum())
    assert len({text for text, _, _ in slow}) > len(slow) // 2  # pictures and words matter


def test_answers_are_those_of_plain_generate(kind, engine, exact):
    for messages, words, pictures in asked(kind):
        model, processor = exact
        inputs = slow_inputs(kind, exact, words, pictures)
        plain = model.generate(**inputs, max_new_tokens=5, do_sample=False)
        made = plain[0, inputs["input_ids"].shape[1] :]
        text = processor.tokenizer.decode(made, skip_special_tokens=True).strip()
        assert engine.answer([messages], max_new_tokens=5)[0].text == text


def test_an_answer_ends_at_a_stop_text_or_an_end_token(kind, engine, folder):
    conversations = [messages for messages, _, _ in asked(kind)]
    whole = engine.answer(conversations, max_new_tokens=6)
    stop = next(letter for letter in whole[0].text[1:] if letter.isascii())
    stopped = engine.answer(conversations, max_new_tokens=6, stop=(stop,))
    for before, after in zip(whole, stopped, strict=True):
        assert after.text == before.text.split(stop)[0].strip()
        assert stop in before.text or after.token_ids == before.token_ids
    assert stopped[0].finish_reason == "stop"
    # Another engine, whose model ends at the second token of the first answer.
    ending = TransformersEngine.from_pretrained(folder)
    ending.model.generation_config.eos_token_id = whole[0].token_ids[1]
    ended = ending.answer(conversations, max_new_tokens=6)
    end = whole[0].token_ids[1]
    for before, after in zip(whole, ended, strict=True):
        length = before.token_ids.index(end) + 1 if end in before.token_ids else 6
        assert after.token_ids == before.token_ids[:length]
        assert (after.finish_reason == "stop") == (end in before.token_ids)


def test_drawn_answers_depend_on_the_seed_and_not_on_the_batch(engine, kind):
    conversations = [messages for messages, _, _ in asked(kind)][:4]
    draw = partial(engine.answer, conversations, max_new_tokens=5, temperature=1.0)
    first, again, other = draw(seed=1), draw(seed=1, batch_size=1), draw(seed=2)
    assert [one.text for one in first] == [one.text for one in again]
    assert [one.text for one in first] != [one.text for one in other]


def test_nothing_asked_nothing_answered(engine):
    assert engine.answer([]) == [] and engine.log_likelihood([], []) == []


# --- likelihoods ----------------------------------------------------------------------------------

OPTIONS = ("two", "a red square", "top left", "there is a small blue ball below the green box")


@pytest.mark.parametrize("batch_size", [1, 8])
def test_likelihoods_are_those_of_the_slow_way(kind, engine, exact, batch_size):
    model, processor = exact
    questions = [one for one in asked(kind) for _ in range(2)]
    options = [OPTIONS[place % 4] for place in range(len(questions))]
    scores = engine.log_likelihood(
        [messages for messages, _, _ in questions], options, batch_size=batch_size
    )
    for score, (_, words, pictures), option in zip(scores, questions, options, strict=True):
        inputs = slow_inputs(kind, exact, words, pictures)
        # Each of these tokenizers puts the blank in front of a text itself.
        ids = processor.tokenizer(option, add_special_tokens=False)["input_ids"]
        logits = continued(model, inputs, ids)[:-1]
        each = logits.log_softmax(-1).gather(1, torch.tensor(ids)[:, None])
        assert score.tokens == len(ids)
        assert abs(score.total - float(each.sum())) <= PER_TOKEN * len(ids)
        assert score.greedy == (logits.argmax(-1).tolist() == ids)


def test_what_a_model_says_is_greedy(kind, engine):
    """The text of a greedy answer, where it is tokenised as it was said."""
    seen = 0
    for messages, _, _ in asked(kind):
        answer = engine.answer([messages], max_new_tokens=1)[0]
        if not answer.text.isascii() or not answer.text.isprintable() or not answer.text:
            continue
        score = engine.log_likelihood([messages], [answer.text])[0]
        if engine.tokenizer.decode(answer.token_ids)[0] == " " and score.tokens == 1:
            seen += 1
            assert score.greedy
    other = engine.log_likelihood([messages], [OPTIONS[3]])[0]
    assert not other.greedy


@pytest.mark.parametrize("text", ["", "  ", "two</s>"])
def test_continuations_that_are_none_are_refused(text, tmp_path):
    engine = TransformersEngine.from_pretrained(other_models.save("llava", tmp_path / "m"))
    said = refused(lambda: engine.log_likelihood([user_message("What?", [])], [text]))
    assert "ends answers" in said if text.strip() else "is empty" in said


# --- what is refused ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def llava(tmp_path_factory):
    """A LLaVA folder; read-only."""
    return other_models.save("llava", tmp_path_factory.mktemp("llava") / "model")


def copy_of(folder, place):
    return shutil.copytree(folder, place / "copy")


def test_a_folder_without_chat_template_says_how_to_give_one(llava, tmp_path):
    folder = copy_of(llava, tmp_path)
    (folder / "chat_template.jinja").unlink()
    said = refused(lambda: open_answerer(folder))
    assert "no chat template" in said and "chat_template.jinja" in said
    (folder / "chat_template.jinja").write_text(other_models.VICUNA, encoding="utf-8")
    assert open_answerer(folder).answer([user_message("What?", [])], max_new_tokens=1)


@pytest.mark.parametrize("asked", ["static_cache", "compile_steps"])
def test_only_eve_answers_over_a_fixed_cache(llava, asked):
    said = refused(lambda: open_answerer(llava, **{asked: True}))
    assert "no EVE model" in said and "leave out static_cache" in said


def test_a_hub_id_without_a_network_says_what_to_fetch():
    for name in ("llava-hf/llava-1.5-7b-hf", "adept/fuyu-8b"):
        said = refused(lambda name=name: open_answerer(name))
        assert said.startswith(name) and f"hf download {name} --local-dir" in said
    assert "is no folder" in refused(lambda: open_answerer("./not/there"))


def test_a_model_of_words_alone_is_refused(tmp_path):
    model = AutoModelForCausalLM.from_config(other_models.text_config())
    model.save_pretrained(tmp_path)
    other_models.tokenizer().save_pretrained(tmp_path)
    said = refused(lambda: open_answerer(tmp_path))
    assert "'llama'" in said and "pictures" in said


def test_files_that_are_missing_or_cut_off_are_named(llava, tmp_path):
    folder = copy_of(llava, tmp_path)
    for file in ("processor_config.json", "preprocessor_config.json"):
        (folder / file).unlink(missing_ok=True)
    assert "processor" in refused(lambda: open_answerer(folder))
    whole = copy_of(llava, tmp_path / "cut")
    weights = whole / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert "model.safetensors" in refused(lambda: open_answerer(whole))
    (whole / "config.json").write_text("{}", encoding="utf-8")
    assert "none that the installed transformers knows" in refused(lambda: open_answerer(whole))
    (whole / "config.json").unlink()
    assert "no config.json" in refused(lambda: open_answerer(whole))


def test_weights_that_would_be_random_are_refused(llava, tmp_path):
    folder = copy_of(llava, tmp_path)
    settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    settings["text_config"]["num_hidden_layers"] = 3
    settings["text_config"].pop("layer_types", None)
    (folder / "config.json").write_text(json.dumps(settings), encoding="utf-8")
    assert "lacks 9 weights" in refused(lambda: open_answerer(folder))


def test_a_processor_that_needs_torchvision_says_so(llava, tmp_path):
    """Of those the paper compares with none does; Qwen2-VL's has a part for videos that does."""
    try:
        import torchvision  # noqa: F401
    except ImportError:
        pass
    else:
        pytest.skip("torchvision is installed")
    folder = copy_of(llava, tmp_path)
    (folder / "config.json").write_text('{"model_type": "qwen2_vl"}', encoding="utf-8")
    (folder / "processor_config.json").unlink()
    (folder / "preprocessor_config.json").write_text(
        '{"processor_class": "Qwen2VLProcessor", "image_processor_type": "Qwen2VLImageProcessor"}',
        encoding="utf-8",
    )
    assert "orchvision" in refused(lambda: open_answerer(folder))


def test_conversations_and_settings_that_do_not_fit(llava, tmp_path):
    engine = TransformersEngine.from_pretrained(llava)
    picture = tiny.picture(20, 20)
    ask = engine.answer
    assert "takes 512 in all" in refused(lambda: ask([user_message("red " * 600, [picture])]))
    assert "takes 512 in all" in refused(lambda: ask([user_message("red", [])], max_new_tokens=511))
    mark = [{"role": "user", "content": "What is <image>?"}]
    assert "holds <image>" in refused(lambda: ask([mark]))
    assert "max_image_tokens" in refused(lambda: ask([mark], max_image_tokens=9))
    assert "max_image_tokens" in refused(
        lambda: engine.log_likelihood([mark], ["two"], max_image_tokens=9)
    )
    assert "batch_size is 0" in refused(lambda: ask([mark], batch_size=0))
    assert "one for each" in refused(lambda: engine.log_likelihood([mark], []))
    assert "temperature" in refused(lambda: ask([mark], temperature=-1))
    fuyu = TransformersEngine.from_pretrained(other_models.save("fuyu", tmp_path / "fuyu"))
    two = user_message("Which is red?", [picture, picture])
    assert "takes 1" in refused(lambda: fuyu.answer([two]))
    turns = [
        *user_message("What?", [picture]),
        {"role": "assistant", "content": "two"},
        *user_message("Where?", []),
    ]
    assert "no earlier answers" in refused(lambda: fuyu.answer([turns]))


# --- which engine ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def eve(tmp_path_factory):
    """An EVE folder as runs write it; read-only."""
    folder = tmp_path_factory.mktemp("eve")
    tiny.model().save_pretrained(folder)
    tiny.processor().save_pretrained(folder)
    return folder


def test_eve_folders_are_opened_by_the_engine_of_eve(eve, tmp_path):
    engine = open_answerer(eve, batch_size=3)
    assert isinstance(engine, EveEngine) and engine.batch_size == 3
    question = user_message("What is this?", [tiny.picture(20, 20)])
    plain = EveEngine(tiny.model(), tiny.processor()).answer([question], max_new_tokens=4)
    assert engine.answer([question], max_new_tokens=4)[0].text == plain[0].text
    assert "is an EVE model" in refused(lambda: TransformersEngine.from_pretrained(eve))
    flat = published.tiny_config()
    place = published.write(tmp_path / "published", flat, published.tiny_weights(flat), kind="bin")
    assert "is an EVE model" in refused(lambda: TransformersEngine.from_pretrained(place))
    assert isinstance(open_answerer(place), EveEngine)


def test_lora_folders_are_opened_by_the_engine_of_eve(eve, tmp_path):
    tiny.lora_adapter(tmp_path, base=eve)
    engine = open_answerer(tmp_path)
    assert isinstance(engine, EveEngine)
    # An adapter before its first step changes nothing.
    assert (
        model_facts(engine)["weights_sha256"] == model_facts(open_answerer(eve))["weights_sha256"]
    )


def test_other_models_are_not_quantized(llava):
    assert "no EVE model" in refused(lambda: open_answerer(llava, quantize="nf4"))


# --- facts ----------------------------------------------------------------------------------------


def test_facts_tell_models_apart(llava, eve, tmp_path):
    engine, facts = open_answerer(llava), model_facts(open_answerer(llava))
    assert facts["class"] == "LlavaForConditionalGeneration" and facts["model_type"] == "llava"
    assert facts["parameters"] == sum(one.numel() for one in engine.model.parameters())
    assert (facts["dtype"], facts["device"], facts["commit"]) == ("float32", "cpu", None)
    assert facts == json.loads(json.dumps(facts))
    assert model_facts(engine) == facts  # the same in every load
    shards = copy_of(llava, tmp_path)
    (shards / "model.safetensors").unlink()
    engine.model.save_pretrained(shards, max_shard_size="50KB")
    assert len(list(shards.glob("*.safetensors"))) > 1
    hashes = {facts["weights_sha256"], model_facts(open_answerer(shards))["weights_sha256"]}
    assert len(hashes) == 1
    another = other_models.save("llava", tmp_path / "other", seed=1)
    hashes |= {
        model_facts(open_answerer(another))["weights_sha256"],
        model_facts(open_answerer(llava, dtype=torch.bfloat16))["weights_sha256"],
        model_facts(open_answerer(eve))["weights_sha256"],
    }
    assert len(hashes) == 4
    with torch.no_grad():
        engine.model.lm_head.weight[0, 0] += 1  # the first of the values that are looked at
    assert model_facts(engine)["weights_sha256"] not in hashes


@pytest.mark.parametrize(
    ("kind_of_bits", "package"), [("int8", "torchao"), ("nf4", "bitsandbytes")]
)
def test_quantized_models_have_facts_of_their_own(eve, kind_of_bits, package):
    pytest.importorskip(package, reason="needs the extra quantize")
    facts = model_facts(open_answerer(eve, quantize=kind_of_bits))
    assert facts == model_facts(open_answerer(eve, quantize=kind_of_bits))
    assert facts["weights_sha256"] != model_facts(open_answerer(eve))["weights_sha256"]


def test_the_commit_is_that_of_the_hub_cache(llava, tmp_path):
    commit = "0123456789abcdef0123456789abcdef01234567"
    folder = tmp_path / "models--a--b" / "snapshots" / commit
    shutil.copytree(llava, folder)
    assert model_facts(open_answerer(folder))["commit"] == commit
