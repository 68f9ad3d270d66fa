"""Attention from a pooled vector to what it was pooled from, and layers that compute in float32.

The patch embedding has two such attentions: the mean of a cell asks its patches, and the class
token asks all cells of its picture.  Both do without keys and values, exactly.

Easy to get wrong: the attention scale is hidden_size ** -0.5 of the full width, not of a head; the
published weights were trained so (published code).

Legend: `G` queries, `K` cells, `I` pictures, `C` patch embedding width, `H` heads, `m` merge size.
"""

import torch
import torch.nn.functional as F
from torch import nn

from .configuration_eve import EveVisionConfig

# Most cells that go through the attention over patches together, so that what they need on the way
# stays in a processor's cache and is not asked from the system anew (width 1024, one core, 1,488
# cells: 204 ms, in one piece 241 ms; with the way back 622 ms, 646 ms).
CELLS_AT_ONCE = 512
# On a GPU many small products wait for Python (32 mixed pictures at 672 in stretches of 512: 6.7 ms
# of work in 9.5 ms), and memory is the only limit: 64 KiB a cell, twice, at width 1024.
CELLS_ON_GPU = 8192


def at_least_float32(x: torch.Tensor) -> torch.Tensor:
    """Half-precision tensors as float32, others as they are (float64 for gradient checks)."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class Float32Linear(nn.Linear):
    """A linear layer that computes in float32 when its weights are half precision."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., in) to (..., out)."""
        weight = at_least_float32(self.weight)
        bias = None if self.bias is None else at_least_float32(self.bias)
        return F.linear(x.to(weight.dtype), weight, bias)


class Float32LayerNorm(nn.LayerNorm):
    """A layer norm that computes in float32 when its weights are half precision."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., width) to the same shape."""
        weight, bias = at_least_float32(self.weight), at_least_float32(self.bias)
        return F.layer_norm(x.to(weight.dtype), self.normalized_shape, weight, bias, self.eps)


def weight_of(layer: nn.Module) -> torch.Tensor:
    """The weight of a layer whose product is done in another shape than its own.

    Raises:
        ValueError: if something stands in the layer's place, whose part would be left out.
    """
    if not isinstance(layer, nn.Linear | nn.Conv2d):
        raise ValueError(
            f"The patch embedding reads the weights of a layer that is now a {type(layer)}; merge "
            "the adapter into the model, or leave model.vision_tower out of its target_modules."
        )
    return layer.weight


class EvePooledAttention(nn.Module):
    """Cross-attention from one pooled vector to the vectors that it was pooled from.

    Both sides are normalised first, each by its own norm; the residual is the bare query vector.

    No key and no value is ever made.  A score is q . (W_k n) = (W_k^T q) . n, and the sum of
    weighted values is W_v (sum of a_i n_i); so the one query goes back through the keys' weights,
    and the one sum forward through the values'.  Each takes C^2 multiplications; m^2 keys and
    values take 2 m^2 C^2.
    """

    def __init__(self, config: EveVisionConfig):
        super().__init__()
        width = config.hidden_size
        self.num_heads = config.num_attention_heads
        self.scale = width**-0.5
        self.query_norm = Float32LayerNorm(width, eps=config.layer_norm_eps)
        self.query = Float32Linear(width, width, bias=False)
        self.key_value_norm = Float32LayerNorm(width, eps=config.layer_norm_eps)
        self.key_value = Float32Linear(width, 2 * width, bias=False)
        self.output = Float32Linear(width, width)

    def keys_values(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Weights of keys and of values by head, each (H, C / H, C)."""
        both = at_least_float32(weight_of(self.key_value))
        return both.unflatten(0, (2, self.num_heads, -1)).unbind()

    def queries(self, pooled: torch.Tensor) -> torch.Tensor:
        """(..., C) to scaled queries by head, (G, H, C / H)."""
        query = self.query(self.query_norm(pooled)) * self.scale
        return query.view(-1, self.num_heads, query.shape[-1] // self.num_heads)


class EveMergeAttention(EvePooledAttention):
    """Merges the m x m patches of a cell into one token: their mean asks them."""

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        """(K, m * m, C) to (K, C)."""
        pooled = patches.mean(1)  # (K, C)
        queries, members = self.queries(pooled), self.key_value_norm(patches)
        keys, values = self.keys_values()
        # Nothing in the loop is a module: ZeRO-3 gathers weights at each call of one, and processes
        # with unequal numbers of calls would wait for each other for ever.
        stretch = CELLS_ON_GPU if patches.is_cuda else CELLS_AT_ONCE
        count, mixed = max(1, -(-len(patches) // stretch)), []
        for some, of in zip(queries.tensor_split(count), members.tensor_split(count), strict=True):
            asking = through_heads(some, keys)  # (., H, C)
            weights = torch.bmm(asking, of.transpose(1, 2)).softmax(-1)  # (., H, m*m)
            sums = torch.bmm(weights, of)  # (., H, C)
            mixed.append(through_heads(sums, values.transpose(1, 2)).flatten(1))
        return pooled + self.output(torch.cat(mixed))


def through_heads(vectors: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """(G, H, given) times each head's (H, given, wanted): (G, H, wanted)."""
    return torch.bmm(vectors.transpose(0, 1), weights).transpose(0, 1)


class EveClassAttention(EvePooledAttention):
    """The class token of each picture: one learned query over that picture's cells."""

    def forward(
        self,
        class_embedding: torch.Tensor,
        cells: torch.Tensor,
        *,
        image_of_cell: torch.Tensor,
        first_cell: torch.Tensor,
    ) -> torch.Tensor:
        """One token for each picture, by a softmax over segments.

        Args:
            class_embedding: (C,).
            cells: (K, C), picture by picture.
            image_of_cell: (K,), the picture of each cell.
            first_cell: (I,), where each picture's cells begin.

        Returns:
            (I, C).
        """
        num_images, owner = len(first_cell), image_of_cell
        members = self.key_value_norm(cells)
        keys, values = self.keys_values()
        asking = through_heads(self.queries(class_embedding), keys)[0]  # (H, C)
        scores = F.linear(members, asking)  # (K, H)
        index = owner.unsqueeze(1).expand_as(scores)
        # The largest score of a picture only keeps exp() in range; it cancels, so it needs no
        # gradient.
        top = scores.new_full((num_images, scores.shape[1]), -torch.inf)
        top = top.scatter_reduce(0, index, scores.detach(), "amax")
        weights = (scores - top[owner]).exp()  # (K, H)
        total = weights.new_zeros(num_images, weights.shape[1]).index_add(0, owner, weights)
        weights = weights / total[owner]
        # One weighted sum for each head and picture, as bags of rows: nothing of K x H x C.
        cell = torch.arange(len(cells), device=owner.device).repeat(self.num_heads)
        first = torch.arange(self.num_heads, device=owner.device).unsqueeze(1) * len(cells)
        sums = F.embedding_bag(
            cell,
            members,
            (first + first_cell).flatten(),
            mode="sum",
            per_sample_weights=weights.T.flatten(),
        ).unflatten(0, (self.num_heads, num_images))  # (H, I, C)
        mixed = through_heads(sums.transpose(0, 1), values.transpose(1, 2)).flatten(1)
        return at_least_float32(class_embedding) + self.output(mixed)


class EveCellMean(nn.Module):
    """In place of `EveMergeAttention` where it is switched off: the mean, and nothing to learn."""

    def __init__(self, config: EveVisionConfig):
        super().__init__()

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        """(K, m * m, C) to (K, C)."""
        return patches.mean(1)


class EveLoneClassToken(nn.Module):
    """In place of `EveClassAttention` where it is switched off: every picture gets the same token.

    So the sequence keeps its length, and what is compared is the attention alone.
    """

    def __init__(self, config: EveVisionConfig):
        super().__init__()

    def forward(
        self,
        class_embedding: torch.Tensor,
        cells: torch.Tensor,
        *,
        image_of_cell: torch.Tensor,
        first_cell: torch.Tensor,
    ) -> torch.Tensor:
        """(C,) to (I, C); arguments as `EveClassAttention.forward` has them."""
        return at_least_float32(class_embedding).expand(len(first_cell), -1)


__all__ = [
    "EveCellMean",
    "EveClassAttention",
    "EveLoneClassToken",
    "EveMergeAttention",
    "EvePooledAttention",
    "Float32LayerNorm",
    "Float32Linear",
    "at_least_float32",
    "weight_of",
]
