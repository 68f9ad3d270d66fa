"""Parity: our code against the numbers of the published programme.

Every name, size, prompt and seed comes from the folder of golden numbers (`golden_files.py`), so
the same tests run on another set of the same format. Float32: 1e-5 absolute on activations and
losses; gradients 1e-4 relative; integers and 8-bit pictures equal. One thing a reader would get
wrong: the published float32 activations are themselves up to 6.9e-6 (patch embedding) and 2.6e-5
(behind the decoder) away from float64, at entries as large as 13; so for activations 1e-5 counts
per unit of the largest entry of the tensor, and is absolute where that is below 1.

Each test stores the largest difference that it saw as a property of its report
(`--junitxml=FILE -o junit_family=xunit1`).
"""

from __future__ import annotations

import functools
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import golden_files as golden
import golden_product as product
from eve_vlm import (
    EveConfig,
    EveForConditionalGeneration,
    EveForPreTraining,
    num_image_tokens,
)
from eve_vlm.alignment_eve import alignment_loss, cells_per_image
from eve_vlm.data.collator import EveCollator
from eve_vlm.data.encode import Encoder
from eve_vlm.image_processing_eve import to_rgb
from eve_vlm.published_eve import rename_weight
from eve_vlm.train.parameters import optimizer_groups, select_trainable
from eve_vlm.train.sections import StageSection
from eve_vlm.train.teacher import FrozenTeacher
from oracle import sequence

ACTIVATIONS = 1e-5  # absolute, float32
GRADIENTS = 1e-4  # relative to the largest entry of a tensor, or to its norm
SMALLEST_NORM = 1e-3  # below it a norm is compared absolutely: its relative error is rounding

UNUSED_ID = 10**6  # stands for a picture where no model reads the ids

Check = Callable[..., None]


@pytest.fixture
def check(record_property: Callable[[str, object], None]) -> Check:
    """Compare two tensors and store the largest difference seen under a group's name."""
    largest: dict[str, float] = {}

    def compare(
        group: str, made: Any, expected: Any, *, deep: bool = False, what: str = ""
    ) -> None:
        made, expected = torch.as_tensor(made).detach(), torch.as_tensor(expected)
        assert made.shape == expected.shape, (group, what)
        difference = float((made.double() - expected.double()).abs().max())
        scale = max(1.0, float(expected.abs().max())) if deep else 1.0
        largest[group] = max(largest.get(group, 0.0), difference)
        if deep:
            key = f"{group}, per unit"
            largest[key] = max(largest.get(key, 0.0), difference / scale)
        assert difference <= ACTIVATIONS * scale, (group, what)

    yield compare
    for group, difference in largest.items():
        record_property(group, difference)


def folder_id(case: golden.Embedding | golden.Prompt) -> str:
    return f"{case.folder.name}-{case.name}"


def training_id(case: golden.Training) -> str:
    return f"{case.path.parent.name}-{case.name}"


# --- the folder -----------------------------------------------------------------------------------


def test_every_group_is_covered() -> None:
    """No group may pass by being empty; a full set must hold all that its listings name."""
    assert golden.processors()
    assert golden.pictures()
    assert {case.name for case in golden.embeddings()}
    assert any(prompt.images for prompt in golden.prompts())
    assert any(not prompt.images for prompt in golden.prompts())
    assert any("image" in sample for case in golden.trainings() for sample in case.samples)
    assert golden.text()["tokenizer_image_token"]
    assert chat_cases() and caption_cases()
    assert golden.read_json(golden.FOLDER / "train" / "optimizer_groups.json")["groups"]
    if not golden.is_subset():
        for group in golden.GROUPS:
            assert (golden.FOLDER / group).is_dir(), group


@pytest.mark.parametrize("content", [None, (), ("note.txt",)], ids=["missing", "empty", "other"])
def test_named_folder_must_be_there(tmp_path: Path, content: tuple[str, ...] | None) -> None:
    """A named folder that is missing or holds no goldens is an error, never a skip."""
    named = tmp_path / "set"
    if content is not None:
        named.mkdir()
        for name in content:
            (named / name).touch()
    with pytest.raises(ValueError, match=golden.VARIABLE):
        golden.find_folder({golden.VARIABLE: str(named)})
    if content is None:
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
        environment = os.environ | {golden.VARIABLE: str(named)}
        run = subprocess.run(
            command, env=environment, capture_output=True, text=True, check=False, timeout=300
        )
        assert run.returncode != 0
        assert golden.VARIABLE in run.stdout and "skipped" not in run.stdout


def test_shipped_subset_is_small() -> None:
    """A fresh clone carries at most 3 MB."""
    shipped = golden.TESTS / "goldens" / "published"
    assert (shipped / "subset.json").is_file()
    assert sum(file.stat().st_size for file in shipped.rglob("*") if file.is_file()) <= 3_000_000


# --- pictures -------------------------------------------------------------------------------------


def processor_name(settings: dict[str, Any]) -> str:
    return next(name for name, other in golden.processors().items() if other is settings)


def on_canvas(pixels: np.ndarray, box: list[int], settings: dict[str, Any]) -> np.ndarray:
    """8-bit pixels where the published programme puts them."""
    canvas = np.empty((settings["image_size"], settings["image_size"], 3), np.uint8)
    canvas[:] = [int(mean * 255) for mean in settings["image_mean"]]
    top, left, bottom, right = box
    canvas[top:bottom, left:right] = pixels
    return canvas


@pytest.mark.parametrize("picture", golden.pictures(), ids=lambda p: f"{p.name}-{p.variant}")
def test_pixels_and_grid(picture: golden.Picture, check: Check) -> None:
    """8-bit pictures and integers equal, floats within 1e-5, with every processor."""
    expected, settings = picture.expected, picture.settings
    processor = product.image_processor(processor_name(settings))
    image = to_rgb(Image.open(picture.path))
    top, left, bottom, right = box = expected["valid_box_tlbr"]
    grid = processor.grid_of(image.height, image.width)
    assert [grid.height, grid.width] == [bottom - top, right - left]
    assert [grid.rows, grid.cols] == expected["grid_hw"]
    assert num_image_tokens(grid.rows, grid.cols) == expected["n_visual_tokens"]
    pixels = processor.resize_to_grid(image)
    assert golden.sha256(on_canvas(pixels, box, settings)) == expected["sha256_uint8_hwc"]

    packed = processor(Image.open(picture.path), return_tensors="pt")
    assert packed["image_grid_thw"].tolist() == [[1, *expected["valid_patches_hw"]]]
    patch, merge = processor.patch_size, processor.merge_size
    made = product.unpack(
        packed["pixel_values"], packed["image_grid_thw"][0], patch=patch, merge=merge
    )
    if stored := golden.stored_pixels().get(expected["sha256_float32_chw"]):
        whole = golden.tensors(stored[0])[stored[1]]
        check("pixels", made, whole[:3, top:bottom, left:right])
        repacked = product.from_canvas(whole, patch=patch, merge=merge)
        check("pixels", packed["pixel_values"], repacked[0])
        assert torch.equal(packed["image_grid_thw"], repacked[1])
    side, sampled = settings["image_size"], []
    for index, value in zip(expected["sample_flat_index"], expected["sample_value"], strict=True):
        channel, row, column = np.unravel_index(index, (4, side, side))
        if channel < 3 and top <= row < bottom and left <= column < right:
            sampled.append((made[channel, row - top, column - left], value))
    for one, other in sampled:
        check("pixels", one, other)


def test_pictures_in_one_call_equal_single_ones() -> None:
    """All pictures of a set packed in one call are the same bits as one by one."""
    name = sorted(golden.processors())[0]
    processor = product.image_processor(name)
    images = product.open_pictures(sorted(golden.preprocess()["images"]))
    together = processor(images, return_tensors="pt")
    apart = [processor(image, return_tensors="pt") for image in images]
    for key in ("pixel_values", "image_grid_thw"):
        assert torch.equal(together[key], torch.cat([one[key] for one in apart]))


# --- patch embedding ------------------------------------------------------------------------------


@functools.cache
def packed_input(folder: Path, checksum: str, formula: tuple[int, ...] | None) -> tuple:
    """A published input as packed patches; from our own pixels where the set does not store it."""
    vision = product.embedding_model(folder).config.vision_config
    shape = {"patch": vision.patch_size, "merge": vision.merge_size}
    if formula:
        canvas = golden.zero_mask_pixels(list(formula))
        assert golden.sha256(canvas) == checksum
        return product.from_canvas(canvas, **shape)
    if checksum in golden.stored_pixels():
        path, key = golden.stored_pixels()[checksum]
        return product.from_canvas(golden.tensors(path)[key], **shape)
    picture = golden.picture_by_hash()[checksum]
    made = product.image_processor(processor_name(picture.settings))(
        Image.open(picture.path), return_tensors="pt"
    )
    return made["pixel_values"], made["image_grid_thw"]


def input_of(case: golden.Embedding) -> tuple[torch.Tensor, torch.Tensor]:
    formula = tuple(case.info["input_shape"]) if "formula" in case.info["input"] else None
    return packed_input(case.folder, case.info["input_sha256"], formula)


@pytest.mark.parametrize("case", golden.embeddings(), ids=folder_id)
@torch.no_grad()
def test_patch_embedding(case: golden.Embedding, check: Check) -> None:
    """Grid equal; cells, class token, whole sequence and projected sequence within 1e-5."""
    model = product.embedding_model(case.folder)
    pixels, grid = input_of(case)
    rows, cols = (grid[0, 1:] // model.config.vision_config.merge_size).tolist()
    assert [rows, cols] == case.info["patch_hw"]
    sequence = model.vision_tower(pixels, grid)
    assert len(sequence) == case.info["tokens"] == num_image_tokens(rows, cols)
    made = {
        "local_attention": sequence[1:].unflatten(0, (rows, cols + 1))[:, :-1].flatten(0, 1),
        "class_token": sequence[:1],
        "pre_projector": sequence,
        "post_projector": model.get_image_features(pixels, grid).last_hidden_state,
    }
    compared = 0
    for part, value in made.items():
        expected = case.expected(part)
        if expected is not None:
            check("patch embedding", value, expected, deep=True, what=part)
            compared += 1
    assert compared


@pytest.mark.parametrize(
    "folder", sorted({case.folder for case in golden.embeddings()}), ids=lambda path: path.name
)
@torch.no_grad()
def test_patch_embedding_in_one_batch(folder: Path, check: Check) -> None:
    """Every input of a folder in one packed call, whatever its size, within 1e-5."""
    cases = [case for case in golden.embeddings() if case.folder == folder]
    inputs = [input_of(case) for case in cases]
    model = product.embedding_model(folder)
    features = model.get_image_features(
        torch.cat([pixels for pixels, _ in inputs]), torch.cat([grid for _, grid in inputs])
    )
    for case, made in zip(cases, features.pooler_output, strict=True):
        expected = case.expected("post_projector")
        check("patch embedding, batched", made, expected, deep=True, what=case.name)


# --- whole model ----------------------------------------------------------------------------------


def prompt_inputs(case: golden.Prompt) -> dict[str, torch.Tensor]:
    """The published ids with our placeholders, and our pixels."""
    model, counts, inputs = product.inference_model(case.folder), [], {}
    if case.images:
        settings = product.published_config(case.folder)["mm_vision_tower"]
        processor = product.image_processor(settings)
        inputs = dict(processor(product.open_pictures(case.images), return_tensors="pt"))
        counts = product.tokens_of(inputs["image_grid_thw"], processor.merge_size)
    ids = product.expand(case.stored["input_ids"].tolist(), counts, model.config.image_token_id)
    return inputs | {"input_ids": torch.tensor([ids])}


@pytest.mark.parametrize("case", golden.prompts(), ids=folder_id)
@torch.no_grad()
def test_model_activations(case: golden.Prompt, check: Check) -> None:
    """Merged embeddings, hidden states and logits within 1e-5 per unit."""
    inputs = prompt_inputs(case)
    assert inputs["input_ids"].shape[1] == case.listing["n_merged"]
    model = product.inference_model(case.folder)
    out = model(**inputs, output_hidden_states=True, use_cache=False)
    check("merged embeddings", out.hidden_states[0][0], case.stored["inputs_embeds"], deep=True)
    compared = 0
    for index, state in enumerate(out.hidden_states):
        if (expected := case.stored.get(f"hidden_states.{index}")) is not None:
            check("hidden states", state[0], expected, deep=True, what=str(index))
            compared += 1
    assert compared == len(case.listing["hidden_kept"])
    name = "logits" if "logits" in case.stored else "logits_last4"
    expected = case.stored[name]
    check("logits", out.logits[0, -len(expected) :], expected, deep=True)


@pytest.mark.parametrize("case", golden.prompts(), ids=folder_id)
@torch.no_grad()
def test_decoder_from_published_embeddings(case: golden.Prompt, check: Check) -> None:
    """The decoder alone, fed the published merged embeddings, so no rounding is passed on to it."""
    model = product.inference_model(case.folder)
    embeds = case.stored["inputs_embeds"][None]
    out = model(inputs_embeds=embeds, output_hidden_states=True, use_cache=False)
    name = "logits" if "logits" in case.stored else "logits_last4"
    expected = case.stored[name]
    check("decoder alone", out.logits[0, -len(expected) :], expected, deep=True)


@pytest.mark.parametrize("use_cache", [True, False], ids=["cache", "no-cache"])
@pytest.mark.parametrize("case", golden.prompts(), ids=folder_id)
@torch.no_grad()
def test_greedy_tokens(case: golden.Prompt, use_cache: bool, check: Check) -> None:
    """All greedy ids equal, with and without key/value cache; first steps' logits close."""
    inputs, listing = prompt_inputs(case), case.listing
    model = product.inference_model(case.folder)
    start = inputs["input_ids"].shape[1]
    settings = {"do_sample": False, "use_cache": use_cache, "pad_token_id": 0}
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    wanted = listing["greedy_new_ids"]
    out = model.generate(
        **inputs,
        **settings,
        max_new_tokens=len(wanted),
        return_dict_in_generate=True,
        output_logits=True,
    )
    assert out.sequences[0, :start].tolist() == inputs["input_ids"][0].tolist()
    assert out.sequences[0, start:].tolist() == wanted == case.stored["greedy_new_ids"].tolist()
    steps = case.stored["greedy_step_logits"]
    check("greedy logits", torch.cat(out.logits[: len(steps)]), steps, deep=True)
    stop = listing["early_stop"]
    settings |= {"eos_token_id": stop["eos_token_id"], "max_new_tokens": len(wanted)}
    assert model.generate(**inputs, **settings)[0, start:].tolist() == stop["new_ids"]


# --- training -------------------------------------------------------------------------------------


@functools.cache
def teacher_of(name: str, layer: int, cells: int) -> FrozenTeacher:
    return FrozenTeacher.from_pretrained(str(golden.FOLDER / name), cells=cells, layer=layer)


def teacher_for(case: golden.Training) -> FrozenTeacher:
    settings = golden.processors()[case.info["image_processor"]]
    cells = settings["image_size_clip"] // settings["patch_stride_clip"]
    return teacher_of(case.info["teacher"], case.info["mm_vision_select_layer"], cells)


def teacher_views(case: golden.Training, batch: product.Batch) -> torch.Tensor:
    """Our 8-bit views for the teacher, (pictures, size, size, 3)."""
    processor = product.image_processor(case.info["image_processor"])
    images = product.open_pictures([case.samples[index]["image"] for index in batch.pictured])
    view, unit, views = teacher_for(case).view, processor.size_multiple, []
    for image in images:
        grid = processor.grid_of(image.height, image.width)
        views.append(torch.tensor(view.render(image, grid.height // unit, grid.width // unit)))
    return torch.stack(views)


def prepared(
    case: golden.Training,
) -> tuple[EveForPreTraining, product.Batch, torch.Tensor, torch.Tensor]:
    """Model, batch, teacher features of the pictures' cells, and cells per picture."""
    model = product.training_model(case)
    batch = product.training_batch(case, model.config.image_token_id)
    aligner, grids = model.aligner, batch.inputs["image_grid_thw"]
    features = teacher_for(case).features(
        teacher_views(case, batch), grids, side=aligner.merge_size * aligner.pool_size
    )
    cells = cells_per_image(grids, merge_size=aligner.merge_size, pool_size=aligner.pool_size)
    return model, batch, features, cells


@pytest.mark.parametrize("case", golden.trainings(), ids=training_id)
def test_teacher_views_and_features(case: golden.Training, check: Check) -> None:
    """The teacher's pixels and its features on the whole canvas, for samples with a picture."""
    batch = product.training_batch(case, UNUSED_ID)
    teacher = teacher_for(case)
    pixels = teacher_views(case, batch).permute(0, 3, 1, 2).float() / 255
    pixels = (pixels - teacher.mean) / teacher.std
    with torch.no_grad():
        features = teacher.extract(teacher.model, pixels)
    for made, whole, index in zip(pixels, features, batch.pictured, strict=True):
        if "images_clip" in case.stored or not golden.is_subset():
            check("teacher view", made, case.stored["images_clip"][index, :3])
        check("teacher features", whole, case.stored["teacher_features"][index])


@pytest.mark.parametrize("case", golden.trainings(), ids=training_id)
@torch.no_grad()
def test_training_forward(case: golden.Training, check: Check) -> None:
    """Batch, activations, both sides of the aligner, and every loss.

    The published batch is padded before pictures take their place, so it may be wider than ours;
    only positions that are attended to are compared.
    The published programme also runs a dummy picture for a text-only sample and compares the
    aligner's output with itself, which adds exactly 0; ours has no picture there.
    """
    info, stored = case.info, case.stored
    model, batch, teacher, cells = prepared(case)
    inputs = batch.inputs
    valid = inputs["attention_mask"].bool()
    lengths = stored["merged_attention_mask"].sum(1)
    assert torch.equal(valid.sum(1), lengths)
    assert list(stored["merged_labels"].shape) == info["merged_shape"]
    for row, length in enumerate(lengths.tolist()):
        assert torch.equal(batch.labels[row, :length], stored["merged_labels"][row, :length])
        assert stored["merged_attention_mask"][row, :length].all()
    assert list(model.aligner.taps) == info["layer_idx"]
    assert model.aligner.pool_size == info["patch_ratio"]

    loss = model(**inputs, labels=batch.labels, teacher_features=teacher)
    check("language loss", loss.loss_terms["lm"], info["llm_loss"])
    check("teacher loss", loss.loss_terms["alignment"], info["clip_loss"])
    check("total loss", loss.loss, info["total_loss"])

    out = model.model(**inputs, output_hidden_states=True, image_taps=model.aligner.taps)
    last = valid.sum(1) - 1
    logits = model.lm_head(out.last_hidden_state)[torch.arange(len(last)), last]
    layers = len(out.hidden_states) - 1
    activations = {
        "inputs_embeds": out.hidden_states[0][valid],
        "hidden_mid_sample0": out.hidden_states[layers // 2][0][valid[0]],
        "hidden_last_sample0": out.last_hidden_state[0][valid[0]],
        "logits_last_valid": logits,
    }
    for name, made in activations.items():
        if name in stored:
            expected, kept = stored[name], stored["merged_attention_mask"].bool()
            expected = expected[kept] if expected.ndim == 3 else expected
            expected = expected[kept[0]] if name.endswith("sample0") else expected
            check("training activations", made, expected, deep=True, what=name)

    student = model.aligner(out.image_taps, inputs["image_grid_thw"])
    sides = zip(student.split(cells.tolist()), teacher.split(cells.tolist()), strict=True)
    for (one, other), index in zip(sides, batch.pictured, strict=True):
        check("aligner, student", one, stored[f"student_feature.{index}"], deep=True)
        check("aligner, teacher", other, stored[f"target_feature.{index}"], deep=True)
    wanted = [info["per_sample_clip_loss"][index] for index in batch.pictured]
    check("teacher loss", alignment_loss(student, teacher, cells), wanted)
    assert info["n_images_counted"] == len(batch.pictured)
    assert sum(info["per_sample_clip_loss"]) == pytest.approx(sum(wanted), abs=0)


def gradients(case: golden.Training, part: str) -> dict[str, torch.Tensor | None]:
    """Gradients by our names of the total loss, of the teacher's or of the language's alone."""
    model, batch, teacher, _ = prepared(case)
    model.train()
    labels, features = batch.labels, teacher
    if part == "clip":
        labels = torch.full_like(labels, product.IGNORED)
    elif part == "llm":
        features = None
    model(**batch.inputs, labels=labels, teacher_features=features).loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("case", golden.trainings(), ids=training_id)
def test_training_batch_from_conversations(case: golden.Training, tmp_path: Path) -> None:
    """Our reader, encoder and collator make the published batch from the conversations."""
    path = tmp_path / "samples.json"
    path.write_text(json.dumps(case.samples), encoding="utf-8")
    template = case.case["version"]
    system = golden.text()["conversation_templates"][template]["system"]
    kind = "plain" if template == "plain" else "chat"
    both = product.processor(case.info["image_processor"])
    encoder = Encoder(both, format=kind, max_length=10**6, teacher_view=teacher_for(case).view)
    records = product.llava_records(path, system=system).values()
    batch = EveCollator(pad_token_id=0)([[encoder(record)] for record in records])
    expected = product.training_batch(case, both.image_token_id)
    for key, value in expected.inputs.items():
        assert torch.equal(batch[key], value), key
    assert torch.equal(batch["labels"], expected.labels)
    assert torch.equal(batch["teacher_pixel_values"], teacher_views(case, expected))
    learnt = int((batch["labels"] != product.IGNORED).sum())
    assert learnt == case.info["n_supervised_tokens"]


@pytest.mark.parametrize("part", ["total", "clip", "llm"])
@pytest.mark.parametrize("case", golden.trainings(), ids=training_id)
def test_gradients(
    case: golden.Training, part: str, record_property: Callable[[str, object], None]
) -> None:
    """Norms of every trainable gradient, and some whole gradients, within 1e-4 relative."""
    found, largest = gradients(case, part), 0.0
    norms = case.info[f"grad_norm_{part}"]
    assert set(norms) == set(case.info["trainable"]) - set(case.info["no_grad_params"])
    for name, listed in norms.items():
        expected = listed or 0.0  # None: this loss does not reach the parameter
        gradient = found[product.our_name(name)]
        norm = 0.0 if gradient is None else float(gradient.double().norm())
        scale = max(expected, SMALLEST_NORM)
        largest = max(largest, abs(norm - expected) / scale)
        assert abs(norm - expected) <= GRADIENTS * scale, name
    for key, expected in case.stored.items():
        if key.startswith(f"grad_{part}."):
            made = found[product.our_name(key.removeprefix(f"grad_{part}."))]
            scale = float(expected.abs().max()) or SMALLEST_NORM  # 0: softmax over a single key
            difference = float((made - expected).abs().max()) / scale
            largest = max(largest, difference)
            assert difference <= GRADIENTS, key
    if part == "total":
        whole = [found[product.our_name(name)] for name in norms]
        norm = float(torch.stack([g.double().norm() for g in whole if g is not None]).norm())
        assert norm == pytest.approx(case.info["global_grad_norm_total"], rel=GRADIENTS)
    record_property(f"gradients, {part}", largest)


def optimizer_steps(case: golden.Training) -> list[float]:
    return next(value for key, value in case.info.items() if key.startswith("adamw"))


@pytest.mark.parametrize(
    "case", [case for case in golden.trainings() if optimizer_steps(case)], ids=training_id
)
def test_optimizer_steps(case: golden.Training, check: Check) -> None:
    """Total loss of plain AdamW steps (rate 1e-3) on one batch, everything trainable.

    AdamW divides by the gradient's own size, so a rounding difference in a small gradient moves its
    weight as far as a large one would; the decoder therefore adds up as the published one does.
    """
    model, batch, teacher, _ = prepared(case)
    model.model.language_model.set_attn_implementation("eager")
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0
    )
    for step, expected in enumerate(optimizer_steps(case)):
        loss = model(**batch.inputs, labels=batch.labels, teacher_features=teacher).loss
        check("optimizer steps", loss, expected, deep=step > 0, what=str(step))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def test_optimizer_groups() -> None:
    """Every published weight that we keep has the published rate and decay, or is frozen."""
    listing = golden.read_json(golden.FOLDER / "train" / "optimizer_groups.json")
    args = listing["args"]
    base, patch = args["learning_rate"], args["vision_tower_lr"]
    projector = args["mm_projector_lr"]
    if not projector:
        projector = patch = base
    text = {"model_type": "llama", "num_hidden_layers": args["num_hidden_layers"]}
    text |= {"vocab_size": 16, "hidden_size": 16, "intermediate_size": 16}
    text |= {"num_attention_heads": 2, "num_key_value_heads": 2}
    text |= {"tie_word_embeddings": args["tie_word_embeddings"]}
    aligned = args["requires_cliploss"]
    config = EveConfig(
        text_config=text,
        vision_config={"hidden_size": 16},
        alignment_config={"teacher_hidden_size": 16} if aligned else None,
        image_token_id=16,
    )
    with torch.device("meta"):
        model = (EveForPreTraining if aligned else EveForConditionalGeneration)(config)
    vision = ["model.vision_tower.*"] + (["aligner.*"] if aligned else [])
    rates = {glob: patch for glob in vision} | {"model.multi_modal_projector.*": projector}
    tuned = args["tune_vision_tower"]
    stage = StageSection(
        name="prealign" if tuned else "finetune",
        trainable=list(rates) if tuned else ["*"],
        learning_rates=rates if tuned else rates | {"*": base},
        weight_decay=args["weight_decay"],
        alignment=None,
    )
    trainable = select_trainable(model, stage)
    made = {
        (name, group["lr"], group["weight_decay"])
        for group in optimizer_groups(model, stage)
        for name in group["names"]
    }
    expected = {
        (product.our_name(name), group["lr"], group["weight_decay"])
        for group in listing["groups"]
        for name in group["params"]
    }
    assert made == expected
    frozen = {rename_weight(name) for name in listing["frozen"]} - {None}
    assert frozen == {name for name, _ in model.named_parameters()} - set(trainable)


# --- text -----------------------------------------------------------------------------------------


def chat_cases() -> list[tuple[str, str]]:
    """Samples of every conversation template; the one of captions has its own tests."""
    templates = [name for name in golden.text()["conversation_templates"] if name != "plain"]
    return [
        (name, sample) for name in templates for sample in golden.text().get(name, {}) if sample
    ]


def caption_cases() -> list[str]:
    return [name for name, entry in golden.text()["plain"].items() if "error" not in entry]


def empty_answer(name: str) -> bool:
    turns = golden.conversations()[name]["conversations"]
    return any(turn["from"] == "gpt" and not turn["value"].strip() for turn in turns)


def unequal_marks(name: str) -> bool:
    """Whether the turns hold more or fewer picture marks than the sample has pictures."""
    sample = golden.conversations()[name]
    marks = sum(turn["value"].count(sequence.MARK) for turn in sample["conversations"])
    return marks != ("image" in sample)


def cut_cases() -> list[tuple[str, str, int]]:
    """Samples that the published programme encoded with a short limit."""
    found = []
    for key, entries in golden.text().items():
        match = re.fullmatch(r"(.+)_max_length_(\d+)", key)
        if match and match[1] in golden.text()["conversation_templates"]:
            names = [name for name in entries if not (empty_answer(name) or unequal_marks(name))]
            found += [(match[1], name, int(match[2])) for name in names]
    return found


def text_encoder(template: str, *, max_length: int = 10**6) -> Encoder:
    """Our encoder with the picture sizes that the text group was made with."""
    _, _, side, _ = golden.text()["collated_v1"]["images_shape"]
    _, _, clip, _ = golden.text()["collated_v1"]["images_clip_shape"]
    name = next(
        name
        for name, settings in golden.processors().items()
        if (settings["image_size"], settings["image_size_clip"]) == (side, clip)
    )
    kind = "plain" if template == "plain" else "chat"
    return Encoder(product.processor(name), format=kind, max_length=max_length)


def record_of(template: str, name: str) -> Any:
    """A published conversation as our record, with the template's system sentence."""
    system = golden.text()["conversation_templates"][template]["system"]
    path = golden.FOLDER / "text" / "conversations.json"
    return product.llava_records(path, system=system)[name]


def published_ids(encoder: Encoder, ids: list[int]) -> list[int]:
    """Our ids before pictures take their place, with the published mark."""
    own = encoder.processor.image_token_id
    return [product.PLACEHOLDER if token == own else token for token in ids]


@pytest.mark.parametrize(
    "entry", golden.text()["tokenizer_image_token"], ids=lambda entry: repr(entry["prompt"])
)
def test_prompt_pieces(entry: dict[str, Any]) -> None:
    """Ids equal for strings with pictures anywhere, through one pass of our tokenizer."""
    tokenizer = product.tokenizer()
    mark = tokenizer.convert_tokens_to_ids(sequence.MARK)
    ids = tokenizer(entry["prompt"])["input_ids"]
    assert [product.PLACEHOLDER if token == mark else token for token in ids] == entry["ids"]


@pytest.mark.parametrize("case", golden.prompts(), ids=folder_id)
def test_processor_makes_the_prompt(case: golden.Prompt) -> None:
    """Text and pictures through our processor give the published ids, expanded, and our pixels."""
    name = product.published_config(case.folder)["mm_vision_tower"]
    images = product.open_pictures(case.images) or None
    made = product.processor(name)(text=case.listing["prompt"], images=images, return_tensors="pt")
    expected = prompt_inputs(case)
    assert made["input_ids"].tolist() == expected["input_ids"].tolist()
    for key in set(expected) - {"input_ids"}:
        assert torch.equal(made[key], expected[key])


def template_cases() -> list[tuple[str, str]]:
    return [
        (name, key)
        for name, template in golden.text()["conversation_templates"].items()
        for key in ("rendered_open", "rendered_closed")
        if template["sep_style"] == "TWO" and key in template
    ]


@pytest.mark.parametrize(("name", "key"), template_cases())
def test_rendered_template(name: str, key: str) -> None:
    """Our chat template renders the published examples, letter for letter."""
    template = golden.text()["conversation_templates"][name]
    asker, answerer = template["roles"]
    rendered = template[key]
    messages = [{"role": "system", "content": template["system"]}]
    body = rendered.removeprefix(template["system"] + template["sep"])
    for part in body.removesuffix(template["sep2"]).split(template["sep2"]):
        question, _, answer = part.partition(f" {answerer}:")
        messages.append({"role": "user", "content": question.removeprefix(f"{asker}: ")})
        if answer:
            messages.append({"role": "assistant", "content": answer.removeprefix(" ")})
    tokenizer = product.tokenizer()
    made = tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=messages[-1]["role"] == "user"
    )
    assert made == tokenizer.bos_token + rendered


@pytest.mark.parametrize(("template", "name"), chat_cases())
def test_chat_ids_and_labels(template: str, name: str) -> None:
    """Ids and labels equal; two published defects are not repeated.

    The published programme finds answers by splitting the text and adding token counts up. A sample
    whose answer contains " ASSISTANT: " or is empty breaks the count, and all its labels become
    -100 with a warning: it is silently not learnt. Ours learns every answer with its end token, and
    refuses an empty answer with a ValueError, which the caller counts. It also refuses more or
    fewer picture marks than pictures, which the published programme takes in silence.
    """
    encoder, record = text_encoder(template), record_of(template, name)
    expected = golden.text()[template][name]
    if empty_answer(name):
        assert set(expected["labels"]) == {product.IGNORED}
        with pytest.raises(ValueError, match="empty"):
            encoder(record)
        return
    if unequal_marks(name):
        with pytest.raises(ValueError, match="mark"):
            encoder(record)
        return
    ids, labels = encoder.encode_text(record.messages)
    assert published_ids(encoder, ids) == expected["input_ids"]
    if expected["warning"]:
        assert set(expected["labels"]) == {product.IGNORED}
        learnt = [token for token in labels if token != product.IGNORED]
        answers = [m["content"] for m in record.messages if m["role"] == "assistant"]
        said = "".join(f" {product.text_of(answer)}</s>" for answer in answers)
        assert product.tokenizer().decode(learnt, skip_special_tokens=False).strip() == said.strip()
    else:
        assert labels == expected["labels"]


@pytest.mark.parametrize("name", caption_cases())
def test_caption_ids_and_labels(name: str) -> None:
    """Ids and labels of the caption format equal."""
    encoder, expected = text_encoder("plain"), golden.text()["plain"][name]
    ids, labels = encoder.encode_text(record_of("plain", name).messages)
    assert published_ids(encoder, ids) == expected["input_ids"]
    assert labels == expected["labels"]


def test_captions_refused() -> None:
    """What the caption format does not take is a ValueError that names the record.

    The published programme stops with a bare AssertionError at every sample that is not one picture
    question with one answer. Ours refuses several answers and empty ones by name, and takes a
    single answer without a picture, or behind a greeting that is dropped, as a caption.
    """
    refused = 0
    for name, entry in golden.text()["plain"].items():
        record, encoder = record_of("plain", name), text_encoder("plain")
        answers = [m for m in record.messages if m["role"] == "assistant"]
        if "error" not in entry:
            continue
        if len(answers) > 1 or empty_answer(name):
            with pytest.raises(ValueError, match=name):
                encoder(record)
            refused += 1
        else:
            _, labels = encoder.encode_text(record.messages)
            learnt = [token for token in labels if token != product.IGNORED]
            caption = product.text_of(answers[0]["content"]) + "\n"
            assert product.tokenizer().decode(learnt).removeprefix(" ") == caption
    assert refused


@pytest.mark.parametrize(("template", "name", "limit"), cut_cases())
def test_long_samples_are_refused(template: str, name: str, limit: int) -> None:
    """A sample longer than the limit is a ValueError with its length; one that fits is whole.

    The published programme cuts instead: text to the limit, so answers lose their end, and rows of
    ids before the pictures are put in, so the merged sequence is longer than the limit all the
    same and a cut between pictures and marks is possible. Ours counts pictures in place.
    """
    record = record_of(template, name)
    whole = text_encoder(template)(record)
    length = len(whole.input_ids)
    if length > limit:
        with pytest.raises(ValueError, match=f"{length} tokens.*{limit}"):
            text_encoder(template, max_length=limit)(record)
    fitting = text_encoder(template, max_length=length)(record)
    assert fitting.input_ids.tolist() == whole.input_ids.tolist()
    assert len(golden.text()[f"{template}_max_length_{limit}"][name]["input_ids"]) <= length


def test_other_tokenizer_version_loses_nothing() -> None:
    """Where a newer tokenizer made the published programme ignore whole samples, ours learns them.

    With `legacy=False` no space is put behind `</s>`, the counts by pieces no longer add up, and
    every conversation of several turns is masked. Ours finds answers by their place in the text.
    """
    listed = golden.text()["v1_legacy_false_tokenizer"]
    lost = [name for name, entry in listed.items() if entry["warning"]]
    for name in lost:
        assert set(listed[name]["labels"]) == {product.IGNORED}
        _, labels = text_encoder("v1").encode_text(record_of("v1", name).messages)
        assert labels == golden.text()["v1"][name]["labels"]
        assert set(labels) != {product.IGNORED}
    assert listed


def test_collated_batch() -> None:
    """Our collator's rows, with pictures taken back to marks, are the published ones."""
    expected, encoder = golden.text()["collated_v1"], text_encoder("v1")
    records = [record_of("v1", name) for name in expected["ids"]]
    encoded = [encoder(record) for record in records]
    batch = EveCollator(pad_token_id=encoder.processor.tokenizer.pad_token_id)(
        [[record] for record in encoded]
    )
    merge = encoder.processor.image_processor.merge_size
    counts = product.tokens_of(batch["image_grid_thw"], merge)
    for index, record in enumerate(records):
        own = [counts.pop(0) for _ in record.images]
        valid = batch["attention_mask"][index].bool()
        ids = batch["input_ids"][index][valid].tolist()
        mark = encoder.processor.image_token_id
        length = sum(expected["attention_mask"][index])
        assert product.collapse(ids, mark, own) == expected["input_ids"][index][:length]
        wanted = [label for label in expected["labels"][index] if label != product.IGNORED]
        labels = batch["labels"][index]
        assert labels[labels != product.IGNORED].tolist() == wanted
        assert set(batch["input_ids"][index][~valid].tolist()) <= {0}
    assert not counts


@pytest.mark.parametrize("format", ["plain", "chat"])
def test_labels_equal_the_oracle(format: str) -> None:
    """Answers that begin with blanks, digits, odd letters or marks: ids and labels as the oracle's."""
    encoder = text_encoder("plain" if format == "plain" else "v1")
    tokenizer = product.tokenizer()
    system = golden.text()["conversation_templates"]["v1"]["system"]
    answers = [
        "Yes.",
        "1. one",
        "\u00e9t\u00e9",
        "\U0001f642 ok",
        "ASSISTANT: x",
        "(a)",
        "two\nlines",
    ]
    for answer in answers:
        turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": answer}]
        sample = {"id": answer, "image": "none.png", "conversations": turns}
        tokenize = lambda text: tokenizer(text)["input_ids"]  # noqa: E731
        start = tokenizer.bos_token_id
        if format == "plain":
            _, ids, labels = sequence.encode_caption(sample, tokenize, start)
        else:
            _, ids, labels = sequence.encode_chat(sample, system, tokenize, start)
        messages = [
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]},
            {"role": "assistant", "content": [{"type": "text", "text": answer}]},
        ]
        made = encoder.encode_text(messages)
        assert published_ids(encoder, made[0]) == ids, answer
        assert made[1] == labels, answer
