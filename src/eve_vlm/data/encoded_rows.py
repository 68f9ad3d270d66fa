"""Rows of records encoded on demand: what the workers of a data loader do.

Texts are tokenised, pictures opened and cut here, in the worker and never before.  Easy to get
wrong: a record that cannot be used must not end the run or vanish; it becomes a `BadRecord`, which
the trainer counts and names.
"""

from collections.abc import Sequence

from eve_vlm.data.encode import BadRecord, EncodedRecord, Encoder
from eve_vlm.data.records import Record
from eve_vlm.data.sources import Mixture

Member = int | Record | BadRecord
"""What a row holds: the number of a record, the record, or why a stream could not give it."""


class EncodedRows:
    """Records of a source by rows of their numbers.

    Args:
        records: the records; None where rows bring the records themselves (streams).
        encoder: turns each into arrays.
    """

    def __init__(self, records: Mixture | None, encoder: Encoder):
        self.records, self.encoder = records, encoder

    def __len__(self) -> int:
        """Number of records, 0 where it is not known."""
        return 0 if self.records is None else len(self.records)

    def __getitem__(self, row: Sequence[Member]) -> list[EncodedRecord | BadRecord]:
        """The records of a row as arrays, or the reasons why they cannot be."""
        return [self.encoded(member) for member in row]

    def encoded(self, member: Member) -> EncodedRecord | BadRecord:
        """One record, by its number or as it is."""
        if isinstance(member, BadRecord):
            return member
        source, index = "", -1
        if not isinstance(member, Record):
            assert self.records is not None
            number, index = self.records.locate(member)
            source = self.records.sources[number].name
            try:
                member = self.records[member]
            except ValueError as error:
                return BadRecord(str(error), f"number {index}", source, index)
        try:
            return self.encoder(member)
        except ValueError as error:
            return BadRecord(str(error), member.id, member.source, index)


__all__ = ["EncodedRows"]
