"""Records of JSON files by offset, against `json.load` of the whole file.  Exact.

Blocks are made tiny, so that every border falls between every two bytes some time.
"""

import json
import pickle
import random
import tracemalloc

import numpy as np
import pytest

import tiny
from eve_vlm.data import json_offsets
from eve_vlm.data.json_offsets import JsonRecords, element_spans, line_spans

NASTY = (
    *('"', "\\", "\\\\", '\\"', "[", "]", "{", "}", ",", "}],[{", ":", "\n", "\r\n", "\t", " "),
    *("é", "中", "🐻", "\u2028", "\x00", "\ufeff", "/", "u0022", "null"),
)
BLOCKS = (1, 2, 3, 5, 7, 16, 64, 1000)


def text(dice):
    return "".join(dice.choice(NASTY) for _ in range(dice.randint(0, 12)))


def value(dice, depth=0):
    kind = dice.randint(0, 7 if depth < 4 else 4)
    if kind == 6:
        return [value(dice, depth + 1) for _ in range(dice.randint(0, 4))]
    if kind == 7:
        return {text(dice): value(dice, depth + 1) for _ in range(dice.randint(0, 4))}
    return (text(dice), dice.random(), None, dice.randint(-9, 9), True, text(dice))[kind]


@pytest.mark.parametrize("seed", range(150))
def test_lists_of_any_values(tmp_path, monkeypatch, seed):
    dice = random.Random(seed)
    monkeypatch.setattr(json_offsets, "BLOCK", dice.choice(BLOCKS))
    data = [value(dice) for _ in range(dice.randint(0, 8))]
    layout = {
        "ensure_ascii": dice.random() < 0.5,
        "indent": dice.choice([None, None, 0, 2]),
        "separators": dice.choice([None, (",", ":")]),
    }
    whole = json.dumps(data, **layout)
    whole = whole.replace("\n", dice.choice(["\n", "\r\n"]))  # only between values; never in a text
    whole = dice.choice(["", "\n", " \t", "\ufeff"]) + whole + dice.choice(["", "\n", " \r\n"])
    file = tmp_path / "a.json"
    file.write_bytes(whole.encode())
    records = JsonRecords(file)
    assert [records[index] for index in range(len(records))] == data
    with file.open(encoding="utf-8-sig") as stream:
        assert json.load(stream) == data


@pytest.mark.parametrize("seed", range(150))
def test_lines_of_any_values(tmp_path, monkeypatch, seed):
    dice = random.Random(seed)
    monkeypatch.setattr(json_offsets, "BLOCK", dice.choice(BLOCKS))
    data = [value(dice) for _ in range(dice.randint(0, 8))]
    end = dice.choice(["\n", "\r\n"])
    lines = []
    for one in data:
        lines += [dice.choice(["", " ", " \t "]) for _ in range(dice.randint(0, 2))]
        lines.append(" " * dice.randint(0, 2) + json.dumps(one, ensure_ascii=dice.random() < 0.5))
    whole = dice.choice(["", "\ufeff"]) + end.join(lines) + dice.choice(["", end, end + " "])
    file = tmp_path / "a.jsonl"
    file.write_bytes(whole.encode())
    records = JsonRecords(file)
    assert [records[index] for index in range(len(records))] == data
    places = [number for number, line in enumerate(lines, 1) if line.strip()]
    assert [records.place(index) for index in range(len(records))] == [
        f"{file}, line {number}" for number in places
    ]


@pytest.mark.parametrize("block", [1, 3, 2**24])
def test_lines_of_a_list_are_counted(tmp_path, monkeypatch, block):
    monkeypatch.setattr(json_offsets, "BLOCK", block)
    file = tmp_path / "a.json"
    file.write_text('[\n{"a":\n 1},\n\n{"b": 2}\n, 3]', encoding="utf-8")
    records = JsonRecords(file)
    assert [records.place(index)[-6:] for index in range(3)] == ["line 2", "line 5", "line 6"]


def test_memory_does_not_grow_with_the_file(tmp_path, monkeypatch):
    """16 MB more of text and one line of 8 MB cost no more than the blocks (here 64 kB).

    Tolerance: 2 MB, which is 30 blocks and an eighth of what is added.
    """
    monkeypatch.setattr(json_offsets, "BLOCK", 2**16)
    peaks = []
    for size in (100, 200_000):
        records = [{"id": str(number), "text": 'x"y' * (size // 3)} for number in range(40)]
        for name, spans in (("a.json", element_spans), ("a.jsonl", line_spans)):
            whole = (
                json.dumps(records)
                if name == "a.json"
                else "\n".join(json.dumps(one) for one in [*records, {"x": "y" * 40 * size}])
            )
            file = tmp_path / f"{size}{name}"
            file.write_text(whole, encoding="utf-8")
            del whole
            tracemalloc.start()
            spans(str(file))
            peaks.append(tracemalloc.get_traced_memory()[1])
            tracemalloc.stop()
    assert max(peaks[2:]) < max(peaks[:2]) + 2 * 2**20


def test_what_is_kept_is_16_bytes_a_record_and_is_read_again(tmp_path, monkeypatch):
    file = tmp_path / "a.jsonl"
    file.write_text("".join(f'{{"n": {n}}}\n' for n in range(1000)), encoding="utf-8")
    records = JsonRecords(file)
    assert records._spans.nbytes == 16 * 1001

    def fail(path):
        raise AssertionError("the file was walked again")

    monkeypatch.setattr(json_offsets, "line_spans", fail)
    again = JsonRecords(file)
    assert isinstance(again._spans, np.memmap) and again[999] == {"n": 999}
    sent = pickle.dumps(again)
    assert len(sent) < 500 and pickle.loads(sent)[17] == {"n": 17}


def test_a_file_that_changes_is_walked_again(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text("1\n2\n", encoding="utf-8")
    assert len(JsonRecords(file)) == 2
    file.write_text("1\n2\n3\n", encoding="utf-8")
    assert [JsonRecords(file)[index] for index in range(3)] == [1, 2, 3]


def test_a_cache_folder_that_cannot_be_written(tmp_path, monkeypatch, caplog):
    (tmp_path / "cache").write_text("a file where the folder should be", encoding="utf-8")
    monkeypatch.setenv("EVE_CACHE", str(tmp_path / "cache"))
    file = tmp_path / "a.jsonl"
    file.write_text("1\n2\n", encoding="utf-8")
    assert JsonRecords(file)[1] == 2
    assert "cannot be kept" in caplog.text


@pytest.mark.parametrize(
    ("name", "content", "part"),
    [
        ("a.json", b'{"a": 1}', "holds an object, not a list"),
        ("a.json", b'"hello"', "holds a text"),
        ("a.json", b"12", "holds something else"),
        ("a.json", "[1]".encode("utf-16"), "UTF-16"),
        ("a.jsonl", "[1]".encode("utf-16"), "UTF-16"),
        ("a.jsonl.gz", b"", "compressed"),
    ],
)
def test_what_is_no_list_of_records(tmp_path, name, content, part):
    file = tmp_path / name
    file.write_bytes(content)
    message = tiny.refused(lambda: JsonRecords(file))
    assert part in message and str(file) in message


def test_records_that_cannot_be_read(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_bytes(b'{"a": 1}\n{"a": \n"\xff"\n' + b"[" * 100_000 + b"\n")
    records = JsonRecords(file)
    assert records[0] == {"a": 1}
    for index, part in ((1, "not valid JSON"), (2, "not UTF-8"), (3, "line 4")):
        message = tiny.refused(lambda index=index: records[index])
        assert part in message and f"line {index + 1}" in message


def test_a_file_that_shrinks_behind_our_back(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text('{"a": 1}\n{"b": 2}\n', encoding="utf-8")
    records = JsonRecords(file)
    file.write_text('{"a": 1}\n', encoding="utf-8")
    assert "ends 8 bytes too early" in tiny.refused(lambda: records[1])
