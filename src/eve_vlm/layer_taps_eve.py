"""Hidden states of some decoder layers, at picture positions only, from any decoder of the library.

`output_hidden_states` would keep every layer at every position.  Easy to get wrong: number 0 is the
embedded input and number L the state after the final norm, so only 1 .. L - 1 need a hook.
"""

from collections.abc import Callable
from typing import cast

import torch
from torch import nn


class LayerTaps:
    """Reads some decoder layers' outputs during one forward pass and keeps their picture positions.

    Hooks only remember the tensors; they are cut down after the pass, because an operation inside a
    hook would run again when gradient checkpointing recomputes the layer (transformers 5.17 runs
    hooks inside the checkpoint, 5.23 outside).  In training autograd holds the same tensors anyway.
    """

    def __init__(self, decoder: nn.Module, taps: tuple[int, ...] | None):
        self.layers = layers_of(decoder)
        self.taps = taps
        self.outputs: dict[int, torch.Tensor] = {}
        self.handles: list[torch.utils.hooks.RemovableHandle] = []

    def __enter__(self) -> None:
        for tap in self.taps or ():
            if 0 < tap < len(self.layers):
                self.handles.append(self.layers[tap - 1].register_forward_hook(self._keep(tap)))

    def _keep(self, tap: int) -> Callable:
        def hook(module: nn.Module, args: tuple, output: torch.Tensor | tuple) -> None:
            self.outputs[tap] = output[0] if isinstance(output, tuple) else output

        return hook

    def __exit__(self, *error: object) -> None:
        for handle in self.handles:
            handle.remove()

    def at(
        self, places: torch.Tensor | None, first: torch.Tensor, last: torch.Tensor
    ) -> tuple[torch.Tensor, ...] | None:
        """The tapped states at some of all B * T places, each (N, D), in the order asked for.

        Without places (0, D).  By numbers: a mask would be counted once a tap, on the way back too,
        and a GPU's host waits for each count.
        """
        if self.taps is None:
            return None
        if places is None:
            places = first.new_empty(0, dtype=torch.long)
        self.outputs |= {0: first, len(self.layers): last}
        states = [self.outputs[tap].flatten(0, 1) for tap in self.taps]
        return tuple(state.index_select(0, places.to(state.device)) for state in states)


def layers_of(decoder: nn.Module) -> nn.ModuleList:
    """The decoder's layers: `layers` nearly everywhere, else its first list (GPT-2, Falcon)."""
    children = dict(decoder.named_children())
    if "layers" in children:
        return cast(nn.ModuleList, children["layers"])
    return next(module for module in decoder.modules() if isinstance(module, nn.ModuleList))


__all__ = ["LayerTaps", "layers_of"]
