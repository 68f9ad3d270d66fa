"""What a run has read: its place in the stream of rows, and every record that it had to leave out.

Records are never dropped silently: each that cannot be used is counted by reason, the first are
named in the log, all are listed in `bad_records.jsonl` beside the model (which `data.quarantine`
reads), and the run stops when they are more than a set share.  Easy to get wrong: all of this is
saved with every checkpoint, or a run that is resumed would forget what it left out.
"""

import json
import logging
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from eve_vlm.data.encode import BadRecord
from eve_vlm.data.rows import RowSampler
from eve_vlm.output_folder import written_whole

logger = logging.getLogger(__name__)

BAD_RECORDS_FILE = "bad_records.jsonl"
NAMED = 20  # the first ones are named in the log, all are counted
JUDGED_FROM = 200  # records before the share is judged: one bad first record is not 100 %


class DataLog:
    """Counts records of one process.

    Args:
        rows: the batches that this process reads.
        max_bad_share: a larger share of records that cannot be used ends the run.
        rows_per_step: rows of all processes and micro-batches of an optimizer step.
    """

    def __init__(self, rows: RowSampler, *, max_bad_share: float, rows_per_step: int = 1):
        self.rows, self.max_bad_share = rows, max_bad_share
        self.rows_per_step = rows_per_step
        self.num_records = 0
        self.bad: list[BadRecord] = []

    def count(self, usable: int, bad: Sequence[BadRecord]) -> None:
        """Counts one batch.

        Raises:
            ValueError: if more records than allowed could not be used.
        """
        self.num_records += usable + len(bad)
        for record in bad:
            if len(self.bad) < NAMED:
                logger.warning("left out: %s", record.reason)
            self.bad.append(record)
        if len(self.bad) > self.max_bad_share * max(self.num_records, JUDGED_FROM):
            raise ValueError(
                f"{len(self.bad)} of the first {self.num_records} records cannot be used, more "
                f"than the share of {self.max_bad_share} that data.max_bad_share allows; the last: "
                f"{self.bad[-1].reason}"
            )

    def reasons(self) -> Counter[str]:
        """Records left out, by reason; names and numbers in it stand as they are."""
        return Counter(record.reason for record in self.bad)

    def write(self, folder: Path, bad: Sequence[BadRecord]) -> None:
        """Writes the list of records left out, each once, in the form of `data.quarantine`."""
        if not bad:
            return
        with written_whole(folder / BAD_RECORDS_FILE) as part, part.open("w") as file:
            for record in dict.fromkeys(bad):
                entry = {"source": record.source, "id": record.id, "index": record.number}
                line = json.dumps(entry | {"reason": record.reason}, ensure_ascii=False)
                file.write(line + "\n")

    def state_dict(self) -> dict[str, Any]:
        """Position and counts, as JSON takes them."""
        return {
            "rows": self.rows.state_dict(),
            "rows_per_step": self.rows_per_step,
            "num_records": self.num_records,
            "bad": [list(record) for record in self.bad],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from a saved state.

        Raises:
            ValueError: if it belongs to other data, or to steps of another size.
        """
        if state["rows_per_step"] != self.rows_per_step:
            raise ValueError(
                f"The checkpoint's steps took {state['rows_per_step']} rows each but now they "
                f"would take {self.rows_per_step}; give the number of processes, "
                "training.per_device_train_batch_size and training.gradient_accumulation_steps "
                "whose product is the same."
            )
        self.rows.load_state_dict(state["rows"])
        self.num_records = state["num_records"]
        self.bad = [BadRecord(*record) for record in state["bad"]]


__all__ = ["BAD_RECORDS_FILE", "DataLog"]
