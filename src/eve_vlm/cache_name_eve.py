"""The two names of the cache of earlier positions: `past_key_values`, and `cache` from 5.24 on.

transformers renamed it everywhere at once: arguments of models and of `generate`, and the field of
outputs.  All that depends on it is here.  Easy to get wrong: the library translates the old name
for its own models only; ours are called by the name of the day (by `generate`) and by either (by
people), so their `forward` takes both, and what they call takes `CACHE`.
"""

from dataclasses import fields

from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast

NAMES = ("past_key_values", "cache")
# What the installed library calls it.
CACHE: str = next(one.name for one in fields(BaseModelOutputWithPast) if one.name in NAMES)


def the_cache(past_key_values: Cache | None, cache: Cache | None) -> Cache | None:
    """The one that was given, or None.

    Raises:
        ValueError: if both were.
    """
    if past_key_values is not None and cache is not None:
        raise ValueError("past_key_values and cache are two names of one argument; give one.")
    return past_key_values if cache is None else cache


__all__ = ["CACHE", "the_cache"]
