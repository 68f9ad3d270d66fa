"""The oracle's parts around an ordinary decoder and an ordinary teacher from transformers.

The decoder is not EVE's, so its weights go under their own official names into the stock class.
One thing a reader would get wrong: hidden state 0 is the merged embedding, and only the last one
is after the final norm.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM

from . import alignment, patch_embedding, sequence

DECODER_KEYS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "hidden_act",
    "max_position_embeddings",
    "rms_norm_eps",
    "tie_word_embeddings",
    "bos_token_id",
    "eos_token_id",
    "attention_bias",
)


class Forward(NamedTuple):
    """One sample through the decoder."""

    embeds: Tensor  # (T, D)
    hidden: list[Tensor]  # (T, D) each
    logits: Tensor  # (T, V)


def build_decoder(config: dict[str, Any], weights: dict[str, Tensor]) -> LlamaForCausalLM:
    """The stock decoder with the published weights; missing or left-over names are an error."""
    known = {key: config[key] for key in DECODER_KEYS if key in config}
    rope = {"rope_type": "default", "rope_theta": config["rope_theta"]}
    decoder = LlamaForCausalLM(LlamaConfig(**known, rope_parameters=rope)).eval()
    names = set(decoder.state_dict())
    own = {name: value for name, value in weights.items() if name in names}
    missing = names - set(own) - ({"lm_head.weight"} if config["tie_word_embeddings"] else set())
    if missing:
        raise ValueError(f"decoder weights are missing: {sorted(missing)}")
    decoder.load_state_dict(own, strict=False)
    decoder.tie_weights()
    decoder.set_attn_implementation("eager")  # the published attention, sum for sum
    return decoder


def embed_pictures(
    canvases: list[Tensor], weights: dict[str, Tensor]
) -> list[tuple[Tensor, int, int]]:
    """Projected tokens, rows and columns per canvas with mask (4, H, W)."""
    layer = patch_embedding.select(weights, "model.vision_tower.")
    projector = patch_embedding.select(weights, "model.mm_projector.")
    patch = layer["patch_embedding.weight"].shape[-1]
    found = []
    for canvas in canvases:
        tokens = patch_embedding.embed(patch_embedding.crop(canvas, patch), layer)
        found.append(
            (patch_embedding.project(tokens.sequence, projector), tokens.rows, tokens.cols)
        )
    return found


def run(decoder: LlamaForCausalLM, ids: list[int], pictures: list[Tensor]) -> Forward:
    """Merge and decode one sample."""
    embeds = sequence.merge(ids, decoder.get_input_embeddings().weight, pictures)
    out = decoder(inputs_embeds=embeds[None], output_hidden_states=True, use_cache=False)
    return Forward(embeds, [state[0] for state in out.hidden_states], out.logits[0])


def build_teacher(config: dict[str, Any], weights: dict[str, Tensor]) -> CLIPVisionModel:
    """The stock teacher; weights under names that begin with `vision_model.` or below it."""
    teacher = CLIPVisionModel(CLIPVisionConfig.from_dict(config)).eval()
    wanted = set(teacher.state_dict())
    bare = {name.removeprefix("vision_model."): value for name, value in weights.items()}
    prefix = "vision_model." if any(name.startswith("vision_model.") for name in wanted) else ""
    state = {prefix + name: value for name, value in bare.items() if prefix + name in wanted}
    missing = {name for name in wanted - set(state) if not name.endswith("position_ids")}
    if missing:
        raise ValueError(f"teacher weights are missing: {sorted(missing)}")
    teacher.load_state_dict(state, strict=False)
    return teacher


@torch.no_grad()
def teacher_features(teacher: CLIPVisionModel, pixels: Tensor, layer: int) -> Tensor:
    """(B, 3, S, S) to (B, patches, W): one hidden state without its class token."""
    hidden = teacher(pixels, output_hidden_states=True).hidden_states
    return hidden[layer][:, 1:]


def student_features(
    forward: Forward, position: int, grid: tuple[int, int], pool: int, weights: dict[str, Tensor]
) -> Tensor:
    """The aligner's view of the picture that begins at a position of the sequence."""
    rows, cols = grid
    taps = []
    for index in alignment.tap_indices(len(forward.hidden) - 1):
        part = forward.hidden[index][position : position + 1 + rows * (cols + 1)]
        taps.append(alignment.cells(part, rows, cols, pool))
    return alignment.align(taps, patch_embedding.select(weights, "model.vision_tower_compressor."))
