"""Results as files: one folder for each model, in it `results.json` and a line for each sample.

    OUTPUT/MODEL/results.json    scores with intervals, counts, failures, prompts, versions, hashes
    OUTPUT/MODEL/TASK.jsonl      every sample: prompt, answer, what was expected, marks
    OUTPUT/MODEL/pictures/       small copies for the page

While a task runs, each process adds to a file of its own, `TASK.part-RANK.jsonl`; a run that was
killed goes on behind the last whole line.  Easy to get wrong: rows may be used again only if the
same model made them in the same way, so `results.json` is written before the first question, with
what tells.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from eve_vlm.json_lines import append_lines, read_lines, write_lines
from eve_vlm.output_folder import written_whole

from .task import Row

RESULTS_FILE = "results.json"
FORMAT = 1
UNFINISHED = "run the same `eve eval` command again to finish it"


class RowFiles:
    """The rows of one task in one folder, whole or growing."""

    def __init__(self, folder: Path, task: str, *, rank: int = 0):
        self.whole = folder / f"{task}.jsonl"
        self._part = folder / f"{task}.part-{rank}.jsonl"
        self._parts = f"{task}.part-*.jsonl"

    def known(self) -> dict[str, Row]:
        """Rows by id of all processes and runs."""
        files = [file for file in (self.whole, *self._sorted_parts()) if file.is_file()]
        return {row.id: row for file in files for row, _ in _rows_of(file)}

    def begin(self) -> None:
        """Takes out the half line that a crash may have left in this process's part."""
        if self._part.is_file():
            write_lines(self._part, read_lines(self._part))

    def add(self, rows: Iterable[Row], *, seconds: float) -> None:
        """Adds answered rows, which took so long together."""
        rows = list(rows)
        share = round(seconds / max(len(rows), 1), 6)
        append_lines(self._part, [asdict(row) | {"seconds": share} for row in rows])

    def finish(self, order: Sequence[str]) -> tuple[list[Row], float]:
        """Puts all rows into one file in the order of the samples; from the first process only.

        Returns:
            The rows, and the seconds that they took.
        """
        found: dict[str, dict[str, Any]] = {}
        for file in (self.whole, *self._sorted_parts()):
            found |= {line["id"]: line for line in read_lines(file)}
        write_lines(self.whole, [found[name] for name in order])
        for file in self._sorted_parts():
            file.unlink()
        pairs = _rows_of(self.whole)
        return [row for row, _ in pairs], sum(seconds for _, seconds in pairs)

    def _sorted_parts(self) -> list[Path]:
        return sorted(self.whole.parent.glob(self._parts))


def read_results(folder: Path) -> dict[str, Any]:
    """`results.json` of a model's folder, or of the file itself.

    Raises:
        ValueError: if there is none, it is not whole, or of another form.
    """
    file = folder if folder.is_file() else folder / RESULTS_FILE
    if not file.is_file():
        inside = sorted(path.parent.name for path in folder.glob(f"*/{RESULTS_FILE}"))
        hint = f"name one of {', '.join(inside)} in it" if inside else "name the folder of a model"
        raise ValueError(f"{folder} holds no results (no {RESULTS_FILE}); {hint}.")
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        raise ValueError(f"{file} is no whole JSON file; remove it and {UNFINISHED}.") from None
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise ValueError(
            f"{file} is not of the form {FORMAT} that this version writes; evaluate again."
        )
    return data


def write_results(folder: Path, data: Mapping[str, Any]) -> None:
    """Writes `results.json`, whole or not at all."""
    with written_whole(folder / RESULTS_FILE) as part:
        part.write_text(json.dumps(data, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def read_rows(folder: Path, task: str) -> list[Row]:
    """All rows of a finished task.

    Raises:
        ValueError: if the task is not finished, or a line is damaged.
    """
    files = RowFiles(folder, task)
    if not files.whole.is_file():
        raise ValueError(f"{folder} holds no finished {task}; {UNFINISHED}.")
    if not files.whole.read_bytes().endswith(b"\n"):
        raise ValueError(f"{files.whole} ends in the middle of a line; {UNFINISHED}.")
    return [row for row, _ in _rows_of(files.whole)]


def _rows_of(file: Path) -> list[tuple[Row, float]]:
    try:
        return [_row(line) for line in read_lines(file)]
    except (ValueError, TypeError, KeyError):
        number = _first_bad_line(file)
        raise ValueError(
            f"Line {number} of {file} is no sample of ours; remove the file to ask again."
        ) from None


def _row(line: dict[str, Any]) -> tuple[Row, float]:
    seconds = line.pop("seconds")
    return Row(**line | {"expected": tuple(line["expected"])}), seconds


def _first_bad_line(file: Path) -> int:
    for number, text in enumerate(file.read_text(encoding="utf-8").split("\n"), start=1):
        try:
            _row(json.loads(text))
        except (ValueError, TypeError, KeyError):
            return number
    return 0


__all__ = [
    "FORMAT",
    "RESULTS_FILE",
    "UNFINISHED",
    "RowFiles",
    "read_results",
    "read_rows",
    "write_results",
]
