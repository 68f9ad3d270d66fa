"""Legs of a running batch over a cache of fixed size: a step is recorded once and played again.

On a GPU a step of a few rows is over before Python has asked for its next one, so the step is a
recording (a CUDA graph), and the next step begins before this one's tokens are looked at.  Rows
join and leave between legs all the same: a leg borrows the fixed cache, and what it made is put
behind the growing one.  Elsewhere the same steps run one by one and gain nothing.  Products of one
input are one product on a GPU (`joined_products.py`).

Easy to get wrong: a recording belongs to a number of rows, a size and a place in memory.  So both
are rounded up, and all sizes lie at the beginning of the same memory.

Legend: `B` rows, `T` positions that are known, `S` positions of the fixed cache.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList
from transformers.cache_utils import Cache, StaticLayer

from eve_vlm.cache_name_eve import CACHE
from eve_vlm.layer_taps_eve import layers_of
from eve_vlm.modeling_eve import EveForConditionalGeneration

from .cache_rows import GrowingCache
from .joined_products import JoinedProducts

STEP = 256  # positions: sizes of fixed caches are multiples of it
# Kernels whose masks can be recorded; flex attention makes its own on the host.
RECORDED = ("sdpa", "eager")


class _FixedLayer(StaticLayer):
    """Keys and values (B, H, S, D) at a place that stays; takes one position at a time.

    The library's own counts positions for each layer, three small kernels of about thirty.
    """

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, position: torch.Tensor):
        super().__init__(keys.shape[2])
        self.keys, self.values, self.cumulative_length = keys, values, position
        self.dtype, self.device, self.is_initialized = keys.dtype, keys.device, True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Writes one position of all rows; moves nothing on."""
        self.keys.index_copy_(2, self.cumulative_length.view(1), key_states)
        self.values.index_copy_(2, self.cumulative_length.view(1), value_states)
        return self.keys, self.values


class _OneLayer(Cache):
    """The cache of one layer, whatever its number is: compiled code for one is code for all."""

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs) -> Any:
        """Without the number, which code would otherwise be compiled for."""
        return self.layers[0].update(key_states, value_states)


class CompiledLayers:
    """Code for a step of any of a decoder's layers, compiled once for all of them.

    Args:
        settings: of `torch.compile`.
    """

    def __init__(self, decoder: nn.Module, **settings: Any):
        self.layers = layers_of(decoder)
        self._call = torch.compile(_call, **settings)

    @contextmanager
    def over(self, cache: Cache) -> Iterator[None]:
        """Layers run compiled, over this cache, and afterwards as before."""
        before = [vars(layer).get("forward") for layer in self.layers]
        for layer, fixed in zip(self.layers, cache.layers, strict=True):
            layer.forward = partial(self._run, layer, _OneLayer(layers=[fixed]))
        try:
            yield
        finally:
            for layer, forward in zip(self.layers, before, strict=True):
                del layer.forward
                if forward is not None:
                    layer.forward = forward

    def _run(self, layer: nn.Module, cache: Cache, *args: Any, **kwargs: Any) -> Any:
        return self._call(layer, *args, **kwargs | {CACHE: cache})


def _call(layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
    return type(layer).forward(layer, *args, **kwargs)


class Steps:
    """Steps of B rows over S positions: the state of all of them, and the recording.

    Args:
        memory: keys and values of each layer, each (B, H, S, D).
        record: keep the first step and play it again; on a GPU.
        compiled: layers for it, or None.
    """

    def __init__(
        self,
        model: EveForConditionalGeneration,
        memory: list[tuple[torch.Tensor, torch.Tensor]],
        *,
        record: bool,
        compiled: CompiledLayers | None = None,
    ):
        keys = memory[0][0]
        self.model, self.device = model, keys.device
        self.position = torch.zeros((), dtype=torch.long, device=self.device)
        self.cache = Cache(layers=[_FixedLayer(*one, self.position) for one in memory])
        rows, size = len(keys), keys.shape[2]
        self.ids = torch.zeros(rows, 1, dtype=torch.long, device=self.device)
        self.positions = torch.zeros_like(self.ids)  # of the words, without padding
        self.mask = torch.ones(rows, size, dtype=torch.long, device=self.device)
        self._record, self._compiled = record, compiled
        self._graph: torch.cuda.CUDAGraph | None = None
        self._logits = self.ids  # of the recording

    @property
    def recorded(self) -> bool:
        """Whether steps are played from now on."""
        return self._graph is not None

    def begin(self, input_ids: torch.Tensor, mask: torch.Tensor, cache: GrowingCache) -> None:
        """Takes over rows (B, T) whose cache holds all but the last position.

        Rows that are too few are filled up with what nobody looks at.
        """
        rows, length = mask.shape
        self.ids.zero_()
        self.positions.zero_()
        self.ids[:rows], self.positions[:rows] = input_ids[:, -1:], mask.sum(-1, keepdim=True) - 1
        self.mask.fill_(1)  # what comes is hidden by being later
        self.mask[:rows, :length] = mask
        self.position.fill_(length - 1)
        for fixed, layer in zip(self.cache.layers, cache.layers, strict=True):
            fixed.keys[:rows, :, : length - 1] = layer.keys
            fixed.values[:rows, :, : length - 1] = layer.values

    def __call__(self) -> torch.Tensor:
        """Logits (B, vocabulary) behind `ids`, in memory that the next step uses again."""
        if not self._record:
            return self._step()
        if self._graph is None:
            self._graph, self._logits = self._recording()
        self._graph.replay()
        return self._logits

    def end(self, cache: GrowingCache, length: int) -> None:
        """Puts what was made behind the rows' own cache, up to `length` positions."""
        rows, new = len(cache.layers[0].keys), slice(cache.get_seq_length(), length)
        for index, fixed in enumerate(self.cache.layers):
            cache.update(fixed.keys[:rows, :, new], fixed.values[:rows, :, new], index)

    def _step(self) -> torch.Tensor:
        decoder, compiled = self.model.model.language_model, self._compiled
        with nullcontext() if compiled is None else compiled.over(self.cache):
            hidden = decoder(
                inputs_embeds=self.model.get_input_embeddings()(self.ids),
                attention_mask=self.mask,
                position_ids=self.positions,
                use_cache=True,
                **{CACHE: self.cache},
            ).last_hidden_state
        self.position += 1
        self.positions += 1
        return self.model.lm_head(hidden)[:, -1]

    def _recording(self) -> tuple[torch.cuda.CUDAGraph, torch.Tensor]:
        """A step that is kept; those that warm up before leave the state as it was."""
        before = self.position.clone(), self.positions.clone()

        def back() -> None:
            self.position.copy_(before[0])
            self.positions.copy_(before[1])

        side = torch.cuda.Stream(self.device)
        side.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(side):
            for _ in range(2):
                self._step()
                back()
        torch.cuda.current_stream(self.device).wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        # Other threads may read pictures to the device meanwhile.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            logits = self._step()
        back()  # as for a step that ran, should recording ever run it
        return graph, logits


class StaticRows:
    """Makes the tokens of legs: what `generate` takes as its `custom_generate`.

    Args:
        record: whether to record; None where it can be done.
        compiled: settings of `torch.compile` for the decoder's layers; None leaves them alone.
        join: whether products of one input are one product, for which weights are laid behind each
            other; None where it gains, on a GPU.
    """

    def __init__(
        self,
        model: EveForConditionalGeneration,
        *,
        record: bool | None = None,
        compiled: dict[str, Any] | None = None,
        join: bool | None = None,
    ):
        self.model = model
        attention = model.model.language_model.config._attn_implementation
        can = model.device.type == "cuda" and attention in RECORDED
        self.record = can if record is None else record
        self._memory: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._steps: dict[tuple[int, int], Steps] = {}
        decoder = model.model.language_model
        self._compiled = None if compiled is None else CompiledLayers(decoder, **compiled)
        join = model.device.type == "cuda" if join is None else join
        self.joined = JoinedProducts(decoder) if join else None

    def steps(self, cache: GrowingCache, length: int) -> Steps:
        """Steps for the rows of a cache and at least `length` positions; kept for the next leg."""
        keys = cache.layers[0].keys
        rows, size = 1 << (len(keys) - 1).bit_length(), -(-length // STEP) * STEP
        shape = (rows, keys.shape[1], size, keys.shape[3])
        needed = rows * keys.shape[1] * size * keys.shape[3]
        if not self._memory or needed > self._memory[0][0].numel():
            self.forget()
            # Zeros, since rows that nobody looks at are computed too.
            self._memory += [
                (layer.keys.new_zeros(needed), layer.values.new_zeros(needed))
                for layer in cache.layers
            ]
        if (rows, size) not in self._steps:
            memory = [
                (keys[:needed].view(shape), values[:needed].view(shape))
                for keys, values in self._memory
            ]
            self._steps[rows, size] = Steps(
                self.model, memory, record=self.record, compiled=self._compiled
            )
        return self._steps[rows, size]

    def forget(self) -> None:
        """Gives the memory back; compiled code stays."""
        self._steps.clear()
        self._memory.clear()

    def __call__(
        self,
        model: EveForConditionalGeneration,
        input_ids: torch.Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        ahead: bool = True,
        **given: Any,
    ) -> torch.Tensor:
        """(B, T) ids and a cache of T - 1 positions to (B, T + made); `generate` calls it.

        Args:
            ahead: the next step may begin before this one's tokens are looked at.
        """
        known = input_ids.shape[1]
        behind = stopping_criteria.max_length
        if self.joined is not None and not self.joined.lay():
            self.forget()  # recordings read weights where they were
        steps = self.steps(given[CACHE], behind)
        mask = given.get("attention_mask")  # None where nothing is padded
        steps.begin(input_ids, torch.ones_like(input_ids) if mask is None else mask, given[CACHE])
        ids = torch.nn.functional.pad(input_ids, (0, behind - known))  # on the device
        seen = torch.empty(ids.shape, dtype=ids.dtype, pin_memory=ids.is_cuda)  # on the host
        seen[:, :known] = input_ids
        made = known
        joined = None if steps.recorded else self.joined  # a recording asks no layer
        with nullcontext() if joined is None else joined.over():
            for made in self._made(steps, ids, seen, known, logits_processor, ahead):
                if bool(stopping_criteria(seen[:, :made], None).all()):
                    break
        steps.end(given[CACHE], made - 1)
        return ids[:, :made]

    def _made(
        self,
        steps: Steps,
        ids: torch.Tensor,
        seen: torch.Tensor,
        known: int,
        logits_processor: LogitsProcessorList,
        ahead: bool,
    ) -> Iterator[int]:
        """Fills columns of `ids` and `seen`; says up to where, when `seen` has them.

        While somebody looks at a column the device makes the next one, which may be in vain.
        """
        rows, behind = ids.shape
        waiting: list[tuple[int, torch.cuda.Event | None]] = []
        for column in range(known, behind):
            scores = steps()[:rows].to(torch.float32, copy=True)
            chosen = logits_processor(ids[:, :column], scores).argmax(-1)
            ids[:, column] = chosen
            steps.ids[:rows, 0] = chosen
            seen[:, column].copy_(chosen, non_blocking=True)
            waiting.append((column + 1, _event(chosen)))
            if len(waiting) > (ahead and self.record):
                yield _arrived(*waiting.pop(0))
        for one in waiting:
            yield _arrived(*one)


def _event(tensor: torch.Tensor) -> torch.cuda.Event | None:
    """What happens when the device has done all that it was given; None on a CPU."""
    if not tensor.is_cuda:
        return None
    event = torch.cuda.Event()
    event.record()
    return event


def _arrived(made: int, event: torch.cuda.Event | None) -> int:
    """The number, once the event has happened."""
    if event is not None:
        event.synchronize()
    return made


__all__ = ["RECORDED", "STEP", "CompiledLayers", "StaticRows", "Steps"]
