"""Rows of a key-value cache: joined, left out, kept for the next turn and found again.

Rows are aligned on the right and padded on the left, as in a batch of prompts; the attention mask
hides the padding, so what stands there does not matter.  Easy to get wrong: a cache made from the
configuration keeps only the last window of a sliding-window layer, and rows of different lengths
then no longer fit together; a bare `DynamicCache()` keeps all, and the mask does the sliding.

Legend: `B` rows, `H` key-value heads, `S` cached positions, `D` head width.
"""

from collections import OrderedDict
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from .messages import Prompt

LEAST_REUSED = 16  # positions: below, finding and copying costs more than reading them again
ROOM = 64  # positions behind the last one that a growing cache holds ready


class GrowingCache(DynamicCache):
    """A cache in which a token is written behind the others.

    The library's own copies all that is there for each token: a third of the time of 32 rows of 600
    positions (dev/LOG.md).
    """

    def __init__(self) -> None:
        super().__init__()
        self.layer_class_to_replicate = _GrowingLayer


class _Growing:
    """States (B, H, S, D) at the beginning of memory that has room behind them."""

    def __init__(self, states: torch.Tensor | None):
        self.memory, self.length = states, 0 if states is None else states.shape[2]

    @property
    def states(self) -> torch.Tensor | None:
        return None if self.memory is None else self.memory[:, :, : self.length]

    def append(self, new: torch.Tensor) -> None:
        behind = self.length + new.shape[2]
        if self.memory is None or behind > self.memory.shape[2]:
            grown = new.new_empty(*new.shape[:2], behind + ROOM, new.shape[3])
            if self.memory is not None:
                grown[:, :, : self.length] = self.memory[:, :, : self.length]
            self.memory = grown
        self.memory[:, :, self.length : behind] = new
        self.length = behind


class _GrowingLayer(DynamicLayer):
    """One layer of it; whoever sets `keys` or `values` anew gives up the room behind them."""

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.dtype, self.device, self.is_initialized = key_states.dtype, key_states.device, True

    @property
    def keys(self) -> torch.Tensor | None:
        return self._keys.states

    @keys.setter
    def keys(self, states: torch.Tensor | None) -> None:
        self._keys = _Growing(states)

    @property
    def values(self) -> torch.Tensor | None:
        return self._values.states

    @values.setter
    def values(self, states: torch.Tensor | None) -> None:
        self._values = _Growing(states)

    def get_seq_length(self) -> int:
        return self._keys.length

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self._keys.append(key_states)
        self._values.append(value_states)
        return self.keys, self.values


def add_rows(cache: DynamicCache, newcomers: DynamicCache) -> None:
    """Puts the newcomers' rows behind those of `cache`, the shorter of both padded on the left."""
    length = max(cache.get_seq_length(), newcomers.get_seq_length())
    for layer, other in zip(cache.layers, newcomers.layers, strict=True):
        # Layer by layer, so that no second cache stands beside the first.
        layer.keys = torch.cat([_widened(layer.keys, length), _widened(other.keys, length)])
        layer.values = torch.cat([_widened(layer.values, length), _widened(other.values, length)])
        other.keys = other.values = None


def _widened(states: torch.Tensor, length: int) -> torch.Tensor:
    """(B, H, S, D) padded on the left to (B, H, length, D)."""
    return F.pad(states, (0, 0, length - states.shape[2], 0))


def keep_rows(cache: DynamicCache, rows: list[int], *, unused: int = 0) -> None:
    """Keeps these rows, in this order and as often as named, without the first `unused` columns."""
    for layer in cache.layers:
        layer.keys = layer.keys[rows, :, unused:]
        layer.values = layer.values[rows, :, unused:]


def row_of(cache: DynamicCache, row: int, made: DynamicCache, *, first: int, length: int) -> None:
    """Copies `length` positions from `first` of one row into an empty cache."""
    span = slice(first, first + length)
    for index, layer in enumerate(cache.layers):
        made.update(layer.keys[row : row + 1, :, span], layer.values[row : row + 1, :, span], index)


@dataclass(frozen=True, slots=True)
class _Entry:
    """A sequence that was read: its tokens, its pictures and where they are, its cache."""

    ids: torch.Tensor  # (S,) on the CPU
    spans: tuple[tuple[int, int], ...]
    digests: tuple[bytes, ...]
    cache: DynamicCache


class PrefixStore:
    """Caches of finished sequences, of which the next turn of a conversation reuses the beginning.

    Args:
        max_tokens: positions kept in all; the least recently used go first.
    """

    def __init__(self, max_tokens: int):
        self.max_tokens = max_tokens
        self._entries: OrderedDict[int, _Entry] = OrderedDict()
        self._named = 0

    @property
    def tokens(self) -> int:
        """Positions that are kept now."""
        return sum(len(entry.ids) for entry in self._entries.values())

    def keep(
        self, prompt: Prompt, ids: torch.Tensor, cache: DynamicCache, row: int, first: int
    ) -> None:
        """Keeps a row of a running cache whose positions from `first` hold `ids`."""
        if not LEAST_REUSED <= len(ids) <= self.max_tokens:
            return
        made = DynamicCache()  # without room: it does not grow where it is kept
        row_of(cache, row, made, first=first, length=len(ids))
        # What this sequence itself began with is now twice there; the shorter one goes.
        for name, entry in list(self._entries.items()):
            if _common(entry, ids, prompt) == len(entry.ids):
                del self._entries[name]
        self._named += 1
        self._entries[self._named] = _Entry(ids, prompt.spans, prompt.digests, made)
        while self.tokens > self.max_tokens:
            self._entries.popitem(last=False)

    def find(self, prompt: Prompt) -> DynamicCache | None:
        """A new cache of one row that holds the longest known beginning of a prompt.

        The last token of the prompt is never in it, and no picture is in it in part.
        """
        best, length = 0, LEAST_REUSED - 1
        for name, entry in self._entries.items():
            common = min(_common(entry, prompt.input_ids, prompt), len(prompt) - 1)
            # A picture that begins in there must end in there.
            common = min([first for first, behind in prompt.spans if behind > common] + [common])
            if common > length:
                best, length = name, common
        if not best:
            return None
        self._entries.move_to_end(best)
        made = GrowingCache()
        row_of(self._entries[best].cache, 0, made, first=0, length=length)
        return made

    def clear(self) -> None:
        """Forgets everything."""
        self._entries.clear()


def _common(entry: _Entry, ids: torch.Tensor, prompt: Prompt) -> int:
    """Positions at the beginning that an entry and a sequence with a prompt's pictures share."""
    shorter = min(len(entry.ids), len(ids))
    differ = (entry.ids[:shorter] != ids[:shorter]).nonzero()
    common = int(differ[0]) if len(differ) else shorter
    for one, other, own, theirs in zip(
        entry.spans, prompt.spans, entry.digests, prompt.digests, strict=False
    ):
        if (one, own) != (other, theirs):
            return min(common, one[0], other[0])
    return common


__all__ = ["LEAST_REUSED", "ROOM", "GrowingCache", "PrefixStore", "add_rows", "keep_rows", "row_of"]
