"""The scripts that a GPU's figures come from, run whole on the shape `tiny`; and what they rest on.

No test looks at how long anything took.  One thing a reader would get wrong: on a CPU nothing is
recorded and nothing is half precision, so what is held here is that every way is run, that all ways
make the same tokens and the same loss, and that the line of JSON says what was done.
"""

import json
import sys
from types import SimpleNamespace

import pytest
import torch
from benchmarks import decode_speed, training_speed
from torch._dynamo.testing import CompileCounter

import tiny
from eve_vlm import language_loss_eve, pooled_attention_eve, record_attention
from eve_vlm.bench.subjects import SHAPES
from eve_vlm.layer_taps_eve import layers_of
from eve_vlm.train.lora import make_trainable
from eve_vlm.train.sections import LoraSection


@pytest.fixture
def run(monkeypatch, capsys):
    """A script's last line, as data, and what it printed."""

    for module, name in (
        (language_loss_eve, "LOGIT_BYTES"),
        (pooled_attention_eve, "CELLS_ON_GPU"),
    ):
        monkeypatch.setattr(module, name, vars(module)[name])
    precision = torch.get_float32_matmul_precision()

    def call(script, *arguments):
        monkeypatch.setattr(sys, "argv", ["script", *arguments])
        script.main()
        out = capsys.readouterr().out
        return json.loads(out.splitlines()[-1]), out

    yield call
    torch.set_float32_matmul_precision(precision)


def test_decode_speed(run):
    """In float32 all ways make the tokens that a growing cache makes."""
    ways = ("growing", "fixed", "recorded", "joined-recorded")
    data, out = run(
        decode_speed,
        *("--shape", "tiny", "--batch", "1,3", "--ways", ",".join([*ways, "library"])),
        *("--tokens", "6", "--repeats", "1", "--device", "cpu"),
    )
    assert [(one["way"], one["batch"]) for one in data["figures"]] == [
        *((way, batch) for way in ways for batch in (1, 3)),
        ("library", 1),
    ]
    assert {one["alike"] for one in data["figures"]} == {6.0, None}
    for one in data["figures"]:
        assert one["share"] == pytest.approx(one["floor_seconds"] / one["seconds"]["median"])
        assert one["need"]["bytes"] > 0 and f"{one['way']:15}" in out


def test_training_speed(run):
    """Attention, adapters at their start, recomputing and chunks of the loss change nothing."""
    ways = (
        "tokens=400",
        "tokens=400,attention=sdpa",
        "tokens=400,checkpointing=true",
        "tokens=400,tf32=true,loss_mib=1",
        "tokens=400,lora=4,cast=false",
    )
    tries = [argument for way in ways for argument in ("--try", way)]
    data, _ = run(training_speed, "--shape", "tiny", "--repeats", "1", "--device", "cpu", *tries)
    losses = [one["loss"] for one in data["figures"]]
    assert len(losses) == len(ways)
    assert losses == pytest.approx([losses[0]] * len(ways), abs=1e-5)  # sums of another order
    whole, adapted = data["figures"][0], data["figures"][-1]
    assert 0 < adapted["needed_flops"] < whole["needed_flops"]  # no gradients of frozen weights
    assert whole["tokens"] <= 400 and whole["records"] > 1 and whole["waits"] == 0


def test_what_is_tried_is_known():
    for shape, ways in training_speed.TRIED.items():
        assert shape in SHAPES
        for way in ways:
            assert way.keys() <= training_speed.USUAL.keys()
            for name, value in way.items():
                assert type(value) is type(training_speed.USUAL[name])
    with pytest.raises(SystemExit, match="speed is none of attention"):
        training_speed.parsed("speed=1")


def packed_row(grids, words):
    """A packed row of records with a picture each."""
    sizes = [1 + rows * (cols + 1) for rows, cols in grids]
    ids = [torch.tensor([1, *[3] * size, *range(5, 5 + words)]) for size in sizes]
    input_ids = torch.cat(ids)[None]
    return {
        "input_ids": input_ids,
        "position_ids": torch.cat([torch.arange(len(one)) for one in ids])[None],
        "labels": input_ids.masked_fill(input_ids == 3, -100),
        **tiny.packed(grids),
    }


def learning(*, adapters, compiled=None):
    """A model of several layers in train mode, as a recipe makes it, and what learns of it."""
    model = tiny.model(tiny.config(), attn_implementation=record_attention.NAME)
    if compiled is not None:
        for layer in layers_of(model.model.language_model):
            layer.compile(backend=compiled, dynamic=True)
    if adapters:
        recipe = SimpleNamespace(
            lora=LoraSection(rank=4, alpha=8, dropout=0.0),
            stage=SimpleNamespace(trainable=["model.vision_tower.*"]),
            model=SimpleNamespace(init_from="random"),
        )
        make_trainable(model, recipe)
        generator = torch.Generator().manual_seed(0)
        for name, part in model.named_parameters():
            if (
                ".lora_" in name
            ):  # the second one starts as zeros, which gives the first no gradient
                part.data.normal_(std=0.1, generator=generator)
    return model.train(), {name: one for name, one in model.named_parameters() if one.requires_grad}


@pytest.mark.parametrize("adapters", [False, True])
def test_compiled_layers_are_not_compiled_for_every_batch(adapters):
    """Where records end is no part of the code, and every layer has the same.

    A row of one record is causal, which is another code, once.  Losses and gradients are those of
    the layers as they are: 1e-5, sums of another order.
    """
    torch._dynamo.reset()  # code of earlier tests counts towards what is compiled at most
    counter = CompileCounter()
    plain, expected = learning(adapters=adapters)
    model, found = learning(adapters=adapters, compiled=counter)
    assert len(layers_of(model.model.language_model)) > 1 and [*found] == [*expected]
    graphs = []
    for grids, words in (
        ([(4, 4), (2, 3)], 4),
        ([(4, 4), (2, 3), (1, 2)], 5),
        ([(2, 2)] * 5, 7),
        ([(6, 5)], 2),
        ([(3, 3)] * 7, 3),
        ([(5, 2)], 9),
    ):
        losses = [one(**packed_row(grids, words)).loss for one in (plain, model)]
        for loss in losses:
            loss.backward()
        assert losses[1].item() == pytest.approx(losses[0].item(), rel=1e-5)
        graphs.append(counter.frame_count)
    several, one = graphs[0], graphs[3]
    assert graphs == [several] * 3 + [one] * 3 and 0 < several < one < 2 * several
    for name, part in expected.items():
        assert part.grad is not None, name
        largest = max(float(part.grad.abs().max()), 1e-3)
        assert float((found[name].grad - part.grad).abs().max()) <= 1e-5 * largest, name
