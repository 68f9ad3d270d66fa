"""A cache of fixed size for one leg of a running batch, over which the library compiles decoding.

`generate` compiles the steps behind the first by itself on a GPU if the cache does not grow.  Rows
join and leave between legs all the same: a leg borrows a fixed cache, and what it made is put
behind the growing one.  Easy to get wrong: code is compiled for a size, so sizes are rounded up and
the fixed cache is used again, at the same place in memory, while rows and size stay the same.
"""

from transformers.cache_utils import Cache, StaticLayer

from .cache_rows import GrowingCache

STEP = 256  # positions: sizes of fixed caches are multiples of it


class StaticRows:
    """Lends fixed caches and takes back what was made; keeps the last one."""

    def __init__(self) -> None:
        self._cache: Cache | None = None
        self._size = (0, 0, 0)

    def lend(self, cache: GrowingCache, length: int) -> Cache:
        """A fixed cache for at least `length` positions that begins with those of `cache`.

        A cache without positions, of prompts of one token, is lent as it is.
        """
        if not cache.layers:
            return cache
        size = (len(cache.layers), len(cache.layers[0].keys), -(-length // STEP) * STEP)
        if self._cache is None or size != self._size:
            # Full layers also where windows slide, as in a growing cache: the mask does that.
            self._cache = Cache(layers=[StaticLayer(size[2]) for _ in cache.layers])
            self._size = size
        self._cache.reset()
        for index, layer in enumerate(cache.layers):
            self._cache.update(layer.keys, layer.values, index)
        return self._cache

    def take_back(self, cache: GrowingCache) -> None:
        """Puts what the leg made behind what was lent."""
        if self._cache is None or not cache.layers:
            return
        known, behind = cache.get_seq_length(), int(self._cache.get_seq_length())
        for index, layer in enumerate(self._cache.layers):
            new = slice(known, behind)
            cache.update(layer.keys[:, :, new], layer.values[:, :, new], index)


__all__ = ["STEP", "StaticRows"]
