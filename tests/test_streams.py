"""Streams: the same records as by number, a place that is exact to the record, shares.  Exact."""

import gzip
import itertools
import json
import tarfile

import pytest

import tiny
from eve_vlm.data.picture_ref import open_image
from eve_vlm.data.sources import build_source
from eve_vlm.data.sources.quarantine import Quarantine, Quarantined
from eve_vlm.data.sources.streams import BrokenFile, StreamMixture, build_stream
from eve_vlm.train.sections import SourceSection
from test_source_files import (
    data_set,
    datasets,
    jsonl,
    opened,
    parquet,
    picture,
    pixels,
    said,
    shard,
    tar,
)

KINDS = ("jsonl", "jsonl.gz", "tar", "tar.gz", "parquet", "hf", "txt")


def made(folder, kind, files=3, size=7):
    """Files of one kind with pictures and captions, and the path that means all of them."""
    if kind == "hf":
        data_set(files * size).save_to_disk(folder / "set")
        return f"hf:{folder / 'set'}"
    for file in range(files):
        numbers = range(file * size, (file + 1) * size)
        path = folder / f"{file}.{kind}"
        rows = [{"image": f"{n}.png", "caption": f"caption {n}"} for n in numbers]
        if kind.startswith("jsonl"):
            for number in numbers:
                (folder / f"{number}.png").write_bytes(picture(number))
            jsonl(path, rows)
        elif kind.startswith("tar"):
            shard(path, numbers[0], size)
        elif kind == "parquet":
            rows = [row | {"image": picture(n)} for row, n in zip(rows, numbers, strict=True)]
            parquet(path, rows, row_group_size=3)
        else:
            path.write_text("".join(f"caption {n}\n\n" for n in numbers), encoding="utf-8")
        if kind.endswith(".gz"):
            path.write_bytes(gzip.compress(path.read_bytes()))
    return f"{folder}/{{0..{files - 1}}}.{kind}"


def stream(path, kind="captions", *, endless=False, quarantine=None, **more):
    section = SourceSection(kind=kind, path=str(path), streaming=True, **more)
    return build_stream([section], endless=endless, quarantine=quarantine).streams[0]


def form(kind):
    return "text" if kind == "txt" else "captions"


def facts(record):
    return (record.id, said(record)[-1], opened(record), record.source)


@pytest.mark.parametrize("kind", KINDS)
def test_a_stream_gives_all_records_in_order(tmp_path, kind):
    path = made(tmp_path, kind)
    found = [facts(record) for record in stream(path, form(kind))]
    assert len(found) == 21
    if kind != "hf":
        words = [text for _, text, _, _ in found]
        assert words == [f"caption {number}" for number in range(21)]
    if kind != "txt":
        assert [one[2] for one in found] == [[pixels(picture(number))] for number in range(21)]
    if not kind.endswith(".gz"):
        by_number = build_source(form(kind), path=path, seed=0)
        assert found == [facts(record) for record in by_number]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("endless", [False, True])
def test_a_place_is_exact_to_the_record(tmp_path, kind, endless):
    """Stopped behind every record, in a new object and through JSON: the rest follows exactly."""
    path = made(tmp_path, kind, files=2, size=5)

    def fresh():
        return stream(path, form(kind), endless=endless)

    whole = fresh()
    ids, states = [], [json.dumps(whole.state_dict())]
    for _, record in zip(range(23 if endless else 10), whole, strict=False):
        ids.append(record.id)
        states.append(json.dumps(whole.state_dict()))
    assert len(ids) == (23 if endless else 10)
    for taken in range(len(ids)):
        again = fresh()
        again.load_state_dict(json.loads(states[taken]))
        rest = [record.id for _, record in zip(range(len(ids) - taken), again, strict=False)]
        assert rest == ids[taken:]
        assert json.dumps(again.state_dict()) == states[-1]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_shares_are_disjoint_and_hold_everything(tmp_path, kind, count):
    path = made(tmp_path, kind)
    whole = [facts(record) for record in stream(path, form(kind))]
    shares = [
        [facts(record) for record in stream(path, form(kind)).shard(index, count)]
        for index in range(count)
    ]
    assert sorted(map(str, itertools.chain(*shares))) == sorted(map(str, whole))
    assert all(shares)


def test_shares_of_shares(tmp_path):
    """A process of 2 with 3 workers: six shares that hold every record once."""
    path = made(tmp_path, "jsonl", files=2, size=9)
    ids = [
        record.id
        for rank in range(2)
        for worker in range(3)
        for record in stream(path).shard(rank, 2).shard(worker, 3)
    ]
    assert len(ids) == 18 and len(set(ids)) == 18


def test_a_place_in_something_else_is_refused(tmp_path):
    path = made(tmp_path, "jsonl")
    state = stream(path).state_dict()
    text = tiny.refused(lambda: stream(path).shard(0, 2).load_state_dict(state))
    assert "part" in text and "number of processes" in text
    other = stream(tmp_path / "0.jsonl")
    assert "files" in tiny.refused(lambda: other.load_state_dict(state))


# --- what goes wrong ------------------------------------------------------------------------------


def walked(records):
    """Texts of good records, reasons of bad ones, until the stream ends."""
    good, bad = [], []
    while True:
        try:
            good.append(said(next(records))[-1])
        except StopIteration:
            return good, bad
        except ValueError as error:
            bad.append(str(error))


def test_a_stream_goes_on_behind_a_bad_record(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text('{"text": "a"}\n{"text": \n\n{"body": 1}\n{"text": "b"}\n', encoding="utf-8")
    good, bad = walked(stream(file, "text"))
    assert good == ["a", "b"]
    assert len(bad) == 2 and "byte 14" in bad[0] and "not valid JSON" in bad[0]
    assert "lacks text" in bad[1]


def test_a_bad_record_has_its_place_too(tmp_path):
    """Stopped right behind it, the stream does not give it again."""
    file = tmp_path / "a.jsonl"
    file.write_text('{"text": "a"}\nno\n{"text": "b"}\n', encoding="utf-8")
    first = stream(file, "text")
    next(first)
    tiny.refused(lambda: next(first))
    again = stream(file, "text")
    again.load_state_dict(first.state_dict())
    assert walked(again) == (["b"], [])


def test_a_bad_text_in_a_shard(tmp_path):
    file = tar(tmp_path / "a.tar", [("a.txt", b"1"), ("b.txt", b"\xff"), ("c.txt", b"3")])
    good, bad = walked(stream(file, "text"))
    assert good == ["1", "3"] and "a.tar:b.txt: not UTF-8" in bad[0]


@pytest.mark.parametrize("kind", ["jsonl.gz", "tar", "tar.gz", "parquet"])
def test_a_file_that_is_cut_ends_the_stream(tmp_path, kind):
    """Not a bad record, which would be counted as one: all that lay behind it is missing."""
    path = made(tmp_path, kind, files=1, size=20)
    file = tmp_path / f"0.{kind}"
    file.write_bytes(file.read_bytes()[: file.stat().st_size * 2 // 3])
    records = stream(path)
    with pytest.raises(BrokenFile, match=f"0.{kind}"):
        walked(records)
    assert not isinstance(BrokenFile(), ValueError)


def test_a_file_that_vanished_ends_the_stream(tmp_path):
    path = made(tmp_path, "jsonl")
    records = stream(path)
    (tmp_path / "1.jsonl").unlink()
    with pytest.raises(BrokenFile, match=r"1.jsonl is not a file"):
        walked(records)


def test_samples_mixed_up_in_a_shard_end_the_stream(tmp_path):
    twice = tar(tmp_path / "a.tar", [("a.txt", b"1"), ("a.txt", b"2")])
    with pytest.raises(BrokenFile, match="twice"):
        walked(stream(twice, "text"))
    apart = tar(tmp_path / "b.tar", [("a.txt", b"1"), ("b.txt", b"2"), ("a.png", picture(0))])
    with pytest.raises(BrokenFile, match="two places"):
        walked(stream(apart, "text"))


def test_an_endless_stream_of_nothing_ends(tmp_path):
    (tmp_path / "a.jsonl").write_text("\n", encoding="utf-8")
    assert walked(stream(tmp_path / "a.jsonl", "text", endless=True)) == ([], [])


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"path": "{path}#5"}, "takes a part by number"),
        ({"split": "[:50%]"}, "takes a part by number"),
        ({"split": "train"}, "no named splits"),
        ({"streaming": False}, "not read in order"),
        ({"kind": "scenes"}, "not read in order"),
        ({"columns": {"x": "y"}}, "names x"),
    ],
)
def test_what_a_stream_cannot_do_is_refused(tmp_path, changes, part):
    path = made(tmp_path, "jsonl")
    keys = {"kind": "captions", "path": path, "streaming": True} | changes
    keys["path"] = keys["path"].replace("{path}", path)
    assert part in tiny.refused(lambda: build_stream([SourceSection(**keys)]))


def test_a_json_list_cannot_be_streamed(tmp_path):
    (tmp_path / "a.json").write_text("[]", encoding="utf-8")
    with pytest.raises(BrokenFile, match=r"cannot be read in order .*jsonl"):
        next(stream(tmp_path / "a.json"))


def test_a_split_of_a_streamed_data_set(tmp_path):
    datasets.DatasetDict(train=data_set(), test=data_set(3)).save_to_disk(tmp_path / "two")
    path = f"hf:{tmp_path / 'two'}"
    assert len(list(stream(path, split="test"))) == 3
    with pytest.raises(BrokenFile, match="has no split 'tset'"):
        next(stream(path, split="tset"))


def test_pictures_of_a_stream_can_be_opened_later(tmp_path):
    """A local shard's stay in it; those of a packed one come along."""
    for kind in ("tar", "tar.gz"):
        records = list(stream(made(tmp_path, kind)))
        assert open_image(records[4].images[0]).tobytes() == pixels(picture(4))


def test_a_stream_of_a_quarantine(tmp_path, caplog):
    path = made(tmp_path, "tar", files=1)
    with tarfile.open(tmp_path / "0.tar") as archive:
        key = archive.getnames()[2].partition(".")[0]
    quarantine = Quarantine([Quarantined("0", key, 1, "x")])
    records = stream(path, quarantine=quarantine, name="0")
    assert [record.id for record in records].count(key) == 0
    assert "1 records are left out" in caplog.text and records.left_out == 1


# --- mixtures -------------------------------------------------------------------------------------


def texts(tmp_path, **sizes):
    return [
        jsonl(tmp_path / f"{name}.jsonl", [{"text": f"{name}{n}"} for n in range(size)])
        for name, size in sizes.items()
    ]


def mixed(files, weights, *, endless):
    sections = [
        SourceSection(kind="text", path=str(file), streaming=True, weight=weight)
        for file, weight in zip(files, weights, strict=True)
    ]
    return build_stream(sections, endless=endless)


def test_shares_of_a_mixture_hold_at_every_moment(tmp_path):
    """Never further than one record from its share."""
    mixture = mixed(texts(tmp_path, a=5, b=7), [3.0, 1.0], endless=True)
    assert isinstance(mixture, StreamMixture) and mixture.names == ["a", "b"]
    sources = [next(mixture).source for _ in range(400)]
    for taken in range(1, 401):
        assert abs(sources[:taken].count("a") - 0.75 * taken) <= 1


def test_a_mixture_of_one_pass_gives_everything_once(tmp_path):
    mixture = mixed(texts(tmp_path, a=5, b=17), [1.0, 1.0], endless=False)
    found = [said(record)[0] for record in mixture]
    assert sorted(found) == sorted([f"a{n}" for n in range(5)] + [f"b{n}" for n in range(17)])
    assert found[:4] == ["a0", "b0", "a1", "b1"]


def test_a_mixture_goes_on_exactly(tmp_path):
    files = texts(tmp_path, a=5, b=7, c=3)
    (tmp_path / "b.jsonl").write_text('{"text": "b0"}\nno\n{"text": "b2"}\n', encoding="utf-8")

    def events(mixture, count):
        found = []
        for _ in range(count):
            try:
                found.append(said(next(mixture))[0])
            except ValueError:
                found.append("bad")
        return found

    whole = events(mixed(files, [3.0, 2.0, 0.5], endless=True), 60)
    assert whole.count("bad") > 2
    for taken in range(0, 60, 7):
        first = mixed(files, [3.0, 2.0, 0.5], endless=True)
        assert events(first, taken) == whole[:taken]
        again = mixed(files, [3.0, 2.0, 0.5], endless=True)
        again.load_state_dict(json.loads(json.dumps(first.state_dict())))
        assert events(again, 60 - taken) == whole[taken:]


def test_a_place_of_other_streams_is_refused(tmp_path):
    files = texts(tmp_path, a=5, b=7)
    state = mixed(files, [1.0, 1.0], endless=True).state_dict()
    text = tiny.refused(lambda: mixed(files[:1], [1.0], endless=True).load_state_dict(state))
    assert "2 streams" in text


def test_a_share_of_a_mixture(tmp_path):
    files = texts(tmp_path, a=6, b=8)
    found = [
        said(record)[0]
        for index in range(2)
        for record in mixed(files, [1.0, 1.0], endless=False).shard(index, 2)
    ]
    assert len(found) == len(set(found)) == 14
