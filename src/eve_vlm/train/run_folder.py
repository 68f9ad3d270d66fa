"""Who may train in an output folder, and whether it is the same run that stands there.

One process at a time holds a folder, and a folder holds one run: the recipe in it must be that of
the command, save keys that change nothing of what is learnt.  Easy to get wrong: processes that
read data are forked from the one that trains, and a lock that they inherit would outlive it, so
the lock is one that the system never hands on.
"""

import json
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from accelerate.utils.environment import get_int_from_env

from eve_vlm.output_folder import written_whole
from eve_vlm.train.recipe import load_recipe, resolved_yaml
from eve_vlm.train.sections import Recipe

RECIPE_FILE = "recipe.resolved.yaml"
RESULT_FILE = "run.json"
LOCK_FILE = ".lock"
# As torchrun and the usual launchers of MPI name it; needed before the processes know one another.
RANK_NAMES = ["RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK"]

MAY_CHANGE = (
    # Names, and what is shown, logged and kept on the way.
    *("name", "output_dir", "samples", "samples.*", "evaluation", "evaluation.*"),
    *("training.report_to", "training.logging_*"),
    *("training.log_level*", "training.disable_tqdm", "training.save_*", "training.hub_*"),
    *("training.push_to_hub", "training.project", "training.trackio_*"),
    # How a step is cut for other devices; the rows of a step must stay, which `DataLog` checks.
    *("training.per_device_train_batch_size", "training.gradient_accumulation_steps"),
    # How fast data come; the order of records does not depend on it.
    "training.dataloader_*",
    *("training.ddp_timeout", "training.skip_memory_metrics", "training.torch_empty_cache_steps"),
    # When a run gives up.
    *("data.max_bad_share", "guards.*"),
)
"""Keys of a recipe, as globs, that may change while a run stands unfinished."""
_NEVER = ("training.dataloader_drop_last", "training.save_only_model")


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Holds a run's folder, made if need be; of several processes of a run the first does it.

    Raises:
        ValueError: if another process holds it; the message names it.
    """
    if get_int_from_env(RANK_NAMES, 0) != 0:
        yield
        return
    new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / LOCK_FILE
    handle = _locked(file)
    try:
        os.ftruncate(handle, 0)
        os.write(handle, json.dumps({"pid": os.getpid(), "host": socket.gethostname()}).encode())
        yield
    finally:
        file.unlink(missing_ok=True)
        os.close(handle)
        if new and not any(folder.iterdir()):
            folder.rmdir()  # nothing was begun


def changed_keys(output: Path, recipe: Recipe, *, resume: bool) -> list[str] | None:
    """Checks that a run may go on in a folder.

    Returns:
        None for a new run; else the keys that differ, all of them in `MAY_CHANGE`, as text.

    Raises:
        ValueError: if the folder holds something else, another run, a finished one, or an
            unfinished one without `resume`.
    """
    file = output / RECIPE_FILE
    if not output.exists() or all(path.name.startswith(".") for path in output.iterdir()):
        return None
    if not file.is_file():
        raise ValueError(
            f"{output} holds other files and no run; choose another output_dir or empty it."
        )
    changed = differences(file, recipe)
    barred = [text for key, text in changed.items() if not _may_change(key)]
    if barred:
        shown = ", ".join(barred[:5]) + (f" and {len(barred) - 5} more" if barred[5:] else "")
        raise ValueError(
            f"{output} already holds a different run ({shown}; see {file}); choose another "
            "output_dir, give these as they were, or remove the folder."
        )
    if (output / RESULT_FILE).is_file():
        raise ValueError(
            f"{output} already holds this run, finished; remove the folder to train it again."
        )
    if not resume:
        raise ValueError(
            f"{output} holds this run unfinished; leave out --no-resume to go on, or remove the "
            "folder."
        )
    return list(changed.values())


def is_finished(output: Path, recipe: Recipe) -> bool:
    """Whether a folder holds this run complete."""
    if not (output / RECIPE_FILE).is_file() or not (output / RESULT_FILE).is_file():
        return False
    return all(_may_change(key) for key in differences(output / RECIPE_FILE, recipe))


def differences(file: Path, recipe: Recipe) -> dict[str, str]:
    """The dotted keys in which a recipe differs from one in a file, each with both values."""
    try:
        before = dict(_flat(asdict(load_recipe(file))))
    except ValueError as error:
        return {"": f"its recipe cannot be read: {error}"}
    now = dict(_flat(asdict(recipe)))
    return {
        key: f"{key} was {before.get(key, 'not given')} and is {now.get(key, 'not given')}"
        for key in sorted(before.keys() | now.keys())
        if (key in before, before.get(key)) != (key in now, now.get(key))
    }


def write_recipe(output: Path, recipe: Recipe) -> None:
    """Writes the recipe of a run, whole: half of one would look like that of another run."""
    output.mkdir(parents=True, exist_ok=True)
    with written_whole(output / RECIPE_FILE) as part:
        part.write_text(resolved_yaml(recipe), encoding="utf-8")


def _may_change(key: str) -> bool:
    return key not in _NEVER and any(fnmatchcase(key, glob) for glob in MAY_CHANGE)


def _flat(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Leaves of nested mappings and lists by dotted key; empty ones are leaves."""
    inner = value.items() if isinstance(value, dict) else enumerate(value)
    for name, one in inner:
        dotted = f"{key}.{name}" if key else str(name)
        if isinstance(one, (dict, list)) and one:
            yield from _flat(one, dotted)
        else:
            yield dotted, one


def _locked(file: Path) -> int:
    """An open handle that holds the lock of a file."""
    while True:
        handle = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            if sys.platform == "win32":
                import msvcrt

                msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)
            else:
                import fcntl

                fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            text = os.read(handle, 1000)
            os.close(handle)
            raise ValueError(_refusal(file.parent, text)) from error
        # The one that held it may have removed the file between our opening and locking.
        if file.exists() and os.path.samestat(os.fstat(handle), file.stat()):
            return handle
        os.close(handle)


def _refusal(folder: Path, text: bytes) -> str:
    try:
        holder = json.loads(text)
        who = f"Process {holder['pid']} on {holder['host']}"
    except (ValueError, KeyError, TypeError):
        who = "Another process"  # it has not written its name yet
    return f"{who} trains in {folder} already; wait for it, stop it, or choose another output_dir."


__all__ = [
    "MAY_CHANGE",
    "RECIPE_FILE",
    "RESULT_FILE",
    "changed_keys",
    "differences",
    "held",
    "is_finished",
    "write_recipe",
]
