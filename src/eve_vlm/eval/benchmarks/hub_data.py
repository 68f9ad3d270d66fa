"""Data sets of the Hub as tables: Parquet files of one split, from a folder or the Hub's cache.

Nothing is downloaded: whoever lacks a data set is told the command that fetches it.  Words are read
in a pass of their own, pictures one by one when they are asked for.  Easy to get wrong: a folder
with some of a split's files looks whole, so their number is held against the one in their names.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from PIL import Image

from eve_vlm.data.sources.names import nearest_names
from eve_vlm.eval.task import MissingDataError
from eve_vlm.pictures import read_picture

# The sets moved in 2026 (lmms-eval 0.7.3 names the new owners); the Hub leads on from the old name.
MOVED = {"lmms-lab": ("lmms-lab-encoder", "lmms-eval")}
BATCH = 1000  # rows whose words are in memory at once


class Table:
    """The rows of one split.

    Args:
        data: id on the Hub.
        split: name of the split.
        config: name of the configuration, empty where there is one only.
        root: folder with data sets, each under its id; None for the Hub's cache.

    Raises:
        MissingDataError: if it is not on this machine, or not whole.
        ValueError: if `datasets` is not installed.
    """

    def __init__(self, data: str, *, split: str, config: str = "", root: Path | None):
        self.name = " ".join(filter(None, (data, config, split)))
        folder = data_folder(data, root)
        paths = [str(path) for path in _files(data, folder, config, split)]
        try:
            import datasets
        except ModuleNotFoundError:
            raise ValueError(
                f'{data} needs the package datasets; install it with pip install "eve-vlm[data]".'
            ) from None
        try:
            rows = datasets.load_dataset("parquet", data_files={split: paths}, split=split)
        except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
            reason = " ".join(str(error).split())[:200].rstrip(".")
            raise ValueError(
                f"{self.name} in {folder} cannot be read ({reason}); fetch it again."
            ) from None
        self._rows = rows.with_format("arrow")  # pictures stay bytes

    def __len__(self) -> int:
        """Number of rows."""
        return len(self._rows)

    def words(self, columns: tuple[str, ...]) -> Iterator[dict[str, Any]]:
        """All rows, with these columns.

        Raises:
            ValueError: if one is lacking.
        """
        self._check(columns)
        for batch in self._rows.select_columns(list(columns)).iter(BATCH):
            yield from batch.to_pylist()

    def pictures(self, row: int, columns: tuple[str, ...]) -> list[Image.Image]:
        """The pictures in some cells of a row, decoded; a cell may hold a list, or nothing.

        Raises:
            ValueError: if a column is lacking or a picture cannot be read.
        """
        self._check(columns)
        [cells] = self._rows.select_columns(list(columns))[row].to_pylist()
        found: list[Image.Image] = []
        for column in columns:
            cell = cells[column]
            for one in cell if isinstance(cell, list) else [cell]:
                if one is not None:
                    name = f"{self.name}, row {row}, {column}"
                    if one["bytes"] is None:
                        raise ValueError(f"{name} has no bytes; fetch the data set again.")
                    found.append(read_picture(one["bytes"], name=name))
        return found

    def _check(self, columns: tuple[str, ...]) -> None:
        for column in columns:
            if column not in self._rows.column_names:
                raise ValueError(
                    f"{self.name} has no column {column}; "
                    f"{nearest_names(column, self._rows.column_names)}."
                )


def data_folder(data: str, root: Path | None) -> Path:
    """Where a data set lies, in the layout of its repository.

    Raises:
        MissingDataError: if it is nowhere.
    """
    owner, _, name = data.rpartition("/")
    ids = [data, *(f"{other}/{name}" for other in MOVED.get(owner, ()))]
    if root is not None:
        found = [root / one for one in ids if (root / one).is_dir()]
        if found:
            return found[0]
        raise MissingDataError(f"{root} has no {data}; {fetching(data)}")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    for one in ids:
        try:
            return Path(snapshot_download(one, repo_type="dataset", local_files_only=True))
        except LocalEntryNotFoundError:
            continue
    raise MissingDataError(f"{data} is not in the Hub's cache; {fetching(data)}")


def fetching(data: str) -> str:
    """How to get a data set, as the second half of a sentence."""
    return (
        f"fetch it with `hf download --repo-type dataset {data} --local-dir ROOT/{data}` and "
        "evaluate with --data-root ROOT."
    )


def _files(data: str, folder: Path, config: str, split: str) -> list[Path]:
    """The Parquet files of a split: `CONFIG/SPLIT-*.parquet`, or below `data`."""
    place = folder / (config or "data")
    found = sorted(place.glob(f"{split}-*.parquet"))
    if not found:
        there = {path.stem.split("-")[0] for path in place.glob("*.parquet")}
        raise MissingDataError(
            f"{folder} has no split {split} in {place.name} ({nearest_names(split, sorted(there))})"
            f"; {fetching(data)}"
        )
    match = re.search(r"-of-(\d+)", found[0].stem)
    if match and len(found) != int(match[1]):
        raise MissingDataError(
            f"{place} has {len(found)} of the {int(match[1])} files of {split}; {fetching(data)}"
        )
    return found


__all__ = ["MOVED", "Table", "data_folder", "fetching"]
