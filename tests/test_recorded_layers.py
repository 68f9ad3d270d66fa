"""Layers that are played instead of run: same losses and gradients, and what does not fit goes on.

Without a GPU `stand_in` plays (`recordings.py`): it keeps a recording's habits and computes by the
layer itself.  The real recordings are tested with the marker `gpu`.
"""

from collections.abc import Callable

import peft
import pytest
import torch
from torch import nn
from transformers import (
    Gemma3TextConfig,
    Gemma3TextModel,
    LlamaConfig,
    LlamaModel,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen2Model,
)

from eve_vlm.record_attention import NAME, register
from eve_vlm.train.recorded_layers import FILLING, LONGEST, recorded_layers
from recordings import stand_in
from tiny import refused

ROW = 512
WIDTH = 64
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


USUAL = {
    **{"hidden_size": WIDTH, "intermediate_size": 96, "num_hidden_layers": 4, "vocab_size": 50},
    **{"num_attention_heads": 4, "num_key_value_heads": 2},
}


def decoder(
    *,
    adapters: bool = True,
    device: str = "cpu",
    kinds: tuple[type[PreTrainedConfig], type[PreTrainedModel]] = (LlamaConfig, LlamaModel),
    **settings: object,
) -> PreTrainedModel:
    """A small decoder over packed rows; with adapters, which are then all that learns."""
    register()
    torch.manual_seed(0)
    config = kinds[0](**(USUAL | settings))
    config._attn_implementation = NAME
    made = kinds[1](config).to(device).train()
    if adapters:
        made.requires_grad_(False)
        peft.inject_adapter_in_model(peft.LoraConfig(r=4, target_modules=PROJECTIONS), made)
        for name, weight in made.named_parameters():
            if "lora_B" in name:  # begins as zeros, which would hide what the other does
                nn.init.normal_(weight, std=0.1)
    return made


def row(*lengths: int, device: str = "cpu") -> dict[str, torch.Tensor]:
    """Embedded words of a packed row."""
    generator = torch.Generator().manual_seed(sum(lengths))
    embeds = torch.randn(1, sum(lengths), WIDTH, generator=generator)
    places = torch.cat([torch.arange(length) for length in lengths])[None]
    return {"inputs_embeds": embeds.to(device), "position_ids": places.to(device)}


def loss_of(model: PreTrainedModel, given: dict[str, torch.Tensor]) -> torch.Tensor:
    """Some number that every state counts in."""
    states = model(**given, use_cache=False).last_hidden_state
    assert states.shape == given["inputs_embeds"].shape
    return states.float().pow(3).mean()


def step(model: PreTrainedModel, given: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Loss and all gradients of one step, the row's own among them."""
    embeds = given["inputs_embeds"].clone().requires_grad_()
    loss = loss_of(model, given | {"inputs_embeds": embeds})
    loss.backward()
    found = {"loss": loss.detach(), "row": embeds.grad}
    for name, weight in model.named_parameters():
        if weight.grad is not None:
            found[name] = weight.grad.clone()
            weight.grad = None
    return found


ROWS = [(200, 212, 100), (100, 12, 300), (40,) * 11, (17,), (500,)]


def assert_same(found: list[dict[str, torch.Tensor]], plain: list[dict[str, torch.Tensor]]) -> None:
    """float32's last digits: sums over other numbers of rows of a matrix."""
    for one, other in zip(plain, found, strict=True):
        assert one.keys() == other.keys()
        for name, value in one.items():
            torch.testing.assert_close(other[name], value, rtol=1e-4, atol=1e-7, msg=name)


@pytest.mark.parametrize("adapters", [True, False])
def test_played_rows_have_the_losses_and_gradients_of_plain_ones(adapters: bool) -> None:
    model = decoder(adapters=adapters)
    plain = [step(model, row(*lengths)) for lengths in ROWS]
    with recorded_layers(model, ROW, record=stand_in) as recorded:
        found = [step(model, row(*lengths)) for lengths in ROWS]
    assert (recorded.played, recorded.passed) == (len(ROWS), 0)
    assert_same(found, plain)


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
    assert_same(found, plain)


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
    assert_same(found, plain)


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


WINDOW = 300  # longer than what fills a row, shorter than a record below
LAYER_TYPES = [
    ["full_attention"] * 2 + ["sliding_attention"] * 2,
    ["sliding_attention", "full_attention"] * 2,
]


@pytest.mark.parametrize("types", LAYER_TYPES)
def test_layers_whose_window_cuts_a_record_are_not_played(types: list[str]) -> None:
    """Whichever comes first: the other layers of such a row are played over its own records."""
    window = {"use_sliding_window": True, "sliding_window": WINDOW, "layer_types": types}
    model = decoder(kinds=(Qwen2Config, Qwen2Model), **window)
    rows = [row(200, 212, 100), row(100, 350), row(180, 90), row(320, 20)]
    plain = [step(model, given) for given in rows]
    with recorded_layers(model, ROW, record=stand_in) as recorded:
        found = [step(model, given) for given in rows]
    assert (recorded.played, recorded.passed) == (2, 2)
    assert_same(found, plain)


def test_a_row_of_which_more_is_asked_goes_through_the_layers() -> None:
    """All hidden states, or a mask: both would lie about the records that fill a row."""
    model = decoder()
    more = [{"output_hidden_states": True}, {"attention_mask": torch.ones(1, 70)}]
    with recorded_layers(model, ROW, record=stand_in) as recorded:
        made = [model(**row(30, 40), use_cache=False, **one) for one in more]
    assert (recorded.played, recorded.passed) == (0, 2)
    assert all(one.last_hidden_state.shape[1] == 70 for one in made)
    assert {state.shape[1] for state in made[0].hidden_states} == {70}


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_decoders_without_records_are_refused(attention: str) -> None:
    model = decoder()
    model.set_attn_implementation(attention)
    with pytest.raises(ValueError, match=r"record_layers cannot record a LlamaDecoderLayer"):
        recorded_layers(model, ROW, record=stand_in).__enter__()


def test_decoders_that_turn_in_two_ways_are_refused() -> None:
    """Windows so long that every layer has the same records, but the turning is two."""
    types = ["full_attention", "sliding_attention"] * 2
    kinds = (Gemma3TextConfig, Gemma3TextModel)
    model = decoder(kinds=kinds, adapters=False, head_dim=16, sliding_window=ROW, layer_types=types)
    with pytest.raises(ValueError, match=r"cannot record a Gemma3DecoderLayer .*one rotary"):
        recorded_layers(model, ROW, record=stand_in).__enter__()
    assert all("forward" not in vars(layer) for layer in model.layers)


def test_what_torch_cannot_record_is_said_in_a_sentence() -> None:
    def fails(*given: object) -> list:
        raise RuntimeError(
            "operation not permitted when stream is capturing\nCUDA kernel errors ..."
        )

    text = refused(lambda: recorded_layers(decoder(), ROW, record=fails).__enter__())
    assert "LlamaDecoderLayer (operation not permitted when stream is capturing); set it" in text


def clear(model: PreTrainedModel) -> None:
    """As some optimizers are told to: zeros instead of nothing."""
    for weight in model.parameters():
        if weight.grad is not None:
            weight.grad.zero_()


@pytest.mark.parametrize("between", [clear, lambda model: None])
def test_gradients_that_are_not_used_up_are_refused(between: Callable[..., None]) -> None:
    """They lie where the next ones are written: a second step would count twice what it brings."""
    model = decoder()
    with recorded_layers(model, ROW, record=stand_in):
        loss_of(model, row(100, 12, 300)).backward()
        between(model)
        assert "zero_grad(set_to_none=True)" in refused(lambda: loss_of(model, row(200, 100)))


def test_one_row_at_a_time_and_back_once() -> None:
    model = decoder()
    with recorded_layers(model, ROW, record=stand_in):
        first = loss_of(model, row(100, 12, 300))
        second = loss_of(model, row(200, 100))
        second.backward()
        assert "one row at a time" in refused(first.backward)
        model.zero_grad()
        loss_of(model, row(200, 100))  # never gone back, which is nobody's loss
        third = loss_of(model, row(200, 100))
        third.backward(retain_graph=True)
        assert "one row at a time" in refused(third.backward)


def test_weights_that_move_before_the_first_row_are_refused() -> None:
    model = decoder()
    weight = model.layers[2].mlp.up_proj.base_layer.weight
    with recorded_layers(model, ROW, record=stand_in):
        model.load_state_dict(model.state_dict())  # as a checkpoint is loaded: in place
        step(model, row(100, 12, 300))
    with recorded_layers(model, ROW, record=stand_in):
        weight.data = weight.data.clone()
        assert "replaced or moved" in refused(lambda: loss_of(model, row(100, 12, 300)))
    with recorded_layers(model, ROW, record=stand_in):
        model.load_state_dict(
            {name: one.clone() for name, one in model.state_dict().items()}, assign=True
        )
        assert "replaced or moved" in refused(lambda: loss_of(model, row(100, 12, 300)))


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
