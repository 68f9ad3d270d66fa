"""The oracle against the golden numbers, without any of our product code.

So oracle and goldens each stand alone, and the product's own tests may lean on the oracle at
sizes of which there are no goldens. One thing a reader would get wrong: a failure here is a
mistake in `tests/oracle` (or in the numbers), never in `src`.
"""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import PreTrainedTokenizerFast

import golden_files as golden
from oracle import alignment, geometry, patch_embedding, preprocess, sequence, whole_model

ACTIVATIONS = 1e-5  # float32, absolute: what the set's own README asks for
# Behind the decoder the published float32 numbers themselves are up to 2.6e-5 away from float64,
# at entries as large as 12, so there the same 1e-5 counts per unit of the largest entry.
GRADIENTS = 1e-4  # relative to the largest entry or the norm, for sums in another order


def assert_close(made: torch.Tensor, expected: torch.Tensor, what: str) -> None:
    """Within 1e-5, counted per unit of the largest entry where that is above one."""
    allowed = ACTIVATIONS * max(1.0, float(expected.abs().max()))
    assert float((made - expected).detach().abs().max()) <= allowed, what


def picture_id(picture: golden.Picture) -> str:
    return f"{picture.name}-{picture.variant}"


def folder_id(case: golden.Embedding | golden.Prompt) -> str:
    return f"{case.folder.name}-{case.name}"


def training_id(case: golden.Training) -> str:
    return f"{case.path.parent.name}-{case.name}"


@functools.cache
def tokenizer() -> PreTrainedTokenizerFast:
    path = golden.FOLDER / "tokenizer" / "tokenizer.json"
    return PreTrainedTokenizerFast(
        tokenizer_file=str(path), bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def tokenize(text: str) -> list[int]:
    return tokenizer()(text)["input_ids"]


def start_token() -> int:
    return tokenizer().bos_token_id


def canvas_by_hash(checksum: str) -> torch.Tensor:
    """A published float tensor, stored or made again by the oracle from the picture."""
    if checksum in golden.stored_pixels():
        path, key = golden.stored_pixels()[checksum]
        return golden.tensors(path)[key]
    picture = golden.picture_by_hash()[checksum]
    pixels, box = preprocess.student_canvas(Image.open(picture.path), picture.settings)
    return torch.from_numpy(preprocess.with_mask(pixels, box, picture.settings))


@pytest.mark.parametrize("picture", golden.pictures(), ids=picture_id)
def test_geometry_and_pixels(picture: golden.Picture) -> None:
    """Integers and 8-bit bytes equal; sampled floats within 1e-5 (double against float32)."""
    expected, settings = picture.expected, picture.settings
    pixels, box = preprocess.student_canvas(Image.open(picture.path), settings)
    rows, cols = grid = geometry.grid(*Image.open(picture.path).size[::-1], settings)
    assert list(box) == expected["valid_box_tlbr"]
    assert list(grid) == expected["grid_hw"]
    assert geometry.count_tokens(rows, cols) == expected["n_visual_tokens"]
    assert golden.sha256(pixels) == expected["sha256_uint8_hwc"]
    assert golden.sha256(preprocess.mask(box, len(pixels))) == expected["sha256_mask_uint8_hw"]
    made = preprocess.with_mask(pixels, box, settings).reshape(-1)
    sampled = made[expected["sample_flat_index"]]
    assert np.abs(sampled - np.array(expected["sample_value"])).max() <= ACTIVATIONS


@pytest.mark.parametrize("case", golden.embeddings(), ids=folder_id)
def test_patch_embedding(case: golden.Embedding) -> None:
    """Grid equal; every stored intermediate within 1e-5."""
    checksum = case.info["input_sha256"]
    if "formula" in case.info["input"]:
        canvas = golden.zero_mask_pixels(case.info["input_shape"])
        assert golden.sha256(canvas) == checksum
    else:
        canvas = canvas_by_hash(checksum)
    weights = patch_embedding.select(case.weights, "model.vision_tower.")
    projector = patch_embedding.select(case.weights, "model.mm_projector.")
    cropped = patch_embedding.crop(canvas, weights["patch_embedding.weight"].shape[-1])
    tokens = patch_embedding.embed(cropped, weights)
    assert [tokens.rows, tokens.cols] == case.info["patch_hw"]
    assert len(tokens.sequence) == case.info["tokens"]
    made = {
        "local_attention": tokens.merged,
        "class_token": tokens.class_token[None],
        "pre_projector": tokens.sequence,
        "post_projector": patch_embedding.project(tokens.sequence, projector),
    }
    for part, value in made.items():
        expected = case.expected(part)
        if expected is not None:
            assert (value - expected).abs().max() <= ACTIVATIONS, part


def decoder_of(path) -> tuple[dict, dict[str, torch.Tensor], torch.nn.Module]:
    config = golden.read_json(path / "config.json")
    training = (path / "training_only.safetensors").is_file()
    weights = golden.published_weights(path, training=training)
    return config, weights, whole_model.build_decoder(config, weights)


@pytest.mark.parametrize("case", golden.prompts(), ids=folder_id)
@torch.no_grad()
def test_whole_model(case: golden.Prompt) -> None:
    """Ids equal; embeddings, hidden states and logits within 1e-5 per unit of the largest."""
    config, weights, decoder = decoder_of(case.folder)
    settings = golden.processors()[config["mm_vision_tower"]]
    canvases = []
    for name in case.images:
        image = Image.open(golden.picture_path(name))
        pixels, box = preprocess.student_canvas(image, settings)
        canvases.append(torch.from_numpy(preprocess.with_mask(pixels, box, settings)))
    ids = sequence.image_token_ids(case.listing["prompt"], tokenize, start_token())
    assert ids == case.stored["input_ids"].tolist()
    pictures = [tokens for tokens, _, _ in whole_model.embed_pictures(canvases, weights)]
    forward = whole_model.run(decoder, ids, pictures)
    assert len(forward.embeds) == case.listing["n_merged"]
    made = {"inputs_embeds": forward.embeds, "logits": forward.logits}
    made["logits_last4"] = forward.logits[-4:]
    made |= {f"hidden_states.{index}": state for index, state in enumerate(forward.hidden)}
    for name in sorted(set(made) & set(case.stored)):
        assert_close(made[name], case.stored[name], name)
    assert int(forward.logits[-1].argmax()) == case.listing["greedy_new_ids"][0]


def norm(value: torch.Tensor | None) -> float:
    return 0.0 if value is None else float(value.double().norm())


@pytest.mark.parametrize("case", golden.trainings(), ids=training_id)
def test_training_forward(case: golden.Training) -> None:
    """Losses and features within 1e-5; gradients of the total loss within 1e-4 of the largest."""
    info, stored = case.info, case.stored
    _, weights, decoder = decoder_of(case.model)
    learnt = {name: p for name, p in decoder.named_parameters()}
    for name, value in weights.items():
        if name.startswith(("model.vision_tower", "model.mm_projector")) and "clip" not in name:
            weights[name] = learnt[name] = value.clone().requires_grad_()
    settings = golden.processors()[info["image_processor"]]
    teacher_folder = golden.FOLDER / info["teacher"]
    teacher = whole_model.build_teacher(
        golden.read_json(teacher_folder / "config.json"),
        golden.tensors(teacher_folder / "model.safetensors"),
    )
    logits, labels, losses = [], [], []
    for index, sample in enumerate(case.samples):
        row = stored["attention_mask"][index].bool()
        ids, wanted = (stored[key][index][row].tolist() for key in ("input_ids", "labels"))
        canvases = []
        if "image" in sample:
            image = Image.open(golden.picture_path(sample["image"]))
            pixels, box = preprocess.student_canvas(image, settings)
            canvases = [torch.from_numpy(preprocess.with_mask(pixels, box, settings))]
            view, view_box = preprocess.teacher_canvas(image, settings)
            view = torch.from_numpy(preprocess.with_mask(view, view_box, settings))
            if "images_clip" in stored or not golden.is_subset():
                assert (view - stored["images_clip"][index]).abs().max() <= ACTIVATIONS
            features = whole_model.teacher_features(
                teacher, view[None, :3], info["mm_vision_select_layer"]
            )[0]
            assert (features - stored["teacher_features"][index]).abs().max() <= ACTIVATIONS
        pictures = whole_model.embed_pictures(canvases, weights)
        forward = whole_model.run(decoder, ids, [tokens for tokens, _, _ in pictures])
        logits.append(forward.logits)
        labels.append(sequence.merge_labels(ids, wanted, [len(p[0]) for p in pictures]))
        assert_close(forward.logits[-1], stored["logits_last_valid"][index], "logits")
        if not pictures:  # adds nothing; the published programme compares it with itself
            assert info["per_sample_clip_loss"][index] == 0
            continue
        grid = pictures[0][1:]
        assert list(grid) == info["patch_hw"][index]
        position = ids.index(sequence.PLACEHOLDER)
        assert [position] == info["image_token_index"][index]
        student = whole_model.student_features(
            forward, position, grid, info["patch_ratio"], weights
        )
        target = alignment.valid_cells(features, view[3], settings["patch_stride_clip"])
        assert_close(student, stored[f"student_feature.{index}"], "student")
        assert_close(target, stored[f"target_feature.{index}"], "target")
        losses.append(alignment.cosine_loss(student, target))
        assert abs(losses[-1].item() - info["per_sample_clip_loss"][index]) <= ACTIVATIONS
    language, teacher_loss = sequence.language_loss(logits, labels), sum(losses) / len(losses)
    total = language + teacher_loss
    assert abs(language.item() - info["llm_loss"]) <= ACTIVATIONS
    assert abs(teacher_loss.item() - info["clip_loss"]) <= ACTIVATIONS
    assert abs(total.item() - info["total_loss"]) <= ACTIVATIONS

    total.backward()
    for name, expected in info["grad_norm_total"].items():
        assert abs(norm(learnt[name].grad) - expected) <= GRADIENTS * max(expected, 1e-3), name
    for key, expected in stored.items():
        if key.startswith("grad_total."):
            made = learnt[key.removeprefix("grad_total.")].grad
            assert (made - expected).abs().max() <= GRADIENTS * expected.abs().max(), key


def test_prompt_pieces() -> None:
    """Ids equal for strings with pictures anywhere."""
    listed = golden.text()["tokenizer_image_token"]
    assert listed
    for entry in listed:
        made = sequence.image_token_ids(entry["prompt"], tokenize, start_token())
        assert made == entry["ids"], entry["prompt"]


def chat_cases() -> list[tuple[str, str]]:
    return [
        (template, name)
        for template, entries in golden.text().items()
        if template in golden.text()["conversation_templates"] and template != "plain"
        for name in entries
    ]


@pytest.mark.parametrize(("template", "name"), chat_cases())
def test_conversations(template: str, name: str) -> None:
    """Ids equal, and labels too, except where the published programme gives a sample up.

    It ignores all of a sample whose answer names a role or is empty, with a warning. The oracle
    learns the answer of the first; the second has no answer to learn.
    """
    expected = golden.text()[template][name]
    system = golden.text()["conversation_templates"][template]["system"]
    sample = golden.conversations()[name]
    text, ids, labels = sequence.encode_chat(sample, system, tokenize, start_token())
    if any(turn["from"] == "gpt" and not turn["value"] for turn in sample["conversations"]):
        assert expected["warning"] and set(expected["labels"]) == {sequence.IGNORED}
        return
    assert text == expected["prompt"]
    assert ids == expected["input_ids"]
    if expected["warning"]:
        assert set(expected["labels"]) == {sequence.IGNORED}
        assert set(labels) != {sequence.IGNORED}
    else:
        assert labels == expected["labels"]


def test_captions() -> None:
    """Ids and labels equal for every sample that the caption template takes."""
    taken = 0
    for name, expected in golden.text()["plain"].items():
        if "error" not in expected:
            text, ids, labels = sequence.encode_caption(
                golden.conversations()[name], tokenize, start_token()
            )
            assert (text, ids, labels) == tuple(
                expected[key] for key in ("prompt", "input_ids", "labels")
            )
            taken += 1
    assert taken
