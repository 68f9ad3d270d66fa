"""Encoded records to one batch: texts padded on the right, pictures packed behind each other.

Easy to get wrong: pictures have no batch dimension; they belong to the texts by the order of their
placeholders.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from eve_vlm.data.encode import IGNORED, BadRecord, EncodedRecord


class EveCollator:
    """Joins encoded records into a batch.

    Returns a dict of `input_ids`, `labels`, `attention_mask` (B, T) and, when there are pictures,
    `pixel_values` (P, d), `image_grid_thw` (I, 3) and, with a teacher, `teacher_pixel_values`
    (I, size, size, 3) uint8.  `bad_records` lists the reasons of records that could not be used;
    whoever takes the batch must take that list out and count it.
    """

    def __init__(self, pad_token_id: int):
        self.pad_token_id = pad_token_id

    def __call__(self, items: Sequence[EncodedRecord | BadRecord]) -> dict[str, Any]:
        """Pads and packs what can be used; without any such record a row that teaches nothing."""
        records = [item for item in items if isinstance(item, EncodedRecord)]
        reasons = [item.reason for item in items if isinstance(item, BadRecord)]
        if not records:
            # The other batches of the step go on; one position without a label adds nothing.
            records = [self._nothing()]
        longest = max(len(record.input_ids) for record in records)
        shape = (len(records), longest)
        input_ids = np.full(shape, self.pad_token_id, np.int64)
        labels = np.full(shape, IGNORED, np.int64)
        attention_mask = np.zeros(shape, np.int64)
        for row, record in enumerate(records):
            length = len(record.input_ids)
            input_ids[row, :length] = record.input_ids
            labels[row, :length] = record.labels
            attention_mask[row, :length] = 1
        batch = {"input_ids": input_ids, "labels": labels, "attention_mask": attention_mask}
        if any(len(record.image_grid_thw) for record in records):
            batch["pixel_values"] = np.concatenate([record.pixel_values for record in records])
            batch["image_grid_thw"] = np.concatenate([record.image_grid_thw for record in records])
            views = [
                record.teacher_pixel_values
                for record in records
                if record.teacher_pixel_values is not None
            ]
            if views:
                batch["teacher_pixel_values"] = np.concatenate(views)
        tensors: dict[str, Any] = {name: torch.from_numpy(array) for name, array in batch.items()}
        return tensors | {"bad_records": reasons} if reasons else tensors

    def _nothing(self) -> EncodedRecord:
        return EncodedRecord(
            id="",
            input_ids=np.array([self.pad_token_id]),
            labels=np.array([IGNORED]),
            pixel_values=np.empty((0, 0), np.float32),
            image_grid_thw=np.empty((0, 3), np.int64),
            teacher_pixel_values=None,
        )


__all__ = ["EveCollator"]
