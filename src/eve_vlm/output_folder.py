"""A folder or file that appears whole or not at all, and only where there is room for it.

What is written goes into one beside the wanted one and takes its name at the end, so a stop
half-way leaves nothing that looks like a model.  Easy to get wrong: the folder beside must be on
the same disk, or the last step is a copy that can fail half-way too.
"""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

SPARE = 64 * 2**20  # bytes beyond the weights: tokenizer, code, what the file system takes


def require_new(folder: str | Path) -> Path:
    """The folder, checked to be absent or empty.

    Raises:
        ValueError: if something is there.
    """
    folder = Path(folder)
    if folder.is_dir() and not any(folder.iterdir()):
        return folder
    if folder.exists():
        raise ValueError(
            f"{folder} is there already and not an empty folder; name a new one or remove it first."
        )
    return folder


def require_room(folder: str | Path, needed: int) -> None:
    """Checks that the disk of a folder, which need not exist yet, has `needed` bytes and to spare.

    Raises:
        ValueError: with both sizes, if it has not.
    """
    place = Path(folder).absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < needed + SPARE:
        raise ValueError(
            f"{folder} needs {(needed + SPARE) / 1e9:.2f} GB but its disk has {free / 1e9:.2f} GB "
            "free; make room, or name a folder on another disk."
        )


@contextmanager
def new_folder(folder: str | Path, *, needed: int = 0) -> Iterator[Path]:
    """A folder to write into; it becomes `folder` at the end, and vanishes on any error.

    Args:
        folder: absent or empty.
        needed: bytes that will be written at most, temporary files too.

    Raises:
        ValueError: see `require_new` and `require_room`.
    """
    folder = require_new(folder)
    require_room(folder, needed)
    beside = folder.absolute().parent / f".{folder.absolute().name}.part-{os.getpid()}"
    beside.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir()
    try:
        yield beside
        _open_to_readers(beside)
        if folder.is_dir():
            folder.rmdir()  # empty; Windows does not rename onto a folder
        os.replace(beside, folder)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


@contextmanager
def written_whole(file: Path) -> Iterator[Path]:
    """A name beside `file` to write to; it becomes `file` at the end, and vanishes on any error."""
    part = file.with_name(f".{file.name}.part-{os.getpid()}")
    try:
        yield part
        os.replace(part, file)
    finally:
        part.unlink(missing_ok=True)


def _open_to_readers(folder: Path) -> None:
    """Gives files the usual mode: safetensors writes 0600, which others cannot read."""
    mask = os.umask(0)
    os.umask(mask)
    for file in folder.rglob("*"):
        if file.is_file():
            file.chmod(0o666 & ~mask)


__all__ = ["new_folder", "require_new", "require_room", "written_whole"]
