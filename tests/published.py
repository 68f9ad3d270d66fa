"""Checkpoints in the published layout: real 7B shapes without memory, or tiny ones on disk.

Names and shapes are written out by hand from the published facts (file lists, the paper's sizes),
not taken from the code under test. One thing a reader would get wrong: the teacher is in a
published checkpoint twice, under two names.
"""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

import golden_files as golden

# The complete config.json of EVE-7B-v1.0.
CONFIG_7B: dict[str, Any] = {
    "_name_or_path": "checkpoints/eve-7b-prtr1-672-mse",
    "architectures": ["EVELlamaForCausalLM"],
    "model_type": "eve",
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "initializer_range": 0.02,
    "tie_word_embeddings": False,
    "pretraining_tp": 1,
    "vocab_size": 32000,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.31.0",
    "use_cache": True,
    "image_aspect_ratio": "square",
    "image_grid_pinpoints": None,
    "mm_hidden_size": 1024,
    "mm_projector_type": "mlp2x_gelu",
    "mm_projector_lr": 2e-05,
    "vision_tower_lr": 2e-05,
    "mm_use_im_patch_token": False,
    "mm_use_im_start_end": False,
    "mm_vision_select_feature": "patch",
    "mm_vision_select_layer": -2,
    "mm_vision_tower": "openai/eve-patch14-anypixel-672",
    "mm_vision_tower_clip": "openai/clip-vit-large-patch14-336",
    "requires_cliploss": True,
    "tune_mm_mlp_adapter": False,
    "use_mm_proj": True,
}
# What the three published checkpoints say differently.
DIFFERENCES: dict[str, dict[str, Any]] = {
    "BAAI/EVE-7B-Pretrain-v1.0": {
        "_name_or_path": "checkpoints/eve-7b-prtr0-672-mse",
        "mm_projector_lr": None,
        "vision_tower_lr": None,
    },
    "BAAI/EVE-7B-v1.0": {},
    "BAAI/EVE-7B-HD-v1.0": {"mm_vision_tower": "openai/eve-patch14-anypixel-1344"},
}
# Vicuna's file carries sampling settings, which a greedy answer does not use.
GENERATION_CONFIG = {
    "_from_model_config": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "max_length": 4096,
    "temperature": 0.9,
    "top_p": 0.6,
    "transformers_version": "4.31.0",
}


def config_7b(name: str) -> dict[str, Any]:
    """The flat configuration of a published checkpoint."""
    return CONFIG_7B | DIFFERENCES[name]


def decoder_shapes(config: dict[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of a LLaMA decoder."""
    width, inner, words = (config[k] for k in ("hidden_size", "intermediate_size", "vocab_size"))
    keys = width // config["num_attention_heads"] * config["num_key_value_heads"]
    yield "model.embed_tokens.weight", (words, width)
    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}"
        yield f"{at}.self_attn.q_proj.weight", (width, width)
        yield f"{at}.self_attn.k_proj.weight", (keys, width)
        yield f"{at}.self_attn.v_proj.weight", (keys, width)
        yield f"{at}.self_attn.o_proj.weight", (width, width)
        yield f"{at}.mlp.gate_proj.weight", (inner, width)
        yield f"{at}.mlp.up_proj.weight", (inner, width)
        yield f"{at}.mlp.down_proj.weight", (width, inner)
        yield f"{at}.input_layernorm.weight", (width,)
        yield f"{at}.post_attention_layernorm.weight", (width,)
    yield "model.norm.weight", (width,)
    yield "lm_head.weight", (words, width)


def picture_shapes(config: dict[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of the patch embedding layer and its projector."""
    width, small = config["hidden_size"], config["mm_hidden_size"]
    yield "model.vision_tower.class_embedding", (small,)
    yield "model.vision_tower.split_embedding", (small,)
    yield "model.vision_tower.patch_embedding.weight", (small, 3, 14, 14)
    for kind in ("local", "global"):
        at = f"model.vision_tower.{kind}_attention"
        for part, rows in (("q", small), ("kv", 2 * small)):
            yield f"{at}.{part}.0.weight", (small,)
            yield f"{at}.{part}.0.bias", (small,)
            yield f"{at}.{part}.1.weight", (rows, small)
        yield f"{at}.proj.weight", (small, small)
        yield f"{at}.proj.bias", (small,)
    yield "model.mm_projector.0.weight", (width, small)
    yield "model.mm_projector.0.bias", (width,)
    yield "model.mm_projector.2.weight", (width, width)
    yield "model.mm_projector.2.bias", (width,)


def aligner_shapes(config: dict[str, Any], teacher: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of the patch aligning layer; a tap at every fourth layer and the input."""
    width, at = config["hidden_size"], "model.vision_tower_compressor"
    for tap in range(config["num_hidden_layers"] // 4 + 1):
        yield f"{at}.norm_layer.{tap}.0.weight", (width,)
        yield f"{at}.norm_layer.{tap}.0.bias", (width,)
        yield f"{at}.norm_layer.{tap}.1.weight", (teacher, width)
    yield f"{at}.input_layer.weight", (teacher, width)
    yield f"{at}.input_layer.bias", (teacher,)
    yield f"{at}.output_layer.weight", (teacher, teacher)
    yield f"{at}.output_layer.bias", (teacher,)


def teacher_shapes(teacher: int, layers: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of both copies of the teacher (its blocks cut down to one matrix each)."""
    for at in ("model.vision_clip", "model.vision_tower_compressor.clip_layer"):
        model = f"{at}.backbone.vision_model"
        yield f"{model}.embeddings.class_embedding", (teacher,)
        yield f"{model}.embeddings.patch_embedding.weight", (teacher, 3, 14, 14)
        yield f"{model}.embeddings.position_ids", (1, 577)
        yield f"{model}.pre_layrnorm.weight", (teacher,)
        for layer in range(layers):
            yield f"{model}.encoder.layers.{layer}.mlp.fc1.weight", (4 * teacher, teacher)


def tiny_config(**changes: Any) -> dict[str, Any]:
    """A published configuration in a size for tests: 5 layers, the words of the golden tokenizer."""
    return (
        CONFIG_7B
        | {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 5}
        | {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 704}
        | {"mm_hidden_size": 16, "torch_dtype": "float32", "max_position_embeddings": 2048}
        | changes
    )


def tiny_weights(config: dict[str, Any], *, teacher: int = 8, seed: int = 0) -> dict:
    """Random weights under published names, with an aligner, two teachers and computed buffers."""
    generator = torch.Generator().manual_seed(seed)
    listed = [
        *decoder_shapes(config),
        *picture_shapes(config),
        *aligner_shapes(config, teacher),
        *teacher_shapes(teacher, 2),
    ]
    dtype = getattr(torch, config["torch_dtype"])
    weights = {
        name: (torch.randn(shape, generator=generator) / 4).to(dtype) for name, shape in listed
    }
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    return weights


def write(
    folder: Path, config: dict[str, Any], weights: dict, *, kind: str, shards: int = 3
) -> Path:
    """Writes a published folder: configuration, tokenizer, generation settings, sharded weights."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (folder / "generation_config.json").write_text(json.dumps(GENERATION_CONFIG), encoding="utf-8")
    for file in (golden.FOLDER / "tokenizer").iterdir():
        shutil.copy(file, folder)
    stem, end = ("pytorch_model", "bin") if kind == "bin" else ("model", "safetensors")
    index = {}
    names = list(weights)
    for shard in range(shards):
        file = f"{stem}-{shard + 1:05d}-of-{shards:05d}.{end}"
        part = {name: weights[name].clone() for name in names[shard::shards]}
        if kind == "bin":
            torch.save(part, folder / file)
        else:
            save_file(part, folder / file, metadata={"format": "pt"})
        index |= dict.fromkeys(part, file)
    total = sum(weight.nbytes for weight in weights.values())
    listing = {"metadata": {"total_size": total}, "weight_map": index}
    (folder / f"{stem}.{end}.index.json").write_text(json.dumps(listing), encoding="utf-8")
    return folder


def hub_cache(folder: Path) -> Path:
    """A cache as the Hub's library lays it out, with a tiny checkpoint under each published name."""
    config = tiny_config()
    weights = tiny_weights(config)
    for name, changes in DIFFERENCES.items():
        place = folder / f"models--{name.replace('/', '--')}"
        snapshot = place / "snapshots" / ("0123456789" * 4)
        write(snapshot, config | changes, weights, kind="bin")
        (place / "refs").mkdir()
        (place / "refs" / "main").write_text(snapshot.name, encoding="utf-8")
    return folder
