"""Hugging Face data sets as tables: `hf:NAME`, `hf:NAME:CONFIG` or `hf:FOLDER`.

Rows are taken as Arrow keeps them, so that pictures stay bytes until somebody opens them.  Easy to
get wrong: a folder that `save_to_disk` wrote is no data set that `load_dataset` reads, so the two
are told apart by the files that only the first has.
"""

import json
from pathlib import Path
from typing import Any

from eve_vlm.data.sources.forms import Form
from eve_vlm.data.sources.names import nearest_names
from eve_vlm.data.sources.parquet import columns_of

PREFIX = "hf:"


class HubTable:
    """The rows of a Hugging Face data set.

    Raises:
        ValueError: if it cannot be loaded, or lacks the split or a column.
    """

    def __init__(self, path: str, split: str, form: Form):
        data = load_data_set(path, split, streaming=False)
        self.path = path
        self.stamp = json.dumps([path, split, data._fingerprint])
        self._data = data.select_columns(columns_of(path, data.column_names, form)).with_format(
            "arrow"
        )

    def __len__(self) -> int:
        """Number of rows."""
        return len(self._data)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """One row, pictures undecoded."""
        return self._data[index].to_pylist()[0]

    def place(self, index: int) -> str:
        """The data set and the row."""
        return f"{self.path}, row {index}"


def load_data_set(path: str, split: str, *, streaming: bool) -> Any:
    """One split of a data set, from the disk or the Hub.

    Args:
        path: with `hf:` in front.
        split: its name; empty where there is only one.
        streaming: an iterable one, which downloads as it goes.

    Raises:
        ValueError: if it cannot be loaded, or there is no such split.
    """
    try:
        import datasets
    except ModuleNotFoundError:
        raise ValueError(
            f'{path} needs the package datasets; install it with pip install "eve-vlm[data]".'
        ) from None
    name, _, config = path.removeprefix(PREFIX).partition(":")
    folder = Path(name)
    saved = any((folder / file).is_file() for file in ("state.json", "dataset_dict.json"))
    try:
        if saved:
            data = datasets.load_from_disk(name)
        else:
            data = datasets.load_dataset(name, config or None, streaming=streaming)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        reason = " ".join(str(error).split())[:300].rstrip(".")
        raise ValueError(
            f"{path} cannot be loaded ({reason}); give the name of a data set on the Hub, or a "
            "folder that holds one."
        ) from None
    if isinstance(data, dict):
        data = _split_of(path, data, split)
    elif split:
        raise ValueError(f"{path} has no splits; leave out {split!r} or write [:95%].")
    if streaming and saved:
        data = data.to_iterable_dataset()
    return data


def _split_of(path: str, splits: dict[str, Any], name: str) -> Any:
    if not name and len(splits) == 1:
        return next(iter(splits.values()))
    if name not in splits:
        problem = f"has no split {name!r}" if name else "has several splits"
        raise ValueError(
            f"{path} {problem}; set data.sources.split, {nearest_names(name, list(splits))}."
        )
    return splits[name]


__all__ = ["PREFIX", "HubTable", "load_data_set"]
