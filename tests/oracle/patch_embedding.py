"""The patch embedding layer in loops over pictures, rows, cells, patches and heads.

Weights come under their official names, with the prefix taken off. `D` is the width. One thing a
reader would get wrong: the scale of both attentions is that of the full width, not of a head.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

Weights = dict[str, Tensor]
NUM_HEADS = 8
EPS = 1e-5
MERGE = 2
ZERO_MASK_PATCHES = 16


class Tokens(NamedTuple):
    """What one picture becomes, and its parts."""

    merged: Tensor  # (rows * cols, D)
    class_token: Tensor  # (D,)
    sequence: Tensor  # (1 + rows * (cols + 1), D)
    rows: int
    cols: int


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """One vector, normalised by its own mean and (biased) variance."""
    mean = x.sum() / len(x)
    variance = ((x - mean) ** 2).sum() / len(x)
    return (x - mean) / torch.sqrt(variance + EPS) * weight + bias


def attend(query: Tensor, others: list[Tensor], weights: Weights, name: str) -> Tensor:
    """One query vector looks at a list of vectors; the output without the residual: (D,)."""
    width = len(query)
    size = width // NUM_HEADS
    get = lambda key: weights[f"{name}.{key}"]  # noqa: E731
    q = get("q.1.weight") @ layer_norm(query, get("q.0.weight"), get("q.0.bias"))
    keys, values = [], []
    for other in others:
        both = get("kv.1.weight") @ layer_norm(other, get("kv.0.weight"), get("kv.0.bias"))
        keys.append(both[:width])
        values.append(both[width:])
    heads = []
    for head in range(NUM_HEADS):
        part = slice(head * size, (head + 1) * size)
        scores = torch.stack([(q[part] * key[part]).sum() * width**-0.5 for key in keys])
        shares = torch.exp(scores - scores.max())
        shares = shares / shares.sum()
        out = torch.zeros_like(q[part])
        for share, value in zip(shares, values, strict=True):
            out = out + share * value[part]
        heads.append(out)
    return get("proj.weight") @ torch.cat(heads) + get("proj.bias")


def crop(canvas: Tensor, patch: int) -> Tensor:
    """(4, H, W) with mask to (3, h, w): the box from the first to the last block of ones."""
    rows, cols = canvas.shape[1] // patch, canvas.shape[2] // patch
    blocks = []
    for row in range(rows):
        for col in range(cols):
            area = canvas[3, row * patch : (row + 1) * patch, col * patch : (col + 1) * patch]
            if area.min() != area.max() or float(area.max()) not in (0.0, 1.0):
                raise ValueError("the mask cuts through a patch; draw it along patch borders")
            if float(area.max()) == 1.0:
                blocks.append((row, col))
    if not blocks:  # the dummy of a text-only sample
        blocks = [(0, 0), (min(rows, ZERO_MASK_PATCHES) - 1, min(cols, ZERO_MASK_PATCHES) - 1)]
    (top, left), (bottom, right) = blocks[0], blocks[-1]
    return canvas[:3, top * patch : (bottom + 1) * patch, left * patch : (right + 1) * patch]


def embed(picture: Tensor, weights: Weights) -> Tokens:
    """(3, H, W) cropped picture to tokens; rows or columns beyond a full cell are dropped."""
    kernel = weights["patch_embedding.weight"]
    patch = kernel.shape[-1]
    flat = kernel.reshape(kernel.shape[0], -1)
    rows, cols = (side // patch // MERGE for side in picture.shape[1:])
    merged: list[Tensor] = []
    for row in range(rows):
        for col in range(cols):
            patches = []
            for y in range(MERGE):
                for x in range(MERGE):
                    top, left = (row * MERGE + y) * patch, (col * MERGE + x) * patch
                    area = picture[:, top : top + patch, left : left + patch]
                    patches.append(flat @ area.reshape(-1))
            mean = sum(patches) / len(patches)
            merged.append(mean + attend(mean, patches, weights, "local_attention"))
    start = weights["class_embedding"]
    class_token = start + attend(start, merged, weights, "global_attention")
    sequence = [class_token]
    for row in range(rows):
        sequence += merged[row * cols : (row + 1) * cols]
        sequence.append(weights["split_embedding"])
    return Tokens(torch.stack(merged), class_token, torch.stack(sequence), rows, cols)


def project(sequence: Tensor, weights: Weights) -> Tensor:
    """The two-layer projector with the exact GELU, one vector at a time."""
    out = []
    for x in sequence:
        x = weights["0.weight"] @ x + weights["0.bias"]
        x = x * 0.5 * (1 + torch.erf(x / 2**0.5))
        out.append(weights["2.weight"] @ x + weights["2.bias"])
    return torch.stack(out)


def select(weights: Weights, prefix: str) -> Weights:
    """Weights below a prefix, with the prefix taken off."""
    return {
        name.removeprefix(prefix): value
        for name, value in weights.items()
        if name.startswith(prefix)
    }
