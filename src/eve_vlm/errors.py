"""What errors are made of: a library's message quoted, a list of names, a load that went wrong.

What a user can mend is a `ValueError` of one sentence: what, where, and how to mend it.  Easy to
get wrong: a library's message may be empty, or ten lines of which the first says what happened.
"""

import re
from collections.abc import Iterable
from os import PathLike

SHOWN = 6  # names listed in a message before "and n more"


def first_line(error: Exception) -> str:
    r"""The first line of a library's message, or its kind where it says nothing.

    >>> first_line(ValueError("no such file.\nTry another one."))
    'no such file'
    """
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__


def listed(names: list[str]) -> str:
    """The first names, and how many more there are."""
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def check_loaded(
    folder: str | PathLike,
    missing: Iterable[str],
    surplus: Iterable[str],
    *,
    allowed: Iterable[str] = (),
) -> None:
    """Compares what a load reported with the names that `allowed` (regular expressions) excuses.

    Raises:
        ValueError: with the names.
    """
    excused = [re.compile(pattern) for pattern in allowed]
    for kind, names in (("lacks", missing), ("has surplus", surplus)):
        bad = sorted(name for name in names if not any(pattern.match(name) for pattern in excused))
        if bad:
            raise ValueError(
                f"The checkpoint {folder} {kind} {len(bad)} weights "
                f"({listed(bad)}); it belongs to "
                "another model or was saved in part, so save it again with save_pretrained."
            )


__all__ = ["check_loaded", "first_line", "listed"]
