"""Tasks of our own that need no data hub: pictures of emoji, composed scenes, written words.

Each is a module of this folder, named as the task, whose `TASK` is its class.
"""

import difflib
from importlib import import_module

from eve_vlm.eval.task import Task

OFFLINE: tuple[str, ...] = (
    *("naming", "presence", "counting", "position", "caption_match"),
    *("reading", "documents", "charts"),
)
"""Their names."""


def build_offline(name: str) -> Task:
    """The task of this name; nothing is drawn or read before its samples are asked for.

    Raises:
        ValueError: if there is none; names the nearest.
    """
    if name not in OFFLINE:
        close = difflib.get_close_matches(name, OFFLINE, n=1)
        hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(OFFLINE)}."
        raise ValueError(f"There is no offline task {name!r}: {hint}")
    task: Task = import_module(f"{__name__}.{name}").TASK()
    return task


__all__ = ["OFFLINE", "build_offline"]
