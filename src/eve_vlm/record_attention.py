"""Attention of packed rows record by record, so that nothing is computed between two records.

With `sdpa` the library gives a packed row a T x T mask, and the kernel computes all of it: a row of
four records of 500 positions takes eight times the products that its records need.  Here the bounds
of the records take the mask's place (`records_of`), and each record is an ordinary causal attention
(`attend_by_record`); on a GPU in half precision all of them are one kernel.  Whatever is no packed
row goes the way of `sdpa`.

Easy to get wrong: a record need not be plainly causal, where a window slides for instance; that is
asked of the library's own mask, and such rows keep their mask.

Legend: `B` rows, `T` positions, `H` heads, `D` head width.
"""

import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from eve_vlm.patch_embedding_eve import on_device, on_host

NAME = "sdpa_by_record"
# torch has said "causal" in two ways.
_WINDOWS = "window_size" in inspect.signature(varlen_attn).parameters
CAUSAL: dict[str, Any] = {"window_size": (-1, 0)} if _WINDOWS else {"is_causal": True}


class Records:
    """What stands in a mask's place; no tuple, for those are taken apart on their way.

    And no dataclass, for compiled layers (torch 2.11) would be compiled anew for each number of
    records.

    Attributes:
        lengths: positions of each record, row behind row; those of a row add up to T.
        bounds: (records + 1,) int32, where each begins and the last one ends.
    """

    def __init__(self, lengths: tuple[int, ...], bounds: torch.Tensor) -> None:
        self.lengths, self.bounds = lengths, bounds


def records_of(
    batch_size: int,
    q_length: int,
    kv_length: int,
    *args: Any,
    mask_function: Callable[..., torch.Tensor] | None = None,
    attention_mask: torch.Tensor | None = None,
    allow_is_causal_skip: bool = True,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    **kwargs: Any,
) -> torch.Tensor | Records | None:
    """The records of packed rows, or the mask that `sdpa` has; arguments are the library's.

    A row is packed where the library forbids plain causality though nothing is padded.
    """
    packed = attention_mask is None and not allow_is_causal_skip and q_length == kv_length > 1
    if packed and mask_function is not None and not use_vmap:
        found = _records(mask_function, batch_size, q_length, device)
        if found is not None:
            return found
    given: dict[str, Any] = {} if mask_function is None else {"mask_function": mask_function}
    return sdpa_mask(
        *(batch_size, q_length, kv_length, *args),
        attention_mask=attention_mask,
        allow_is_causal_skip=allow_is_causal_skip,
        use_vmap=use_vmap,
        device=device,
        **given,
        **kwargs,
    )


def _records(
    sees: Callable[..., torch.Tensor], rows: int, length: int, device: torch.device | str
) -> Records | None:
    """Asks a mask (row, head, position, seen position) where records begin; None if not causal.

    A record begins where a position does not see the one before it.  It is plainly causal if its
    last position sees its first and none sees the next one.
    """
    row = torch.arange(rows, device=device).unsqueeze(1)  # (B, 1)
    place = torch.arange(length, device=device).unsqueeze(0)  # (1, T)
    head = torch.zeros((), dtype=torch.long, device=device)
    before, behind = place[:, :-1], place[:, 1:]
    joined = sees(row, head, behind, before).expand(rows, -1)
    begins = F.pad(~joined, (1, 0), value=True).flatten()  # (B * T,)
    places = torch.arange(rows * length, device=device)
    first = torch.where(begins, places, 0).cummax(0).values  # of the record of each position
    within = first.view(rows, length) % length
    last = F.pad(begins[1:], (0, 1), value=True).view(rows, length)
    whole = (sees(row, head, place, within) | ~last).all()
    causal = whole & ~sees(row, head, before, behind).any()
    # All that the host has to know, in the one copy that it waits for.
    begins, plain = on_host(torch.cat([begins, causal.view(1)])).split([rows * length, 1])
    if not bool(plain):
        return None
    bounds = F.pad(begins.nonzero().squeeze(1), (0, 1), value=rows * length)
    return Records(tuple(bounds.diff().tolist()), *on_device(torch.device(device), bounds.int()))


@torch.compiler.disable  # where records end differs by batch, and code is not compiled for each
def attend_by_record(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | Records | None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """The library's `sdpa`, which the records of packed rows go through one by one.

    Args:
        query, key, value: (B, H, T, D), keys and values with fewer heads perhaps.

    Returns:
        (B, T, H, D), and no weights.
    """
    if not isinstance(attention_mask, Records):
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    query, key, value = (_as_computed(states) for states in (query, key, value))
    if _in_one_kernel(query, value, **kwargs):
        return _varlen(query, key, value, attention_mask), None
    # Split, not cut out one by one: the way back of each cut would be as long as all rows.
    parts = [
        states.transpose(0, 1).flatten(1, 2)[None].split(attention_mask.lengths, 2)
        for states in (query, key, value)
    ]  # (1, H, length, D) each
    made = [
        sdpa_attention_forward(module, *states, None, **kwargs)[0]
        for states in zip(*parts, strict=True)
    ]
    return torch.cat(made, 1).unflatten(1, (query.shape[0], -1))[0], None


def _as_computed(states: torch.Tensor) -> torch.Tensor:
    """In autocast's type; turning leaves queries and keys, and not values, in float32."""
    kind = states.device.type
    return states.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else states


def _in_one_kernel(
    query: torch.Tensor,
    value: torch.Tensor,
    *,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> bool:
    """Whether torch's kernel for rows of unequal length can do it (FlashAttention's limits)."""
    width = query.shape[-1]
    usual = scaling is None or abs(scaling * width**0.5 - 1) < 1e-6
    fits = width == value.shape[-1] and width % 8 == 0 and width <= 256
    half = query.is_cuda and query.dtype in (torch.bfloat16, torch.float16)
    return half and usual and fits and dropout == 0


def _varlen(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, records: Records
) -> torch.Tensor:
    """All records at once: (B, H, T, D) to (B, T, H, D)."""
    groups = query.shape[1] // key.shape[1]
    q, k, v = (
        states.transpose(1, 2).flatten(0, 1)  # (B * T, H, D)
        for states in (query, repeat_kv(key, groups), repeat_kv(value, groups))
    )
    longest, bounds = max(records.lengths), records.bounds
    made: Any = varlen_attn(q, k, v, bounds, bounds, longest, longest, **CAUSAL)
    return made.unflatten(0, (query.shape[0], -1))


def register() -> None:
    """Makes the library know it by `NAME`; may be called again."""
    AttentionInterface.register(NAME, attend_by_record)
    AttentionMaskInterface.register(NAME, records_of)


__all__ = ["NAME", "Records", "attend_by_record", "records_of", "register"]
