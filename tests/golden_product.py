"""Our classes, built from what a folder of golden numbers holds under official names.

The published programme marks a picture with one id and puts it on a square canvas with a mask; ours
repeats a placeholder and packs patches. The two translations live here. One thing a reader would
get wrong: the published dummy picture of a text-only sample has no counterpart on our side.
"""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor

import golden_files as golden
from eve_vlm import (
    EveConfig,
    EveForConditionalGeneration,
    EveForPreTraining,
    EveImageProcessor,
    EveModel,
    EveProcessor,
    EveVisionConfig,
    num_image_tokens,
)
from eve_vlm.convert_eve_weights_to_hf import convert_state_dict
from eve_vlm.data.records import Record
from eve_vlm.data.sources import LlavaSource
from eve_vlm.image_processing_eve import to_rgb
from eve_vlm.processing_eve import VICUNA_CHAT_TEMPLATE
from eve_vlm.published_eve import image_settings, nested_config, rename_weight
from eve_vlm.published_tokenizer_eve import published_tokenizer

PLACEHOLDER = -200  # the published mark of a picture
IGNORED = -100


# --- pictures -------------------------------------------------------------------------------------


@functools.cache
def image_processor(name: str) -> EveImageProcessor:
    """Our processor for a published processor folder."""
    return EveImageProcessor(**image_settings(golden.processors()[name]))


def open_pictures(names: list[str]) -> list[Image.Image]:
    """Pictures by name."""
    return [to_rgb(Image.open(golden.picture_path(name))) for name in names]


def unpack(pixel_values: Tensor, image_grid_thw: Tensor, *, patch: int, merge: int) -> Tensor:
    """Packed patches of one picture to (3, height, width)."""
    _, rows, cols = image_grid_thw.tolist()
    cells = pixel_values.reshape(rows // merge, cols // merge, merge, merge, 3, patch, patch)
    return cells.permute(4, 0, 2, 5, 1, 3, 6).reshape(3, rows * patch, cols * patch)


def from_canvas(canvas: Tensor, *, patch: int, merge: int) -> tuple[Tensor, Tensor]:
    """A published tensor (4, H, W) to packed patches and grid.

    Cropped to the box of the mask; an empty mask means the top left 16 x 16 patches, as published.
    Rows and columns of patches that do not fill a cell are dropped.
    """
    on = canvas[3, ::patch, ::patch].nonzero()
    if len(on):
        (top, left), (bottom, right) = on[0].tolist(), on[-1].tolist()
    else:
        top, left = 0, 0
        bottom, right = (min(side // patch, 16) - 1 for side in canvas.shape[1:])
    rows, cols = ((end - start + 1) // merge for start, end in ((top, bottom), (left, right)))
    box = canvas[:3, top * patch :, left * patch :]
    box = box[:, : rows * merge * patch, : cols * merge * patch]
    cells = box.reshape(3, rows, merge, patch, cols, merge, patch)
    pixels = cells.permute(1, 4, 2, 5, 0, 3, 6).reshape(rows * cols * merge**2, -1)
    return pixels, torch.tensor([[1, rows * merge, cols * merge]])


def tokens_of(image_grid_thw: Tensor, merge: int) -> list[int]:
    """Tokens per picture."""
    grids = image_grid_thw.tolist()
    return [num_image_tokens(rows // merge, cols // merge) for _, rows, cols in grids]


# --- models ---------------------------------------------------------------------------------------


def published_config(folder: Path, listing: str = "config_inference.json") -> dict[str, Any]:
    """A model's published configuration."""
    return golden.read_json(folder / listing)


def load(model: torch.nn.Module, weights: dict[str, Tensor], *, aligner: bool) -> None:
    """Put published weights into our model; only a tied head may be missing, nothing left over."""
    state = convert_state_dict(weights, aligner=aligner)
    missing, surplus = model.load_state_dict(state, strict=False)
    assert not surplus
    assert not missing or (missing == ["lm_head.weight"] and model.config.tie_word_embeddings)
    model.tie_weights()


@functools.cache
def inference_model(folder: Path) -> EveForConditionalGeneration:
    """Our model with a folder's weights; shared, so nobody may change it."""
    config = published_config(folder)
    model = EveForConditionalGeneration(
        EveConfig(**nested_config(config, golden.processors()[config["mm_vision_tower"]]))
    )
    load(model, golden.published_weights(folder), aligner=False)
    return model.eval()


def training_model(case: golden.Training) -> EveForPreTraining:
    """Our training model with a case's weights; a new one every time."""
    weights = golden.published_weights(case.model, training=True)
    width = golden.read_json(golden.FOLDER / case.info["teacher"] / "config.json")["hidden_size"]
    config = EveConfig(
        **nested_config(
            published_config(case.model, "config.json"),
            golden.processors()[case.info["image_processor"]],
            teacher_hidden_size=width,
        )
    )
    model = EveForPreTraining(config)
    load(model, weights, aligner=True)
    return model.eval()


@functools.cache
def embedding_model(folder: Path) -> EveModel:
    """Patch embedding and projector of a folder; the decoder behind them is a stub of one layer."""
    weights = golden.tensors(folder / "weights.safetensors")
    kernel = weights["model.vision_tower.patch_embedding.weight"]
    width = weights["model.mm_projector.0.weight"].shape[0]
    text = {"model_type": "llama", "vocab_size": 8, "hidden_size": width, "num_hidden_layers": 1}
    text |= {"intermediate_size": 8, "num_attention_heads": 1, "num_key_value_heads": 1}
    vision = EveVisionConfig(patch_size=kernel.shape[-1], hidden_size=kernel.shape[0])
    model = EveModel(EveConfig(text_config=text, vision_config=vision, image_token_id=7))
    state = {
        name.removeprefix("model."): value for name, value in convert_state_dict(weights).items()
    }
    missing, surplus = model.load_state_dict(state, strict=False)
    assert not surplus
    assert all(name.startswith("language_model.") for name in missing)
    return model.eval()


def our_name(published: str) -> str:
    """Our name of a published weight that we keep."""
    name = rename_weight(published)
    assert name is not None, published
    return name


# --- text and batches -----------------------------------------------------------------------------


@functools.cache
def tokenizer() -> Any:
    """Our tokenizer, with `<image>` in its vocabulary."""
    file = golden.FOLDER / "tokenizer" / "tokenizer.json"
    return published_tokenizer(file, chat_template=VICUNA_CHAT_TEMPLATE)


@functools.cache
def processor(name: str) -> EveProcessor:
    """Our processor with the picture sizes of a published processor folder."""
    words = tokenizer()
    return EveProcessor(image_processor(name), words, chat_template=words.chat_template)


def text_of(content: str | list[dict[str, Any]]) -> str:
    """The words of a message."""
    if isinstance(content, str):
        return content
    return "".join(part["text"] for part in content if part["type"] == "text")


def llava_records(path: Path, *, system: str) -> dict[str, Record]:
    """Conversations of a LLaVA file as our records, by id, behind a system sentence."""
    folder = golden.picture_path(next(iter(golden.preprocess()["images"]))).parent
    source = LlavaSource(path, image_folder=folder)
    opening = [{"role": "system", "content": system}] if system else []
    records = [source[index] for index in range(len(source))]
    return {
        record.id: dataclasses.replace(record, messages=opening + record.messages)
        for record in records
    }


def expand(ids: list[int], counts: list[int], value: int) -> list[int]:
    """Each published mark becomes as many of `value` as its picture has tokens."""
    out, left = [], list(counts)
    for token in ids:
        out += [value] * left.pop(0) if token == PLACEHOLDER else [token]
    assert not left
    return out


def collapse(ids: list[int], image_token_id: int, counts: list[int]) -> list[int]:
    """The reverse: each run of placeholders of a picture becomes one published mark."""
    out, position, left = [], 0, list(counts)
    while position < len(ids):
        if ids[position] == image_token_id:
            count = left.pop(0)
            assert set(ids[position : position + count]) == {image_token_id}
            out.append(PLACEHOLDER)
            position += count
        else:
            out.append(ids[position])
            position += 1
    assert not left
    return out


class Batch(NamedTuple):
    """A training batch in our form, padded on the right."""

    inputs: dict[str, Tensor]  # input_ids, attention_mask, pixel_values, image_grid_thw
    labels: Tensor  # (B, T)
    pictured: list[int]  # samples that have a picture, in order


def training_batch(case: golden.Training, image_token_id: int) -> Batch:
    """The published batch of a case, with our pixels for its pictures."""
    processor = image_processor(case.info["image_processor"])
    pictured = [index for index, sample in enumerate(case.samples) if "image" in sample]
    pixels = processor(
        open_pictures([case.samples[index]["image"] for index in pictured]), return_tensors="pt"
    )
    counts = tokens_of(pixels["image_grid_thw"], processor.merge_size)
    rows, labels = [], []
    for index in range(len(case.samples)):
        kept = case.stored["attention_mask"][index].bool()
        ids, wanted = (case.stored[key][index][kept].tolist() for key in ("input_ids", "labels"))
        own = [counts[pictured.index(index)]] if index in pictured else []
        rows.append(expand(ids, own, image_token_id))
        marked = [PLACEHOLDER if i == PLACEHOLDER else w for i, w in zip(ids, wanted, strict=True)]
        labels.append(expand(marked, own, IGNORED))
    length = max(map(len, rows))
    pad = lambda row, value: row + [value] * (length - len(row))  # noqa: E731
    inputs = {
        "input_ids": torch.tensor([pad(row, 0) for row in rows]),
        "attention_mask": torch.tensor([pad([1] * len(row), 0) for row in rows]),
        "pixel_values": pixels["pixel_values"],
        "image_grid_thw": pixels["image_grid_thw"],
    }
    return Batch(inputs, torch.tensor([pad(row, IGNORED) for row in labels]), pictured)
