"""Files of JSON lines that grow while a program runs, and are read after a crash too.

Easy to get wrong: what stands behind the last line break is no whole line; a crash may leave half
of one there, and whoever adds to such a file first has to take it out.
"""

import json
from pathlib import Path
from typing import Any

from eve_vlm.output_folder import written_whole


def append_lines(file: Path, entries: list[dict[str, Any]]) -> None:
    """Adds lines of JSON in one write, so that a stop leaves whole lines or at most a last half."""
    text = "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries)
    with file.open("a", encoding="utf-8") as out:
        out.write(text)


def read_lines(file: Path) -> list[dict[str, Any]]:
    """All whole lines of a file; none if it is not there.

    The last line may have been cut off by a crash, and is then left out.
    """
    if not file.is_file():
        return []
    lines = file.read_text(encoding="utf-8").split("\n")
    # What stands behind the last line break is no whole line.
    return [json.loads(line) for line in lines[:-1] if line]


def write_lines(file: Path, entries: list[dict[str, Any]]) -> None:
    """Puts these lines in the place of the file, whole or not at all."""
    with written_whole(file) as part:
        part.touch()
        append_lines(part, entries)


__all__ = ["append_lines", "read_lines", "write_lines"]
