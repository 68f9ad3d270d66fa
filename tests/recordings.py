"""What `torch.cuda.make_graphed_callables` does, without a GPU: recordings with all their habits.

A layer is played over the sample's places in shapes that do not change; what it makes, what its way
back needs and all of its gradients lie where those of the row before lay.  Easy to get wrong: only
this last habit shows what a step does to the gradients of another, so nothing is copied out.
"""

from collections.abc import Callable

import torch
from torch import nn

from eve_vlm.train.recorded_layers import TensorLayer

Tensors = tuple[torch.Tensor, ...]


def stand_in(
    layers: tuple[TensorLayer, ...], samples: tuple[Tensors, ...]
) -> list[Callable[..., torch.Tensor]]:
    """Recordings of layers, each over its sample."""
    return [Recording(layer, sample) for layer, sample in zip(layers, samples, strict=True)]


class Recording:
    """One layer's, called with what its sample has."""

    def __init__(self, layer: TensorLayer, sample: Tensors):
        self.layer, self.sample = layer, sample
        self.weights: list[nn.Parameter] = list(layer.parameters())
        self.learning = [one for one in (*sample, *self.weights) if one.requires_grad]
        self.gradients = [torch.full_like(one, torch.nan) for one in self.learning]
        self.made = torch.full_like(sample[0], torch.nan)
        self.output = self.made.detach()

    def __call__(self, *given: torch.Tensor) -> torch.Tensor:
        """The layer's output, in the memory of the one before."""
        assert given[0].shape == self.sample[0].shape and given[0].requires_grad
        assert all(one is place for one, place in zip(given[1:], self.sample[1:], strict=True))
        return _Played.apply(self, *given, *self.weights)

    def forth(self, hidden: torch.Tensor) -> torch.Tensor:
        """Plays the way forth."""
        self.sample[0].copy_(hidden)
        lengths = self.sample[-1].diff()
        self.layer.lengths = tuple(lengths[lengths > 0].tolist())
        with torch.enable_grad():
            self.made = self.layer(*self.sample)
        self.output.data.copy_(self.made)  # `data`: autograd does not hear of it, as of a replay
        return self.output.detach()

    def back(self, gradient: torch.Tensor) -> list[torch.Tensor | None]:
        """Plays the way back."""
        # Retained, for a replay goes back as often as it is asked, rightly or not.
        found = torch.autograd.grad(self.made, self.learning, gradient, retain_graph=True)
        for place, one in zip(self.gradients, found, strict=True):
            place.data.copy_(one)
        places = iter(self.gradients)
        every = (*self.sample, *self.weights)
        return [next(places).detach() if one.requires_grad else None for one in every]


class _Played(torch.autograd.Function):
    @staticmethod
    def forward(ctx, one, hidden, *others):
        ctx.one = one
        return one.forth(hidden)

    @staticmethod
    def backward(ctx, gradient):
        return None, *ctx.one.back(gradient)
