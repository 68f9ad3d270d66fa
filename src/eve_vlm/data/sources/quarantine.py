"""The list of records that are left out: one JSON object a line, as `eve data check` writes it.

    {"source": "mix665k", "id": "000123", "index": 17, "reason": "picture is missing"}

`index` is the number of the record in its source, after split and cap.  Easy to get wrong: ids are
not always unique (the published mixture of 665 K repeats some), so the number decides and the id
only confirms it; where the two do not agree the list belongs to other data, and that is an error.
"""

import json
import logging
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np

from eve_vlm.data.sources.source import PartSource, Source

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Quarantined:
    """One record that is left out."""

    source: str
    """Name of the data set."""
    id: str
    """Id of the record."""
    index: int
    """Its number in the source."""
    reason: str
    """Why it is left out."""


FIELDS = tuple(field.name for field in fields(Quarantined))


class Quarantine:
    """A list of records to leave out; `(source, id) in quarantine` asks for one."""

    def __init__(self, entries: list[Quarantined]):
        self.entries = entries
        self._pairs = {(entry.source, entry.id) for entry in entries}

    def __contains__(self, pair: tuple[str, str]) -> bool:
        return pair in self._pairs

    def __iter__(self) -> Iterator[tuple[str, str]]:
        """The pairs of source and id."""
        return iter(self._pairs)

    def __len__(self) -> int:
        """Number of records that are left out."""
        return len(self.entries)

    def without(self, source: Source) -> Source:
        """The source without what is in the list; what was left out is said by reason.

        Raises:
            ValueError: if a number and an id do not belong to the same record.
        """
        mine = [entry for entry in self.entries if entry.source == source.name]
        if not mine:
            return source
        for entry in mine:
            self._check(source, entry)
        out = sorted({entry.index for entry in mine})
        reasons = Counter(entry.reason for entry in {entry.index: entry for entry in mine}.values())
        logger.warning(
            "%s: %d of %d records are left out by the quarantine list (%s)",
            source.name,
            len(out),
            len(source),
            "; ".join(f"{count} x {reason}" for reason, count in reasons.most_common()),
        )
        return PartSource(source, np.delete(np.arange(len(source)), out))

    def _check(self, source: Source, entry: Quarantined) -> None:
        found = None
        if 0 <= entry.index < len(source):
            try:
                found = source[entry.index].id
            except ValueError:
                return  # it cannot be read, which is why it is in the list
        if found != entry.id:
            holds = "does not exist" if found is None else f"is {found!r}"
            raise ValueError(
                f"The quarantine list names {entry.id!r} as record {entry.index} of "
                f"{source.name}, but that {holds}; the data or their split changed, so make the "
                "list again with eve data check."
            )


def read_quarantine(path: str | Path) -> Quarantine:
    """Reads a list of records to leave out.

    Raises:
        ValueError: with the line, if it is not there or not of this form.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path} is not a file; check data.quarantine in the recipe.")
    entries = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            given = json.loads(line)
            entry = Quarantined(**{name: given[name] for name in FIELDS})
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path}, line {number}: no entry of a quarantine list ({error}); it needs "
                f"{', '.join(FIELDS)}."
            ) from None
        if not isinstance(entry.index, int) or not isinstance(entry.id, str):
            raise ValueError(
                f"{path}, line {number}: id must be a text and index a whole number, but they are "
                f"{entry.id!r} and {entry.index!r}."
            )
        entries.append(entry)
    return Quarantine(entries)


__all__ = ["Quarantine", "Quarantined", "read_quarantine"]
