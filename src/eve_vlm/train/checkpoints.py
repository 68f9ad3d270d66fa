"""Checkpoints that are there whole or not at all, and the newest of them that still is.

A checkpoint is written into a hidden folder beside its place, flushed to the disk, listed with sums
in `checksums.json`, and only then takes its name; older ones are removed after that.  So a process
that is killed at any moment leaves whole checkpoints and hidden rests, nothing between.  Easy to
get wrong: a name is moved before its files are deleted, or a folder that is half deleted would look
like a checkpoint.
"""

import errno
import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

logger = logging.getLogger(__name__)

CHECKSUMS_FILE = "checksums.json"
_NAME = re.compile(r"checkpoint-(\d+)")
_THREADS = min(8, os.cpu_count() or 1)  # hashing runs outside Python's lock, flushing in the kernel


def checkpoints_in(folder: Path) -> list[Path]:
    """The checkpoints of a run's folder by their steps, oldest first; whole or not."""
    found = [path for path in folder.glob("checkpoint-*") if _NAME.fullmatch(path.name)]
    return sorted((path for path in found if path.is_dir()), key=step_of)


def step_of(checkpoint: Path) -> int:
    """The step that a checkpoint's name tells.

    >>> step_of(Path("runs/a/checkpoint-120"))
    120
    """
    match = _NAME.fullmatch(checkpoint.name)
    assert match is not None, checkpoint
    return int(match[1])


def last_whole_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint that passes its own list of sums, or None; sets the others aside.

    A broken one that is newer keeps its files under the name `broken-checkpoint-N` and is named in
    a warning.  What a killed process had begun to write or to delete is removed.  Only for the
    process that holds the run's folder (`run_folder.held`): what looks like a rest here may be the
    work of a run that is alive.
    """
    for rest in sorted(folder.glob(".checkpoint-*.part-*")):
        logger.warning("%s is removed: a process ended while it was written or deleted.", rest)
        shutil.rmtree(rest)
    for checkpoint in reversed(checkpoints_in(folder)):
        problem = problem_of(checkpoint)
        if problem is None:
            return checkpoint
        aside = _free_name(folder / f"broken-{checkpoint.name}")
        checkpoint.rename(aside)
        logger.warning("%s is not whole (%s); it is kept as %s.", checkpoint, problem, aside.name)
    return None


def problem_of(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint, in words, or None: every file is read and compared."""
    try:
        listed = json.loads((checkpoint / CHECKSUMS_FILE).read_text(encoding="utf-8"))["files"]
        sizes = {name: entry["size"] for name, entry in listed.items()}
        sums = {name: entry["sha256"] for name, entry in listed.items()}
    except FileNotFoundError:
        return f"it has no {CHECKSUMS_FILE}"
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{CHECKSUMS_FILE} cannot be read: {error}"
    for name, size in sizes.items():
        file = checkpoint / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != size:
            return f"{name} has {file.stat().st_size} bytes instead of {size}"
    with ThreadPoolExecutor(_THREADS) as pool:
        found = pool.map(_sha256, [checkpoint / name for name in sums])
        for (name, wanted), sha256 in zip(sums.items(), found, strict=True):
            if sha256 != wanted:
                return f"{name} is not what was written"
    return None


def files_below(folder: Path) -> list[str]:
    """Names of all files of a folder and the folders in it, relative to it."""
    return sorted(
        file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()
    )


def flush_and_sum(folder: Path, names: Sequence[str]) -> dict[str, dict[str, int | str]]:
    """Writes files through to the disk and returns size and sha256 of each.

    Both at a time: while the disk takes the bytes, the processor sums them from memory.
    """
    files = [folder / name for name in names]
    with ThreadPoolExecutor(_THREADS) as pool:
        sums = [pool.submit(_sha256, file) for file in files]
        for flushed in [pool.submit(_flush, file) for file in files]:
            flushed.result()
        return {
            name: {"size": file.stat().st_size, "sha256": sha256.result()}
            for name, file, sha256 in zip(names, files, sums, strict=True)
        }


def seal(part: Path, target: Path, sums: Mapping[str, dict[str, int | str]]) -> None:
    """Gives a checkpoint, whose files are flushed, its list of sums and then its name."""
    listing = part / CHECKSUMS_FILE
    listing.write_text(json.dumps({"files": sums}, indent=1), encoding="utf-8")
    _flush(listing)
    for inner in (part, *(path for path in part.rglob("*") if path.is_dir())):
        _flush(inner)
    part.rename(target)
    _flush(target.parent)


def remove_old(folder: Path, *, keep: int | None) -> None:
    """Removes all but the newest `keep` checkpoints; None and 0 keep all."""
    if not keep or keep < 0:
        return
    for checkpoint in checkpoints_in(folder)[:-keep]:
        gone = folder / f".{checkpoint.name}.part-removed"
        shutil.rmtree(gone, ignore_errors=True)
        checkpoint.rename(gone)
        shutil.rmtree(
            gone, ignore_errors=True
        )  # what stays is a rest, and goes with the next start


def flush_files(folder: Path, names: Iterable[str]) -> None:
    """Writes files of a folder, and the folder, through to the disk."""
    for name in names:
        _flush(folder / name)
    _flush(folder)


def size_of(checkpoint: Path) -> int:
    """Bytes of all files of a checkpoint, from its list."""
    listed = json.loads((checkpoint / CHECKSUMS_FILE).read_text(encoding="utf-8"))["files"]
    return sum(entry["size"] for entry in listed.values())


def is_disk_full(error: BaseException, folder: Path, needed: int) -> bool:
    """Whether an error of writing means that the disk, or the user's share of it, is full.

    PyTorch's writer only says that writing failed, so the free bytes are asked too.
    """
    full = (errno.ENOSPC, errno.EDQUOT)
    if isinstance(error, OSError) and error.errno in full:
        return True
    if any(os.strerror(number).lower() in str(error).lower() for number in full):
        return True
    return shutil.disk_usage(folder).free < needed


def _sha256(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _flush(path: Path) -> None:
    """Waits until a file or folder is on the disk."""
    if os.name == "nt" and path.is_dir():
        return  # Windows opens no folders, and needs no flush for names
    # Windows flushes only what is open for writing.
    handle = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _free_name(path: Path) -> Path:
    number, free = 1, path
    while free.exists():
        number += 1
        free = path.with_name(f"{path.name}-{number}")
    return free


__all__ = [
    "CHECKSUMS_FILE",
    "checkpoints_in",
    "files_below",
    "flush_and_sum",
    "flush_files",
    "is_disk_full",
    "last_whole_checkpoint",
    "problem_of",
    "remove_old",
    "seal",
    "size_of",
    "step_of",
]
