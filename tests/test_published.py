"""Published checkpoints: load by name or folder, in both formats, and back again. Exact throughout.

The layouts are written by `published.py`, whose names and shapes come from the published facts.
The promise to users: whatever they name, each weight comes out bit for bit, and nothing is lost
without a word. One thing a reader would get wrong: loading by Hub id runs without a network, on a
cache laid out as the Hub's own library lays it out.
"""

import json
import os
import random
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForImageTextToText, AutoProcessor, pipeline

import eve_vlm
import golden_files as golden
import published
import tiny
from eve_vlm import EveConfig, EveForConditionalGeneration, EveForPreTraining, EveProcessor
from eve_vlm.convert_eve_weights_to_hf import convert, convert_state_dict
from eve_vlm.loading import find_model, load_config
from eve_vlm.processing_eve import VICUNA_CHAT_TEMPLATE
from eve_vlm.published_eve import (
    CHECKPOINTS,
    KEY_MAPPING,
    PRESETS,
    find_preprocessor,
    nested_config,
    published_name,
    rename_weight,
    teacher_width,
)
from eve_vlm.published_tokenizer_eve import published_tokenizer

KINDS = ("bin", "safetensors")
refused = partial(tiny.refused, end=".")


def same(model: torch.nn.Module, expected: dict[str, torch.Tensor]) -> None:
    """Every weight of the model is the expected one, bit for bit."""
    state = model.state_dict()
    assert state.keys() == expected.keys()
    for name, weight in state.items():
        assert torch.equal(weight, expected[name]), name


@pytest.fixture(scope="module")
def weights():
    """Tiny random weights under published names; read-only."""
    return published.tiny_weights(published.tiny_config())


@pytest.fixture(scope="module", params=KINDS)
def folder(request, tmp_path_factory, weights):
    """A published folder of each format; read-only."""
    place = tmp_path_factory.mktemp(request.param)
    return published.write(place, published.tiny_config(), weights, kind=request.param)


# --- real shapes, without memory ------------------------------------------------------------------


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_real_shapes(name):
    """All 7B weights by name and shape, both ways, with the sizes that are published."""
    flat = published.config_7b(name)
    preprocessor = find_preprocessor(flat)
    config = EveConfig(**nested_config(flat, preprocessor, teacher_hidden_size=teacher_width(flat)))
    with torch.device("meta"):
        model = EveForPreTraining(config)
        listed = {
            name: torch.empty(shape)
            for part in (
                published.decoder_shapes(flat),
                published.picture_shapes(flat),
                published.aligner_shapes(flat, 1024),
                published.teacher_shapes(1024, 24),
            )
            for name, shape in part
        }
    expected = {name: tuple(weight.shape) for name, weight in model.state_dict().items()}
    found = convert_state_dict(listed, aligner=True)
    assert {name: tuple(weight.shape) for name, weight in found.items()} == expected
    answering = convert_state_dict(listed)
    assert sum(weight.numel() for weight in answering.values()) == 6_768_398_336
    assert len(listed) - len(found) == 2 * (4 + 24)  # both copies of the teacher
    for ours in expected:
        assert rename_weight(published_name(ours)) == ours
    edge, pool = (1344, 2) if "HD" in name else (672, 1)
    assert preprocessor["image_size"] == edge
    assert config.alignment_config.pool_size == pool
    assert config.dtype == config.text_config.dtype == torch.bfloat16
    assert config.image_token_id == 32000


def test_presets_are_the_golden_preprocessors():
    """The golden numbers were made with these files; only keys without effect are left out."""
    compared = 0
    for name, settings in golden.processors().items():
        preset = PRESETS.get(Path(name).name)
        if preset is not None:
            assert preset == {key: settings[key] for key in preset}
            compared += 1
    assert compared == len(PRESETS)


# --- from disk ------------------------------------------------------------------------------------


def test_load(folder, weights):
    model, processor = eve_vlm.load(folder, device="cpu")
    assert type(model) is EveForConditionalGeneration and not model.training
    same(model, convert_state_dict(weights))
    assert processor.image_processor.size["longest_edge"] == 672
    assert processor.image_token_id == model.config.image_token_id == 704
    assert model.generation_config.eos_token_id == 2
    assert model.generation_config.temperature in (None, 1.0)


def test_the_classes_of_the_library(folder, weights):
    expected = convert_state_dict(weights)
    same(EveForConditionalGeneration.from_pretrained(folder), expected)
    same(AutoModelForImageTextToText.from_pretrained(folder), expected)
    headless = AutoModel.from_pretrained(folder)
    inside = {k.removeprefix("model."): v for k, v in expected.items() if k != "lm_head.weight"}
    same(headless, inside)
    for cls in (AutoProcessor, EveProcessor):
        processor = cls.from_pretrained(folder)
        assert type(processor) is EveProcessor
        assert processor.chat_template == VICUNA_CHAT_TEMPLATE


def test_a_pipeline(folder):
    """The shortest way that users know; the same words as our engine's."""
    from eve_vlm.serve.engine import EveEngine, user_message

    picture = tiny.picture(90, 60)
    messages = user_message("What is this?", [picture])
    pipe = pipeline("image-text-to-text", model=str(folder), device="cpu")
    said = pipe(text=messages, max_new_tokens=5, return_full_text=False)[0]["generated_text"]
    engine = EveEngine(*eve_vlm.load(folder, device="cpu"))
    assert said.strip() == engine.generate([messages], max_new_tokens=5)[0]


def test_the_golden_weights_in_their_own_layout(tmp_path):
    """The recorded model, as a folder: the same logits as from its state dict, to 1e-5 (see below)."""
    import golden_product

    source = next(path for path in (golden.FOLDER / "model").iterdir() if path.is_dir())
    flat = golden.read_json(source / "config_inference.json")
    weights = dict(golden.published_weights(source))
    place = published.write(tmp_path / "published", flat, weights, kind="bin", shards=2)
    own = golden.processors()[flat["mm_vision_tower"]]
    (place / "preprocessor_config.json").write_text(json.dumps(own), encoding="utf-8")
    model, processor = eve_vlm.load(place, device="cpu")
    known = golden_product.inference_model(source)
    inputs = processor(text="<image>\nWhat?", images=tiny.picture(90, 60), return_tensors="pt").to(
        "cpu"
    )
    with torch.no_grad():
        found, expected = model(**inputs).logits, known(**inputs).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("cls", [EveForConditionalGeneration, AutoModelForImageTextToText])
def test_the_classes_list_what_is_missing_or_surplus(tmp_path, weights, cls):
    """As `eve_vlm.load` does: nothing is filled with random numbers, nothing dropped."""
    gone = "model.vision_tower.global_attention.q.1.weight"
    less = {name: weight for name, weight in weights.items() if name != gone}
    place = published.write(tmp_path / "less", published.tiny_config(), less, kind="bin")
    text = refused(lambda: cls.from_pretrained(place))
    assert "lacks 1 weights (model.vision_tower.class_attention.query.weight)" in text
    assert "lacks 1 weights" in refused(lambda: eve_vlm.load(place, device="cpu"))
    more = weights | {"model.vision_tower.extra": torch.ones(2)}
    place = published.write(tmp_path / "more", published.tiny_config(), more, kind="bin")
    assert "surplus 1 weights (model.vision_tower.extra)" in refused(
        lambda: cls.from_pretrained(place)
    )
    _, report = EveForConditionalGeneration.from_pretrained(place, output_loading_info=True)
    assert report["unexpected_keys"] == {"model.vision_tower.extra"}


def test_what_is_saved_is_ours(tmp_path, folder, weights):
    """Also from a published file; and the library's own layout of a decoder stays as it is."""
    model, processor = eve_vlm.load(folder, device="cpu")
    model.save_pretrained(tmp_path / "a")
    processor.save_pretrained(tmp_path / "a")
    expected = convert_state_dict(weights)
    assert load_file(tmp_path / "a" / "model.safetensors").keys() == expected.keys()
    same(eve_vlm.load(tmp_path / "a", device="cpu").model, expected)
    mixture = tiny.model(tiny.config(model_type="mixtral", num_local_experts=2))
    mixture.save_pretrained(tmp_path / "b")
    names = load_file(tmp_path / "b" / "model.safetensors").keys()
    assert "model.language_model.layers.0.block_sparse_moe.experts.0.w1.weight" in names
    same(EveForConditionalGeneration.from_pretrained(tmp_path / "b"), mixture.state_dict())


def test_the_aligner_only_where_it_is_asked_for(tmp_path, weights):
    teacher = tmp_path / "teacher"
    teacher.mkdir()
    (teacher / "config.json").write_text(json.dumps({"vision_config": {"hidden_size": 8}}))
    flat = published.tiny_config(mm_vision_tower_clip=str(teacher))
    place = published.write(tmp_path / "model", flat, weights, kind="safetensors")
    assert type(eve_vlm.load(place, device="cpu").model) is EveForConditionalGeneration
    model = eve_vlm.load(place, device="cpu", aligner=True).model
    assert type(model) is EveForPreTraining
    same(model, convert_state_dict(weights, aligner=True))
    unknown = published.tiny_config(mm_vision_tower_clip="a/teacher")
    (place / "config.json").write_text(json.dumps(unknown))
    assert "no aligner" in refused(lambda: eve_vlm.load(place, device="cpu", aligner=True))


def test_a_folder_s_own_preprocessor_wins(tmp_path, weights):
    place = published.write(tmp_path / "a", published.tiny_config(), weights, kind="bin")
    own = PRESETS["eve-patch14-anypixel-672"] | {"image_size": 1344}
    (place / "preprocessor_config.json").write_text(json.dumps(own))
    assert EveProcessor.from_pretrained(place).image_processor.size["longest_edge"] == 1344
    assert load_config(place).alignment_config.pool_size == 2


def test_the_folder_that_the_configuration_names(tmp_path, weights):
    """As the published programme wants it: a folder beside, under the name in the configuration."""
    flat = published.tiny_config(mm_vision_tower="openai/mine")
    place = published.write(tmp_path / "a", flat, weights, kind="bin")
    text = refused(lambda: load_config(place))
    assert "openai/mine" in text and "eve-patch14-anypixel-672" in text
    named = place / "openai" / "mine"
    named.mkdir(parents=True)
    own = PRESETS["eve-patch14-anypixel-672"] | {"conv_stride": 3, "image_size": 1008}
    (named / "preprocessor_config.json").write_text(json.dumps(own))
    assert load_config(place).vision_config.merge_size == 3
    assert EveProcessor.from_pretrained(place).image_processor.merge_size == 3


BY_NAME = """
import sys, torch, eve_vlm
from transformers import AutoProcessor, AutoModelForImageTextToText
folder, *names = sys.argv[1:]
here = eve_vlm.load(folder, device="cpu").model.state_dict()
for name in names:
    model, processor = eve_vlm.load(name, device="cpu")
    again = AutoModelForImageTextToText.from_pretrained(name)
    assert model.state_dict().keys() == again.state_dict().keys() == here.keys()
    for key, weight in here.items():
        assert torch.equal(weight, model.state_dict()[key])
        assert torch.equal(weight, again.state_dict()[key])
    assert type(AutoProcessor.from_pretrained(name)) is eve_vlm.EveProcessor
    print(processor.image_processor.size["longest_edge"])
"""


def test_by_name(tmp_path):
    """Through the Hub's own library, from its cache, with the network switched off."""
    published.hub_cache(tmp_path)
    place = next(tmp_path.glob("*EVE-7B-v1.0/snapshots/*"))
    done = subprocess.run(
        [sys.executable, "-c", BY_NAME, place, *CHECKPOINTS],
        env=os.environ | {"HF_HUB_CACHE": str(tmp_path), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() == ["672", "672", "1344"]


# --- memory ---------------------------------------------------------------------------------------

MEMORY = """
import re, sys, threading, time, torch, eve_vlm
import transformers.models.llama.modeling_llama

def private():
    return int(re.search(r"RssAnon:\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024

peak, done = 0, False
def watch():
    global peak
    while not done:
        peak = max(peak, private())
        time.sleep(0.002)

before = private()
watcher = threading.Thread(target=watch)
watcher.start()
model = eve_vlm.load(sys.argv[1], device="cpu").model
done = True
watcher.join()
print(peak - before, sum(weight.nbytes for weight in model.parameters()))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads memory from /proc")
@pytest.mark.parametrize("kind", KINDS)
def test_memory_is_the_model_and_one_shard(tmp_path, kind):
    """bfloat16 shards to a float32 model, so that nothing can stay in the mapped file."""
    flat = published.tiny_config(
        hidden_size=256, intermediate_size=704, vocab_size=40_000, torch_dtype="bfloat16"
    )
    weights = published.tiny_weights(flat, teacher=256)
    published.write(tmp_path, flat, weights, kind=kind, shards=6)
    shard = max(file.stat().st_size for file in tmp_path.glob("*-of-*"))
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, tmp_path],
        env=os.environ | {"OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    peak, model = map(int, done.stdout.split())
    # 24 MiB for everything else: the tokenizer, threads that read, Python's own objects.
    assert peak <= model + shard + 24 * 2**20, f"{peak:,} above {model:,} and {shard:,}"


# --- conversion -----------------------------------------------------------------------------------


def test_convert_and_back(tmp_path, folder, weights):
    ours, back = tmp_path / "ours", tmp_path / "back"
    done = convert(folder, ours, check=True, max_shard_size="40KB")
    expected = convert_state_dict(weights)
    assert done.weights == done.compared == len(expected)
    assert done.parameters == sum(weight.numel() for weight in expected.values())
    assert done.left_behind == {"teacher's copy": 12, "aligner": 10, "computed buffer": 1}
    assert done.shards > 3 and len(list(ours.glob("model-*.safetensors"))) == done.shards
    assert json.loads((ours / "config.json").read_text())["text_config"]["hidden_size"] == 32
    same(eve_vlm.load(ours, device="cpu").model, expected)
    done = convert(ours, back, to="published", check=True)
    assert done.left_behind == {} and done.shards == 1
    stored = load_file(back / "model.safetensors")
    assert stored.keys() == {published_name(name) for name in expected}
    for name, weight in stored.items():
        assert torch.equal(weight, weights[name]), name
    flat = json.loads((back / "config.json").read_text())
    before = published.tiny_config()
    paths = {"_name_or_path", "mm_projector_lr", "vision_tower_lr", "transformers_version"}
    for key in before.keys() - paths - {"requires_cliploss", "rope_scaling", "pretraining_tp"}:
        assert flat[key] == before[key], key
    assert (back / "tokenizer.model").read_bytes() == (folder / "tokenizer.model").read_bytes()


def test_both_layouts_answer_alike(tmp_path, folder):
    """Published folder, converted, and converted back: the same logits.

    To 1e-5, not exactly: weights stay mapped to their file, and how a matrix is aligned there
    decides which kernel the product takes (4.8e-7 seen between equal weights).
    """
    convert(folder, tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "back", to="published")
    logits = []
    for place in (folder, tmp_path / "ours", tmp_path / "back"):
        model, processor = eve_vlm.load(place, device="cpu")
        inputs = processor(
            text="<image>\nWhat is this?", images=tiny.picture(120, 50), return_tensors="pt"
        )
        with torch.no_grad():
            logits.append(model(**inputs).logits)
    for other in logits[1:]:
        torch.testing.assert_close(other, logits[0], rtol=0, atol=1e-5)


def test_convert_to_another_type(tmp_path, folder, weights):
    convert(folder, tmp_path / "half", dtype=torch.bfloat16, check=True)
    stored = load_file(tmp_path / "half" / "model.safetensors")
    for name, weight in convert_state_dict(weights).items():
        assert torch.equal(stored[name], weight.to(torch.bfloat16)), name
    assert load_config(tmp_path / "half").dtype == torch.bfloat16


def test_what_convert_refuses(tmp_path, folder, model, saved_model):
    assert "qwen3" in refused(
        lambda: convert(_saved(tmp_path / "q", model_type="qwen3"), tmp_path / "a", to="published")
    )
    assert "patches of 4" in refused(lambda: convert(saved_model, tmp_path / "b", to="published"))
    assert "no aligner" in refused(lambda: convert(saved_model, tmp_path / "c", aligner=True))
    assert "5GB" in refused(lambda: convert(folder, tmp_path / "d", max_shard_size="much"))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("x")
    assert "not an empty folder" in refused(lambda: convert(folder, tmp_path / "full"))
    assert not any((tmp_path / name).exists() for name in "abcd")


def _saved(place: Path, **settings) -> Path:
    tiny.model(tiny.config(**settings)).save_pretrained(place)
    tiny.processor().save_pretrained(place)
    return place


def test_a_full_disk_is_seen_before(tmp_path, folder, monkeypatch):
    import shutil

    room = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: room._replace(free=1000))
    assert "GB free" in refused(lambda: convert(folder, tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_a_shape_that_does_not_fit(tmp_path, weights):
    flat = published.tiny_config(intermediate_size=64)
    place = published.write(tmp_path / "a", flat, weights, kind="safetensors")
    text = refused(lambda: convert(place, tmp_path / "out"))
    assert "(48, 32) there, (64, 32) expected" in text or "(32, 48) there" in text
    assert "another shape" in refused(lambda: eve_vlm.load(place, device="cpu"))


def test_the_command(tmp_path, folder, capsys):
    """What it prints are the numbers of the conversion."""
    from eve_vlm.cli import app

    out = tmp_path / "ours"
    app(
        ["convert", str(folder), "--out", str(out), "--check", "--dtype", "bfloat16"],
        standalone_mode=False,
    )
    said = capsys.readouterr().out
    parameters = sum(weight.numel() for weight in load_file(out / "model.safetensors").values())
    assert f"{parameters:,} parameters" in said and "in 1 file" in said
    assert "Left behind: 12 weights (teacher's copy)." in said
    assert "Checked: 71 weights read again, all equal bit by bit." in said


# --- names ----------------------------------------------------------------------------------------


def test_the_library_renames_as_we_do(weights):
    """`KEY_MAPPING` is given to the library; one rule fits each name, and it is ours."""
    import re

    for name in weights:
        ours = rename_weight(name)
        fitting = [p for p in KEY_MAPPING if re.match(p, name)]
        if ours is not None:
            assert len(fitting) == 1 and published_name(ours) == name


def test_unknown_weights_are_no_news():
    assert "model.vision_towers.x" in refused(lambda: rename_weight("model.vision_towers.x"))
    assert "model.other.weight" in refused(lambda: published_name("model.other.weight"))


# --- tokenizer ------------------------------------------------------------------------------------


def test_the_sentencepiece_file_gives_the_same_ids():
    """Against sentencepiece itself and the fast file, on 2,000 random texts; exact."""
    processor = pytest.importorskip("sentencepiece").SentencePieceProcessor
    file = golden.FOLDER / "tokenizer" / "tokenizer.model"
    own = published_tokenizer(file, chat_template="x")
    fast = published_tokenizer(file.with_suffix(".json"), chat_template="x")
    pieces = processor(model_file=str(file))
    draw = random.Random(0)
    letters = "abcdefghijklmnopqrstuvwxyz     ABC.,:'0123\n\té漢<>"
    for _ in range(2000):
        text = "".join(draw.choice(letters) for _ in range(draw.randint(1, 40)))
        ids = own(text, add_special_tokens=False)["input_ids"]
        assert ids == pieces.encode(text) == fast(text, add_special_tokens=False)["input_ids"]
        assert own.decode(ids) == fast.decode(ids)
    assert own("a <image> b")["input_ids"] == fast("a <image> b")["input_ids"]


def test_a_checkpoint_without_a_tokenizer(tmp_path, weights):
    place = published.write(tmp_path / "a", published.tiny_config(), weights, kind="bin")
    (place / "tokenizer.json").unlink()
    assert EveProcessor.from_pretrained(place).image_token_id == 704  # from tokenizer.model
    (place / "tokenizer.model").write_bytes(b"no model")
    assert "no sentencepiece model" in refused(lambda: EveProcessor.from_pretrained(place))
    (place / "tokenizer.model").unlink()
    assert "tokenizer.model" in refused(lambda: EveProcessor.from_pretrained(place))


# --- names that lead nowhere ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["BAAI/EVE-7B-HD-v9.9", "nobody", "./nowhere", "/no/where", "a/b/c"]
)
def test_a_name_that_leads_nowhere(name):
    text = refused(lambda: find_model(name))
    assert name in text and ("Hub" in text)


def test_offline_is_said_with_what_works():
    text = refused(lambda: eve_vlm.load("BAAI/EVE-7B-v1.0"))
    assert "network" in text and "folders work without one" in text


def test_eve_v2_is_another_model(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "eve-qwen2"}))
    assert "EVE v2" in refused(lambda: eve_vlm.load(tmp_path))
