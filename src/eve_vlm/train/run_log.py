"""The log of a run as a file: a line of JSON for everything that is logged, written at once.

What is in a checkpoint ends with it, and a tracker may be on another machine; this file is there
after a crash too, and `report.html` is drawn from it.  Easy to get wrong: a run that is resumed
goes back to its last checkpoint, so lines of later steps are taken out first, or every curve would
run over itself.
"""

import time
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainingArguments

from eve_vlm.json_lines import append_lines, read_lines, write_lines

LOG_FILE = "log.jsonl"


class RunLog(TrainerCallback):
    """Writes `log.jsonl` in the folder of the run, from its first process."""

    def __init__(self, folder: Path):
        self.file = folder / LOG_FILE

    def on_train_begin(
        self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any
    ) -> None:
        """Takes lines out that a resumed run will write again; notes how far it shall go."""
        if state.is_world_process_zero:
            cut_lines(self.file, behind=state.global_step)
            self._write(state, {"max_steps": state.max_steps})

    def on_log(
        self,
        args: TrainingArguments,
        state: Any,
        control: Any,
        logs: dict | None = None,
        **kwargs: Any,
    ) -> None:
        """Adds a line of all figures; texts are for trackers."""
        figures = {
            name: value for name, value in (logs or {}).items() if isinstance(value, (int, float))
        }
        if state.is_world_process_zero and figures:
            self._write(state, figures)

    def _write(self, state: Any, entry: dict[str, Any]) -> None:
        where = {"step": state.global_step, "time": round(time.time(), 3)}
        append_lines(self.file, [where | entry])


def cut_lines(file: Path, *, behind: int) -> None:
    """Takes out lines of steps behind one, and a last line that is not whole."""
    if file.is_file():
        kept = [entry for entry in read_lines(file) if entry["step"] <= behind]
        write_lines(file, kept)


__all__ = ["LOG_FILE", "RunLog", "cut_lines"]
