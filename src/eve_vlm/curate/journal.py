"""What a unit has finished item by item, for stages in which an item costs money or minutes.

Every worker that tries a unit writes a file of its own, one line for each item, and the next try
reads the files of all tries before.  So a killed worker loses the items that it had not got yet and
none that it had.  Easy to get wrong: two tries must not share a file, since the half line that a
killed one leaves would swallow the first line of the next.
"""

import json
import uuid
from pathlib import Path
from typing import Any

from eve_vlm.curate.ledger import WORK
from eve_vlm.json_lines import read_lines


class Journal:
    """The items of one unit of a step that are finished already, by id.

    Args:
        folder: the output folder.
        step: the step.
        unit: its unit.
    """

    def __init__(self, folder: Path, step: str, unit: str):
        self.folder = folder / WORK / f"{step}.journal"
        self.unit, self.attempt = unit, uuid.uuid4().hex
        self.finished: dict[str, dict[str, Any]] = {}
        for file in sorted(self.folder.glob(f"{unit}.*.jsonl")):
            self.finished |= {one["id"]: one for one in read_lines(file)}
        self._file: Any = None

    def add(self, entry: dict[str, Any]) -> None:
        """Notes one item, so that it stands whatever happens to this process."""
        if self._file is None:
            self.folder.mkdir(parents=True, exist_ok=True)
            name = self.folder / f"{self.unit}.{self.attempt}.jsonl"
            self._file = name.open("a", encoding="utf-8")
        self._file.write(json.dumps(entry, ensure_ascii=False) + "\n")
        self._file.flush()  # to the system, which outlives the process
        self.finished[entry["id"]] = entry

    def close(self) -> None:
        """Ends writing."""
        if self._file is not None:
            self._file.close()

    def remove(self) -> None:
        """Removes what the unit's result holds by now."""
        self.close()
        for file in self.folder.glob(f"{self.unit}.*.jsonl"):
            file.unlink(missing_ok=True)


__all__ = ["Journal"]
