"""The language loss: next-token cross-entropy, the head applied only where there is a label.

After 600 picture tokens labels are a small part of the positions (2.3 x faster at one half), and
their logits are made in chunks, so that a vocabulary of 150,000 words needs no tensor of its size
times all labels.  Four implementations compute the same; `docs/loss.md` has their figures.

Easy to get wrong: a head whose weights are spread over several processes (ZeRO-3, FSDP2 around the
head) talks to all of them at each call, so each must call it equally often, however many labels it
has.

Legend: `B` batch, `T` text positions, `N` labels, `D` decoder width, `G` groups of labels.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from .patch_embedding_eve import at_least_float32

IGNORED = -100  # the label of positions where nothing is to be learnt
LOGIT_BYTES = 2**27  # of float32 logits that are made at once: 1048 labels at 32,000 words
IMPLEMENTATIONS = ("auto", "chunked", "torch", "liger", "cut")
Reduction = Literal["none", "sum"]


class LanguageLoss(NamedTuple):
    """What `language_loss` returns."""

    total: torch.Tensor
    """Scalar: the weighted sum over the labels, divided; differentiable."""
    group_losses: torch.Tensor | None = None
    """(G,) weighted sums by group, not divided; None unless groups were given (and for liger)."""
    group_counts: torch.Tensor | None = None
    """(G,) sums of the weights by group."""


def language_loss(
    hidden: torch.Tensor,
    lm_head: nn.Module,
    labels: torch.Tensor,
    *,
    weights: torch.Tensor | None = None,
    groups: torch.Tensor | None = None,
    num_groups: int | None = None,
    num_items_in_batch: torch.Tensor | int | None = None,
    implementation: str = "auto",
) -> LanguageLoss:
    """Cross-entropy of the next tokens in float32: sum(weight x loss) / (items or sum of weights).

    Args:
        hidden: (B, T, D), the decoder's last states.
        labels: (B, T), -100 where nothing is to be learnt; shifted here.
        weights: (B, T), how much each label counts; without it each counts 1.
        groups: (B, T) integers below `num_groups`, e.g. the data set that a label belongs to.
        num_items_in_batch: what to divide by, the labels (or their weights' sum) of the whole
            accumulated batch; without it those of this call.
        implementation: one of `IMPLEMENTATIONS`.

    Raises:
        ValueError: if the implementation cannot run here, or cannot do what is asked.
    """
    if groups is not None and num_groups is None:
        raise ValueError("label_groups came without num_groups; give the number of groups with it.")
    targets = _next(labels, IGNORED).to(hidden.device)  # (B, T)
    wanted = targets != IGNORED
    # Places once: each use of the mask would count again, and a GPU's host waits for every count.
    places = wanted.flatten().nonzero().squeeze(1)  # (N,) of B * T
    states, targets = _at(places, hidden), _at(places, targets)  # (N, D), (N,)
    name = _implementation(implementation, lm_head, states, weighted=weights is not None)
    # Nothing to predict, and yet every rank must touch the head; no kernel takes zero rows.
    loss = _LOSSES[name if len(targets) else "chunked"]
    each = weights is not None or (groups is not None and name != "liger")
    reduction: Reduction = "none" if each else "sum"
    losses = loss(lm_head, states, targets, reduction)  # (N,), or their sum

    count: torch.Tensor | int
    chosen = None if weights is None else _at(places, _next(weights, 0).to(losses))  # (N,)
    if chosen is None:
        count = wanted.sum().clamp(min=1)
    else:
        losses, count = losses * chosen, chosen.sum()
        count = torch.where(count > 0, count, 1.0)
    total = losses.sum() / (count if num_items_in_batch is None else num_items_in_batch)
    if groups is None or num_groups is None or reduction == "sum":
        return LanguageLoss(total)
    group = _at(places, _next(groups, 0).to(hidden.device))  # (N,)
    parts = losses.detach(), torch.ones_like(losses) if chosen is None else chosen
    return LanguageLoss(
        total, *(part.new_zeros(num_groups).index_add(0, group, part) for part in parts)
    )


def _next(of_positions: torch.Tensor, last: int) -> torch.Tensor:
    """What belongs to the next position, (B, T); the last position has none."""
    return F.pad(of_positions[:, 1:], (0, 1), value=last)


def _at(places: torch.Tensor, of_positions: torch.Tensor) -> torch.Tensor:
    """What belongs to some of all positions, (B, T, ...) to (N, ...)."""
    return of_positions.flatten(0, 1).index_select(0, places)


# --- implementations: (head, states (N, D), targets (N,), reduction) to (N,) or a scalar ----------


def _rows(lm_head: nn.Module) -> int:
    """Labels whose logits are made at once."""
    return max(1, LOGIT_BYTES // (4 * cast(int, lm_head.out_features)))


def _in_chunks(
    cross_entropy: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    states: torch.Tensor,
    targets: torch.Tensor,
    rows: int,
    count: int,
    reduction: Reduction,
) -> torch.Tensor:
    """Chunk by chunk, each made again in the backward pass: 4 products with the head instead of 3.

    Gradients made in the forward pass would save one (`torch` and `liger` do so), but not through
    the hooks of a head that is sharded, quantized or has adapters.
    """
    if count == 1:
        return cross_entropy(states, targets)
    parts = [slice(start * rows, (start + 1) * rows) for start in range(count)]
    losses = [
        checkpoint(cross_entropy, states[part], targets[part], use_reentrant=False)
        for part in parts
    ]
    return torch.cat(losses) if reduction == "none" else torch.stack(losses).sum()


def _chunked(
    lm_head: nn.Module, states: torch.Tensor, targets: torch.Tensor, reduction: Reduction
) -> torch.Tensor:
    """Calls the head as a module, so that whatever is hooked to it happens."""

    def cross_entropy(states: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        logits = lm_head(states)  # (chunk, vocabulary)
        return F.cross_entropy(at_least_float32(logits), targets, reduction=reduction)

    rows = _rows(lm_head)
    count = max(1, -(-len(targets) // rows))  # one call even without labels: it touches the head
    if dist.is_available() and dist.is_initialized() and _is_spread(lm_head):
        most = torch.tensor(count, device=states.device)
        dist.all_reduce(most, dist.ReduceOp.MAX)
        count = int(most)
    return _in_chunks(cross_entropy, states, targets, rows, count, reduction)


def _torch(
    lm_head: nn.Module, states: torch.Tensor, targets: torch.Tensor, reduction: Reduction
) -> torch.Tensor:
    """PyTorch's own, with our chunks: its 4 rows for 2,048 labels of 150,000 take 7.5 x as long.

    It returns losses in the type of the states, so half-precision ones are summed here.
    """
    states, weight = _as_computed(lm_head, states)
    with torch.autocast(states.device.type, enabled=False):
        losses = F.linear_cross_entropy(
            states,
            weight,
            targets,
            reduction=reduction if states.dtype.itemsize > 2 else "none",
            options=nn.LinearCrossEntropyOptions(batch_chunk_size=_rows(lm_head)),
        )
    losses = at_least_float32(losses)
    return losses if reduction == "none" else losses.sum()


def _liger(
    lm_head: nn.Module, states: torch.Tensor, targets: torch.Tensor, reduction: Reduction
) -> torch.Tensor:
    """Liger's fused kernel; it gives the sum only."""
    kernel = _package("liger")(reduction="sum", accum_dtype=torch.float32)
    states, weight = _as_computed(lm_head, states)
    with torch.autocast(states.device.type, enabled=False):
        return kernel(weight, states, targets)


def _cut(
    lm_head: nn.Module, states: torch.Tensor, targets: torch.Tensor, reduction: Reduction
) -> torch.Tensor:
    """Cut cross-entropy: its kernel on CUDA; elsewhere its compiled form, which we chunk.

    The kernel leaves out small gradients unless told otherwise; here it is told.
    """
    kernel = _package("cut")
    states, weight = _as_computed(lm_head, states)
    with torch.autocast(states.device.type, enabled=False):
        if states.device.type == "cuda":
            return kernel(states, weight, targets, reduction=reduction, filter_eps=None)
        rows = _rows(lm_head)
        return _in_chunks(
            lambda x, y: kernel(x, weight, y, reduction=reduction, impl="torch_compile"),
            states,
            targets,
            rows,
            -(-len(targets) // rows),
            reduction,
        )


_LOSSES: dict[str, Callable[[nn.Module, torch.Tensor, torch.Tensor, Reduction], torch.Tensor]] = {
    "chunked": _chunked,
    "torch": _torch,
    "liger": _liger,
    "cut": _cut,
}


# --- which of them --------------------------------------------------------------------------------


def _implementation(asked: str, lm_head: nn.Module, states: torch.Tensor, *, weighted: bool) -> str:
    """The implementation to use: the one asked for, if it can, or the fastest of those measured."""
    if asked not in IMPLEMENTATIONS:
        raise ValueError(
            f"loss_implementation is {asked!r}; choose one of {', '.join(IMPLEMENTATIONS)}."
        )
    device, plain = states.device.type, _is_plain(lm_head, states)
    if asked == "auto":
        # Measured on a CPU only (docs/loss.md): for several chunks 1.3 to 2.2 x faster, in half
        # the memory.  Its losses come in the type of the states, so float32 or better.
        if device != "cpu" or not plain or not _TORCH_HAS_IT:
            return "chunked"
        exact = _computed_in(states).itemsize > 2
        return "torch" if exact and len(states) > _rows(lm_head) else "chunked"
    if asked == "chunked":
        return asked
    reason = None
    if not plain:
        reason = "takes a plain language head, and this one is sharded, wrapped or hooked"
    elif asked == "torch" and not _TORCH_HAS_IT:
        reason = f"needs torch 2.13, and this is {torch.__version__}"
    elif asked == "liger" and device != "cuda":
        reason = f"runs on CUDA only, and the model is on {device}"
    elif asked == "liger" and weighted:
        reason = "gives only the sum of all losses, and these labels have weights"
    elif asked == "cut" and device == "cuda" and _computed_in(states).itemsize > 2:
        reason = f"computes in half precision on CUDA, and this is {_computed_in(states)}"
    if reason is not None:
        raise ValueError(f"The loss {asked!r} {reason}; choose 'chunked', which always works.")
    return asked


_TORCH_HAS_IT = "LinearCrossEntropyOptions" in dir(nn)


def _package(name: str) -> Any:
    """What an optional package offers for the loss."""
    try:
        if name == "liger":
            from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

            return LigerFusedLinearCrossEntropyLoss
        from cut_cross_entropy import linear_cross_entropy

        return linear_cross_entropy
    except ImportError as error:
        package = {"liger": "liger-kernel", "cut": "cut-cross-entropy"}[name]
        raise ValueError(
            f"The loss {name!r} needs a package that is missing ({error}); "
            f"run: pip install {package}, or choose 'chunked'."
        ) from error


def _is_plain(lm_head: nn.Module, states: torch.Tensor) -> bool:
    """Whether calling the head is a product with a whole matrix, and nothing more."""
    if type(lm_head) is not nn.Linear or lm_head.bias is not None:
        return False
    weight = lm_head.weight
    whole = type(weight) is nn.Parameter and weight.shape[0] == lm_head.out_features
    hooked = lm_head._forward_hooks or lm_head._forward_pre_hooks or "forward" in vars(lm_head)
    return whole and not hooked and weight.device == states.device


def _is_spread(lm_head: nn.Module) -> bool:
    """Whether a call of the head waits for other processes: an FSDP2 unit, or DeepSpeed's mark."""
    from torch.distributed.fsdp import FSDPModule

    units = any(isinstance(module, FSDPModule) for module in lm_head.modules())
    return units or any("ds_id" in vars(parameter) for parameter in lm_head.parameters())


def _computed_in(states: torch.Tensor) -> torch.dtype:
    """The type that a linear layer would compute in."""
    device = states.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else states.dtype


def _as_computed(lm_head: nn.Module, states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """States and head matrix in that type, for kernels that autocast does not know."""
    dtype = _computed_in(states)
    return states.to(dtype), cast(torch.Tensor, lm_head.weight).to(dtype)


__all__ = ["IMPLEMENTATIONS", "LanguageLoss", "language_loss"]
