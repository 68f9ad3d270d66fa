"""Memory estimates against measured peaks, against formulas by hand, and `eve fits` itself.

The measured peaks are the resident sizes of fresh processes that really train and answer
(`benchmarks/measure_memory.py`): two of them here, all with `--slow`. One thing a reader would get
wrong: the run without memory and a run with it are compared too, operation by operation, because a
peak can agree by chance.
"""

import importlib.util
import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import tiny
from eve_vlm import EveConfig
from eve_vlm.memory.estimate import MemoryModel
from eve_vlm.memory.formulas import Sizes, Trained, Workload, held
from eve_vlm.memory.machine import (
    Device,
    human_bytes,
    parse_bytes,
    smallest_change,
    this_machine,
)
from eve_vlm.memory.trace import CACHE, GRADIENTS, LiveBytes
from eve_vlm.train.muon import MuonAdamW
from eve_vlm.train.parameters import optimizer_groups
from test_cli import eve, refused  # noqa: F401
from test_muon import stage as stage_with_muon

ROOT = Path(__file__).resolve().parent.parent
MEASURABLE = Path("/proc/self/clear_refs").exists()


def measuring():
    """The measuring program as a module."""
    spec = importlib.util.spec_from_file_location(
        "measure_memory", ROOT / "benchmarks" / "measure_memory.py"
    )
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


MEASURE = measuring()
QUICK = ("optimizer", "weights")


def work(**settings) -> Workload:
    """A training step on one picture of 2 x 2 cells, 7 tokens."""
    return Workload(**{"training": True, "length": 64, "rows": 2, "cols": 2, **settings})


def answering(**settings) -> Workload:
    """Ten words of answer about the same picture."""
    return work(training=False, new_tokens=10, **settings)


def llama(layers: int = 2, **text) -> EveConfig:
    """A Llama of width 256 whose sizes are easy to write down."""
    shape = MEASURE.decoder(256, layers, intermediate_size=640, **text)
    return EveConfig(text_config=shape, vision_config={"hidden_size": 32}, image_token_id=3)


# --- measured -------------------------------------------------------------------------------------


@pytest.mark.skipif(not MEASURABLE, reason="resident peaks are read from Linux's /proc")
@pytest.mark.parametrize(
    "name",
    [
        name if name in QUICK else pytest.param(name, marks=pytest.mark.slow)
        for name in MEASURE.CASES
    ],
)
def test_estimates_are_within_15_percent_of_measured_peaks(name):
    """15 % is what `eve fits` promises; the safety margin on top of every estimate is 10 %."""
    if name == "lora":
        pytest.importorskip("peft")
    for case, what, guess, real in MEASURE.compare([name]):
        assert guess == pytest.approx(real, rel=0.15), (case, what)


# --- the run without memory ----------------------------------------------------------------------

DECODERS = {
    "llama": {},
    "mistral": {"sliding_window": 32},
    "qwen2": {},
    "qwen3": {},
    "gemma3_text": {"sliding_window": 32},
    "smollm3": {},
    "olmo2": {},
}


@pytest.mark.parametrize("model_type", DECODERS)
@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "checkpointed"])
def test_the_run_without_memory_makes_what_a_real_one_makes(model_type, checkpointing):
    """Forward and backward on real tensors: the same peak, to the bytes of a few integers."""
    config = tiny.config(model_type=model_type, **DECODERS[model_type])
    asked = work(length=96, gradient_checkpointing=checkpointing, batch=2)
    memory = MemoryModel(config)
    expected = memory._run(asked)[1]["step"].bytes
    model = tiny.model(config).train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    inputs = tiny.packed([(2, 2)] * 2)
    ids = torch.zeros(2, 96, dtype=torch.long)
    ids[:, :7] = config.image_token_id
    labels = ids.masked_fill(ids == config.image_token_id, -100)
    counter = LiveBytes()
    counter.ignore(model)
    with counter:
        inputs["pixel_values"] = inputs["pixel_values"].clone()
        model(input_ids=ids, labels=labels, **inputs).loss.backward()
    # Integers count for 2 % of a model this small; the memory of attention's own scratch is none.
    assert expected == pytest.approx(counter.peak.bytes, rel=0.03)


def test_layers_keep_what_the_backward_pass_needs():
    """Another layer of a float32 Llama, by hand, in numbers per token.

    Both norms: their input, its normalised form, their output (3 x 256 each); attention: query,
    key, value, result (4 x 256); feed-forward: gate, its SiLU, up, their product (4 x 640). Beside
    them a few numbers per token: norms' scales, attention's sums.
    """
    asked = work(length=512)
    peaks = [MemoryModel(llama(layers)).estimate(asked).phases for layers in (6, 7)]
    weights = 4 * 256 * (4 * 256 + 3 * 640 + 2) * 3  # a layer's own, and both moments
    kept = [sum(phases["forward and backward"].values()) for phases in peaks]
    by_hand = 4 * (6 * 256 + 4 * 256 + 4 * 640) * 512
    assert kept[1] - kept[0] - weights == pytest.approx(by_hand, rel=0.02)


def test_checkpointing_keeps_one_state_per_layer():
    asked = work(length=512, gradient_checkpointing=True, trainable=("model.vision_tower.*",))
    peaks = [MemoryModel(llama(layers)).estimate(asked).phases for layers in (6, 7)]
    kept = [sum(phases["forward and backward"].values()) for phases in peaks]
    weights = 4 * 256 * (4 * 256 + 3 * 640 + 2)
    assert kept[1] - kept[0] - weights == pytest.approx(4 * 256 * 512, rel=0.02)


def test_the_cache_is_keys_and_values():
    asked = answering(length=200, batch=3)
    phases = MemoryModel(llama(4, num_key_value_heads=1)).estimate(asked).phases
    layers, heads, width = 4, 1, 64
    assert phases["choosing a word"][CACHE] == 2 * layers * heads * width * 4 * 3 * 200
    sliding = llama(4, model_type="gemma3_text", sliding_window=32, num_key_value_heads=1)
    windowed = MemoryModel(sliding).estimate(asked).phases["choosing a word"][CACHE]
    assert windowed < phases["choosing a word"][CACHE] / 2


# --- formulas -------------------------------------------------------------------------------------


def test_zero_shares_sixteen_bytes_a_parameter():
    """ZeRO, section 3: 2 + 2 + 12 bytes; stages 1, 2 and 3 shard 12, 14 and 16 of them."""
    count = 10**9
    sizes = Sizes({"decoder": 2 * count}, count, [Trained(count, 2 * count)], 10**7)
    for stage, expected in ((1, 2 + 2 + 12 / 8), (2, 2 + 14 / 8), (3, 16 / 8)):
        asked = work(dtype=torch.bfloat16, device="cuda", gpus=8, sharding=f"zero{stage}")
        parts = held(sizes, asked)
        named = ("weights: decoder", "float32 master weights", "optimizer's moments", GRADIENTS)
        assert sum(parts[name] for name in named) == expected * count


def test_moments_are_of_the_parameters_type_and_eight_bits_are_two_bytes_and_scales():
    count = 2**20
    sizes = Sizes({"decoder": 2 * count}, count, [Trained(count, 2 * count)], 10**6)
    moments = {
        name: held(sizes, work(dtype=torch.bfloat16, optimizer=name))["optimizer's moments"]
        for name in ("adamw", "adamw8bit", "sgd")
    }
    assert moments == {"adamw": 4 * count, "adamw8bit": 2 * count + 2 * 4 * count // 256, "sgd": 0}


@pytest.mark.parametrize("globs", [("*",), ("*.mlp.*",)])
def test_muon_keeps_one_moment_of_the_matrices_it_moves(globs):
    """As the real optimizer keeps them after a step."""
    config, asked = llama(tie_word_embeddings=True), work(muon=globs)
    counted = held(MemoryModel(config).sizes(asked), asked)["optimizer's moments"]
    model = tiny.model(config)
    optimizer = MuonAdamW(optimizer_groups(model, stage_with_muon(globs)))
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    states = [state.items() for state in optimizer.state.values()]
    kept = [value for state in states for name, value in state if name != "step"]
    assert counted == sum(value.nbytes for value in kept)
    for changes, words in (
        ({"device": "cuda", "sharding": "zero3"}, "whole matrices"),
        ({"optimizer": "sgd"}, "beside AdamW"),
    ):
        text = tiny.refused(
            lambda given=changes: MemoryModel(config).estimate(replace(asked, **given))
        )
        assert words in text


def test_only_what_learns_has_gradients_and_tied_weights_have_one():
    memory = MemoryModel(llama(tie_word_embeddings=True))
    everything = memory.sizes(work())
    model = tiny.model(llama(tie_word_embeddings=True))
    assert sum(everything.weights.values()) == sum(p.nbytes for p in model.parameters())
    assert everything.gradients == sum(everything.weights.values())
    frozen = memory.sizes(work(trainable=("model.vision_tower.*",)))
    assert frozen.gradients == sum(p.nbytes for p in model.model.vision_tower.parameters())
    # Rank x (in + out) of seven linear layers, four of them square.
    lora = memory.sizes(work(lora=8))
    assert lora.weights["LoRA"] == 4 * 2 * 8 * (4 * (256 + 256) + 3 * (256 + 640))


def test_impossible_lengths_are_refused():
    memory = MemoryModel(llama(max_position_embeddings=128))
    assert "beyond the 128 positions" in tiny.refused(lambda: memory.estimate(work(length=129)))
    assert "no room" in tiny.refused(lambda: memory.estimate(work(length=7)))
    assert "no room" in tiny.refused(lambda: memory.estimate(answering(length=17)))


# --- this machine ---------------------------------------------------------------------------------


def test_sizes_are_read_and_written():
    assert parse_bytes("40GiB") == 40 * 2**30 and parse_bytes(" 1.5 gb ") == 1_500_000_000
    written = [human_bytes(int(size * 2**30)) for size in (0, 0.5, 12.34, 1234)]
    assert written == ["< 1 MiB", "512 MiB", "12.3 GiB", "1,234 GiB"]
    for bad in ("40", "GiB", "40 PB", "-1GiB", "0GiB", "a lot"):
        assert "is no size of memory" in tiny.refused(lambda bad=bad: parse_bytes(bad))


def test_this_machine_has_memory():
    memory = this_machine()[0]
    assert memory.kind == "cpu" and 2**28 < memory.bytes < 2**62
    if MEASURABLE:
        total = int(Path("/proc/meminfo").read_text().split()[1]) * 1024
        assert memory.bytes <= total


def test_the_smallest_change_comes_first():
    memory = MemoryModel(llama(8))
    asked = work(length=2048)
    needs = memory.estimate(asked).wanted
    less = smallest_change(memory, asked, Device("RAM", "cpu", needs - 50 * 2**20))
    assert less.words == "gradient checkpointing"
    assert less.estimate.wanted == memory.estimate(less.work).wanted < needs
    much = smallest_change(memory, asked, Device("RAM", "cpu", less.estimate.wanted - 2**22))
    assert "gradient checkpointing" in much.words and "," in much.words
    assert smallest_change(memory, asked, Device("RAM", "cpu", 2**20)) is None
    halved = replace(asked, batch=4, gradient_checkpointing=True, optimizer="adamw_fused")
    needs = memory.estimate(halved).wanted
    half = smallest_change(memory, halved, Device("RAM", "cpu", needs - 2**20))
    assert half.words == "batch 2 x 2 accumulated" and half.work.accumulation == 2
    # Where a GPU does not even hold weights, gradients and moments, only sharing them helps.
    shape = MEASURE.decoder(2048, 8, 32000)
    large = MemoryModel(EveConfig(text_config=shape, image_token_id=3))
    gpu = work(device="cuda", dtype=torch.bfloat16, length=128, trainable=("model.*",))
    assert large.at_least(gpu) > 4 * 2**30
    assert "GPUs" in smallest_change(large, gpu, Device("GPU", "cuda", 4 * 2**30)).words


# --- the command ----------------------------------------------------------------------------------


def test_fits_shows_every_task(eve, saved_model):  # noqa: F811
    code, out, _ = eve("fits", saved_model, "--length", 64)
    assert code == 0
    for task in ("answer", "prealign", "pretrain", "pretrain, LoRA 16", "finetune, LoRA 16"):
        assert any(line.startswith(task) and " yes" in line for line in out.splitlines()), task


def test_fits_shows_parts_and_json_says_the_same(eve, saved_model):  # noqa: F811
    arguments = ("fits", saved_model, "--task", "train", "--length", 64, "--gpu-memory", "40GiB")
    code, out, _ = eve(*arguments)
    assert code == 0 and "optimizer's moments" in out and "it fits" in out
    code, out, _ = eve(*arguments, "--json")
    (data,) = json.loads(out)
    assert code == 0 and data["devices"][0] == {
        "name": "GPU of 40GiB",
        "bytes": 40 * 2**30,
        "fits": True,
    }
    assert data["dtype"] == "bfloat16" and data["sequence"]["length"] == 64


def test_fits_counts_what_the_recipe_moves_by_muon(eve, saved_model):  # noqa: F811
    asked = ("--task", "train", "--stage", "finetune", "--teacher", "none", "--json")
    moments = []
    for options in ([], ["--optimizer", "adamw_fused"]):
        code, out, _ = eve(
            "fits", saved_model, "--recipe", "eve_small_cpu/3_finetune", *asked, *options
        )
        assert code == 0
        moments.append(json.loads(out)[0]["phases"]["optimizer step"]["optimizer's moments"])
    linear = {
        name: module.weight.nbytes
        for name, module in tiny.model().named_modules()
        if isinstance(module, torch.nn.Linear) and name != "lm_head"
    }
    assert moments[1] - moments[0] == sum(linear.values())


def test_fits_takes_recipes_and_configurations(eve, saved_model, tmp_path):  # noqa: F811
    code, out, _ = eve("fits", "tiny/2_pretrain", "--task", "train", "--teacher", "none")
    assert code == 0 and "16 x 256 tokens" in out
    code, out, _ = eve("fits", saved_model / "config.json", "--task", "answer", "--pictures", 0)
    assert code == 0 and "0 pictures" in out
    code, out, _ = eve(
        *("fits", saved_model, "--task", "answer", "--gpu-memory", "100MiB"),
        *("--batch", 2, "--length", 256),
    )
    assert code == 0 and "does not fit" in out and "No change" in out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nowhere/at/all"], "nowhere/at/all"),
        (["."], "holds no model"),
        (["MODEL", "--gpus", "0"], "--gpus is 0"),
        (["MODEL", "--length", "100000"], "beyond the 512 positions"),
        (["MODEL", "--lora", "0"], "--lora is 0"),
        (["MODEL", "--gpu-memory", "many"], "is no size of memory"),
        (["MODEL", "--picture", "big"], "is no picture size"),
        (["MODEL", "--zero", "4"], "--zero is 4"),
        (["MODEL", "--zero", "3", "--fsdp"], "keep one"),
        (["MODEL", "--task", "answer", "--lora", "8"], "--lora is for training"),
        (["MODEL", "--stage", "prealign", "--lora", "8"], "frozen in prealign"),
        (["MODEL", "--recipe", "tiny/9"], "no such recipe"),
        (["tiny/2_pretrain", "--recipe", "tiny/2_pretrain"], "leave --recipe out"),
    ],
)
def test_fits_refuses_in_one_sentence(refused, saved_model, arguments, said):  # noqa: F811
    given = [str(saved_model) if word == "MODEL" else word for word in arguments]
    assert said in refused("fits", *given)
