"""Products of one input with several matrices as one product, over the very same weights.

A decoder layer asks for queries, keys and values, and for gate and up, one after the other.  For a
step of few rows each product is a walk through its matrix, and a GPU is slow at the beginning and
the end of every walk; so matrices of one input are laid behind each other, and whichever layer is
asked first walks through all of them.  Names, types and numbers of the weights stay.

Easy to get wrong: the matrices are moved once, so a model is joined where it stays, behind loading
and moving.  With gradients each layer multiplies alone, or a weight that learns would not be the
one that is multiplied.  Only `decode_speed.py` uses it, until a GPU has shown that it gains.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from eve_vlm.layer_taps_eve import layers_of

GROUPS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


class Joined:
    """Matrices of one input, one behind the other, and what was made for those not yet asked."""

    def __init__(self, parts: list[nn.Linear]):
        self.weight = torch.cat([part.weight.detach() for part in parts])
        self.sizes = [part.out_features for part in parts]
        biases = [part.bias for part in parts]
        self.bias = None if biases[0] is None else torch.cat([bias.detach() for bias in biases])
        self.waiting: list[torch.Tensor | None] = [None] * len(parts)
        start = 0
        for part, size in zip(parts, self.sizes, strict=True):
            part.weight.data = self.weight[start : start + size]
            start += size

    def product(self, index: int, x: torch.Tensor) -> torch.Tensor:
        """(..., in) to (..., out) of one of them; the others' wait for their turn."""
        made = self.waiting[index]
        if made is None:
            self.waiting = list(F.linear(x, self.weight, self.bias).split(self.sizes, -1))
            made = self.waiting[index]
            assert made is not None
        self.waiting[index] = None
        return made


class JoinedLinear(nn.Linear):
    """A linear layer whose product is part of a larger one; it was an `nn.Linear` before."""

    joined: Joined
    index: int

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., in) to (..., out)."""
        if torch.is_grad_enabled():
            return super().forward(x)
        return self.joined.product(self.index, x)


def join_products(decoder: nn.Module) -> int:
    """Joins what can be joined in every layer, in place; says how many products that saves.

    Left alone are layers that are more than a plain matrix (adapters, quantized weights), on
    another device, or joined already.
    """
    saved = 0
    for layer in layers_of(decoder):
        for module in layer.modules():
            children = dict(module.named_children())
            for names in GROUPS:
                parts: list[Any] = [children.get(name) for name in names]
                if _can_join(parts):
                    joined = Joined(parts)
                    for index, part in enumerate(parts):
                        part.__class__ = JoinedLinear
                        part.joined, part.index = joined, index
                    saved += len(parts) - 1
    return saved


def _can_join(parts: list[Any]) -> bool:
    """Whether all of them are plain, alike, and of the same input's width."""
    if not all(type(part) is nn.Linear for part in parts):
        return False
    kinds = {
        (part.in_features, part.weight.dtype, part.weight.device, part.bias is None)
        for part in parts
    }
    plain = all(type(part.weight) is nn.Parameter and not part._forward_hooks for part in parts)
    return plain and len(kinds) == 1


__all__ = ["GROUPS", "Joined", "JoinedLinear", "join_products"]
