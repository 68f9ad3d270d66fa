"""Writes the quarantine list while a check goes on: a line for each bad record, read by recipes.

Easy to get wrong: `reason` is the title of what is wrong, the same for many records, because
training counts by it; what exactly is wrong with one record stands beside it as `detail`.
"""

import json
from collections.abc import Sequence
from typing import TextIO

from eve_vlm.data.check.problems import KINDS, Problem


class QuarantineFile:
    """A list of bad records; see `eve_vlm.data.sources.quarantine` for the form.

    Args:
        stream: takes the lines.
    """

    def __init__(self, stream: TextIO):
        self.stream, self.records = stream, 0

    def __call__(self, source: str, problems: Sequence[Problem]) -> None:
        """Adds one record with all its problems."""
        entry = {
            "source": source,
            "id": problems[0].id,
            "index": problems[0].number,
            "reason": "; ".join(KINDS[problem.kind].title for problem in problems),
            "detail": " ".join(problem.message for problem in problems),
        }
        self.stream.write(json.dumps(entry, ensure_ascii=False) + "\n")
        self.records += 1


__all__ = ["QuarantineFile"]
