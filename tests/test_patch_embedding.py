"""The patch embedding without keys and values against its plain form, which makes all of them.

The plain form is `oracle/published_shape.py`: canvases, a round for each picture, four keys and
values for each cell. In float64 the two differ by the order of sums alone: 1e-12 relative to the
largest entry is asked, where 3e-16 (values) and 2e-15 (gradients) are seen. `test_modeling.py` holds
the layer against loops, and `test_goldens.py` against the published programme.
"""

import copy

import pytest
import torch

import tiny
from eve_vlm import pooled_attention_eve
from eve_vlm.pooled_attention_eve import at_least_float32
from oracle import published_shape

EXACT = 1e-12
SIDE = 7 * tiny.MERGE * tiny.PATCH
# Cells: one, a row, a column, odd sides, the whole canvas.
GRIDS = [(1, 1), (1, 5), (4, 1), (3, 2), (7, 7), (2, 6)]


@pytest.fixture(params=[1, 3, 10, 10_000])
def stretch(request, monkeypatch):
    """Cells at once: each alone, ending within pictures and at their ends, all in one."""
    monkeypatch.setattr(pooled_attention_eve, "CELLS_AT_ONCE", request.param)
    return request.param


def model_and_pictures():
    """Patch embedding and projector in float64, and pictures of all grids."""
    model = copy.deepcopy(tiny.model().model).double()
    generator = torch.Generator().manual_seed(1)
    cell = tiny.MERGE * tiny.PATCH
    pictures = [
        torch.randn(3, cell * rows, cell * cols, generator=generator, dtype=torch.float64)
        for rows, cols in GRIDS
    ]
    return model, pictures


def packed(pictures):
    """As the image processor packs them."""
    pixels = torch.cat([published_shape.patches_of(one, tiny.PATCH) for one in pictures])
    sides = [(1, *(length // tiny.PATCH for length in one.shape[1:])) for one in pictures]
    return pixels, torch.tensor(sides)


def plain(model, pictures):
    """The plain form, of the model's own weights, so that its gradients arrive in them too."""
    canvases = published_shape.canvases(pictures, SIDE, tiny.PATCH)
    parts = (model.vision_tower, model.multi_modal_projector)
    weights = [published_shape.official(dict(part.named_parameters())) for part in parts]
    return published_shape.embed(canvases, *weights)


def assert_exact(made, expected, name=""):
    difference = float((made - expected).detach().abs().max())
    assert difference <= EXACT * float(expected.detach().abs().max()), (name, difference)


def test_values_equal_the_plain_form(stretch):
    model, pictures = model_and_pictures()
    made = model.get_image_features(*packed(pictures)).pooler_output
    for one, expected in zip(made, plain(model, pictures), strict=True):
        assert one.shape == expected.shape
        assert_exact(one, expected)


def test_gradients_equal_the_plain_form(stretch):
    """Of every weight and of every pixel, for a loss in which all tokens count differently."""
    model, pictures = model_and_pictures()
    pictures = [picture.requires_grad_() for picture in pictures]
    expected = torch.cat(plain(model, pictures))
    weights = {
        name: weight
        for name, weight in model.named_parameters()
        if not name.startswith("language_model.")
    }
    inputs = [*weights.values(), *pictures]
    of = torch.randn(expected.shape, generator=torch.Generator().manual_seed(2)).double()
    wanted = torch.autograd.grad((expected.tanh() * of).sum(), inputs)
    tokens = model.get_image_features(*packed(pictures)).last_hidden_state
    made = torch.autograd.grad((tokens.tanh() * of).sum(), inputs)
    assert len(weights) == 23
    for name, one, other in zip([*weights, *GRIDS], made, wanted, strict=True):
        assert_exact(one, other, name)


def test_gradients_by_finite_differences(stretch):
    """Of cells and class tokens of three pictures, in every entry of the pixels (gradcheck's 1e-5)."""
    model, pictures = model_and_pictures()
    pixels, grids = packed(pictures[1:4])
    tower = model.vision_tower
    assert torch.autograd.gradcheck(
        lambda pixels: tower(pixels, grids), pixels.requires_grad_(), fast_mode=True
    )


def test_no_picture_at_all():
    """No tokens, and gradients that are zero and not missing."""
    tower = tiny.model().model.vision_tower
    made = tower(torch.zeros(0, 3 * tiny.PATCH**2), torch.zeros(0, 3, dtype=torch.long))
    assert made.shape == (0, tiny.VISION_WIDTH)
    made.sum().backward()
    for name, weight in tower.named_parameters():
        assert weight.grad is not None and not weight.grad.any(), name


def test_large_scores_of_the_class_token():
    """exp() of a score stays in range: 1e4 times larger keys make the softmax a choice of one cell."""
    model, pictures = model_and_pictures()
    with torch.no_grad():
        model.vision_tower.class_attention.key_value.weight[: tiny.VISION_WIDTH] *= 1e4
        made = model.get_image_features(*packed(pictures)).pooler_output
        for one, expected in zip(made, plain(model, pictures), strict=True):
            assert bool(one.isfinite().all())
            assert_exact(one[0], expected[0])


def test_float32_weights_are_not_copied():
    weight = torch.zeros(3)
    assert at_least_float32(weight) is weight
    assert at_least_float32(weight.half()).dtype == torch.float32
    assert at_least_float32(weight.double()).dtype == torch.float64


@pytest.mark.parametrize("layer", ["merge_attention.key_value", "class_attention.key_value"])
def test_an_adapter_on_weights_that_are_read_is_refused(layer):
    """Its layer is never called, so its part would be left out without a word."""
    peft = pytest.importorskip("peft", reason="needs the extra lora")
    model = tiny.model()
    peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=rf".*\.{layer}"))
    text = tiny.refused(lambda: model.model.vision_tower(**tiny.packed([(2, 2)])), end=".")
    assert "merge the adapter" in text and "target_modules" in text
    other = tiny.model()
    peft.get_peft_model(other, peft.LoraConfig(r=2, target_modules=r".*\.merge_attention\.output"))
    assert other.model.vision_tower(**tiny.packed([(2, 2)])).shape == (7, tiny.VISION_WIDTH)
