"""Every kind of file in every form, against readers of others: tarfile, pyarrow, datasets.  Exact."""

import base64
import io
import itertools
import json
import logging
import random
import tarfile

import numpy as np
import pytest
from PIL import Image

import tiny
from eve_vlm.data.picture_ref import open_image
from eve_vlm.data.records import text_of
from eve_vlm.data.sources import build_mixture, build_source, read_quarantine
from eve_vlm.data.sources.paths import expand, read_split, slice_of
from eve_vlm.train.sections import SourceSection

pa = pytest.importorskip("pyarrow", reason="needs the extra data")
pq = pytest.importorskip("pyarrow.parquet")
datasets = pytest.importorskip("datasets", reason="needs the extra data")


def source(kind, path, **more):
    return build_source(kind, path=str(path), seed=more.pop("seed", 0), **more)


def picture(number, size=(9, 7)):
    """The bytes of a PNG that no other number gives."""
    pixels = np.random.default_rng(number).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def pixels(data):
    return Image.open(io.BytesIO(data)).convert("RGB").tobytes()


def opened(record):
    return [open_image(image).tobytes() for image in record.images]


def said(record):
    return [text_of(message) for message in record.messages]


def jsonl(file, samples):
    file.write_text("".join(json.dumps(one) + "\n" for one in samples), encoding="utf-8")
    return file


def tar(file, members):
    with tarfile.open(file, "w") as archive:
        for name, data in members:
            facts = tarfile.TarInfo(name)
            facts.size = len(data)
            archive.addfile(facts, io.BytesIO(data))
    return file


# --- forms ----------------------------------------------------------------------------------------


def test_captions(tmp_path):
    for number in range(3):
        (tmp_path / f"{number}.png").write_bytes(picture(number))
    samples = [{"image": f"{number}.png", "caption": f" cap {number}\n"} for number in range(2)]
    samples.append({"id": 7, "image": ["1.png", "2.png"], "caption": "two"})
    records = source("captions", jsonl(tmp_path / "a.jsonl", samples))
    first, _, last = records
    assert (first.id, last.id, first.source) == ("0", "7", "a")
    assert first.messages == [
        {"role": "user", "content": [{"type": "image"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "cap 0"}]},
    ]
    assert opened(last) == [pixels(picture(1)), pixels(picture(2))]
    assert last.messages[0]["content"] == [{"type": "image"}, {"type": "image"}]


def test_text_is_learnt_as_it_is(tmp_path):
    (tmp_path / "a.txt").write_text("one\r\n\n  two words \n", encoding="utf-8")
    (tmp_path / "a.md").write_text("# Whole\n\nfile", encoding="utf-8")
    lines = source("text", tmp_path / "a.txt")
    assert [said(record) for record in lines] == [["one"], ["two words"]]
    assert all(record.format == "plain" and not record.images for record in lines)
    assert said(source("text", tmp_path / "a.md")[0]) == ["# Whole\n\nfile"]
    file = jsonl(tmp_path / "a.jsonl", [{"text": "three"}, {"body": "four"}])
    assert said(source("text", file)[0]) == ["three"]
    assert "lacks text or txt" in tiny.refused(lambda: source("text", file)[1])
    assert said(source("text", file, columns={"text": "body"})[1]) == ["four"]


def data_url(number):
    return "data:image/png;base64," + base64.b64encode(picture(number)).decode()


MESSAGES = {
    "marks": ("a <image> b <image>", ["0.png", "1.png"]),
    "parts": (
        [
            {"type": "text", "text": "a "},
            {"type": "image"},
            {"type": "text", "text": " b "},
            {"type": "image", "text": None},
        ],
        ["0.png", "1.png"],
    ),
    "names in parts": (
        [
            {"type": "text", "text": "a "},
            {"type": "image", "image": "0.png"},
            {"type": "text", "text": " b "},
            {"type": "image", "path": "1.png"},
        ],
        None,
    ),
    "urls": (
        [
            {"type": "text", "text": "a "},
            {"type": "image_url", "image_url": {"url": data_url(0)}},
            {"type": "text", "text": " b "},
            {"type": "image_url", "image_url": data_url(1)},
        ],
        None,
    ),
    "mixed": (
        [
            {"type": "text", "text": "a "},
            {"type": "image", "url": data_url(0)},
            {"type": "text", "text": " b <image>"},
        ],
        "1.png",
    ),
}


@pytest.mark.parametrize("case", MESSAGES)
def test_messages(tmp_path, case):
    content, images = MESSAGES[case]
    for number in range(2):
        (tmp_path / f"{number}.png").write_bytes(picture(number))
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": content},
        {"role": "assistant", "content": "yes"},
    ]
    sample = {"messages": messages} | ({"images": images} if images else {})
    record = source("messages", jsonl(tmp_path / "a.jsonl", [sample]))[0]
    assert [message["role"] for message in record.messages] == ["system", "user", "assistant"]
    assert record.messages[1]["content"] == [
        {"type": "text", "text": "a "},
        {"type": "image"},
        {"type": "text", "text": " b "},
        {"type": "image"},
    ]
    assert opened(record) == [pixels(picture(0)), pixels(picture(1))]


BAD = [
    ("messages", {"messages": "hi"}, "messages are a str"),
    ("messages", {"messages": [{"role": "tool", "content": "x"}]}, "'tool' is unknown"),
    ("messages", {"messages": [{"role": "user", "content": 3}]}, "3 where a text"),
    ("messages", {"messages": [{"role": "user", "content": [{"type": "video"}]}]}, "video"),
    ("messages", {"messages": ["hi"]}, "role 'hi'"),
    (
        "messages",
        {"messages": [{"role": "user", "content": [{"type": "image", "image": 3}]}]},
        "3 where",
    ),
    (
        "messages",
        {
            "messages": [
                {"role": "user", "content": [{"type": "image", "image": "data:image/png,x"}]}
            ]
        },
        "not base64",
    ),
    ("messages", {}, "lacks messages or conversations"),
    ("captions", {"image": "a.png"}, "lacks caption or text or txt"),
    ("captions", {"caption": "x"}, "no picture"),
    ("captions", {"image": "a.png", "caption": ["x"]}, "caption is"),
    ("captions", {"image": "../a.png", "caption": "x"}, "lies outside of"),
    ("captions", {"image": "x/../../a.png", "caption": "x"}, "lies outside of"),
    ("captions", {"image": "/etc/a.png", "caption": "x"}, "lies outside of"),
    ("captions", {"image": {"path": None}, "caption": "x"}, "None where"),
    ("text", {"text": 3}, "its text is '3'"),
    ("text", "hello", "it is a str"),
    ("llava", {"conversations": "x"}, "a list of turns"),
]


@pytest.mark.parametrize(("kind", "sample", "part"), BAD)
def test_records_that_are_not_of_their_form(tmp_path, kind, sample, part):
    file = jsonl(tmp_path / "a.jsonl", [sample])
    text = tiny.refused(lambda: source(kind, file)[0])
    assert part in text and f"Record in {file}, line 1:" in text


def test_columns(tmp_path):
    (tmp_path / "a.png").write_bytes(picture(0))
    file = jsonl(tmp_path / "a.jsonl", [{"key": 5, "pic": "a.png", "alt": "words"}])
    columns = {"id": "key", "image": "pic", "caption": "alt"}
    record = source("captions", file, columns=columns)[0]
    assert (record.id, said(record)) == ("5", ["", "words"])
    text = tiny.refused(lambda: source("captions", file, columns={"captoin": "alt"}))
    assert "captoin" in text and "use id, image, caption" in text


# --- pictures -------------------------------------------------------------------------------------


def test_where_pictures_lie(tmp_path):
    """A folder, a whole path in it, a tar, a URL, and a zip behind a URL: the same pixels."""
    import zipfile

    folder = tmp_path / "pictures"
    folder.mkdir()
    (folder / "a.png").write_bytes(picture(0))
    tar(tmp_path / "p.tar", [("./a.png", picture(0))])
    with zipfile.ZipFile(tmp_path / "p.zip", "w") as archive:
        archive.write(folder / "a.png", "in/a.png")
    file = jsonl(tmp_path / "a.jsonl", [{"image": "a.png", "caption": "x"}])
    whole = jsonl(tmp_path / "b.jsonl", [{"image": str(folder / "a.png"), "caption": "x"}])
    url = jsonl(tmp_path / "c.jsonl", [{"image": f"file://{folder}/a.png", "caption": "x"}])
    for data, place in (
        (file, folder),
        (file, tmp_path / "p.tar"),
        (file, f"file://{folder}"),
        (file, f"zip://in::{tmp_path}/p.zip"),
        (whole, folder),
        (whole, "/"),
        (whole, None),
        (url, None),
    ):
        records = source("captions", data, image_folder=None if place is None else str(place))
        assert opened(records[0]) == [pixels(picture(0))], place
    lost = jsonl(tmp_path / "d.jsonl", [{"image": "b.png", "caption": "x"}])
    records = source("captions", lost, image_folder=str(tmp_path / "p.tar"))
    assert "holds no picture 'b.png'" in tiny.refused(lambda: records[0])
    records = source("captions", lost)
    assert "is not a file" in tiny.refused(lambda: opened(records[0]))


def test_data_behind_a_url(tmp_path):
    import fsspec

    memory = fsspec.filesystem("memory")
    memory.pipe("/eve/a.jsonl", b'{"image": "a.png", "caption": "x"}\n')
    memory.pipe("/eve/a.png", picture(0))
    with memory.open("/eve/a.tar", "wb") as file:
        file.write(tar(tmp_path / "a.tar", [("k.png", picture(1)), ("k.txt", b"y")]).read_bytes())
    assert opened(source("captions", "memory://eve/a.jsonl")[0]) == [pixels(picture(0))]
    assert opened(source("captions", "memory://eve/*.tar")[0]) == [pixels(picture(1))]
    text = tiny.refused(lambda: source("captions", "memory://eve/none.jsonl"))
    assert "none.jsonl is not a file" in text


# --- tar ------------------------------------------------------------------------------------------


def shard(file, first, count):
    members = []
    for number in range(first, first + count):
        members.append((f"d/{number:04}.png", picture(number)))
        members.append((f"d/{number:04}.txt", f"caption {number}\n".encode()))
    return tar(file, members)


def test_shards_against_tarfile(tmp_path):
    for number in range(3):
        shard(tmp_path / f"{number:02}.tar", 10 * number, 10 - number)
    records = source("captions", tmp_path / "{00..02}.tar")
    expected = {}
    for file in sorted(tmp_path.glob("*.tar")):
        with tarfile.open(file) as archive:
            for member in archive.getmembers():
                key, _, ending = member.name.partition(".")
                expected.setdefault(key, {})[ending] = archive.extractfile(member).read()
    assert len(records) == len(expected) == 27
    for record, (key, parts) in zip(records, expected.items(), strict=True):
        assert record.id == key and opened(record) == [pixels(parts["png"])]
        assert said(record) == ["", parts["txt"].decode().strip()]
        assert record.source == "{00..02}"


def test_json_in_a_shard(tmp_path):
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "That."}]
    sample = {"id": "own", "image": "elsewhere.jpg", "conversations": turns}
    members = [("a.png", picture(0)), ("a.json", json.dumps(sample).encode())]
    members += [("b.1.png", picture(1)), ("b.0.png", picture(2)), ("b.json", b'{"caption": "c"}')]
    file = tar(tmp_path / "a.tar", members)
    record = source("llava", file)[0]
    assert (record.id, said(record)) == ("own", ["What?", "That."])
    assert opened(record) == [pixels(picture(0))]
    two = source("captions", file)[1]
    assert (two.id, said(two)) == ("b", ["", "c"])
    assert opened(two) == [pixels(picture(2)), pixels(picture(1))]


def test_texts_in_a_shard(tmp_path):
    file = tar(tmp_path / "a.tar", [("a.txt", b"one"), ("b.txt", "zw\u00f6lf".encode())])
    assert [said(record) for record in source("text", file)] == [["one"], ["zw\u00f6lf"]]


def test_long_names_in_a_shard(tmp_path):
    name = "x" * 150 + "/" + "y" * 90
    file = tar(tmp_path / "a.tar", [(f"{name}.png", picture(0)), (f"{name}.txt", b"c")])
    assert source("captions", file)[0].id == name


def cut(file, size):
    file.write_bytes(file.read_bytes()[:size])


def test_shards_that_are_not_whole(tmp_path):
    whole = shard(tmp_path / "a.tar", 0, 3).read_bytes()
    with tarfile.open(tmp_path / "a.tar") as archive:
        members = archive.getmembers()
    inside, between = members[3].offset_data + 5, members[4].offset
    for size in (inside, between, between + 100, len(whole) // 512 * 512 - 20 * 512 + 200):
        (tmp_path / "b.tar").write_bytes(whole[:size])
        text = tiny.refused(lambda: source("captions", tmp_path / "b.tar"))
        assert "b.tar is no whole tar" in text, size
    spoiled = bytearray(whole)
    spoiled[members[3].offset : members[3].offset + 512] = b"\xff" * 512
    (tmp_path / "c.tar").write_bytes(spoiled)
    assert "no whole tar" in tiny.refused(lambda: source("captions", tmp_path / "c.tar"))
    (tmp_path / "d.tar").write_bytes(b"")
    assert "no whole tar" in tiny.refused(lambda: source("captions", tmp_path / "d.tar"))
    (tmp_path / "e.tar").write_bytes(b"hello" * 1000)
    assert "no whole tar" in tiny.refused(lambda: source("captions", tmp_path / "e.tar"))
    assert "compressed" in tiny.refused(lambda: source("captions", tar_gz(tmp_path)))


def tar_gz(folder):
    import gzip

    (folder / "f.tar.gz").write_bytes(gzip.compress(shard(folder / "f.tar", 0, 2).read_bytes()))
    return folder / "f.tar.gz"


def test_shards_that_mix_samples_up(tmp_path):
    twice = tar(tmp_path / "a.tar", [("a.txt", b"1"), ("a.txt", b"2")])
    assert "'a.txt' twice" in tiny.refused(lambda: source("text", twice))
    apart = tar(tmp_path / "b.tar", [("a.txt", b"1"), ("b.txt", b"2"), ("a.png", picture(0))])
    assert "'a' in two places" in tiny.refused(lambda: source("text", apart))
    with tarfile.open(tmp_path / "c.tar", "w") as archive:
        link = tarfile.TarInfo("a.png")
        link.type, link.linkname = tarfile.SYMTYPE, "b.png"
        archive.addfile(link)
    assert "as a link" in tiny.refused(lambda: source("captions", tmp_path / "c.tar"))


# --- parquet --------------------------------------------------------------------------------------


def parquet(file, rows, **more):
    pq.write_table(pa.Table.from_pylist(rows), file, **more)
    return file


def test_parquet_against_pyarrow(tmp_path):
    dice = random.Random(0)
    rows = [
        {
            "id": f"r{number}",
            "image": {"bytes": picture(number), "path": None},
            "caption": "".join(dice.choice('ab"\\é🐻,') for _ in range(20)),
            "unused": number,
        }
        for number in range(23)
    ]
    file = parquet(tmp_path / "a.parquet", rows, row_group_size=5)
    records = source("captions", file)
    expected = pq.read_table(file).to_pylist()
    assert len(records) == 23
    for index in dice.sample(range(23), 23):  # in any order
        record = records[index]
        assert record.id == expected[index]["id"]
        assert said(record)[1] == expected[index]["caption"]
        assert opened(record) == [pixels(expected[index]["image"]["bytes"])]
        assert records[index].images[0].size() == (9, 7)


@pytest.mark.parametrize("kind", ["bytes", "path", "list", "some"])
def test_pictures_of_parquet_in_every_type(tmp_path, kind):
    for number in range(4):
        (tmp_path / f"{number}.png").write_bytes(picture(number))
    value = {
        "bytes": lambda number: picture(number),
        "path": lambda number: f"{number}.png",
        "list": lambda number: [{"bytes": picture(number), "path": "x"}],
        "some": lambda number: {"bytes": picture(number)} if number % 2 else None,
    }[kind]
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
    rows = [{"image": value(number), "messages": turns} for number in range(4)]
    records = source("messages", parquet(tmp_path / "a.parquet", rows))
    for number, record in enumerate(records):
        there = kind != "some" or number % 2
        assert opened(record) == ([pixels(picture(number))] if there else [])


def test_parquet_without_a_column(tmp_path):
    rows = [{"img": b"x", "captoin": "y"}]
    file = parquet(tmp_path / "a.parquet", rows)
    text = tiny.refused(lambda: source("captions", file))
    assert "no column caption or text or txt" in text and "did you mean 'captoin'?" in text
    text = tiny.refused(lambda: source("captions", file, columns={"image": "pic"}))
    assert "no column pic for image" in text and "img, captoin" in text
    columns = {"image": "img", "caption": "captoin"}
    assert said(source("captions", file, columns=columns)[0]) == ["", "y"]


def test_parquet_that_is_not_whole(tmp_path):
    file = parquet(tmp_path / "a.parquet", [{"text": "x" * 100}] * 1000)
    cut(file, 500)
    assert "no whole Parquet file" in tiny.refused(lambda: source("text", file))
    (tmp_path / "b.parquet").write_bytes(b"")
    text = tiny.refused(lambda: source("text", tmp_path / "b.parquet"))
    assert "no whole Parquet file" in text


def test_heavy_row_groups_are_said(tmp_path, monkeypatch, caplog):
    from eve_vlm.data.sources import parquet as module

    file = parquet(tmp_path / "a.parquet", [{"image": picture(0), "caption": "x"}] * 4)
    source("captions", file)
    assert "row groups" not in caplog.text
    monkeypatch.setattr(module, "HEAVY", 100)
    source("captions", file)
    assert "smaller row groups" in caplog.text


# --- Hugging Face ---------------------------------------------------------------------------------


def hub_rows(count=7):
    return {
        "image": [{"bytes": picture(number), "path": None} for number in range(count)],
        "caption": [f"c{number}" for number in range(count)],
    }


def data_set(count=7):
    features = datasets.Features({"image": datasets.Image(), "caption": datasets.Value("string")})
    return datasets.Dataset.from_dict(hub_rows(count), features=features)


def test_a_saved_data_set(tmp_path):
    data = data_set()
    data.save_to_disk(tmp_path / "one")
    datasets.DatasetDict(train=data, test=data_set(3)).save_to_disk(tmp_path / "two")
    for path, split, size in (
        ("one", None, 7),
        ("two", "train", 7),
        ("two", "test", 3),
        ("two", "train[:3]", 3),
    ):
        records = source("captions", f"hf:{tmp_path / path}", split=split)
        assert len(records) == size
        for number, record in enumerate(records):
            assert said(record) == ["", data[number]["caption"]]
            assert opened(record) == [data[number]["image"].convert("RGB").tobytes()]


def test_pictures_of_a_data_set_stay_undecoded(tmp_path, monkeypatch):
    data_set().save_to_disk(tmp_path / "one")
    records = source("captions", f"hf:{tmp_path / 'one'}")

    def fail(*args, **more):
        raise AssertionError("a picture was decoded")

    monkeypatch.setattr(datasets.Image, "decode_example", fail)
    assert len(records[3].images) == 1


def test_a_folder_that_load_dataset_reads(tmp_path):
    folder = tmp_path / "set"
    folder.mkdir()
    rows = [{"text": f"t{number}"} for number in range(5)]
    parquet(folder / "train-00000.parquet", rows)
    records = source("text", f"hf:{folder}", split="train")
    assert [said(record)[0] for record in records] == [f"t{number}" for number in range(5)]


def test_data_sets_that_are_not_there(tmp_path):
    datasets.DatasetDict(train=data_set(), test=data_set(3)).save_to_disk(tmp_path / "two")
    path = f"hf:{tmp_path / 'two'}"
    text = tiny.refused(lambda: source("captions", path, split="trian"))
    assert "has no split 'trian'" in text and "did you mean 'train'?" in text
    assert "several splits" in tiny.refused(lambda: source("captions", path))
    data_set().save_to_disk(tmp_path / "one")
    text = tiny.refused(lambda: source("captions", f"hf:{tmp_path / 'one'}", split="train"))
    assert "has no splits" in text
    text = tiny.refused(lambda: source("text", f"hf:{tmp_path / 'one'}"))
    assert "no column text or txt" in text
    assert "cannot be loaded" in tiny.refused(lambda: source("text", f"hf:{tmp_path / 'none'}"))


# --- files, splits, caps --------------------------------------------------------------------------


def test_several_files(tmp_path):
    for name in ("b", "a", "c"):
        jsonl(tmp_path / f"{name}.jsonl", [{"text": f"{name}{number}"} for number in range(2)])
    everything = [said(record)[0] for record in source("text", tmp_path / "*.jsonl")]
    assert everything == ["a0", "a1", "b0", "b1", "c0", "c1"]
    chosen = source("text", tmp_path / "{c,a}.jsonl")
    assert [said(record)[0] for record in chosen] == ["c0", "c1", "a0", "a1"]
    assert [record.id for record in chosen] == ["c:0", "c:1", "a:0", "a:1"]


def test_braces_and_patterns(tmp_path):
    assert expand("x{08..11}.tar") == ["x08.tar", "x09.tar", "x10.tar", "x11.tar"]
    assert expand("{a,b}{1..2}") == ["a1", "a2", "b1", "b2"]
    for path, part in (
        (str(tmp_path / "*.tar"), "fits no file"),
        (str(tmp_path / "{00..02}.jsonl"), "00.jsonl is not a file"),
        ("{5..1}.tar", "counts down"),
        ("{a,a}.tar", "twice"),
        (str(tmp_path / "a.jsonl"), "is not a file"),
        (str(tmp_path / "a.csv"), "is not a file"),
    ):
        assert part in tiny.refused(lambda path=path: source("llava", path))
    (tmp_path / "a.csv").write_text("x", encoding="utf-8")
    assert "no kind that holds llava" in tiny.refused(lambda: source("llava", tmp_path / "a.csv"))
    (tmp_path / "odd[1].jsonl").write_text('{"text": "x"}\n', encoding="utf-8")
    assert len(source("text", tmp_path / "odd[1].jsonl")) == 1


@pytest.mark.parametrize("size", [*range(1, 40), 199, 1000, 665_298, 33_000_000])
def test_slices_that_meet_hold_every_record_once(size):
    for cuts in (["50%"], ["29%", "57.5%"], ["1%", "33%", "99%"], ["10%", str(size // 2)]):
        try:
            bounds = sorted(cuts, key=lambda cut: slice_of(read_split(f"[:{cut}]"), size).stop)
            parts = [
                slice_of(read_split(f"[{begin}:{end}]"), size)
                for begin, end in itertools.pairwise(["", *bounds, ""])
            ]
        except ValueError as error:
            assert "holds none" in str(error) and size < 40
            continue
        assert parts[0].start == 0 and parts[-1].stop == size
        assert all(left.stop == right.start for left, right in itertools.pairwise(parts))


@pytest.mark.parametrize("split", ["[:95%]", "[2:6]", "[95%:]", "[:]", "[3:]", "[ :40%]"])
def test_slices_against_lists(tmp_path, split):
    """The same as datasets' own reading of the same words, where it has one."""
    rows = [{"text": f"t{number}"} for number in range(20)]
    folder = tmp_path / "set"
    folder.mkdir()
    jsonl(folder / "train.jsonl", rows)
    ours = source("text", folder / "train.jsonl", split=split)
    theirs = datasets.load_dataset(
        "json", data_files=str(folder / "train.jsonl"), split=f"train{split.replace(' ', '')}"
    )
    assert [said(record)[0] for record in ours] == list(theirs["text"])


@pytest.mark.parametrize(
    ("split", "part"),
    [
        ("[5:100]", "reaches to record 100, but there are 20"),
        ("[7:7]", "holds none"),
        ("[9:3]", "holds none"),
        ("[a:b]", "is not understood"),
        ("[-3:]", "is not understood"),
        ("[3]", "is not understood"),
        ("train", "no named splits"),
    ],
)
def test_splits_that_do_not_fit(tmp_path, split, part):
    file = jsonl(tmp_path / "a.jsonl", [{"text": "x"}] * 20)
    assert part in tiny.refused(lambda: source("text", file, split=split))


def test_a_number_of_records_is_drawn_by_the_seed(tmp_path):
    file = jsonl(tmp_path / "a.jsonl", [{"text": f"{number}"} for number in range(100)])

    def words(path, **more):
        return [int(said(record)[0]) for record in source("text", path, **more)]

    drawn = words(f"{file}#30", seed=1)
    assert drawn == words(f"{file}#30", seed=1) == sorted(set(drawn)) and len(drawn) == 30
    assert drawn != words(f"{file}#30", seed=2)
    inside = words(f"{file}#30", seed=1, split="[50:]")
    assert len(inside) == 30 and min(inside) >= 50
    assert words(f"{file}#100") == list(range(100))
    for cap in (101, 0):
        assert "there are 100" in tiny.refused(lambda cap=cap: source("text", f"{file}#{cap}"))


def test_kinds_and_options():
    assert "kind is 'lava'" in tiny.refused(lambda: source("lava", "a.json"))
    text = tiny.refused(lambda: build_source("llava", path=None, seed=0))
    assert "path is missing" in text


# --- mixtures from a recipe -----------------------------------------------------------------------


def sections(tmp_path, **more):
    files = [
        jsonl(tmp_path / f"{name}.jsonl", [{"text": f"{name}{n}"} for n in range(size)])
        for name, size in (("a", 10), ("b", 90))
    ]
    return [
        SourceSection(kind="text", path=str(file), **{k: v[index] for k, v in more.items()})
        for index, file in enumerate(files)
    ]


def test_weights_are_shares(tmp_path):
    mixture = build_mixture(sections(tmp_path, weight=[3.0, 1.0]), seed=0)
    assert len(mixture) == 100 and mixture.names == ["a", "b"]
    used = [mixture[index].source for index in range(100)]
    assert (used.count("a"), used.count("b")) == (75, 25)
    uses = [[mixture[i].id for i in range(75)].count(str(number)) for number in range(10)]
    assert set(uses) == {7, 8}  # as evenly as 75 uses of 10 records can be
    rows = mixture.describe()
    assert [tuple(row) for row in rows] == [("a", 10, 75, 0.75), ("b", 90, 25, 0.25)]
    assert len({mixture[index].id for index in range(75, 100)}) == 25


def test_repeats_and_names(tmp_path):
    mixture = build_mixture(sections(tmp_path, repeat=[2.0, 0.5], name=["x", "y"]), seed=0)
    assert [tuple(row)[:3] for row in mixture.describe()] == [("x", 10, 20), ("y", 90, 45)]
    assert sum(row.share for row in mixture.describe()) == 1
    assert mixture.locate(19) == (0, 9) and mixture.locate(21) == (1, 2)


def test_the_fingerprint_follows_the_data(tmp_path):
    first = build_mixture(sections(tmp_path), seed=0).fingerprint
    assert build_mixture(sections(tmp_path, split=[None, None]), seed=1).fingerprint != ""
    assert build_mixture(sections(tmp_path, repeat=[2.0, 1.0]), seed=0).fingerprint != first
    assert build_mixture(sections(tmp_path, split=["[:5]", None]), seed=0).fingerprint != first
    made = sections(tmp_path)
    again = build_mixture(made, seed=0).fingerprint
    assert build_mixture(made, seed=0).fingerprint == again
    jsonl(tmp_path / "a.jsonl", [{"text": "other"}] * 10)
    assert build_mixture(made, seed=0).fingerprint != again


# --- quarantine -----------------------------------------------------------------------------------


def listed(tmp_path, *entries):
    file = tmp_path / "quarantine.jsonl"
    names = ("source", "id", "index", "reason")
    return jsonl(file, [dict(zip(names, entry, strict=True)) for entry in entries])


def test_a_quarantine_leaves_out_what_it_names(tmp_path, caplog):
    caplog.set_level(logging.WARNING)
    file = listed(
        tmp_path, ("a", "3", 3, "empty"), ("a", "7", 7, "empty"), ("b", "0", 0, "no picture")
    )
    mixture = build_mixture(sections(tmp_path), seed=0, quarantine=file)
    assert len(mixture) == 97
    ids = [(mixture[i].source, mixture[i].id) for i in range(97)]
    assert not {("a", "3"), ("a", "7"), ("b", "0")} & set(ids)
    assert "a: 2 of 10 records are left out" in caplog.text and "2 x empty" in caplog.text
    assert "b: 1 of 90" in caplog.text
    quarantine = read_quarantine(file)
    assert ("a", "3") in quarantine and ("b", "3") not in quarantine and len(quarantine) == 3
    assert set(quarantine) == {("a", "3"), ("a", "7"), ("b", "0")}


def test_ids_that_repeat_do_not_take_others_along(tmp_path):
    file = jsonl(tmp_path / "a.jsonl", [{"id": "same", "text": f"{n}"} for n in range(3)])
    section = SourceSection(kind="text", path=str(file))
    quarantine = listed(tmp_path, ("a", "same", 1, "empty"))
    mixture = build_mixture([section], seed=0, quarantine=quarantine)
    assert [said(mixture[index])[0] for index in range(len(mixture))] == ["0", "2"]


@pytest.mark.parametrize(
    ("entries", "part"),
    [
        ([("a", "4", 3, "x")], "record 3 of a, but that is '3'"),
        ([("a", "99", 99, "x")], "does not exist"),
        ([("c", "3", 3, "x")], "data set 'c', which data.sources does not have"),
        ([("a", 3, 3, "x")], "id must be a text"),
        ([("a", "3", "3", "x")], "index a whole number"),
    ],
)
def test_a_quarantine_of_other_data_is_refused(tmp_path, entries, part):
    file = listed(tmp_path, *entries)
    made = sections(tmp_path)
    assert part in tiny.refused(lambda: build_mixture(made, seed=0, quarantine=file))


def test_a_quarantine_that_cannot_be_read(tmp_path):
    made = sections(tmp_path)
    text = tiny.refused(lambda: build_mixture(made, seed=0, quarantine=tmp_path / "none"))
    assert "is not a file" in text
    (tmp_path / "q").write_text('{"source": "a"}\n', encoding="utf-8")
    text = tiny.refused(lambda: build_mixture(made, seed=0, quarantine=tmp_path / "q"))
    assert "line 1" in text and "source, id, index, reason" in text
