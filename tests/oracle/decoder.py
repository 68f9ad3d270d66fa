"""A Llama decoder in float64 loops over layers, heads and positions, and one AdamW step.

The library's own Llama rounds to float32 inside (norms, rotary angles), whatever the dtype of its
weights, so it cannot say what float64 would. Weights come under the published names, prefix
`model.` and all. One thing a reader would get wrong: rotary pairs are element i and i + d/2 of a
head, not neighbours.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

Weights = dict[str, Tensor]


class Decoded(NamedTuple):
    """One text through the decoder."""

    hidden: list[Tensor]  # L + 1 times (T, D): the embedded input, ..., the last after its norm
    logits: Tensor  # (T, V)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """One vector, divided by its root mean square."""
    return x / torch.sqrt((x * x).sum() / len(x) + eps) * weight


def rotate(x: Tensor, position: int, theta: float) -> Tensor:
    """One head's vector, turned pair by pair by angles that grow with the position."""
    half = len(x) // 2
    turned = [torch.zeros(())] * len(x)
    for pair in range(half):
        angle = torch.tensor(position * theta ** (-pair / half), dtype=x.dtype)
        cos, sin = torch.cos(angle), torch.sin(angle)
        turned[pair] = x[pair] * cos - x[pair + half] * sin
        turned[pair + half] = x[pair + half] * cos + x[pair] * sin
    return torch.stack(turned)


def attend(states: list[Tensor], config: dict[str, Any], weights: Weights, name: str) -> list:
    """Causal attention of normalised states, one position and one head at a time."""
    heads, groups = config["num_attention_heads"], config["num_key_value_heads"]
    size, theta = config["head_dim"], config["rope_theta"]
    head = lambda x, index: x[index * size : (index + 1) * size]  # noqa: E731
    queries, keys, values, out = [], [], [], []
    for position, state in enumerate(states):
        q, k, v = (weights[f"{name}.{part}_proj.weight"] @ state for part in "qkv")
        queries.append([rotate(head(q, index), position, theta) for index in range(heads)])
        keys.append([rotate(head(k, index), position, theta) for index in range(groups)])
        values.append([head(v, index) for index in range(groups)])
        mixed = []
        for index in range(heads):
            group = index * groups // heads
            query = queries[position][index]
            scores = [
                (query * keys[past][group]).sum() * size**-0.5 for past in range(position + 1)
            ]
            shares = torch.softmax(torch.stack(scores), 0)
            mixed.append(sum(shares[past] * values[past][group] for past in range(position + 1)))
        out.append(weights[f"{name}.o_proj.weight"] @ torch.cat(mixed))
    return out


def feed(state: Tensor, weights: Weights, name: str) -> Tensor:
    """The gated feed-forward of one position."""
    gate = weights[f"{name}.gate_proj.weight"] @ state
    up = weights[f"{name}.up_proj.weight"] @ state
    return weights[f"{name}.down_proj.weight"] @ (gate / (1 + torch.exp(-gate)) * up)


def decode(embeds: Tensor, config: dict[str, Any], weights: Weights) -> Decoded:
    """Embeddings (T, D) of one text through all layers and the language head."""
    eps, states = config["rms_norm_eps"], list(embeds)
    hidden = [embeds]
    for layer in range(config["num_hidden_layers"]):
        name = f"model.layers.{layer}"
        scale = weights[f"{name}.input_layernorm.weight"]
        mixed = attend(
            [rms_norm(x, scale, eps) for x in states], config, weights, f"{name}.self_attn"
        )
        states = [x + y for x, y in zip(states, mixed, strict=True)]
        scale = weights[f"{name}.post_attention_layernorm.weight"]
        states = [x + feed(rms_norm(x, scale, eps), weights, f"{name}.mlp") for x in states]
        hidden.append(torch.stack(states))
    hidden[-1] = torch.stack([rms_norm(x, weights["model.norm.weight"], eps) for x in states])
    return Decoded(hidden, torch.stack([weights["lm_head.weight"] @ x for x in hidden[-1]]))


def adamw(weight: Tensor, gradient: Tensor, settings: dict[str, float]) -> Tensor:
    """The weight after the first step: both averages are corrected to the gradient itself."""
    rate = settings["lr"]
    kept = weight * (1 - rate * settings["weight_decay"])
    return kept - rate * gradient / (gradient.abs() + settings["eps"])
