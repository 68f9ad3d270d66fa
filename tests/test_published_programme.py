"""The published programme's shape of work computes what we compute, or timing it would say nothing.

Loss, gradients of every weight, logits and answers of both ways at tiny size.  Tolerances are
relative to the largest entry: float32 sums of a few dozen terms in another order, through three
layers whose weights are far from small (`tiny.config`), differ by some 1e-6; a wrong cell, mask or
label by 1e-2 and more.
"""

import pytest
import torch
from transformers import CLIPVisionConfig, CLIPVisionModel

import tiny
from eve_vlm.data.collator import EveCollator
from eve_vlm.data.encode import EncodedRecord
from oracle import published_shape, published_step

GRIDS = [(4, 4), (2, 4), (4, 2), (3, 4)]  # cells; the edge of tiny pictures is 4
TOLERANCE = 2e-5


@pytest.fixture(scope="module")
def pictures():
    generator = torch.Generator().manual_seed(3)
    return [
        torch.randn(3, rows * tiny.MULTIPLE, cols * tiny.MULTIPLE, generator=generator)
        for rows, cols in GRIDS
    ]


@pytest.fixture(scope="module")
def samples():
    """Words before and behind the picture, of several lengths; the last ones are learnt."""
    found = []
    for index in range(len(GRIDS)):
        ids = torch.arange(10, 10 + 6 + 3 * index)
        labels = ids.clone()
        labels[: 3 + index] = published_step.IGNORED
        found.append(published_step.Sample(ids, 1 + index % 2, labels))
    return found


def ours(samples, pictures, *, packed):
    """The same samples through our own collator."""
    records = []
    for index, (sample, (rows, cols)) in enumerate(zip(samples, GRIDS, strict=True)):
        tokens = 1 + rows * (cols + 1)
        whole = [
            torch.cat([part[: sample.place], torch.full((tokens,), filled), part[sample.place :]])
            for part, filled in ((sample.ids, 3), (sample.labels, published_step.IGNORED))
        ]
        records.append(
            EncodedRecord(
                id=str(index),
                input_ids=whole[0].numpy(),
                labels=whole[1].numpy(),
                pixel_values=published_shape.patches_of(pictures[index], tiny.PATCH).numpy(),
                image_grid_thw=torch.tensor([[1, 2 * rows, 2 * cols]]).numpy(),
                teacher_pixel_values=None,
                source="",
            )
        )
    rows = [records] if packed else [[record] for record in records]
    return tiny.for_model(EveCollator(0, packed=packed)(rows))


def close(one, other, what=""):
    difference = float((one - other).detach().abs().max() / other.detach().abs().max())
    assert difference < TOLERANCE, (what, difference)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("aligned", [False, True])
def test_loss_and_gradients_are_ours(samples, pictures, aligned, packed):
    model = tiny.model(tiny.config(aligned=aligned)).train()
    canvases = published_shape.canvases(pictures, tiny.EDGE, tiny.PATCH)
    published = published_step.Published(model)
    batch, given = ours(samples, pictures, packed=packed), {}
    if aligned:
        teacher = small_teacher()
        features = published_step.teacher_cells(teacher, torch.randn(4, 3, 20, 20), GRIDS)
        given = {"aligner": model.aligner, "features": features}
        batch["teacher_features"] = torch.cat(features)
    step = published.step(samples, canvases, **given)
    step.loss.backward()
    theirs = {name: weight.grad.clone() for name, weight in model.named_parameters()}
    model.zero_grad()
    output = model(**batch)
    output.loss.backward()
    close(output.loss, step.loss)
    close(output.loss_terms["lm"], step.language)
    if aligned:
        close(output.loss_terms["alignment"], step.alignment)
    for name, weight in model.named_parameters():
        assert theirs[name].abs().max() > 0, name
        close(weight.grad, theirs[name], name)


def small_teacher():
    config = CLIPVisionConfig(
        hidden_size=tiny.TEACHER_WIDTH,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=20,
        patch_size=5,
    )
    return CLIPVisionModel._from_config(config).eval()


def test_what_is_read_and_answered_is_ours(samples, pictures):
    """Rows padded on the right and questions one by one, beside one batch of the running kind."""
    model = tiny.model()
    published = published_step.Published(model)
    canvases = published_shape.canvases(pictures, tiny.EDGE, tiny.PATCH)
    logits, mask, _ = published.read(samples, canvases)
    batch = ours(samples, pictures, packed=False)
    batch.pop("labels")
    with torch.no_grad():
        seen = model(**batch).logits
    close(seen[mask.bool()], logits[mask.bool()])
    for index, sample in enumerate(samples):
        alone = ours_alone(batch, index, pictures)
        with torch.no_grad():
            made = model.generate(**alone, max_new_tokens=5, min_new_tokens=5, do_sample=False)
        answer = published.answer(sample, canvases[index], 5)
        ends = [token for token in answer if token == 2]
        assert not ends  # nothing that `generate` had to keep from ending
        assert made[0, -5:].tolist() == answer


def ours_alone(batch, index, pictures):
    length = int(batch["attention_mask"][index].sum())
    return {
        "input_ids": batch["input_ids"][index : index + 1, :length],
        "pixel_values": published_shape.patches_of(pictures[index], tiny.PATCH),
        "image_grid_thw": batch["image_grid_thw"][index : index + 1],
    }


def test_nothing_is_kept_twice():
    """The second frame holds our very parameters and attends in the programme's way."""
    model = tiny.model()
    published = published_step.Published(model)
    own = {id(weight) for weight in model.parameters()}
    assert all(id(weight) in own for weight in published.decoder.parameters())
    assert published.decoder.config._attn_implementation == "eager"
    assert model.config.text_config._attn_implementation == "sdpa"
