"""The patch aligning layer and its loss, one picture, one cell and one head at a time.

Weights come under their official names, with the prefix taken off. One thing a reader would get
wrong: the last tap is the only query and never a key, and it also passes by the attention through
`input_layer` without any LayerNorm.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .patch_embedding import layer_norm

NUM_HEADS = 8


def tap_indices(num_layers: int, every: int = 4) -> list[int]:
    """Layers that are looked at, the last first: L, L-4, ... down to 0 or more."""
    found, index = [], num_layers
    while index >= 0:
        found.append(index)
        index -= every
    return found


def cells(sequence: Tensor, rows: int, cols: int, pool: int) -> list[Tensor]:
    """A picture's tokens without class and row-end ones, averaged over pool x pool cells."""
    table = []
    position = 1  # after the class token
    for _ in range(rows):
        table.append([sequence[position + col] for col in range(cols)])
        position += cols + 1  # over the row-end token
    pooled = []
    for row in range(rows // pool):
        for col in range(cols // pool):
            area = [table[row * pool + y][col * pool + x] for y in range(pool) for x in range(pool)]
            pooled.append(sum(area) / len(area))
    return pooled


def align(taps: list[list[Tensor]], weights: dict[str, Tensor]) -> Tensor:
    """Per tap a list of cells, the last tap first, to the student's features: (cells, W)."""
    width = weights["input_layer.weight"].shape[0]
    size = width // NUM_HEADS
    out = []
    for cell in range(len(taps[0])):
        views = []
        for index, tap in enumerate(taps):
            scaled = layer_norm(
                tap[cell],
                weights[f"norm_layer.{index}.0.weight"],
                weights[f"norm_layer.{index}.0.bias"],
            )
            views.append(weights[f"norm_layer.{index}.1.weight"] @ scaled)
        query, others = views[0], views[1:]
        heads = []
        for head in range(NUM_HEADS):
            part = slice(head * size, (head + 1) * size)
            scores = [(query[part] * other[part]).sum() * width**-0.5 for other in others]
            shares = torch.softmax(torch.stack(scores), dim=0)
            heads.append(sum(s * o[part] for s, o in zip(shares, others, strict=True)))
        attended = weights["output_layer.weight"] @ torch.cat(heads) + weights["output_layer.bias"]
        skip = weights["input_layer.weight"] @ taps[0][cell] + weights["input_layer.bias"]
        out.append(skip + attended)
    return torch.stack(out)


def cosine_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """One minus the mean cosine over a picture's cells."""
    total = torch.zeros((), dtype=student.dtype)
    for one, other in zip(student, teacher, strict=True):
        total = total + (one * other).sum() / (one.norm() * other.norm())
    return 1 - total / len(student)


def valid_cells(features: Tensor, mask: Tensor, patch: int) -> Tensor:
    """Teacher features (side * side, W) at the patches where the mask (S, S) is one."""
    side = mask.shape[0] // patch
    found = []
    for row in range(side):
        for col in range(side):
            if float(mask[row * patch, col * patch]) == 1.0:
                found.append(features[row * side + col])
    return torch.stack(found)
