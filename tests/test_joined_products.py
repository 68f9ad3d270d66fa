"""Products of one input as one product: the same numbers, the same weights, and who is left alone.

Independent side: the model before its layers were joined, and its files.  One thing a reader would
get wrong: a joined layer shares its memory with its neighbours, which files must not show.
"""

import copy

import pytest
import torch
from joined_products import JoinedLinear, join_products
from torch import nn

import tiny
from eve_vlm import EveForConditionalGeneration


def ids_of(model):
    return torch.randint(5, 300, (2, 9), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("bias", [False, True])
def test_the_same_scores(bias):
    """To float32's rounding: sums of 32 numbers, perhaps in another order."""
    model = tiny.model(tiny.config(attention_bias=bias, mlp_bias=bias))
    with torch.no_grad():
        for name, part in model.named_parameters():
            if name.endswith("bias"):
                part.normal_(generator=torch.Generator().manual_seed(1))
    joined = copy.deepcopy(model)
    assert join_products(joined.model.language_model) == 3 * tiny.LAYERS
    assert join_products(joined.model.language_model) == 0  # once is enough
    with torch.inference_mode():
        expected = model(ids_of(model)).logits
        found = joined(ids_of(model)).logits
    assert float((found - expected).abs().max()) <= 1e-5 * float(expected.abs().max())


def test_one_product_is_seen(monkeypatch):
    """Queries, keys and values from one call, and nothing of it stays behind."""
    model = tiny.model()
    join_products(model.model.language_model)
    calls, product = [], torch.nn.functional.linear

    def linear(x, weight, bias=None):
        calls.append(weight.shape[0])
        return product(x, weight, bias)

    monkeypatch.setattr(torch.nn.functional, "linear", linear)
    with torch.no_grad():
        model.model.language_model.layers[0].self_attn.q_proj(torch.zeros(1, tiny.WIDTH))
        attention = model.model.language_model.layers[0].self_attn
        attention.k_proj(torch.zeros(1, tiny.WIDTH))
        attention.v_proj(torch.zeros(1, tiny.WIDTH))
    assert calls == [8 * (4 + 2 + 2)]
    assert attention.q_proj.joined.waiting == [None] * 3


def test_weights_keep_names_and_files(tmp_path):
    """Saved and loaded again, they are the weights of before, each a matrix of its own."""
    model = tiny.model()
    before = {name: part.clone() for name, part in model.state_dict().items()}
    join_products(model.model.language_model)
    model.save_pretrained(tmp_path)
    after = EveForConditionalGeneration.from_pretrained(tmp_path).state_dict()
    assert before.keys() == model.state_dict().keys() == after.keys()
    assert all(torch.equal(after[name], part) for name, part in before.items())


def test_with_gradients_each_layer_multiplies_alone():
    """Or a weight that learns would not be the one that is multiplied."""
    model, joined = tiny.model(), tiny.model()
    join_products(joined.model.language_model)
    for one in (model, joined):
        one(ids_of(one)).logits.square().mean().backward()
    for (name, part), other in zip(model.named_parameters(), joined.parameters(), strict=True):
        if part.grad is not None:
            assert torch.allclose(part.grad, other.grad), name


def test_what_is_no_plain_matrix_is_left_alone():
    model = tiny.model()
    layers = model.model.language_model.layers

    class Adapted(nn.Linear):
        """Stands for an adapter: a layer that does more."""

    layers[0].self_attn.k_proj.__class__ = Adapted
    layers[1].mlp.up_proj.double()
    assert join_products(model.model.language_model) == 1 + 2 + 3
    kinds = [type(layers[0].self_attn.q_proj), type(layers[1].mlp.gate_proj)]
    assert JoinedLinear not in kinds
