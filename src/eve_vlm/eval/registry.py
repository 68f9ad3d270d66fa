"""Tasks by name: the public benchmarks, and our own that need no download.

Easy to get wrong: building a task reads no data, so that results can be compared and drawn again on
a machine that has none of it; `samples()` is what opens a data set.
"""

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from .benchmarks import BENCHMARKS, build_benchmark
from .benchmarks.judge import Judge
from .offline import OFFLINE, build_offline
from .task import Task

PAPER = (*("vqav2", "gqa", "vizwiz", "sqa", "textvqa", "pope", "mme", "mmbench", "seed", "mmvet"),)
SETS: dict[str, tuple[str, ...]] = {
    "paper": PAPER,
    "others": tuple(name for name in BENCHMARKS if name not in PAPER),
    "offline": OFFLINE,
}
"""Names for several tasks: the paper's ten, what others report for EVE, our own."""
TASKS = (*BENCHMARKS, *OFFLINE)


@dataclass(frozen=True, kw_only=True, slots=True)
class TaskOptions:
    """What tasks may need to be told."""

    data_root: Path | None = None
    """Folder with data sets as `hf download` lays them out, one folder for each Hub id."""
    preset: str = "published@1"
    """Prompts, splits and lengths of answers of the public benchmarks."""
    judge: Judge | None = None
    """The language model that marks free answers."""
    splits: Mapping[str, str] = field(default_factory=dict)
    """Another split than the preset's, by task."""


def task_names(wanted: Iterable[str]) -> list[str]:
    """Names of tasks and of sets of them, as names of tasks, each once, in the order given.

    Raises:
        ValueError: with the nearest names, if there is no such task.
    """
    found: dict[str, None] = {}
    for name in wanted:
        if name not in SETS and name not in TASKS:
            near = difflib.get_close_matches(name, [*TASKS, *SETS], n=3, cutoff=0.5)
            hint = f"did you mean {' or '.join(near)}?" if near else "see `eve eval tasks`."
            raise ValueError(f"There is no task {name!r}: {hint}")
        found |= dict.fromkeys(SETS.get(name, (name,)))
    return list(found)


def build_task(name: str, options: TaskOptions | None = None) -> Task:
    """A task by its name; its data is not opened.

    Raises:
        ValueError: if there is no such task or preset.
    """
    [name] = task_names([name])
    if name in OFFLINE:
        return build_offline(name)
    options = options or TaskOptions()
    return build_benchmark(
        name,
        data_root=options.data_root,
        preset=options.preset,
        judge=options.judge,
        splits=options.splits,
    )


__all__ = ["PAPER", "SETS", "TASKS", "TaskOptions", "build_task", "task_names"]
