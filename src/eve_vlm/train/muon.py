"""Muon for the matrices of a small decoder, AdamW for all else, in one optimizer.

Muon (Jordan et al. 2024) moves a matrix by its momentum with all singular values made about equal.
A model that learns to see from nothing needs half of the records then (`dev/LOG.md`).  The step
is scaled to the size of AdamW's (Liu et al. 2025, arXiv 2502.16982), so both share learning rates.
Easy to get wrong: `torch.optim.Muon` multiplies in bfloat16, which CPUs without it do 25 times more
slowly than float32, so the products are here, in float32 on a CPU.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

MOMENTUM = 0.95
STEPS = 5
# Of x -> a x + b x^3 + c x^5, which after five steps is within 0.68 to 1.21 for x from 0.0015 to 1.
A, B, C = 3.4445, -4.7750, 2.0315
RMS = 0.2  # root mean square of an element of AdamW's steps


class MuonAdamW(torch.optim.AdamW):
    """AdamW whose groups with `muon: True` are moved by Muon.

    Args:
        groups: parameter groups; those of Muon hold matrices alone.
        settings: of AdamW; learning rate and weight decay of a group count for both.

    Raises:
        ValueError: if a parameter of Muon is no matrix.
    """

    def __init__(self, groups: list[dict[str, Any]], **settings: Any):
        super().__init__([{"muon": False} | group for group in groups], **settings)
        # Fused, AdamW would undo the scale of float16 by itself and skip steps with an infinity;
        # Muon does not, so that is left to the scaler.
        self._step_supports_amp_scaling = False
        for group in self.param_groups:
            for parameter in group["params"]:
                if group["muon"] and parameter.ndim != 2:
                    raise ValueError(
                        f"Muon moves matrices, but a parameter has shape {tuple(parameter.shape)}; "
                        "name matrices alone."
                    )

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> Any:
        """One step of all groups; parameters without a gradient stay as they are."""
        if closure is not None:
            raise ValueError("MuonAdamW takes no closure.")
        gradients = []
        for group in self.param_groups:
            for parameter in group["params"] if group["muon"] else ():
                if parameter.grad is not None:
                    self._move(parameter, group)
                    gradients.append((parameter, parameter.grad))
                    parameter.grad = None  # so that AdamW leaves it alone
        super().step()
        for parameter, gradient in gradients:
            parameter.grad = gradient

    def _move(self, parameter: nn.Parameter, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            # A count as AdamW keeps it, which it looks for in every state that it loads.
            state["step"] = torch.zeros((), dtype=torch.float32)
            state["momentum"] = torch.zeros_like(parameter)
        state["step"] += 1
        assert parameter.grad is not None
        momentum = state["momentum"].lerp_(parameter.grad, 1 - MOMENTUM)
        update = orthogonal(parameter.grad.lerp(momentum, MOMENTUM))
        scale = RMS * max(parameter.shape) ** 0.5
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.add_(update.to(parameter.dtype), alpha=-group["lr"] * scale)


def orthogonal(matrix: torch.Tensor) -> torch.Tensor:
    """A matrix (rows, cols) with its singular vectors, and singular values of 0.68 to 1.21.

    Below 0.0015 of the matrix's norm singular values stay smaller, at most 485 times what they are.
    By Newton-Schulz steps, products alone; float32 on a CPU, bfloat16 elsewhere.
    """
    x = matrix.float() if matrix.device.type == "cpu" else matrix.bfloat16()
    tall = x.shape[0] > x.shape[1]
    if tall:
        x = x.T
    x = x / (x.norm() + 1e-7)
    for _ in range(STEPS):
        square = x @ x.T  # (least, least)
        x = torch.addmm(x, torch.addmm(square, square, square, beta=B, alpha=C), x, beta=A)
    return x.T if tall else x


__all__ = ["MuonAdamW", "orthogonal"]
