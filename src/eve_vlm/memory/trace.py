"""Runs a model without memory and counts, byte by byte, what the same run would take with it.

The model lies on the `meta` device: its tensors have a shape and a type and no contents. Every
operation of the forward and backward pass goes through `LiveBytes`, which adds each new storage and
subtracts it when nothing holds it any more, so the highest sum is the peak. The model's own code is
what runs, so any decoder of the library is counted as it is.

Easy to get wrong: integers and booleans stay real and on the CPU, because the code asks them how
many tokens, pictures and labels there are; only floating point has no contents.
"""

import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

PATCH_EMBEDDING = "patch embedding"
DECODER = "decoder"
ALIGNER = "aligner"
TEACHER = "teacher"
LOSS = "logits and loss"
BACKWARD = "backward pass"
GRADIENTS = "gradients"
CACHE = "key-value cache"
INPUTS = "inputs"

aten = torch.ops.aten


@dataclass
class Peak:
    """The highest sum of live bytes, and which parts held them at that moment."""

    bytes: int = 0
    parts: dict[str, int] = field(default_factory=dict)


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all storages that operations make while it is entered.

    Works on real tensors as well as on `meta` ones. `part` is the name that new storages are filed
    under.

    Attributes:
        peak: highest sum so far.
        peak_without_gradients: the same of everything but gradients, for runs that shard them.
    """

    def __init__(self) -> None:
        super().__init__()
        self.part = INPUTS
        self.live: Counter[str] = Counter()
        self.total = 0
        self.peak, self.peak_without_gradients = Peak(), Peak()
        self._known: dict[int, tuple[int, str]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        """Runs one operation and counts what it made."""
        result = self.run(func, args, kwargs or {})
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self._count(tensor)
        return result

    def run(self, func: Callable, args: tuple, kwargs: dict) -> Any:
        """The operation itself; a subclass may run it in another way."""
        return func(*args, **kwargs)

    def ignore(self, module: nn.Module) -> None:
        """Leaves a module's own tensors out of the sum: weights are counted elsewhere."""
        for tensor in [*module.parameters(), *module.buffers()]:
            self._known.setdefault(tensor.untyped_storage()._cdata, (0, DECODER))

    def file_under(self, tensor: torch.Tensor, part: str) -> None:
        """Moves a live storage to another part."""
        key = tensor.untyped_storage()._cdata
        size, before = self._known.get(key, (0, part))
        if size and before != part:
            self.live[before] -= size
            self.live[part] += size
            self._known[key] = (size, part)

    def restart(self) -> None:
        """Forgets the peaks; what is live now is where the next ones begin."""
        self.peak, self.peak_without_gradients = Peak(), Peak()
        self._look()

    def _count(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        size = storage.nbytes()
        self._known[key] = (size, self.part)
        self.live[self.part] += size
        self.total += size
        weakref.finalize(storage, self._gone, key).atexit = False
        self._look()

    def _gone(self, key: int) -> None:
        size, part = self._known.pop(key)
        self.live[part] -= size
        self.total -= size

    def _look(self) -> None:
        if self.total > self.peak.bytes:
            self.peak = Peak(self.total, dict(self.live))
        rest = self.total - self.live[GRADIENTS]
        if rest > self.peak_without_gradients.bytes:
            self.peak_without_gradients = Peak(rest, {**self.live, GRADIENTS: 0})


class Rehearsal(LiveBytes):
    """`LiveBytes` for a model on `meta` whose integers are real."""

    def run(self, func: Callable, args: tuple, kwargs: dict) -> Any:
        """The operation on `meta` where one of its tensors is there, else as it is."""
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        if not any(tensor.is_meta for tensor in tensors):
            return self._run_real(func, args, kwargs)
        if func is aten.masked_select.default and not args[1].is_meta:
            values, mask = args
            shape = torch.broadcast_shapes(values.shape, mask.shape)
            return values.new_empty(int(mask.expand(shape).sum()))
        if len(args) > 1 and isinstance(args[1], list | tuple):  # x[mask] and its gradient
            args = (args[0], _without_masks(args[1]), *args[2:])
        args, kwargs = tree_map_only(torch.Tensor, lambda tensor: tensor.to("meta"), (args, kwargs))
        return func(*args, **kwargs)

    def _run_real(self, func: Callable, args: tuple, kwargs: dict) -> Any:
        """Integers that are made on, or moved to, the model's device stay on the CPU."""
        if torch.device(kwargs.get("device") or "cpu").type != "meta":
            return func(*args, **kwargs)
        if args and isinstance(args[0], torch.Tensor) and not args[0].is_floating_point():
            return func(*args, **kwargs | {"device": torch.device("cpu")})
        made = func(*args, **kwargs)
        if made.is_floating_point() or func is aten.empty.memory_format:  # nobody asks an empty one
            return made
        return func(*args, **kwargs | {"device": torch.device("cpu")})


def _without_masks(indices: list | tuple) -> list:
    """Real boolean masks among indices as positions, so that the result has a shape."""
    found: list = []
    for index in indices:
        is_mask = isinstance(index, torch.Tensor) and index.dtype == torch.bool
        found += index.nonzero(as_tuple=True) if is_mask and not index.is_meta else [index]
    return found


def _fused_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """`scaled_dot_product_attention` by the fused kernel that the CPU has.

    On `meta` torch takes the kernel that keeps all T x T weights. Those of CPU and GPU keep query,
    key, value, result and one number per row, and a boolean mask as one of floats; this one has
    shapes for `meta` too.
    """
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype)
    return aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale
    )[0]


@contextmanager
def rehearsal(model: nn.Module, parts: dict[nn.Module, str]) -> Iterator[Rehearsal]:
    """Enters a `Rehearsal` in which each module of `parts` files what it makes under its name."""
    counter = Rehearsal()
    counter.ignore(model)
    with ExitStack() as stack:
        for module, part in parts.items():
            for handle in _hooks(counter, module, part):
                stack.callback(handle.remove)
        for parameter in model.parameters():
            if parameter.requires_grad:
                handle = parameter.register_post_accumulate_grad_hook(
                    lambda parameter: counter.file_under(parameter.grad, GRADIENTS)
                )
                stack.callback(handle.remove)
        # Autocast knows no `meta` device; the model only ever switches it off.
        stack.enter_context(mock.patch.object(torch, "autocast", lambda *_, **__: nullcontext()))
        stack.enter_context(mock.patch.object(F, "scaled_dot_product_attention", _fused_attention))
        stack.enter_context(counter)
        yield counter


def _hooks(
    counter: LiveBytes, module: nn.Module, part: str
) -> list[torch.utils.hooks.RemovableHandle]:
    before: list[str] = []

    def enter(module: nn.Module, args: tuple) -> None:
        before.append(counter.part)
        counter.part = part

    def leave(module: nn.Module, args: tuple, output: Any) -> None:
        counter.part = before.pop()

    # Always: gradient checkpointing leaves a recomputed layer by an exception.
    return [
        module.register_forward_pre_hook(enter),
        module.register_forward_hook(leave, always_call=True),
    ]


__all__ = ["LiveBytes", "Peak", "Rehearsal", "rehearsal"]
