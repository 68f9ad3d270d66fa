"""Layers that are played instead of run: same losses and gradients, and what does not fit goes on.

Without a GPU `stand_in` plays: it keeps a recording's habits (fixed shapes, fixed places) and
computes by the layer itself.  The real recordings are tested with the marker `gpu`.
"""

from collections.abc import Callable

import peft
import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaModel

from eve_vlm.record_attention import NAME, register
from eve_vlm.train.recorded_layers import FILLING, LONGEST, TensorLayer, recorded_layers

ROW = 512
WIDTH = 64
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def decoder(*, adapters: bool = True, device: str = "cpu", **settings: object) -> LlamaModel:
    """A small decoder over packed rows; with adapters, which are then all that learns."""
    register()
    torch.manual_seed(0)
    usual = {
        **{"hidden_size": WIDTH, "intermediate_size": 96, "num_hidden_layers": 4},
        **{"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 50},
    }
    config = LlamaConfig(**(usual | settings))
    config._attn_implementation = NAME
    made = LlamaModel(config).to(device).train()
    if adapters:
        made.requires_grad_(False)
        peft.inject_adapter_in_model(peft.LoraConfig(r=4, target_modules=PROJECTIONS), made)
        for name, weight in made.named_parameters():
            if "lora_B" in name:  # begins as zeros, which would hide what the other does
                nn.init.normal_(weight, std=0.1)
    return made


def stand_in(layers: tuple[TensorLayer, ...], samples: tuple) -> list[Callable[..., torch.Tensor]]:
    """Plays as recordings do: over the sample's places, in shapes that do not change."""

    def played(layer: TensorLayer, sample: tuple, hidden: torch.Tensor, *rest: torch.Tensor):
        assert hidden.shape == sample[0].shape and hidden.requires_grad
        assert all(one is place for one, place in zip(rest, sample[1:], strict=True))
        lengths = rest[-1].diff()
        layer.lengths = tuple(lengths[lengths > 0].tolist())
        return layer(hidden, *rest)

    return [
        lambda *given, layer=layer, sample=sample: played(layer, sample, *given)
        for layer, sample in zip(layers, samples, strict=True)
    ]


def row(*lengths: int, device: str = "cpu") -> dict[str, torch.Tensor]:
    """Embedded words of a packed row."""
    generator = torch.Generator().manual_seed(sum(lengths))
    embeds = torch.randn(1, sum(lengths), WIDTH, generator=generator)
    places = torch.cat([torch.arange(length) for length in lengths])[None]
    return {"inputs_embeds": embeds.to(device), "position_ids": places.to(device)}


def step(model: LlamaModel, given: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Loss and all gradients of one step, the row's own among them."""
    embeds = given["inputs_embeds"].clone().requires_grad_()
    states = model(**given | {"inputs_embeds": embeds}, use_cache=False).last_hidden_state
    assert states.shape == embeds.shape
    loss = states.float().pow(3).mean()
    loss.backward()
    found = {"loss": loss.detach(), "row": embeds.grad}
    for name, weight in model.named_parameters():
        if weight.grad is not None:
            found[name] = weight.grad.clone()
            weight.grad = None
    return found


ROWS = [(200, 212, 100), (100, 12, 300), (40,) * 11, (17,), (500,)]


@pytest.mark.parametrize("adapters", [True, False])
def test_played_rows_have_the_losses_and_gradients_of_plain_ones(adapters: bool) -> None:
    model = decoder(adapters=adapters)
    plain = [step(model, row(*lengths)) for lengths in ROWS]
    with recorded_layers(model, ROW, record=stand_in) as recorded:
        found = [step(model, row(*lengths)) for lengths in ROWS]
    assert (recorded.played, recorded.passed) == (len(ROWS), 0)
    for one, other in zip(plain, found, strict=True):
        assert one.keys() == other.keys()
        for name, value in one.items():
            # Sums over other numbers of rows of a matrix: float32's last digits.
            torch.testing.assert_close(other[name], value, rtol=1e-4, atol=1e-7, msg=name)


def test_what_is_recorded_may_be_compiled_and_once_for_all_layers() -> None:
    graphs = []

    def keep(graph: torch.fx.GraphModule, samples: list[torch.Tensor]) -> Callable[..., object]:
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    model = decoder()
    plain = [step(model, row(*lengths)) for lengths in ROWS]
    compiled = {"dynamic": False, "backend": keep}
    with recorded_layers(model, ROW, compiled=compiled, record=stand_in):
        found = [step(model, row(*lengths)) for lengths in ROWS]
    # Before the attention and behind it, which is not compiled; not for each of four layers.
    assert len(graphs) <= 4
    for one, other in zip(plain, found, strict=True):
        for name, value in one.items():
            torch.testing.assert_close(other[name], value, rtol=1e-4, atol=1e-7, msg=name)


def test_rows_that_do_not_fit_go_through_the_layers() -> None:
    model = decoder()
    too_many = row(*[4] * 60)  # more records than half a dozen positions each
    long = row(ROW + 1)
    two = {name: torch.cat([value, value]) for name, value in row(30, 40).items()}
    plain = [step(model, given) for given in (too_many, long, two)]
    with recorded_layers(model, ROW, record=stand_in) as recorded:
        found = [step(model, given) for given in (too_many, long, two)]
        assert (recorded.played, recorded.passed) == (0, 3)
        with torch.no_grad():
            model(**row(30, 40), use_cache=False)
        assert (recorded.played, recorded.passed) == (0, 3), "answering is no step"
    for one, other in zip(plain, found, strict=True):
        for name, value in one.items():
            torch.testing.assert_close(other[name], value, rtol=1e-4, atol=1e-7, msg=name)


def test_the_decoder_is_left_as_it_was() -> None:
    model = decoder()
    layer = model.layers[1]
    mark = layer.forward
    layer.forward = mark  # a forward of its own, as other tools put there
    with pytest.raises(RuntimeError, match="stop"), recorded_layers(model, ROW, record=stand_in):
        assert layer.forward is not mark
        raise RuntimeError("stop")
    assert layer.forward is mark
    assert "forward" not in vars(model) and "forward" not in vars(model.layers[0])


def test_decoders_that_turn_otherwise_are_refused() -> None:
    model = decoder()
    model.set_attn_implementation("eager")
    with pytest.raises(ValueError, match=r"record_layers cannot record a LlamaDecoderLayer"):
        recorded_layers(model, ROW, record=stand_in).__enter__()


def test_what_fills_a_row_is_shorter_than_what_is_played() -> None:
    assert FILLING <= LONGEST


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="records CUDA graphs")
def test_recordings_on_a_gpu_have_the_losses_and_gradients_of_plain_steps() -> None:
    """Twice through the same rows, so that nothing of the row before is left in memory."""
    model = decoder(device="cuda", hidden_size=WIDTH, num_attention_heads=2, num_key_value_heads=1)
    autocast = torch.autocast("cuda", torch.bfloat16)
    rows = [row(*lengths, device="cuda") for lengths in ROWS]
    with autocast:
        plain = [step(model, given) for given in rows]
    with recorded_layers(model, ROW, half=torch.bfloat16) as recorded, autocast:
        found = [step(model, given) for given in [*rows, *rows]]
    assert (recorded.played, recorded.passed) == (2 * len(rows), 0)
    for one, other in zip([*plain, *plain], found, strict=True):
        for name, value in one.items():
            # Products in bfloat16, split for other shapes: a hundredth of the largest.
            error = (other[name].float() - value.float()).abs().max()
            assert error <= 0.02 * value.float().abs().max() + 1e-8, (name, float(error))
