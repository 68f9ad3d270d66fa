"""What was found out about data files, kept in the cache folder until the files change.

A file is known by its place, size and time of change, so a file that was written anew is looked at
again.  Easy to get wrong: whatever depends on settings too must have them in its `key`.
"""

import hashlib
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from eve_vlm.cache import cache_folder
from eve_vlm.data.files import is_url, place_is_said, url_system
from eve_vlm.output_folder import written_whole

logger = logging.getLogger(__name__)

VERSION = 1  # of what is kept; another one is made anew


def stamp_of(path: str | Path) -> str:
    """What names one state of a file: its whole path, its size, and when it was changed.

    Raises:
        ValueError: if there is no such file.
    """
    if is_url(path):
        system, inside = url_system(str(path))
        with place_is_said(path):
            facts = system.info(inside)
        known = {key: str(facts[key]) for key in ("size", "mtime", "ETag", "etag") if key in facts}
        return json.dumps([str(path), known])
    file = Path(path)
    if not file.is_file():
        raise ValueError(f"{file} is not a file; check data.sources.path in the recipe.")
    facts = file.stat()
    return json.dumps([str(file.resolve()), facts.st_size, facts.st_mtime_ns])


def kept_file(kind: str, key: Any, suffix: str = ".npy") -> Path:
    """Where something with this key is kept; it need not exist yet."""
    name = hashlib.sha256(json.dumps([VERSION, kind, key]).encode()).hexdigest()[:32]
    return cache_folder() / "data" / kind / f"{name}{suffix}"


def kept_array(kind: str, key: Any, make: Callable[[], np.ndarray]) -> np.ndarray:
    """An array from the cache folder, mapped into memory; made and kept where it is not there."""
    file = kept_file(kind, key)
    if not file.is_file():
        array = make()
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            with written_whole(file) as part, part.open("wb") as stream:
                np.save(stream, array)
        except OSError as error:
            logger.warning("%s cannot be kept in %s: %s", kind, file.parent, error)
            return array
    return np.load(file, mmap_mode="r", allow_pickle=False)


__all__ = ["kept_array", "kept_file", "stamp_of"]
