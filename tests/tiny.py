"""Small things that many tests are made of: a tokenizer, a processor, models, pictures, a recipe.

Everything is made in memory from seeds, in milliseconds. One thing a reader would get wrong: the
decoder's `initializer_range` is far above the usual 0.02, because with the usual one a tiny random
model answers every picture alike, and then no test can tell one picture from another.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from transformers import CLIPVisionConfig, CLIPVisionModel, PreTrainedTokenizerFast

from eve_vlm import (
    EveAlignmentConfig,
    EveConfig,
    EveForConditionalGeneration,
    EveForPreTraining,
    EveImageProcessor,
    EveProcessor,
    EveVisionConfig,
)
from eve_vlm.data.tokenizer import train_tokenizer
from eve_vlm.loading import load_model
from eve_vlm.train.recipe import load_recipe
from eve_vlm.train.sections import Recipe

PATCH, MERGE, MULTIPLE, EDGE = 4, 2, 8, 32  # pixels; a picture is at most 4 x 4 cells, 21 tokens
VISION_WIDTH, WIDTH, LAYERS = 24, 32, 3
TEACHER_WIDTH = 16
QUICKSTART_SEED, QUICKSTART_QUESTIONS = 1, 6
QUICKSTART_OVERRIDES = (
    "training.max_steps=2",
    "training.per_device_train_batch_size=4",
    "training.logging_steps=1",
)
QUESTIONS = (
    "What is this?",
    "How many red squares are there in the picture?",
    "Where is it?",
    "Say more.",
)
ANSWERS = ("a red square", "two", "top left", "there is a small blue ball below the green box")


def tokenizer() -> PreTrainedTokenizerFast:
    """About 300 entries: bytes, special tokens and a few merges."""
    return train_tokenizer([*QUESTIONS, *ANSWERS] * 4, vocab_size=300)


def processor(*, edge: int = EDGE, multiple: int = MULTIPLE, **settings: Any) -> EveProcessor:
    """A processor for `PATCH`-pixel patches, with the plain chat template unless told otherwise."""
    words = tokenizer()
    pictures = EveImageProcessor(
        size={"longest_edge": edge}, size_multiple=multiple, patch_size=PATCH, merge_size=MERGE
    )
    settings.setdefault("chat_template", words.chat_template)
    return EveProcessor(pictures, words, **settings)


def config(
    *, model_type: str = "llama", aligned: bool = False, pool_size: int = 1, **text: Any
) -> EveConfig:
    """`WIDTH` wide, `LAYERS` deep, grouped heads, room for 512 positions."""
    settings: dict[str, Any] = {
        "hidden_size": WIDTH,
        "intermediate_size": 48,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "vocab_size": 300,
        "max_position_embeddings": 512,
        "initializer_range": 0.3,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "tie_word_embeddings": False,
    }
    alignment = EveAlignmentConfig(
        teacher_hidden_size=TEACHER_WIDTH, tap_every=1, num_attention_heads=8, pool_size=pool_size
    )
    return EveConfig(
        text_config={"model_type": model_type, **settings, **text},
        vision_config=EveVisionConfig(
            patch_size=PATCH, merge_size=MERGE, hidden_size=VISION_WIDTH, num_attention_heads=8
        ),
        alignment_config=alignment if aligned else None,
        image_token_id=3,
    )


def model(
    of: EveConfig | None = None, *, seed: int = 0, attn_implementation: str = "sdpa"
) -> EveForConditionalGeneration:
    """A random model in eval mode; with an alignment in its configuration, the training class."""
    of = config() if of is None else of
    cls = EveForConditionalGeneration if of.alignment_config is None else EveForPreTraining
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        made = cls._from_config(of, attn_implementation=attn_implementation)
    made.generation_config.eos_token_id, made.generation_config.pad_token_id = 2, 0
    return made.eval()


def picture(height: int, width: int, *, seed: int = 0) -> Image.Image:
    """Noise on a colour: no two are alike, and neither are two patches of one."""
    rng = np.random.default_rng([seed, height, width])
    colour = rng.integers(0, 256, 3)
    noise = rng.integers(-60, 61, (height, width, 3))
    return Image.fromarray(np.clip(colour + noise, 0, 255).astype(np.uint8))


def conversation(question: str, answer: str | None = None, *, pictures: int = 1) -> list[dict]:
    """One user turn with pictures in front, and the answer if there is one."""
    content = [{"type": "image"}] * pictures + [{"type": "text", "text": question}]
    messages = [{"role": "user", "content": content}]
    if answer is not None:
        messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    return messages


def packed(grids: list[tuple[int, int]], *, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random packed pixels for pictures of these (rows, cols) of cells."""
    generator = torch.Generator().manual_seed(seed)
    thw = torch.tensor([(1, MERGE * rows, MERGE * cols) for rows, cols in grids]).view(-1, 3)
    pixels = torch.randn(int(thw.prod(-1).sum()), 3 * PATCH**2, generator=generator)
    return {"pixel_values": pixels, "image_grid_thw": thw}


def teacher_folder(folder: Path, *, cells: int = EDGE // MULTIPLE) -> Path:
    """A random CLIP vision model with one patch for each of `cells` x `cells` alignment cells."""
    with torch.random.fork_rng():
        torch.manual_seed(7)
        model = CLIPVisionModel(
            CLIPVisionConfig(
                hidden_size=TEACHER_WIDTH,
                intermediate_size=32,
                num_hidden_layers=2,
                num_attention_heads=2,
                image_size=5 * cells,
                patch_size=5,
            )
        )
    model.save_pretrained(folder)
    settings = {"image_mean": [0.48, 0.46, 0.41], "image_std": [0.27, 0.26, 0.28]}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return folder


def lora_adapter(folder: Path, *, base: Path) -> None:
    """A PEFT adapter of a model folder for decoder and picture parts, as it is before its first step."""
    peft = pytest.importorskip("peft", reason="needs the extra lora")
    settings = peft.LoraConfig(
        target_modules=r".*language_model.*\.q_proj",
        modules_to_save=["model.vision_tower", "model.multi_modal_projector"],
    )
    peft.get_peft_model(load_model(base), settings).save_pretrained(folder)


def llava_file(folder: Path, *, records: int = 12, captions: bool = False) -> Path:
    """A LLaVA JSON file with its pictures; every fourth record of a conversation is text only."""
    folder.mkdir(parents=True, exist_ok=True)
    samples = []
    for index in range(records):
        question, answer = QUESTIONS[index % 4], ANSWERS[index % 4]
        sample: dict[str, Any] = {"id": f"r{index}"}
        if captions or index % 4 != 3:
            name = f"{index}.png"
            picture(16 + 8 * (index % 5), 40 - 8 * (index % 4), seed=index).save(folder / name)
            sample["image"], question = name, f"<image>\n{question}"
        sample["conversations"] = [
            {"from": "human", "value": question},
            {"from": "gpt", "value": answer},
        ]
        samples.append(sample)
    file = folder / "data.json"
    file.write_text(json.dumps(samples), encoding="utf-8")
    return file


def recipe_data(
    data: Path, output: Path, *, teacher: Path | None = None, init_from: Path | None = None
) -> dict[str, Any]:
    """The keys of a recipe that trains a tiny model in well under a second a step."""
    text_config = None if init_from else config().text_config.to_dict()
    if text_config:
        # The tokenizer says these.
        for name in ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id"):
            text_config.pop(name)
    alignment = {"teacher": str(teacher), "layer": -2, "tap_every": 1} if teacher else None
    return {
        "name": "test",
        "output_dir": str(output),
        "seed": 3,
        "model": {
            "init_from": str(init_from) if init_from else None,
            "text_config": text_config,
            "vision": {
                "patch_size": PATCH,
                "merge_size": MERGE,
                "hidden_size": VISION_WIDTH,
                "num_attention_heads": 8,
            },
            "image": {"longest_edge": EDGE, "size_multiple": MULTIPLE},
            "dtype": "float32",
        },
        "data": {
            "sources": [{"kind": "llava", "path": str(data)}],
            "format": "chat",
            "max_length": 256,
        },
        "stage": {
            "name": "finetune",
            "trainable": ["*"],
            "learning_rates": {"*": 1.0e-3},
            "weight_decay": 0.0,
            "alignment": alignment,
        },
        "training": {
            "max_steps": 4,
            "per_device_train_batch_size": 2,
            "logging_steps": 1,
            "save_strategy": "no",
            "dataloader_pin_memory": False,
            "use_cpu": True,
        },
    }


def recipe(file: Path, data: dict[str, Any], *overrides: str) -> Recipe:
    """Writes `data` as YAML to `file` and loads it as `eve train` would."""
    file.write_text(yaml.safe_dump(data, sort_keys=False), encoding="utf-8")
    return load_recipe(file, overrides)


def for_model(batch: dict[str, Any]) -> dict[str, Any]:
    """A batch of the collator without what the trainer takes out of it."""
    ours = ("record_ids", "source_names", "bad_records", "num_tokens")
    return {name: value for name, value in batch.items() if name not in ours}


def refused(action: Callable[[], object], *, end: str = "") -> str:
    """The message of the ValueError that `action` must raise: one line, with this end."""
    with pytest.raises(ValueError) as caught:
        action()
    text = str(caught.value)
    assert "\n" not in text and text.endswith(end)
    return text
