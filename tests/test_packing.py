"""Packed rows: the plan, the order of rows with its position, and packed == separate.

The plan is compared with a slow first fit in plain loops.  Positions and ids are exact; losses and
gradients agree to 1e-5 (relative 1e-4 for gradients): float32 sums in another order.
"""

import itertools
import random

import numpy as np
import pytest
import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import tiny
from eve_vlm.data.collator import EveCollator
from eve_vlm.data.encode import IGNORED, BadRecord, Encoder
from eve_vlm.data.packing import Budget, Size, pack
from eve_vlm.data.records import Record
from eve_vlm.data.rows import Position, Rows, RowSampler, steps_of
from eve_vlm.data.teacher_view import TeacherView

SAME = 1e-5


# --- the plan -------------------------------------------------------------------------------------


def slow_first_fit(sizes, budget):
    """First fit, longest first, in loops."""
    rows = []
    for index in sorted(range(len(sizes)), key=lambda index: -sizes[index].tokens):
        for row in rows:
            tokens = sum(sizes[other].tokens for other in row) + sizes[index].tokens
            patches = sum(sizes[other].patches for other in row) + sizes[index].patches
            if tokens <= budget.tokens and (budget.patches is None or patches <= budget.patches):
                row.append(index)
                break
        else:
            rows.append([index])
    return [sorted(row) for row in rows]


def random_sizes(rng, number):
    return [
        Size(rng.randint(1, 100), rng.choice([0, 0, rng.randint(1, 80)])) for _ in range(number)
    ]


@pytest.mark.parametrize("seed", range(40))
def test_the_plan_is_that_of_a_slow_first_fit(seed):
    rng = random.Random(seed)
    sizes = random_sizes(rng, rng.randint(0, 120))
    budget = Budget(rng.randint(100, 400), rng.choice([None, rng.randint(80, 300)]))
    rows = pack(sizes, budget)
    assert rows == slow_first_fit(sizes, budget)
    assert sorted(itertools.chain(*rows)) == list(range(len(sizes)))
    for row in rows:
        assert sum(sizes[index].tokens for index in row) <= budget.tokens
        patches = sum(sizes[index].patches for index in row)
        assert budget.patches is None or patches <= budget.patches


def test_a_record_above_the_budget_gets_a_row_of_its_own():
    """The encoder refuses it by name; the plan must not lose it on the way there."""
    assert pack([Size(50, 0), Size(500, 0), Size(40, 9)], Budget(100, 5)) == [[1], [0], [2]]


def test_short_records_fill_rows():
    """A mix as in instruction data: more than 95 % of positions hold tokens."""
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(5.5, 0.7, 2000), 20, 2048).astype(int)
    sizes = [Size(int(length), 0) for length in lengths]
    rows = pack(sizes, Budget(4096))
    assert lengths.sum() / (len(rows) * 4096) > 0.95


# --- the order of rows ----------------------------------------------------------------------------


def rows_of(number=50, *, seed=3, window=16, packed=True):
    sizes = random_sizes(random.Random(7), number)
    given = {"sizes": lambda chosen: [sizes[index] for index in chosen], "budget": Budget(150, 120)}
    return Rows(number, seed=seed, window=window, **(given if packed else {}))


@pytest.mark.parametrize("packed", [False, True])
def test_every_epoch_reads_every_record_once_in_its_own_order(packed):
    rows = rows_of(packed=packed)
    walk = rows.walk(Position())
    seen = []
    for epoch in range(3):
        read = [next(walk)[0] for _ in range(rows.count(epoch + 1) - rows.count(epoch))]
        assert sorted(itertools.chain(*read)) == list(range(50))
        seen.append(read)
    assert seen[0] != seen[1] != seen[2]
    assert any(len(row) > 1 for row in seen[0]) == packed


def test_the_order_is_the_seeds():
    first, again, other = (
        list(itertools.islice(rows_of(seed=seed).walk(Position()), 40)) for seed in (3, 3, 4)
    )
    assert first == again != other


def test_unpacked_order_is_the_samplers_of_the_library():
    """torch's own random sampler with a seed, as the library's trainer reads."""
    generator = torch.Generator().manual_seed(3 + 1)
    sampler = torch.utils.data.RandomSampler(range(50), generator=generator)
    walk = itertools.islice(rows_of(packed=False).walk(Position(epoch=1)), 50)
    assert [row for row, _ in walk] == [[index] for index in sampler]


@pytest.mark.parametrize("packed", [False, True])
def test_a_walk_goes_on_from_every_position(packed):
    rows = rows_of(packed=packed)
    walked = list(itertools.islice(rows.walk(Position()), 120))
    for number in range(0, 119, 7):
        rest = rows_of(packed=packed).walk(walked[number][1])
        assert [row for row, _ in itertools.islice(rest, 119 - number)] == [
            row for row, _ in walked[number + 1 :]
        ]


@pytest.mark.parametrize("world", [1, 2, 3])
def test_processes_take_turns(world):
    """Together they read the stream, none twice; each reads as much as the others."""
    alone = list(itertools.islice(rows_of().walk(Position()), 4 * 2 * world))
    samplers = [
        RowSampler(rows_of(), batch_size=2, rank=rank, world=world) for rank in range(world)
    ]
    read = [list(itertools.islice(iter(sampler), 4)) for sampler in samplers]
    turns = [row for turn in zip(*read, strict=True) for batch in turn for row in batch]
    assert turns == [row for row, _ in alone]


@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1), (2, 4), (3, 1)])
def test_a_position_means_the_same_on_another_number_of_processes(before, after):
    """12 batches on some processes, then the rest on others: the stream is read through."""
    total = [row for row, _ in itertools.islice(rows_of().walk(Position()), 200)]
    steps = 12 // before
    samplers = [
        RowSampler(rows_of(), batch_size=1, rank=rank, world=before) for rank in range(before)
    ]
    for sampler in samplers:
        ahead = iter(sampler)
        for _ in range(steps + 3):  # a loader reads ahead of what is taken
            next(ahead)
        for _ in range(steps):
            sampler.taken()
    states = [sampler.state_dict() for sampler in samplers]
    assert all(state == states[0] for state in states)
    read = []
    for rank in range(after):
        sampler = RowSampler(rows_of(), batch_size=1, rank=rank, world=after)
        sampler.load_state_dict(states[0])
        read.append([batch[0] for batch in itertools.islice(iter(sampler), 6)])
    turns = [row for turn in zip(*read, strict=True) for row in turn]
    assert turns == total[12 : 12 + 6 * after]


def test_a_position_of_other_data_is_refused():
    state = RowSampler(rows_of(50), batch_size=1).state_dict()
    other = RowSampler(rows_of(51), batch_size=1)
    assert "num_records 50, but the data now have 51" in tiny.refused(
        lambda: other.load_state_dict(state)
    )


def test_steps_cover_the_epochs():
    for at_once in (1, 6, 12):
        rows = rows_of()
        steps = steps_of(rows, 2, at_once=at_once)
        assert rows.count(2) <= steps * at_once < rows.count(2) + at_once
    assert rows_of().count(0.5) == pytest.approx(rows_of().count(1) / 2, abs=1)


def test_epochs_grow_evenly_and_are_whole_at_the_end_of_an_epoch():
    rows = rows_of()
    places = [position for _, position in itertools.islice(rows.walk(Position()), rows.count(2))]
    epochs = [rows.epochs_at(place) for place in places]
    assert epochs == sorted(epochs) and epochs[-1] == 2.0
    assert rows.epochs_at(places[rows.count(1) - 1]) == 1.0


# --- packed == separate ---------------------------------------------------------------------------

VIEW = TeacherView(cells=4, cell_pixels=5, fill=(9, 9, 9))


@pytest.fixture(scope="module")
def records(processor):
    """Seven encoded records with 0, 1 and 2 pictures, of two data sets."""
    encoder = Encoder(processor, format="chat", max_length=256, teacher_view=VIEW)
    made = []
    for index, pictures in enumerate([1, 0, 2, 0, 1, 1, 0]):
        number = index % 4
        messages = tiny.conversation(
            tiny.QUESTIONS[number], tiny.ANSWERS[number], pictures=pictures
        )
        images = [
            tiny.picture(10 + 7 * n, 30 - index, seed=10 * index + n) for n in range(pictures)
        ]
        source = ("words", "pictures")[bool(pictures)]
        record = Record(id=str(index), messages=messages, images=images, source=source)
        made.append(encoder(record))
    return made


def in_rows(records):
    """Three packed rows of different lengths."""
    return [
        [records[0], records[1], records[2]],
        [records[3]],
        [records[4], records[5], records[6]],
    ]


def test_positions_start_again_and_no_target_crosses_a_boundary(records):
    batch = EveCollator(0, packed=True)(in_rows(records))
    assert "attention_mask" not in batch
    positions, labels = batch["position_ids"], batch["labels"]
    boundaries = 0
    for row, members in enumerate(in_rows(records)):
        start = 0
        for record in members:
            length = len(record.input_ids)
            place = slice(start, start + length)
            assert positions[row, place].tolist() == list(range(length))
            assert batch["input_ids"][row, place].tolist() == record.input_ids.tolist()
            assert labels[row, start] == IGNORED
            assert labels[row, start + 1 : start + length].tolist() == record.labels[1:].tolist()
            boundaries += start > 0
            start += length
        assert positions[row, start:].tolist() == list(range(positions.shape[1] - start))
        assert (labels[row, start:] == IGNORED).all()
    assert boundaries == 4
    assert batch["record_ids"] == [["0", "1", "2"], ["3"], ["4", "5", "6"]]
    assert batch["source_names"][0] == ["pictures", "words", "pictures"]
    assert batch["num_tokens"] == sum(len(record.input_ids) for record in records)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("weight", ["token", "sample", "sqrt"])
def test_packed_is_separate_in_training(records, attention, checkpointing, weight):
    """Loss by term and every gradient, in train mode, with pictures and the aligner."""
    seen = []
    for rows, packed in (([[record] for record in records], False), (in_rows(records), True)):
        model = tiny.model(tiny.config(aligned=True), attn_implementation=attention).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        batch = tiny.for_model(EveCollator(0, packed=packed, label_weight=weight)(rows))
        batch.pop("teacher_pixel_values")
        features = torch.randn(
            int((batch["image_grid_thw"][:, 1:] // tiny.MERGE).prod(1).sum()),
            tiny.TEACHER_WIDTH,
            generator=torch.Generator().manual_seed(0),
        )
        out = model(**batch, teacher_features=features)
        out.loss.backward()
        gradients = {name: weight.grad for name, weight in model.named_parameters()}
        seen.append((out.loss_terms, gradients))
    (terms, gradients), (packed_terms, packed_gradients) = seen
    for name, term in terms.items():
        assert float(packed_terms[name]) == pytest.approx(float(term), abs=SAME), name
    for name, gradient in gradients.items():
        allowed = 1e-4 * float(gradient.abs().max()) + 1e-9
        assert float((packed_gradients[name] - gradient).abs().max()) <= allowed, name


def test_a_leak_would_be_seen(records):
    """With an attention mask of ones records see each other: the test above is able to fail."""
    model = tiny.model(tiny.config()).train()
    batch = tiny.for_model(EveCollator(0, packed=True)(in_rows(records)))
    batch.pop("teacher_pixel_values")
    right = float(model(**batch).loss)
    leaking = float(model(**batch, attention_mask=torch.ones_like(batch["input_ids"])).loss)
    assert abs(leaking - right) > 1e-3


def test_packed_is_separate_with_flex_attention(records):
    """Forward only: this kernel has no backward pass on a CPU; heads of 32, below it is wrong there."""
    losses = []
    for attention in ("sdpa", "flex_attention"):
        model = tiny.model(tiny.config(hidden_size=128, head_dim=32), attn_implementation=attention)
        batch = tiny.for_model(EveCollator(0, packed=True)(in_rows(records)[:1]))
        batch.pop("teacher_pixel_values")
        with torch.no_grad():
            losses.append(float(model(**batch).loss))
    assert losses[1] == pytest.approx(losses[0], abs=SAME)


def test_the_bounds_are_what_variable_length_attention_reads(records):
    """An attention in loops that looks at nothing but the bounds gives the same loss."""

    def by_bounds(module, query, key, value, attention_mask, *, scaling, cu_seq_lens_q, **given):
        groups = query.shape[1] // key.shape[1]
        key, value = (each.repeat_interleave(groups, 1) for each in (key, value))
        out = torch.zeros_like(query)
        assert given["max_length_q"] == int((cu_seq_lens_q[1:] - cu_seq_lens_q[:-1]).max())
        for start, end in itertools.pairwise(cu_seq_lens_q.tolist()):
            part = slice(start, end)
            scores = query[:, :, part] @ key[:, :, part].mT * scaling
            later = torch.ones(end - start, end - start, dtype=torch.bool).triu(1)
            out[:, :, part] = scores.masked_fill(later, -torch.inf).softmax(-1) @ value[:, :, part]
        return out.transpose(1, 2), None

    ALL_ATTENTION_FUNCTIONS["by_bounds"] = by_bounds
    try:
        losses = []
        for attention in ("sdpa", "by_bounds"):
            model = tiny.model(tiny.config()).train()
            model.model.language_model.config._attn_implementation = attention
            batch = tiny.for_model(EveCollator(0, packed=True, varlen=True)([records]))
            batch.pop("teacher_pixel_values")
            losses.append(float(model(**batch).loss))
    finally:
        ALL_ATTENTION_FUNCTIONS.pop("by_bounds", None)
    assert losses[1] == pytest.approx(losses[0], abs=SAME)


def test_bounds_need_one_row(records):
    collate = EveCollator(0, packed=True, varlen=True)
    assert "per_device_train_batch_size to 1" in tiny.refused(lambda: collate(in_rows(records)))


def test_bad_records_leave_a_packed_row_and_are_listed(records):
    bad = BadRecord("broken", "b", "words")
    batch = EveCollator(0, packed=True)([[records[0], bad, records[1]], [bad]])
    assert batch["bad_records"] == [bad, bad] and batch["record_ids"] == [["0", "1"]]
    whole = EveCollator(0, packed=True)([[records[0], records[1]]])
    assert torch.equal(batch["input_ids"], whole["input_ids"])


def test_labels_carry_the_number_of_their_data_set(records):
    collate = EveCollator(0, packed=True, sources=("words", "pictures"))
    batch = collate([[records[0], records[1]]])
    lengths = [len(records[0].input_ids), len(records[1].input_ids)]
    assert batch["label_groups"].tolist() == [[1] * lengths[0] + [0] * lengths[1]]
    assert "label_groups" not in EveCollator(0, sources=("words",))([[records[1]]])
