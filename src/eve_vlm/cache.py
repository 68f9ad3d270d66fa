"""Where this package keeps what can be made or fetched again: one folder, which the user can move.

Rendered pictograms, fetched assets and a note of the last quickstart run live there. Easy to get
wrong: the answer follows the environment, so ask each time instead of keeping it in a constant.
"""

import os
from pathlib import Path


def cache_folder() -> Path:
    """The folder that `EVE_CACHE` names (`~` is the home folder), else one in the user's cache.

    It need not exist yet.  A relative one counts from where the program runs.

    Raises:
        ValueError: if `EVE_CACHE` begins with the home folder of nobody.
    """
    named = os.environ.get("EVE_CACHE", "")
    try:
        folder = Path(named).expanduser() if named.strip() else Path.home() / ".cache" / "eve-vlm"
    except RuntimeError:
        raise ValueError(
            f"EVE_CACHE is {named!r}, but that home folder cannot be found; set it to a whole path."
        ) from None
    return folder.absolute()


__all__ = ["cache_folder"]
