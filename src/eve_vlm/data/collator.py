"""Encoded records to one batch: padded or packed rows of text, pictures behind each other.

A batch is made of rows, and a row of one record (padded to the longest) or of several (packed, each
blind to the others).  Easy to get wrong: decoders tell the records of a packed row apart by
positions that start again at 0, and do so only where there is no attention mask at all; so a packed
batch has `position_ids` and no `attention_mask`, and what fills up a row counts as one more record.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from eve_vlm.data.encode import IGNORED, BadRecord, EncodedRecord
from eve_vlm.data.label_weights import weights_of

Row = Sequence[EncodedRecord | BadRecord]


class EveCollator:
    """Joins rows of encoded records into a batch.

    Returns a dict of
        `input_ids`, `labels` (B, T); `attention_mask` (B, T), or `position_ids` (B, T) when packed;
        `pixel_values` (P, d), `image_grid_thw` (I, 3) and, with a teacher, `teacher_pixel_values`
            (I, size, size, 3) uint8, when there are pictures;
        `teacher_is_kept` (I,) booleans, `teacher_kept` (Z, W) float16 and `teacher_keys` (I, 16)
            uint8, where the teacher's features are kept; then canvases are of the others only;
        `label_weights` (B, T) float32, unless every label counts 1;
        `label_groups` (B, T) int64, with more than one data set;
        `cu_seq_lens_q`, `cu_seq_lens_k` (records + 1,) int32 and `max_length_q`, `max_length_k`,
            where the attention asks for them;
    and of what is not for the model: `record_ids` and `source_names`, a list for each row,
    `bad_records`, and `num_tokens`, all tokens without padding.

    Args:
        pad_token_id: fills rows up.
        packed: rows hold several records.
        varlen: adds the bounds of records, as FlashAttention reads them; packed batches of one row.
        label_weight: `token`, `sample` or `sqrt`, see `label_weights`.
        sources: names of all data sets, for the loss of each; none or one leaves that out.
    """

    def __init__(
        self,
        pad_token_id: int,
        *,
        packed: bool = False,
        varlen: bool = False,
        label_weight: str = "token",
        sources: Sequence[str] = (),
    ):
        self.pad_token_id, self.packed, self.varlen = pad_token_id, packed, varlen
        self.label_weight = label_weight
        self.groups = {name: index for index, name in enumerate(sources)}

    def __call__(self, rows: Sequence[Row]) -> dict[str, Any]:
        """Joins what can be used; without any such record, a row that teaches nothing."""
        assert not any(isinstance(row, EncodedRecord | BadRecord) for row in rows), "not in rows"
        usable = [[item for item in row if isinstance(item, EncodedRecord)] for row in rows]
        usable = [row for row in usable if row]
        batch = self._texts(usable or [[self._nothing()]]) | _pictures(usable)
        tensors: dict[str, Any] = {name: torch.from_numpy(array) for name, array in batch.items()}
        if self.varlen:
            tensors |= _bounds(usable or [[self._nothing()]])
        return tensors | {
            "record_ids": [[record.id for record in row] for row in usable],
            "source_names": [[record.source for record in row] for row in usable],
            "bad_records": [item for row in rows for item in row if isinstance(item, BadRecord)],
            "num_tokens": sum(len(record.input_ids) for row in usable for record in row),
        }

    def _texts(self, rows: list[list[EncodedRecord]]) -> dict[str, np.ndarray]:
        lengths = [sum(len(record.input_ids) for record in row) for row in rows]
        shape = (len(rows), max(lengths))
        batch = {
            "input_ids": np.full(shape, self.pad_token_id, np.int64),
            "labels": np.full(shape, IGNORED, np.int64),
        }
        if self.packed:
            batch["position_ids"] = np.zeros(shape, np.int64)
        else:
            batch["attention_mask"] = np.zeros(shape, np.int64)
        if self.label_weight != "token":
            batch["label_weights"] = np.zeros(shape, np.float32)
        if len(self.groups) > 1:
            batch["label_groups"] = np.zeros(shape, np.int64)
        for number, row in enumerate(rows):
            start = 0
            for record in row:
                self._put(batch, number, start, record)
                start += len(record.input_ids)
            if self.packed:  # what fills the row up is one more record, which teaches nothing
                batch["position_ids"][number, start:] = np.arange(shape[1] - start)
        return batch

    def _put(
        self, batch: dict[str, np.ndarray], row: int, start: int, record: EncodedRecord
    ) -> None:
        """Writes one record into its place of a row."""
        place = row, slice(start, start + len(record.input_ids))
        labels = record.labels
        if self.packed and len(labels):
            # Its first token stands behind another record, which must not learn to foretell it.
            labels = np.concatenate([[IGNORED], labels[1:]])
        batch["input_ids"][place], batch["labels"][place] = record.input_ids, labels
        if self.packed:
            batch["position_ids"][place] = np.arange(len(labels))
        else:
            batch["attention_mask"][place] = 1
        if "label_weights" in batch:
            batch["label_weights"][place] = weights_of(labels, self.label_weight)
        if "label_groups" in batch:
            batch["label_groups"][place] = self.groups[record.source]

    def _nothing(self) -> EncodedRecord:
        """Stands in for a batch without a usable record: the other batches of the step go on."""
        return EncodedRecord(
            id="",
            input_ids=np.array([self.pad_token_id]),
            labels=np.array([IGNORED]),
            pixel_values=np.empty((0, 0), np.float32),
            image_grid_thw=np.empty((0, 3), np.int64),
            teacher_pixel_values=None,
            source=next(iter(self.groups), ""),
        )


def _pictures(rows: list[list[EncodedRecord]]) -> dict[str, np.ndarray]:
    """All pictures of the batch in the order of their placeholders; nothing without any."""
    records = [record for row in rows for record in row]
    if not any(len(record.image_grid_thw) for record in records):
        return {}
    views = [
        record.teacher_pixel_values for record in records if record.teacher_pixel_values is not None
    ]
    batch = {
        "pixel_values": np.concatenate(
            [record.pixel_values for record in records if len(record.pixel_values)]
        ),
        "image_grid_thw": np.concatenate([record.image_grid_thw for record in records]),
    }
    if views:
        batch["teacher_pixel_values"] = np.concatenate(views)
    keys = [key for record in records for key in record.teacher_keys]
    if keys:
        kept = [features for record in records for features in record.teacher_kept]
        found = [features for features in kept if features is not None]
        batch["teacher_keys"] = (
            np.frombuffer(b"".join(keys), np.uint8).reshape(len(keys), -1).copy()
        )
        batch["teacher_is_kept"] = np.array([features is not None for features in kept])
        batch["teacher_kept"] = np.concatenate(found) if found else np.empty((0, 0), np.float16)
    return batch


def _bounds(rows: list[list[EncodedRecord]]) -> dict[str, Any]:
    """Where records begin and end in a packed batch of one row, as FlashAttention reads it."""
    if len(rows) > 1:
        raise ValueError(
            f"FlashAttention reads packed records from one row, but the batch has {len(rows)}; set "
            "training.per_device_train_batch_size to 1 and give data.packing.tokens as many times "
            "more."
        )
    ends = np.cumsum([0] + [len(record.input_ids) for record in rows[0]])
    bounds = torch.from_numpy(ends.astype(np.int32))
    longest = max(int(end - start) for start, end in pairwise(ends))
    return {
        "cu_seq_lens_q": bounds,
        "cu_seq_lens_k": bounds,
        "max_length_q": longest,
        "max_length_k": longest,
    }


__all__ = ["EveCollator"]
