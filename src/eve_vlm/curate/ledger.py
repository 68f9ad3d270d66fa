"""What is done: which units of which step, with their facts; and under which settings.

The files of the units are the truth.  The ledger is a list of their facts, so that going on with
thousands of units does not open thousands of files: what it lacks (a crash came between the two) is
read from the files, and what it has without a file is not done.  Easy to get wrong: a stage's
results belong to its settings *and* those of all stages before it, so each has a mark made of both.
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from eve_vlm.curate.blocks import ENDING, read_facts
from eve_vlm.json_lines import append_lines, read_lines, write_lines
from eve_vlm.output_folder import written_whole

VERSION = "2"  # of what stages write; results of another version are not gone on with
LEDGER, MARKS, WORK = "ledger.jsonl", "settings.json", "work"


class Ledger:
    """The finished units in a folder."""

    def __init__(self, folder: Path):
        self.folder, self.file = folder, folder / LEDGER
        self._facts: dict[str, dict[str, dict[str, Any]]] = {}
        entries = read_lines(self.file)
        listed = {(one["step"], one["unit"]): one["facts"] for one in entries}
        for step in sorted(path for path in (folder / WORK).glob("*") if path.is_dir()):
            for unit in sorted(path.stem for path in step.glob(f"*{ENDING}")):
                facts = listed.get((step.name, unit))
                if facts is None:
                    facts = read_facts(self.path(step.name, unit))
                self._facts.setdefault(step.name, {})[unit] = facts
        known = [
            {"step": step, "unit": unit, "facts": facts}
            for step, units in self._facts.items()
            for unit, facts in units.items()
        ]
        if len(known) != len(entries) or not all((e["step"], e["unit"]) in listed for e in known):
            write_lines(self.file, known)

    def path(self, step: str, unit: str) -> Path:
        """The file of a unit."""
        return unit_file(self.folder, step, unit)

    def done(self, step: str) -> dict[str, dict[str, Any]]:
        """The finished units of a step with their facts."""
        return self._facts.get(step, {})

    def add(self, step: str, unit: str, facts: dict[str, Any]) -> None:
        """Notes a unit whose file stands."""
        self._facts.setdefault(step, {})[unit] = facts
        append_lines(self.file, [{"step": step, "unit": unit, "facts": facts}])

    def forget(self, steps: Sequence[str]) -> None:
        """Removes the results of steps."""
        for step in steps:
            for file in (self.folder / WORK / step).glob("*"):
                file.unlink()
            self._facts.pop(step, None)
        write_lines(
            self.file,
            [
                {"step": step, "unit": unit, "facts": facts}
                for step, units in self._facts.items()
                for unit, facts in units.items()
            ],
        )


def unit_file(folder: Path, step: str, unit: str) -> Path:
    """Where the result of a unit stands."""
    return folder / WORK / step / f"{unit}{ENDING}"


def marks_of(settings: dict[str, Any]) -> dict[str, str]:
    """A mark for each stage, in order, of its settings and all before it."""
    marks, before = {}, VERSION
    for stage, values in settings.items():
        text = json.dumps([before, stage, values], sort_keys=True, default=str)
        before = marks[stage] = hashlib.sha256(text.encode()).hexdigest()[:16]
    return marks


def read_marks(folder: Path) -> dict[str, str]:
    """The marks of the stages that were begun in a folder."""
    file = folder / MARKS
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def write_marks(folder: Path, marks: dict[str, str]) -> None:
    """Notes them."""
    with written_whole(folder / MARKS) as part:
        part.write_text(json.dumps(marks, indent=1) + "\n", encoding="utf-8")


__all__ = [
    "LEDGER",
    "WORK",
    "Ledger",
    "marks_of",
    "read_marks",
    "unit_file",
    "write_marks",
]
