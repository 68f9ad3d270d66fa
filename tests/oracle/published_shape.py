"""The patch embedding in plain matrix products, in the shape of work of the published programme.

Every picture lies on a square canvas with a mask channel, the convolution runs over the whole
canvas, and then a Python round for each picture cuts its box out, makes keys and values of every
patch for the attention in cells and of every cell for the class token, and runs the projector. The
same function as `patch_embedding.py`, fast enough to be timed and to have gradients. One thing a
reader would get wrong: the row-end token is the last column of every row, so it is added before the
grid is flattened.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .patch_embedding import EPS, MERGE, NUM_HEADS, Weights

# Parts of our parameters' names, and what they are called in a published checkpoint.
OFFICIAL = {
    "patch_projection": "patch_embedding",
    "row_end_embedding": "split_embedding",
    "merge_attention": "local_attention",
    "class_attention": "global_attention",
    "query_norm": "q.0",
    "query": "q.1",
    "key_value_norm": "kv.0",
    "key_value": "kv.1",
    "output": "proj",
    "linear_1": "0",
    "linear_2": "2",
}


def official(weights: Weights) -> Weights:
    """Weights of our patch embedding, or of its projector, under their official names."""
    return {
        ".".join(OFFICIAL.get(part, part) for part in name.split(".")): weight
        for name, weight in weights.items()
    }


def canvases(pictures: list[Tensor], side: int, patch: int) -> Tensor:
    """Pictures (3, h, w) in the middle of canvases with a mask, on borders of cells: (I, 4, S, S)."""
    cell = MERGE * patch
    made = pictures[0].new_zeros(len(pictures), 4, side, side)
    for index, picture in enumerate(pictures):
        height, width = picture.shape[1:]
        top, left = ((side - length) // cell // 2 * cell for length in (height, width))
        made[index, :3, top : top + height, left : left + width] = picture
        made[index, 3, top : top + height, left : left + width] = 1.0
    return made


def patches_of(picture: Tensor, patch: int) -> Tensor:
    """A picture's patches, those of a cell behind each other: (P, 3 * p * p)."""
    rows, cols = (length // patch // MERGE for length in picture.shape[1:])
    cut = picture.view(3, rows, MERGE, patch, cols, MERGE, patch)
    return cut.permute(1, 4, 2, 5, 0, 3, 6).reshape(-1, 3 * patch**2)


def look(queries: Tensor, members: Tensor, weights: Weights, name: str) -> Tensor:
    """Queries (G, C) at members (G, M, C), every member with a key and a value: (G, C)."""
    get = lambda key: weights[f"{name}.{key}"]  # noqa: E731
    groups, count, width = members.shape
    normed = F.layer_norm(queries, (width,), get("q.0.weight"), get("q.0.bias"), EPS)
    q = (normed @ get("q.1.weight").T).view(groups, NUM_HEADS, 1, -1)
    normed = F.layer_norm(members, (width,), get("kv.0.weight"), get("kv.0.bias"), EPS)
    both = (normed @ get("kv.1.weight").T).view(groups, count, 2, NUM_HEADS, -1)
    key, value = both.permute(2, 0, 3, 1, 4)  # (G, H, M, C/H)
    shares = (q @ key.transpose(-2, -1) * width**-0.5).softmax(-1)  # (G, H, 1, M)
    return F.linear((shares @ value).reshape(groups, width), get("proj.weight"), get("proj.bias"))


def box(mask: Tensor) -> tuple[slice, slice]:
    """Rows and columns of a mask (h, w) that hold ones."""
    rows, cols = (mask.amax(axis).nonzero().flatten() for axis in (1, 0))
    return slice(int(rows[0]), int(rows[-1]) + 1), slice(int(cols[0]), int(cols[-1]) + 1)


def embed(canvases: Tensor, weights: Weights, projector: Weights) -> list[Tensor]:
    """(I, 4, S, S), the last channel the mask, to the decoder's tokens of each picture."""
    kernel = weights["patch_embedding.weight"]
    width, patch = kernel.shape[0], kernel.shape[-1]
    maps = F.conv2d(canvases[:, :3], kernel, stride=patch)  # (I, C, S/p, S/p)
    start, end = weights["class_embedding"], weights["split_embedding"]
    made = []
    for features, mask in zip(maps, canvases[:, 3, ::patch, ::patch], strict=True):
        rows, cols = box(mask)
        features = features[:, rows, cols]
        means = F.avg_pool2d(features, MERGE)  # (C, R, W)
        height, length = means.shape[1:]
        cells = features.unfold(1, MERGE, MERGE).unfold(2, MERGE, MERGE)
        cells = cells.permute(1, 2, 3, 4, 0).reshape(height * length, MERGE**2, width)
        pooled = means.flatten(1).T
        merged = pooled + look(pooled, cells, weights, "local_attention")
        first = start + look(start[None], merged[None], weights, "global_attention")
        rows_of = merged.view(height, length, width)
        table = torch.cat([rows_of, end.expand(height, 1, width)], dim=1).flatten(0, 1)
        tokens = F.linear(torch.cat([first, table]), projector["0.weight"], projector["0.bias"])
        made.append(F.linear(F.gelu(tokens), projector["2.weight"], projector["2.bias"]))
    return made
