"""The weight files of a checkpoint folder: what is in them, whether they are whole, one by one.

Safetensors or pickled `.bin`, one file or shards with an index.  Headers are read, not weights, so
a 14 GB checkpoint is looked through in a second.  Easy to get wrong: a pickle may hold code; it is
only ever read with `weights_only=True`, which refuses that, and the file is named.
"""

import json
import pickle
import re
import struct
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from transformers.utils import (
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    WEIGHTS_INDEX_NAME,
    WEIGHTS_NAME,
)

from .errors import first_line

# As the library looks for them: safetensors first, one file before shards.
FILES = (
    (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME),
    (WEIGHTS_NAME, WEIGHTS_INDEX_NAME),
)
AGAIN = "download or copy it again"
LFS_POINTER = b"version https://git-lfs"
# What torch's pickle reader raises at a file that ends early or holds something else (all seen).
NOT_A_PICKLE = (RuntimeError, EOFError, OSError, LookupError, ValueError, struct.error)


class WeightEntry(NamedTuple):
    """One weight as a file's header describes it."""

    name: str
    """As stored."""
    shape: tuple[int, ...]
    dtype: torch.dtype
    file: Path


def weight_files(folder: str | Path) -> list[Path]:
    """The files that hold the weights of a checkpoint folder, in the index's order.

    Raises:
        ValueError: if there are none, the index cannot be read, or a shard that it names is not
            there.
    """
    folder = Path(folder)
    for single, index in FILES:
        if (folder / single).is_file():
            return [folder / single]
        if (folder / index).is_file():
            files = [folder / name for name in dict.fromkeys(_index(folder / index).values())]
            gone = [file.name for file in files if not file.is_file()]
            if gone:
                raise ValueError(
                    f"{folder} lacks {len(gone)} of {len(files)} shards that {index} names "
                    f"({', '.join(gone)}); the download was not finished, so {AGAIN}."
                )
            return files
    known = ", ".join(name for pair in FILES for name in pair)
    raise ValueError(f"{folder} holds no weights (none of {known}); name a folder with a model.")


def list_weights(folder: str | Path) -> dict[str, WeightEntry]:
    """Every weight of a checkpoint folder by its stored name; reads headers only.

    Raises:
        ValueError: see `weight_files`; or if a file is cut off, corrupt, or wants to run code, or
            files and index do not agree.
    """
    with WeightReader(folder) as reader:
        return dict(reader.entries)


class WeightReader:
    """Reads the weights of a checkpoint folder one at a time, from memory-mapped files.

    A context manager; `entries` is what `list_weights` returns.  No more than the weights that the
    caller holds are in memory.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.entries: dict[str, WeightEntry] = {}
        self._open: dict[Path, Any] = {}

    def __enter__(self) -> "WeightReader":
        """Opens every file and reads its header."""
        files = weight_files(self.folder)
        for file in files:
            weights = _open_file(file)
            self._open[file] = weights
            for name in weights.keys():  # noqa: SIM118  # safe_open has keys() and is no mapping
                self.entries[name] = WeightEntry(name, *_header(weights, name), file)
        self._compare_with_index()
        return self

    def __exit__(self, *_: object) -> None:
        """Lets go of the files."""
        self._open.clear()

    def read(self, name: str) -> torch.Tensor:
        """One weight, in its stored type."""
        weights = self._open[self.entries[name].file]
        return weights[name] if isinstance(weights, dict) else weights.get_tensor(name)

    def _compare_with_index(self) -> None:
        for single, index in FILES:
            if (self.folder / single).is_file():
                return
            if (self.folder / index).is_file():
                named = _index(self.folder / index)
                wrong = sorted(
                    name
                    for name in named.keys() | self.entries.keys()
                    if name not in named
                    or name not in self.entries
                    or self.folder / named[name] != self.entries[name].file
                )
                if wrong:
                    raise ValueError(
                        f"{self.folder / index} and its shards disagree about {len(wrong)} weights "
                        f"({wrong[0]}, ...); they come from two downloads, so {AGAIN}."
                    )
                return


def _index(file: Path) -> Mapping[str, str]:
    """Weight name to file name."""
    try:
        listing = json.loads(file.read_text(encoding="utf-8"))
        names = listing["weight_map"]
        listing["metadata"]  # the library asks for it too
        if any(Path(name).name != name for name in names.values()):
            raise ValueError("it names files outside its folder")
        return names
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise ValueError(f"{file} is no index of weights ({error}); {AGAIN}.") from None


def _open_file(file: Path) -> Any:
    """A safetensors handle, or a dict of memory-mapped tensors from a pickle without code."""
    with file.open("rb") as opened:
        if opened.read(len(LFS_POINTER)) == LFS_POINTER:
            raise ValueError(
                f"{file} is a pointer of Git LFS and not the weights; run `git lfs pull` there."
            )
    if file.suffix == ".safetensors":
        try:
            return safe_open(file, framework="pt")
        except (SafetensorError, OSError) as error:
            raise ValueError(
                f"{file} is cut off or corrupt ({first_line(error)}); {AGAIN}."
            ) from None
    try:
        with warnings.catch_warnings(action="ignore"):  # of pickle protocols; refused below
            weights = torch.load(
                file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file)
            )
    except pickle.UnpicklingError as error:
        raise ValueError(_refusal(file, str(error))) from None
    except NOT_A_PICKLE as error:
        raise ValueError(f"{file} is cut off or corrupt ({first_line(error)}); {AGAIN}.") from None
    if not isinstance(weights, dict) or not all(
        isinstance(weight, torch.Tensor) for weight in weights.values()
    ):
        raise ValueError(
            f"{file} holds something else than weights by name; name a folder with a model."
        )
    return weights


def _refusal(file: Path, said: str) -> str:
    """Why torch's reader without code refused a pickle: it asks for a function, or is garbage."""
    wanted = re.search(r"GLOBAL ([\w.]+)", said)
    if wanted:
        return (
            f"{file} is a pickle that wants to run code ({wanted[1]}) and was not read; do not "
            "trust its source, and ask there for safetensors."
        )
    return f"{file} holds something else than weights, or code, and was not read; {AGAIN}."


def _header(weights: Any, name: str) -> tuple[tuple[int, ...], torch.dtype]:
    if isinstance(weights, dict):
        return tuple(weights[name].shape), weights[name].dtype
    part = weights.get_slice(name)
    return tuple(part.get_shape()), _SAFE_DTYPES[part.get_dtype()]


# The names of safetensors' header; those of a language model's weights.
_SAFE_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}

__all__ = ["WeightEntry", "WeightReader", "list_weights", "weight_files"]
