"""The nearest of some names, for messages about a column or a split that is not there.

Kept apart because tables, Hugging Face data sets and forms all say it.  Easy to get wrong: the
whole list is given only where it is short enough to read.
"""

import difflib
from collections.abc import Sequence

SHOWN = 12


def nearest_names(wanted: str, there: Sequence[str]) -> str:
    """A half-sentence with the names nearest to one that is lacking.

    >>> nearest_names("captoin", ["caption", "image"])
    "did you mean 'caption'? there are caption, image"
    """
    names = [str(name) for name in there]
    near = difflib.get_close_matches(wanted, names, n=1)
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    listing = f"there are {', '.join(names[:SHOWN])}{more}" if names else "there are none"
    return f"did you mean {near[0]!r}? {listing}" if near else listing


__all__ = ["nearest_names"]
