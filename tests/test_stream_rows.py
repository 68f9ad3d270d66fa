"""Rows of streams, and the sizes of a mixture: the same records wherever a run goes on.

Exact throughout.  Independent side: the list of all records that the stream was made of.
"""

import itertools
import json
import re

import numpy as np
import pytest

import tiny
from eve_vlm.data.encode import BadRecord, Encoder
from eve_vlm.data.encoded_rows import EncodedRows
from eve_vlm.data.lengths import MixtureLengths
from eve_vlm.data.packing import Budget, Size
from eve_vlm.data.records import Record
from eve_vlm.data.rows import RowSampler
from eve_vlm.data.sources import build_mixture
from eve_vlm.data.sources.streams import build_stream
from eve_vlm.data.stream_rows import StreamRows
from eve_vlm.train.sections import SourceSection


@pytest.fixture(scope="module")
def lines(tmp_path_factory):
    """Thirty conversations, one a line."""
    folder = tmp_path_factory.mktemp("lines")
    records = json.loads(tiny.llava_file(folder, records=30).read_text())
    file = folder / "data.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return file


@pytest.fixture(scope="module")
def encoder():
    return Encoder(tiny.processor(), format="chat", max_length=256)


def stream_of(file):
    return build_stream([SourceSection(kind="llava", path=str(file), streaming=True)])


def rows_of(file, encoder, *, packed=True, window=8, seed=5):
    budget = Budget(150) if packed else None
    return StreamRows(stream_of(file), seed=seed, window=window, size=encoder.size, budget=budget)


def ids(rows):
    return [[record.id for record in row] for row in rows]


@pytest.mark.parametrize("packed", [False, True])
def test_a_stream_is_read_window_by_window(lines, encoder, packed):
    """Thirty records are 3 3/4 windows of eight; the fifth window begins the file again."""
    wanted = [record["id"] for record in json.loads((lines.parent / "data.json").read_text())]
    walk = rows_of(lines, encoder, packed=packed).walk(rows_of(lines, encoder).start)
    seen, longest = [], 0
    while len(seen) < 40:
        row, _ = next(walk)
        seen += [record.id for record in row]
        longest = max(longest, len(row))
        sizes = [encoder.size(record) for record in row]
        assert sum(size.tokens for size in sizes) <= 150 or len(row) == 1
    windows = [sorted(seen[start : start + 8]) for start in range(0, 40, 8)]
    endless = wanted * 2
    assert windows == [sorted(endless[start : start + 8]) for start in range(0, 40, 8)]
    assert seen[:8] != endless[:8]  # shuffled
    assert (longest > 1) == packed


@pytest.mark.parametrize("packed", [False, True])
def test_a_stream_goes_on_from_every_place(lines, encoder, packed):
    rows = rows_of(lines, encoder, packed=packed)
    walked = list(itertools.islice(rows.walk(rows.start), 30))
    for number in range(0, 29, 3):
        place = json.loads(json.dumps(walked[number][1]))  # as a checkpoint keeps it
        rest = rows_of(lines, encoder, packed=packed).walk(place)
        assert ids(row for row, _ in itertools.islice(rest, 29 - number)) == ids(
            row for row, _ in walked[number + 1 :]
        )


def test_a_sampler_of_a_stream_goes_on_though_a_loader_reads_ahead(lines, encoder):
    whole = iter(RowSampler(rows_of(lines, encoder), batch_size=2))
    batches = [ids(next(whole)) for _ in range(12)]
    sampler = RowSampler(rows_of(lines, encoder), batch_size=2)
    ahead = iter(sampler)
    for _ in range(9):
        next(ahead)
    for _ in range(5):
        sampler.taken()
    other = RowSampler(rows_of(lines, encoder), batch_size=2)
    other.load_state_dict(json.loads(json.dumps(sampler.state_dict())))
    rest = iter(other)
    assert [ids(next(rest)) for _ in range(7)] == batches[5:]


def test_a_broken_line_of_a_stream_is_counted_where_it_stands(tmp_path, lines, encoder):
    text = lines.read_text().splitlines()
    text[2] = text[2][:20]
    broken = tmp_path / "broken.jsonl"
    broken.write_text("\n".join(text))
    walk = rows_of(broken, encoder, packed=False).walk(rows_of(broken, encoder).start)
    members = [row[0] for row, _ in itertools.islice(walk, 8)]
    (bad,) = [member for member in members if isinstance(member, BadRecord)]
    before = len("\n".join(text[:2])) + 1
    place = int(re.search(r"broken\.jsonl, byte (\d+)", bad.reason)[1])
    assert before <= place <= before + len(text[2])
    assert EncodedRows(None, encoder)[[bad]] == [bad]


# --- sizes of a mixture ---------------------------------------------------------------------------


def mixture(*sections):
    return build_mixture(sections, seed=0)


def test_sizes_are_those_of_the_encoded_records(tmp_path, lines, encoder, monkeypatch):
    """Also where a source is used in part or several times; measured once, then kept."""
    given = str(lines)
    records = mixture(
        SourceSection(kind="llava", path=given, name="a", split="[:60%]", repeat=0.5),
        SourceSection(kind="llava", path=given, name="b", split="[60%:]", repeat=2.0),
    )
    sizes = MixtureLengths(records, encoder, folder=tmp_path, workers=0)
    numbers = list(range(len(records)))
    assert len(numbers) == 9 + 24
    for size, number in zip(sizes(numbers), numbers, strict=True):
        encoded = encoder(records[number])
        assert size == Size(len(encoded.input_ids), len(encoded.pixel_values))

    def never(record):
        raise AssertionError("measured again")

    monkeypatch.setattr(encoder, "size", never)
    again = MixtureLengths(records, encoder, folder=tmp_path, workers=0)
    assert again(numbers) == sizes(numbers)


def test_sizes_are_measured_again_for_other_settings(tmp_path, lines):
    records = mixture(SourceSection(kind="llava", path=str(lines)))
    small, large = (
        Encoder(tiny.processor(edge=edge), format="chat", max_length=256) for edge in (16, 32)
    )
    first = MixtureLengths(records, small, folder=tmp_path)(range(30))
    second = MixtureLengths(records, large, folder=tmp_path)(range(30))
    assert sum(size.tokens for size in first) < sum(size.tokens for size in second)


def test_workers_measure_the_same(tmp_path, lines, encoder):
    records = mixture(SourceSection(kind="llava", path=str(lines)))
    alone = MixtureLengths(records, encoder, folder=tmp_path / "alone")
    together = MixtureLengths(records, encoder, folder=tmp_path / "together", workers=2)
    assert alone(range(30)) == together(range(30))


def test_a_record_that_cannot_be_used_takes_a_place_where_it_is_counted(tmp_path, encoder):
    file = tmp_path / "one.jsonl"
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "a ball"}]
    file.write_text(json.dumps({"id": "x", "image": "missing.png", "conversations": turns}) + "\n")
    records = mixture(SourceSection(kind="llava", path=str(file)))
    assert MixtureLengths(records, encoder, folder=tmp_path)([0]) == [Size(1, 0)]
    (bad,) = EncodedRows(records, encoder)[[0]]
    assert bad.id == "x" and bad.source == "one" and "missing.png" in bad.reason


def test_encoded_rows_give_records_as_the_encoder_does(lines, encoder):
    records = mixture(SourceSection(kind="llava", path=str(lines)))
    rows = EncodedRows(records, encoder)
    for made, number in zip(rows[[4, 0]], (4, 0), strict=True):
        wanted = encoder(records[number])
        assert made.source == "data" and np.array_equal(made.input_ids, wanted.input_ids)
    assert isinstance(records[0], Record)
