"""The table of operations against torch's own counter, which sees every product that really runs.

Counts are whole numbers and have to be equal.  Eager attention computes all pairs, those into the
future too, and the counter knows no kernels of SDPA on a CPU; so the counted passes use eager
attention, and their pairs are given as rows x length^2.  Pairs that have to be seen are counted by
a loop over the mask.
"""

from dataclasses import replace
from fnmatch import fnmatchcase

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

import tiny
from eve_vlm import EveConfig
from eve_vlm.flops import (
    NOTHING,
    Work,
    causal_pairs,
    flops_of,
    terms_of,
    terms_of_config,
    work_of,
)
from eve_vlm.peaks import GPUS, gpu_peak, measured_peak, peak_of
from eve_vlm.train.meter import Meter, counts_of
from small_decoders import FAMILIES, decoder_folder

ROWS, LENGTH, LABELS = 2, 40, 16
GRIDS = [(4, 6), (8, 4)]  # patches: cells 2 x 3 and 4 x 2, tokens 9 and 13
NEW = ["model.vision_tower.*", "model.multi_modal_projector.*", "aligner.*"]


def inputs(*, aligned=False, pictures=True):
    """Two rows without padding, a picture in each, labels in both."""
    ids = torch.full((ROWS, LENGTH), 7)
    labels = torch.full((ROWS, LENGTH), -100)
    labels[0, 20:30], labels[1, 34:] = 5, 6
    batch = {"input_ids": ids, "labels": labels}
    if pictures:
        ids[0, 1:10], ids[1, 1:14] = 3, 3
        batch |= tiny.packed([(2, 3), (4, 2)])
    if aligned and pictures:
        batch["teacher_features"] = torch.randn(14, tiny.TEACHER_WIDTH)
    return batch


def counted(model, batch):
    """Operations of a forward and of a backward pass as torch counts them."""
    with FlopCounterMode(display=False) as forward:
        loss = model(**batch).loss
    with FlopCounterMode(display=False) as backward:
        loss.backward()
    return forward.get_total_flops(), backward.get_total_flops()


def everything_seen(config, *, grids=GRIDS, attention=True):
    """The work of `inputs`, every pair of attention computed; without any where it is not seen."""
    pairs = ROWS * LENGTH**2 if attention else 0
    work = work_of([LENGTH] * ROWS, grids, labels=LABELS, config=config)
    return replace(work, pairs=pairs, window_pairs=pairs)


def prepared(config, trainable=("*",), *, checkpointing=False):
    model = tiny.model(config, attn_implementation="eager").train()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(any(fnmatchcase(name, glob) for glob in trainable))
    if checkpointing:
        model.gradient_checkpointing_enable()
    return model


# --- against the counter --------------------------------------------------------------------------


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointed"])
@pytest.mark.parametrize(
    ("aligned", "trainable"),
    [
        (False, ["*"]),
        (True, ["*"]),
        (True, NEW),  # a frozen decoder passes gradients on
        (False, ["model.multi_modal_projector.*"]),
        (True, ["aligner.*"]),  # nothing goes back into the decoder
        (False, ["lm_head.*"]),
    ],
    ids=["all", "all, aligned", "prealign", "projector", "aligner", "head"],
)
def test_a_step_costs_what_is_counted(aligned, trainable, checkpointing):
    config = tiny.config(aligned=aligned)
    model = prepared(config, trainable, checkpointing=checkpointing)
    forward, backward = counted(model, inputs(aligned=aligned))
    flops = flops_of(terms_of(model, checkpointing=checkpointing), everything_seen(config))
    assert (flops.forward, flops.backward + flops.recomputed) == (forward, backward)
    assert bool(flops.recomputed) == checkpointing
    assert flops.needed == forward + flops.backward and flops.done == forward + backward


def test_sharpened_settings():
    """Deeper projector, cells of a teacher that pool four tokens, larger grids."""
    config = tiny.config(aligned=True, pool_size=2)
    config.projector_depth = 3
    model = prepared(config)
    batch = inputs() | {"teacher_features": torch.randn(3, tiny.TEACHER_WIDTH)}
    forward, backward = counted(model, batch)
    work = everything_seen(config)
    assert work.teacher_cells == 3  # of 2 x 3 and 4 x 2 cells: 1 and 2
    flops = flops_of(terms_of(model), work)
    assert (flops.forward, flops.backward) == (forward, backward)


def test_words_alone_pass_one_blank_cell():
    """A batch without pictures sends one cell through the patch embedding, so that ranks agree."""
    config = tiny.config()
    model = prepared(config)
    forward, backward = counted(model, inputs(pictures=False))
    work = everything_seen(config, grids=[(2, 2)])
    flops = flops_of(terms_of(model), work)
    assert (flops.forward, flops.backward) == (forward, backward)


@pytest.mark.parametrize("family", FAMILIES)
def test_decoders_of_many_families(family, tmp_path):
    """Linear layers of any decoder, GPT-2's too, which are no `nn.Linear`."""
    text = AutoModelForCausalLM.from_pretrained(decoder_folder(tmp_path / family, family)).config
    config = tiny.config()
    config = EveConfig(
        text_config=text,
        vision_config=config.vision_config,
        image_token_id=3,
    )
    model = prepared(config)
    forward, backward = counted(model, inputs())
    flops = flops_of(terms_of(model), everything_seen(config))
    assert (flops.forward, flops.backward) == (forward, backward)
    windows = {term.unit for term in terms_of(model) if term.part == "attention"}
    expected = {"gemma3_text": {"pairs", "window_pairs"}, "mistral": {"window_pairs"}}
    assert windows == expected.get(family, {"pairs"})


def test_lora_on_a_frozen_decoder():
    peft = pytest.importorskip("peft", reason="needs the extra lora")
    config = tiny.config()
    model = prepared(config, NEW)
    settings = peft.LoraConfig(r=4, target_modules=r".*language_model.*_proj")
    wrapped = peft.get_peft_model(model, settings)
    for name, parameter in model.named_parameters():
        if name.startswith(("model.vision_tower.", "model.multi_modal_projector.")):
            parameter.requires_grad_(True)
    forward, backward = counted(wrapped, inputs())
    flops = flops_of(terms_of(model), everything_seen(config))
    assert (flops.forward, flops.backward) == (forward, backward)


def test_from_the_configuration_alone():
    """A 7B model without memory; 6 x parameters x tokens is the well-known estimate."""
    config = EveConfig()
    terms = terms_of_config(config)
    decoder = flops_of(terms, replace(NOTHING, tokens=1), part="decoder")
    head = flops_of(terms, replace(NOTHING, labels=1), part="head")
    weights = 6_738_415_616 - 2 * 32_000 * 4096 - 65 * 4096  # without embedding, head and norms
    assert decoder.forward == 2 * weights and decoder.needed == 6 * weights
    assert head.forward == 2 * 32_000 * 4096
    # Attention of 2048 positions, each seeing itself and what is before it.
    work = work_of([2048], labels=0, config=config)
    attention = flops_of(terms, work, part="attention").forward
    assert attention == 32 * 4 * 4096 * 2048 * 2049 // 2


def test_unknown_layers_are_refused():
    config = tiny.config(model_type="mixtral", num_local_experts=2, num_experts_per_tok=1)
    message = tiny.refused(lambda: terms_of_config(config), end=".")
    assert "mixtral" in message and "layer 0" in message


# --- what has to be done --------------------------------------------------------------------------


@pytest.mark.parametrize("window", [None, 1, 3, 50])
@pytest.mark.parametrize("length", [0, 1, 2, 3, 7, 40])
def test_pairs_by_a_loop(length, window):
    far = length if window is None else window
    seen = sum(0 <= query - key < far for query in range(length) for key in range(length))
    assert causal_pairs(length, window) == seen


def test_batches_are_counted_as_documents_are(tmp_path):
    """Padded, packed, with a window: the same numbers as from the lengths of the documents."""
    config = tiny.config(aligned=True, pool_size=2, sliding_window=4)
    lengths = [9, 5, 3]
    ids = torch.zeros(3, 9, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        ids[row, :length], mask[row, :length] = 7, 1
    labels = torch.where(mask.bool(), 5, -100)
    grids = {"image_grid_thw": torch.tensor([[1, 8, 12], [1, 4, 4]])}
    views = {"teacher_pixel_values": torch.zeros(2, 4, 4, 3)}
    padded = {"input_ids": ids, "attention_mask": mask, "labels": labels, **grids, **views}
    expected = work_of(lengths, [(8, 12), (4, 4)], labels=8 + 4 + 2, config=config)
    assert Work(**counts(padded, config)) == expected
    assert expected.window_pairs == 30 + 14 + 6 and expected.pairs == 45 + 15 + 6
    # The same documents in two rows, the second filled up with three positions of padding.
    ids = torch.tensor([[7] * 9 + [7] * 5, [7] * 3 + [0] * 11])
    positions = torch.tensor([[*range(9), *range(5)], [*range(3), *range(11)]])
    labels = torch.where(positions > 0, 5, -100)
    labels[1, 3:] = -100
    packed = {"input_ids": ids, "position_ids": positions, "labels": labels, **grids, **views}
    assert Work(**counts(packed, config)) == expected
    # Without pictures a blank cell; without views the aligner has nothing to do.
    bare = {"input_ids": ids, "position_ids": positions, "labels": labels}
    assert Work(**counts(bare, config)) == work_of(
        lengths, [(2, 2)], labels=14, config=tiny.config(sliding_window=4)
    )


def counts(batch, config):
    from eve_vlm.train.meter import UNITS

    return dict(zip(UNITS, counts_of(batch, config, pad_token_id=0).tolist(), strict=True))


def test_a_meter_adds_up_and_begins_anew(monkeypatch):
    """Work over time over peak, with a clock that is told what to say."""
    config = tiny.config()
    terms = terms_of_config(config)
    now = iter([10.0, 14.0, 15.0])
    monkeypatch.setattr("eve_vlm.train.meter.time.perf_counter", lambda: next(now))
    from eve_vlm.peaks import Peak

    meter = Meter(terms, config, pad_token_id=0, peak=Peak(1e9, "told"), device=torch.device("cpu"))
    batch = {"input_ids": torch.full((1, 10), 7), "labels": torch.full((1, 10), 5)}
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    meter.count(batch)
    meter.count(batch)
    work = work_of([10, 10], [(2, 2)] * 2, labels=18, config=config)
    assert meter.work() == replace(work, passes=2)
    figures = meter.figures()
    needed = flops_of(terms, replace(work, passes=2)).needed
    assert figures["mfu"] == pytest.approx(needed / 4.0 / 1e9, rel=1e-12)
    assert 0.01 < figures["memory_gib"] < 1000
    assert meter.figures()["mfu"] == 0.0  # nothing was counted since
    now = iter([1.0, 2.0])
    unknown = Meter(terms, config, pad_token_id=0, peak=None, device=torch.device("cpu"))
    assert set(unknown.figures()) == {"memory_gib"}


# --- peaks ----------------------------------------------------------------------------------------

NAMES = {  # as torch.cuda.get_device_name says them
    "NVIDIA H100 80GB HBM3": 989.5,
    "NVIDIA H100 PCIe": 756,
    "NVIDIA H100 NVL": 835.5,
    "NVIDIA H200": 989.5,
    "NVIDIA A100-SXM4-80GB": 312,
    "NVIDIA A100 80GB PCIe": 312,
    "NVIDIA L4": 121,
    "NVIDIA GeForce RTX 4090": 165.2,
    "AMD Instinct MI300X": 1307.4,
    # Not known, a slice, another card, or no such type of numbers: nothing is said.
    "NVIDIA H100": None,
    "NVIDIA H20": None,
    "NVIDIA A100-SXM4-80GB MIG 1g.10gb": None,
    "NVIDIA A10G": None,
    "NVIDIA L40": None,
    "NVIDIA GeForce RTX 3090 Ti": None,
    "NVIDIA GeForce RTX 4090 Laptop GPU": None,
    "NVIDIA GeForce RTX 4090 D": None,
    "Tesla V100-SXM2-16GB": None,
    "Tesla T4": None,
}


@pytest.mark.parametrize("name", NAMES)
def test_peaks_by_name(name):
    found = gpu_peak(name, torch.bfloat16)
    assert (found and found.flops / 1e12) == NAMES[name]
    assert found is None or found.source


def test_types_have_peaks_of_their_own():
    a100 = "NVIDIA A100-SXM4-40GB"
    assert gpu_peak(a100, torch.float32).flops == 19.5e12
    assert gpu_peak(a100, torch.float32, tf32=True).flops == 156e12
    assert gpu_peak("Tesla V100-SXM2-16GB", torch.float16).flops == 125e12
    assert gpu_peak("Tesla V100-SXM2-16GB", torch.float32, tf32=True).flops == 15.7e12


@pytest.mark.parametrize("name", ["tf32", "ieee"])
def test_precision_by_its_newer_name(name, monkeypatch):
    """As transformers sets it for `training.tf32`; torch's older question fails behind that."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100-SXM4-80GB")
    products = torch.backends.cuda.matmul
    before, products.fp32_precision = products.fp32_precision, name
    try:
        found = peak_of(torch.device("cuda", 0), torch.float32)
    finally:
        products.fp32_precision = before
    assert found == gpu_peak("NVIDIA A100-SXM4-80GB", torch.float32, tf32=name == "tf32")
    assert torch.get_float32_matmul_precision() == "highest"  # other tests find it as it was


@pytest.mark.parametrize(
    ("name", "theirs"),
    [
        ("NVIDIA H100 80GB HBM3", "NVIDIA H100"),
        ("NVIDIA A100-SXM4-80GB", "NVIDIA A100"),
        ("NVIDIA L4", "NVIDIA L4"),
        ("AMD Instinct MI300X", "AMD MI300X"),
    ],
)
def test_peaks_agree_with_torch(name, theirs):
    """torch has a table for its profiler, of rounded figures: within 1 %."""
    module = pytest.importorskip("torch._inductor.analysis.device_info")
    known = module.lookup_device_info(theirs)
    # Its L4 has sparse figures without saying so (the data sheet marks them).
    sparse = 2 if theirs == "NVIDIA L4" else known.tops_sparsity_factor
    dense = known.tops[torch.bfloat16] / sparse
    assert gpu_peak(name, torch.bfloat16).flops / 1e12 == pytest.approx(dense, rel=0.01)


def test_every_entry_can_be_found():
    for words, rates in GPUS.items():
        found = gpu_peak(" ".join(words), torch.float16)
        assert found is not None and found.flops == rates.half * 1e12, words


def test_a_cpu_is_measured_and_draws_nothing(monkeypatch):
    """The fastest of three products, by a clock that is told what to say: 1, 0.25 and 2 seconds."""
    state = torch.get_rng_state()
    now = iter([0.0, *(0.0, 0.0, 1.0), *(1.0, 1.0, 1.25), *(1.25, 1.25, 3.25), 5.0])
    monkeypatch.setattr("eve_vlm.peaks.time.perf_counter", lambda: next(now))
    peak = measured_peak(torch.float32, sizes=(64,), seconds=4.0)
    assert peak.flops == 2 * 64**3 / 0.25 and "64 x 64 float32" in peak.source
    monkeypatch.undo()
    # A core of the last twenty years makes a billion operations a second, and none 10^14.
    assert 1e9 < measured_peak(torch.float32).flops < 1e14
    assert torch.equal(state, torch.get_rng_state())
