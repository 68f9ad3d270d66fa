"""The patch aligning layer and its loss: against slow loops, and the promises about zero.

Tolerance 1e-5 (times the largest entry beyond 1): float32 sums of up to 32 in another order, against
float64 loops. Zeros are exact.
"""

import copy

import pytest
import torch

import tiny
from eve_vlm import EveForConditionalGeneration, EveForPreTraining, EvePatchAligner
from eve_vlm.alignment_eve import alignment_loss, cells_per_image, tap_indices
from oracle import alignment as slow

SAME = 1e-5
GRIDS = [(2, 3), (1, 1), (4, 2), (3, 3)]


def assert_same(made, expected, tolerance=SAME):
    assert made.shape == expected.shape
    allowed = tolerance * max(1.0, float(expected.abs().max()))
    assert float((made - expected).abs().max()) <= allowed


def batch_for(grids, *, seed=0):
    """One row: a word, each picture, a word; labels at the words."""
    ids = [1]
    for index, (rows, cols) in enumerate(grids):
        ids += [3] * (1 + rows * (cols + 1)) + [20 + index]
    ids += [7, 8, 9]
    input_ids = torch.tensor([ids])
    labels = input_ids.masked_fill(input_ids == 3, -100)
    batch = {
        "input_ids": input_ids,
        "attention_mask": torch.ones_like(input_ids),
        "labels": labels,
    }
    return batch | (tiny.packed(grids, seed=seed) if grids else {})


def features_for(grids, *, pool=1, seed=0):
    """Random teacher features of the pictures' cells."""
    cells = sum((rows // pool) * (cols // pool) for rows, cols in grids)
    return torch.randn(cells, tiny.TEACHER_WIDTH, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("layers", "every", "expected"),
    [
        (32, 4, (32, 28, 24, 20, 16, 12, 8, 4, 0)),
        (30, 4, (30, 26, 22, 18, 14, 10, 6, 2)),
        (3, 1, (3, 2, 1, 0)),
        (5, 3, (5, 2)),
    ],
)
def test_taps(layers, every, expected):
    assert tap_indices(layers, every) == expected == tuple(slow.tap_indices(layers, every))


def test_a_single_tap_is_refused():
    of = tiny.config(aligned=True)
    of.alignment_config.tap_every = tiny.LAYERS + 1
    with pytest.raises(ValueError, match=r"tap_every \(4\) leaves one tap of 3 decoder layers"):
        EvePatchAligner(of)


@torch.no_grad()
@pytest.mark.parametrize("pool", [1, 2])
def test_aligner_equals_slow_loops(pool):
    """Per picture, cell and head; with pooling, odd rows and columns are left over."""
    of = tiny.config(aligned=True, pool_size=pool)
    aligner = tiny.model(of).aligner
    grids = [(2, 3), (4, 4), (5, 2), (2, 2)] if pool == 2 else GRIDS
    thw = tiny.packed(grids)["image_grid_thw"]
    sizes = [1 + rows * (cols + 1) for rows, cols in grids]
    generator = torch.Generator().manual_seed(1)
    tapped = [torch.randn(sum(sizes), tiny.WIDTH, generator=generator) for _ in aligner.taps]
    made = aligner(tuple(tapped), thw)
    names = {"input": "input_layer", "output": "output_layer"}
    weights = {}
    for name, weight in aligner.state_dict().items():
        part, *rest = name.split(".")
        if part in names:
            weights[".".join([names[part], *rest])] = weight.double()
        else:
            number, leaf = rest
            weights[f"norm_layer.{number}.{ {'norms': 0, 'maps': 1}[part] }.{leaf}"] = (
                weight.double()
            )
    expected, place = [], 0
    for (rows, cols), size in zip(grids, sizes, strict=True):
        pieces = [
            slow.cells(tap[place : place + size].double(), rows, cols, pool) for tap in tapped
        ]
        expected.append(slow.align(pieces, weights))
        place += size
    assert_same(made, torch.cat(expected))


def test_loss_equals_slow_loops():
    student, teacher = features_for(GRIDS, seed=1), features_for(GRIDS, seed=2)
    cells = torch.tensor([rows * cols for rows, cols in GRIDS])
    made = alignment_loss(student, teacher, cells)
    pieces = zip(student.split(cells.tolist()), teacher.split(cells.tolist()), strict=True)
    assert_same(made, torch.stack([slow.cosine_loss(one, other) for one, other in pieces]))


def test_identical_features_lose_nothing():
    """1 - cosine of a vector with itself: zero but for rounding of one float32 (1.2e-7)."""
    features = features_for(GRIDS)
    cells = torch.tensor([rows * cols for rows, cols in GRIDS])
    assert float(alignment_loss(features, features, cells).abs().max()) <= 1e-6
    assert float(alignment_loss(features, 3 * features, cells).abs().max()) <= 1e-6
    assert_same(alignment_loss(features, -features, cells), torch.full((len(GRIDS),), 2.0))


@pytest.mark.parametrize(
    ("teacher", "cells"), [((17, 16), [6, 1, 8, 9]), ((24, 8), [6, 1, 8, 9]), ((24, 16), [6, 1])]
)
def test_features_of_other_pictures_are_refused(teacher, cells):
    with pytest.raises(ValueError, match="teacher views and pictures"):
        alignment_loss(torch.zeros(24, 16), torch.zeros(teacher), torch.tensor(cells))


def test_cells_per_image():
    thw = torch.tensor([(1, 8, 6), (1, 10, 4)])
    assert cells_per_image(thw, merge_size=2, pool_size=1).tolist() == [12, 10]
    assert cells_per_image(thw, merge_size=2, pool_size=2).tolist() == [2, 2]


# --- in the model ---------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [False, True])
def test_the_loss_is_both_terms(training):
    """Language as without an aligner; alignment from the tapped states at the pictures."""
    made = tiny.model(tiny.config(aligned=True))
    made.train(training)
    batch, teacher = batch_for(GRIDS), features_for(GRIDS)
    with torch.no_grad():
        plain = made(**batch)
        out = made(**batch, teacher_features=teacher)
        states = made.model(
            **{name: batch[name] for name in batch if name != "labels"},
            output_hidden_states=True,
            use_cache=False,
        ).hidden_states
        mask = batch["input_ids"] == 3
        student = made.aligner(
            tuple(states[tap][mask] for tap in made.aligner.taps), batch["image_grid_thw"]
        )
        cells = torch.tensor([rows * cols for rows, cols in GRIDS])
        expected = alignment_loss(student, teacher, cells).mean()
    assert set(out.loss_terms) == {"lm", "alignment"}
    assert torch.equal(out.loss_terms["lm"], plain.loss_terms["lm"])
    assert torch.equal(out.loss_terms["alignment"], expected)
    assert_same(out.loss, plain.loss_terms["lm"] + expected)
    made.alignment_weight = 0.25
    with torch.no_grad():
        lighter = made(**batch, teacher_features=teacher)
    assert_same(lighter.loss, plain.loss_terms["lm"] + 0.25 * expected)
    assert torch.equal(lighter.loss_terms["alignment"], expected)  # reported unweighted


def test_alignment_divides_by_all_pictures_of_the_step():
    made = tiny.model(tiny.config(aligned=True))
    batch, teacher = batch_for(GRIDS), features_for(GRIDS)
    with torch.no_grad():
        one = made(**batch, teacher_features=teacher).loss_terms["alignment"]
        for images in (8, torch.tensor(8)):
            out = made(**batch, teacher_features=teacher, num_images_in_batch=images)
            assert_same(out.loss_terms["alignment"], one * len(GRIDS) / 8)


@pytest.mark.parametrize("case", ["text only", "text only with features", "no teacher"])
def test_without_pictures_or_teacher_the_term_is_exactly_zero(case):
    """And every aligner weight has a gradient, of zeros: other ranks wait for it."""
    made = tiny.model(tiny.config(aligned=True)).train()
    batch = batch_for(GRIDS if case == "no teacher" else [])
    extra = {"teacher_features": torch.empty(0, tiny.TEACHER_WIDTH)} if "with" in case else {}
    out = made(**batch, **extra)
    out.loss.backward()
    assert float(out.loss_terms["alignment"]) == 0.0
    assert torch.equal(out.loss.detach(), out.loss_terms["lm"])
    for name, weight in made.aligner.named_parameters():
        assert weight.grad is not None and bool((weight.grad == 0).all()), name
    for name, weight in made.model.vision_tower.named_parameters():
        assert weight.grad is not None, name


def test_every_part_learns_from_alignment():
    made = tiny.model(tiny.config(aligned=True)).train()
    batch = batch_for(GRIDS)
    batch["labels"] = torch.full_like(batch["labels"], -100)
    made(**batch, teacher_features=features_for(GRIDS)).loss.backward()
    moved = {
        name.split(".")[1 if name.startswith("model.") else 0]
        for name, weight in made.named_parameters()
        if weight.grad is not None and bool((weight.grad != 0).any())
    }
    assert moved == {"vision_tower", "multi_modal_projector", "language_model", "aligner"}


def test_identical_features_in_the_model_lose_nothing():
    made = tiny.model(tiny.config(aligned=True))
    batch = batch_for(GRIDS)
    with torch.no_grad():
        taps = made.model(
            **{name: batch[name] for name in batch if name != "labels"},
            image_taps=made.aligner.taps,
            use_cache=False,
        ).image_taps
        student = made.aligner(taps, batch["image_grid_thw"])
        out = made(**batch, teacher_features=student)
    assert abs(float(out.loss_terms["alignment"])) <= 1e-6  # rounding of 1 - 1


def test_aligner_sums_in_float32_in_a_bfloat16_model():
    made = tiny.model(tiny.config(aligned=True))
    exact = copy.deepcopy(made.aligner.bfloat16())
    thw = tiny.packed(GRIDS)["image_grid_thw"]
    count = sum(1 + rows * (cols + 1) for rows, cols in GRIDS)
    tapped = [torch.randn(count, tiny.WIDTH).bfloat16() for _ in made.aligner.taps]
    with torch.no_grad():
        ours = made.aligner(tuple(tapped), thw)
        expected = exact.double()(tuple(tap.double() for tap in tapped), thw)
    assert ours.dtype == torch.float32
    assert_same(ours, expected)


def test_gradients_of_the_aligner():
    """Against finite differences in float64 (gradcheck's own tolerance, 1e-5)."""
    aligner = tiny.model(tiny.config(aligned=True, pool_size=2)).aligner.double()
    thw = tiny.packed([(2, 2), (4, 3)])["image_grid_thw"]
    count = 1 + 2 * 3 + 1 + 4 * 4
    tapped = tuple(
        torch.randn(count, tiny.WIDTH, dtype=torch.double, requires_grad=True) for _ in aligner.taps
    )
    assert torch.autograd.gradcheck(lambda *taps: aligner(taps, thw), tapped, fast_mode=True)


def test_the_training_class_needs_an_alignment():
    with pytest.raises(ValueError, match=r"needs config\.alignment_config"):
        EveForPreTraining(tiny.config())


def test_a_training_checkpoint_loads_for_answering(tmp_path):
    """With nothing missing, nothing reported as surplus, and back again."""
    made = tiny.model(tiny.config(aligned=True))
    made.save_pretrained(tmp_path)
    loaded, report = EveForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    for name, weight in loaded.state_dict().items():
        assert torch.equal(weight, made.state_dict()[name]), name
    again, report = EveForPreTraining.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    for name, weight in made.state_dict().items():
        assert torch.equal(weight, again.state_dict()[name]), name


def test_alignment_does_not_touch_generation():
    """The training class answers, too: without labels nothing of the aligner runs."""
    made = tiny.model(tiny.config(aligned=True))
    plain = tiny.model()
    plain.load_state_dict(
        {name: weight for name, weight in made.state_dict().items() if "aligner" not in name}
    )
    batch = batch_for(GRIDS)
    batch.pop("labels")
    settings = {"max_new_tokens": 5, "do_sample": False}
    assert torch.equal(made.generate(**batch, **settings), plain.generate(**batch, **settings))


# --- several processes ----------------------------------------------------------------------------


def way_of_gradients(model, batch):
    """Modules in the order in which gradients come back to their outputs, once for each output.

    It is what ZeRO-3 goes by, and all processes must go the same way.
    """
    way = []

    class Mark(torch.autograd.Function):
        @staticmethod
        def forward(context, tensor, name):
            context.name = name
            return tensor.view_as(tensor)

        @staticmethod
        def backward(context, gradient):
            way.append(context.name)
            return gradient, None

    def marked(output, name):
        if isinstance(output, torch.Tensor):
            return Mark.apply(output, name) if output.requires_grad else output
        if isinstance(output, tuple | list):
            return type(output)(marked(one, name) for one in output)
        if isinstance(output, dict):
            for key, value in output.items():
                output[key] = marked(value, name)
        return output

    hooks = [
        module.register_forward_hook(lambda _, __, output, name=name: marked(output, name))
        for name, module in model.named_modules()
        if name
    ]
    order = []
    hooks += [
        parameter.register_hook(lambda _, name=name: order.append(name))
        for name, parameter in model.named_parameters()
    ]
    model(**batch).loss.backward()
    for hook in hooks:
        hook.remove()
    return way, order


@pytest.mark.parametrize("pool_size", [1, 2])
def test_gradients_go_the_same_way_with_and_without_pictures(pool_size):
    """Else ZeRO-2 mixes them and ZeRO-3 waits for ever, where one process has words alone."""
    model = tiny.model(tiny.config(aligned=True, pool_size=pool_size)).train()
    pictures = tiny.packed([(2, 4), (4, 2)])
    token = model.config.image_token_id
    ids = torch.tensor([[1] + [token] * (2 + 2 * 5 + 4 * 3) + [5, 6, 7, 8]])
    cells = 16 // pool_size**2
    with_pictures = {
        "input_ids": ids,
        "labels": ids.masked_fill(ids == token, -100),
        "teacher_features": torch.randn(cells, tiny.TEACHER_WIDTH),
        **pictures,
    }
    words = torch.tensor([[1, 5, 6, 7, 8]])
    ways = [
        way_of_gradients(model, batch)
        for batch in (with_pictures, {"input_ids": words, "labels": words})
    ]
    (way, order), (way_of_words, order_of_words) = ways
    assert way_of_words == way and len(way) > 50
    assert order_of_words == order and len(order) == len(list(model.named_parameters()))
