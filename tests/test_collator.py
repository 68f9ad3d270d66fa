"""Batches: padded texts, packed pictures, counted losses. Exact."""

import numpy as np
import pytest
import torch

import tiny
from eve_vlm.data.collator import EveCollator
from eve_vlm.data.encode import BadRecord, Encoder
from eve_vlm.data.records import Record
from eve_vlm.data.teacher_view import TeacherView

VIEW = TeacherView(cells=4, cell_pixels=5, fill=(9, 9, 9))


@pytest.fixture(scope="module")
def records(processor):
    """Encoded records with 1, 0, 2 and 0 pictures."""
    encoder = Encoder(processor, format="chat", max_length=256, teacher_view=VIEW)
    made = []
    for index, pictures in enumerate([1, 0, 2, 0]):
        messages = tiny.conversation(tiny.QUESTIONS[index], tiny.ANSWERS[index], pictures=pictures)
        images = [tiny.picture(10 + 5 * n, 30, seed=10 * index + n) for n in range(pictures)]
        made.append(encoder(Record(id=str(index), messages=messages, images=images)))
    return made


def rows(records):
    """Every record as a row of its own."""
    return [[record] for record in records]


def test_texts_are_padded_on_the_right(records):
    batch = EveCollator(77)(rows(records))
    assert batch["bad_records"] == []
    longest = max(len(record.input_ids) for record in records)
    for name in ("input_ids", "labels", "attention_mask"):
        assert batch[name].shape == (4, longest) and batch[name].dtype == torch.int64
    for row, record in enumerate(records):
        length = len(record.input_ids)
        assert batch["input_ids"][row, :length].tolist() == record.input_ids.tolist()
        assert batch["labels"][row, :length].tolist() == record.labels.tolist()
        assert (batch["input_ids"][row, length:] == 77).all()
        assert (batch["labels"][row, length:] == -100).all()
        assert batch["attention_mask"][row].tolist() == [1] * length + [0] * (longest - length)


def test_pictures_are_packed_in_the_order_of_their_texts(records):
    batch = EveCollator(0)(rows(records))
    for name in ("pixel_values", "image_grid_thw", "teacher_pixel_values"):
        expected = np.concatenate([getattr(record, name) for record in records])
        assert (batch[name].numpy() == expected).all() and batch[
            name
        ].numpy().dtype == expected.dtype
    assert len(batch["image_grid_thw"]) == len(batch["teacher_pixel_values"]) == 3


def test_text_only_batches_have_no_picture_keys(records):
    batch = EveCollator(0)(rows([records[1], records[3]]))
    assert set(tiny.for_model(batch)) == {"input_ids", "labels", "attention_mask"}


def test_without_a_teacher_there_are_no_views(records):
    batch = EveCollator(0)(rows(record._replace(teacher_pixel_values=None) for record in records))
    assert "teacher_pixel_values" not in batch and "pixel_values" in batch


def test_a_text_only_record_in_front_keeps_the_views(records):
    batch = EveCollator(0)(rows([records[1], records[0]]))
    assert len(batch["teacher_pixel_values"]) == len(batch["image_grid_thw"]) == 1


def test_bad_records_are_listed_not_lost(records):
    first, second = BadRecord("first", "a", "one set"), BadRecord("second")
    batch = EveCollator(0)(rows([records[0], first, records[2], second]))
    assert batch["bad_records"] == [first, second]
    assert batch["input_ids"].shape[0] == 2 and batch["record_ids"] == [["0"], ["2"]]


def test_a_batch_of_bad_records_only_teaches_nothing(model):
    """It must not end a run whose share of bad records is allowed: the loss is exactly zero."""
    batch = EveCollator(5)(rows([BadRecord("broken"), BadRecord("also broken")]))
    assert [bad.reason for bad in batch["bad_records"]] == ["broken", "also broken"]
    assert batch["record_ids"] == [] and batch["num_tokens"] == 0
    batch = tiny.for_model(batch)
    assert batch["input_ids"].tolist() == [[5]] and batch["attention_mask"].tolist() == [[1]]
    assert batch["labels"].tolist() == [[-100]] and "pixel_values" not in batch
    with torch.no_grad():
        assert float(model(**batch).loss) == 0.0


@torch.no_grad()
def test_a_batch_is_what_the_model_takes(records, model):
    """The loss of the batch is the mean over all its labels, as if each record came alone.

    1e-5: float32 sums in another order.
    """
    batch = EveCollator(0)(rows(records))
    batch = tiny.for_model(batch)
    batch.pop("teacher_pixel_values")
    total, count = 0.0, 0
    for record in records:
        alone = tiny.for_model(EveCollator(0)([[record]]))
        alone.pop("teacher_pixel_values", None)
        labels = int((alone["labels"][:, 1:] != -100).sum())
        total, count = total + float(model(**alone).loss) * labels, count + labels
    assert float(model(**batch).loss) == pytest.approx(total / count, abs=1e-5)
