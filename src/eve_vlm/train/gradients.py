"""Gradient norms of the parts of a model, in one pass over all gradients.

What is summed here is this process's share, so one sum over all processes gives the whole: a shard
counts in full, and a copy that every process holds counts as one part of as many.  Easy to get
wrong: a product with a matrix of zeros and ones would carry a NaN of one part into all others.
"""

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from eve_vlm.alignment_eve import EveForPreTraining
from eve_vlm.layer_taps_eve import LayerTaps
from eve_vlm.modeling_eve import EveForConditionalGeneration

THIRDS = ("decoder_early", "decoder_middle", "decoder_late")


class _Layout(NamedTuple):
    """Where the squares of the gradients that are there go."""

    present: list[bool]
    parts: torch.Tensor
    shares: torch.Tensor


class GradientNorms:
    """Sums of squares of the gradients by part of the model.

    Args:
        model: the model that trains, wrapped for several processes, adapters or a compiler or not.
        processes: number of processes that train together.
    """

    def __init__(self, model: nn.Module, *, processes: int = 1):
        groups = parameter_parts(model)
        self.names = list(groups)
        self.parameters = [parameter for group in groups.values() for parameter in group]
        self._part_of = [index for index, part in enumerate(groups.values()) for _ in part]
        self.processes = processes
        self._layout: _Layout | None = None

    def share(self, device: torch.device) -> torch.Tensor:
        """(number of parts,) float32: this process's share of every part's sum of squares.

        A norm above 1.8e19 counts as infinite, because its square is.
        """
        present = [parameter.grad is not None for parameter in self.parameters]
        sums = torch.zeros(len(self.names), device=device)
        if not any(present):
            return sums
        gradients = [item.grad for item in self.parameters if item.grad is not None]
        if self._layout is None or self._layout.present != present:
            # Kept from step to step, so that nothing is copied to the device while it computes.
            parts = [
                part for part, is_there in zip(self._part_of, present, strict=True) if is_there
            ]
            shares = [_shards(gradient) / self.processes for gradient in gradients]
            self._layout = _Layout(
                present,
                torch.tensor(parts, device=device),
                torch.tensor(shares, device=device),
            )
        local = [item.to_local() if isinstance(item, DTensor) else item for item in gradients]
        norms = torch.stack(torch._foreach_norm(local, 2, dtype=torch.float32)).to(device)
        return sums.index_add_(0, self._layout.parts, norms.square() * self._layout.shares)


def parameter_parts(model: nn.Module) -> dict[str, list[nn.Parameter]]:
    """The trainable parameters by part: patch embedding, projector, aligner, thirds of the decoder.

    Tied weights count with the embeddings. Parts without a trainable parameter are left out.
    """
    eve = next(item for item in model.modules() if isinstance(item, EveForConditionalGeneration))
    parts: dict[str, list[nn.Module]] = {
        "patch_embedding": [eve.model.vision_tower],
        "projector": [eve.model.multi_modal_projector],
        "aligner": [eve.aligner] if isinstance(eve, EveForPreTraining) else [],
        "embeddings": [eve.get_input_embeddings()],
        **{third: [] for third in THIRDS},
        "head": [eve.get_output_embeddings()],
        "rest": [model],  # the final norm, learned positions
    }
    layers = LayerTaps(eve.model.language_model, None).layers
    for index, layer in enumerate(layers):
        parts[THIRDS[index * len(THIRDS) // len(layers)]].append(layer)
    taken: set[nn.Parameter] = set()
    groups = {name: _new(modules, taken) for name, modules in parts.items()}
    return {name: group for name, group in groups.items() if group}


def _new(modules: Iterable[nn.Module], taken: set[nn.Parameter]) -> list[nn.Parameter]:
    """Their trainable parameters that no part before them has taken."""
    found = []
    for module in modules:
        for parameter in module.parameters():
            if parameter.requires_grad and parameter not in taken:
                taken.add(parameter)
                found.append(parameter)
    return found


def _shards(gradient: torch.Tensor) -> int:
    """Pieces that a gradient is cut into; 1 where every process holds all of it."""
    if not isinstance(gradient, DTensor):
        return 1
    pieces = 1
    for size, placement in zip(gradient.device_mesh.shape, gradient.placements, strict=True):
        pieces *= size if placement.is_shard() else 1
    return pieces


__all__ = ["GradientNorms", "parameter_parts"]
