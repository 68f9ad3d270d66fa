"""The index of records: its facts against opening everything, the cache, and the command.  Exact."""

import json

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from eve_vlm.cli import app
from eve_vlm.data import record_index
from eve_vlm.data.indexing import index_sources
from eve_vlm.data.picture_ref import PictureFile, open_image, size_of_image
from eve_vlm.data.record_index import kept_index
from eve_vlm.data.records import text_of
from eve_vlm.data.sources import build_source


def turn(role, value):
    return {"from": role, "value": value}


@pytest.fixture
def data_file(tmp_path):
    """1203 records of 0 to 3 pictures; one is malformed, one picture missing and one is no picture."""
    dice = np.random.default_rng(0)
    for number in range(10):
        width, height = dice.integers(1, 90, 2).tolist()
        Image.new("RGB", (width, height)).save(tmp_path / f"{number}.png")
    (tmp_path / "bad.png").write_bytes(b"no picture")
    samples = []
    for number in range(1203):
        names = [f"{dice.integers(10)}.png" for _ in range(dice.integers(0, 4))]
        marks = "<image>" * len(names)
        samples.append(
            {
                "id": f"r{number}",
                "image": names,
                "conversations": [turn("human", f"{marks}What?"), turn("gpt", "é" * (number % 7))],
            }
        )
    samples[17] = {"id": "broken"}
    samples[18]["image"] = ["none.png", "1.png"]
    samples[19]["image"] = ["bad.png"]
    file = tmp_path / "mix.json"
    file.write_text(json.dumps(samples), encoding="utf-8")
    return file


def source(file, **more):
    return build_source("llava", path=str(file), seed=0, **more)


def expected(records, number):
    """Letters and sizes as opening everything gives them."""
    try:
        record = records[number]
    except ValueError:
        return -1, []
    sizes = []
    for image in record.images:
        try:
            sizes.append(open_image(image).size)
        except ValueError:
            sizes.append((0, 0))
    return sum(len(text_of(message)) for message in record.messages), sizes


@pytest.mark.parametrize("workers", [0, 2])
def test_facts_of_all_records(data_file, workers):
    told = []
    records = source(data_file)
    truth = [expected(records, number) for number in range(1203)]
    (summary,) = index_sources([records], workers=workers, progress=told.append)
    index = kept_index(records.fingerprint)
    found = [
        (int(index.characters[number]), [tuple(size) for size in index.sizes_of(number).tolist()])
        for number in range(1203)
    ]
    assert found == truth and sum(told) == 1203
    sizes = [size for _, sizes in truth for size in sizes]
    letters = sorted(count for count, _ in truth if count >= 0)
    assert (summary.name, summary.records, summary.unread) == ("mix", 1203, 1)
    assert (summary.pictures, summary.missing) == (len(sizes), 2)
    # Tolerance: the last digits of a sum of floats.
    assert summary.megapixels == pytest.approx(sum(w * h for w, h in sizes) / 1e6, rel=1e-12)
    assert summary.characters[0] == letters[len(letters) // 2] and summary.characters[3] == 11


def test_sources_know_sizes_of_an_index(data_file, monkeypatch):
    """Then no picture file is opened; those that could not be read stay unknown."""
    plain = source(data_file)
    truth = [expected(plain, number)[1] for number in range(100)]
    index_sources([plain], workers=0)
    indexed = source(data_file)
    assert indexed.fingerprint == plain.fingerprint

    def fail(self):
        raise AssertionError("a header was read")

    monkeypatch.setattr(PictureFile, "header_size", fail)
    for number in range(100):
        if number in (17, 18, 19):
            continue
        assert [size_of_image(image) for image in indexed[number].images] == truth[number]
    assert [image.known_size is None for image in indexed[18].images] == [True, False]


def test_what_was_indexed_is_not_read_again(data_file, monkeypatch):
    first = index_sources([source(data_file)], workers=0)

    def fail(records, numbers):
        raise AssertionError("it was indexed again")

    monkeypatch.setattr("eve_vlm.data.indexing.facts_of", fail)
    assert index_sources([source(data_file)], workers=0) == first
    # A part or a share of the same file needs nothing new either.
    assert index_sources([source(data_file, split="[:50%]")], workers=0) == first
    with pytest.raises(AssertionError, match="indexed again"):
        index_sources([source(data_file)], workers=0, again=True)


def test_pictures_that_changed_are_seen_again(data_file):
    index_sources([source(data_file)], workers=0)
    Image.new("RGB", (5, 6)).save(data_file.parent / "none.png")
    (kept,) = index_sources([source(data_file)], workers=0)
    (anew,) = index_sources([source(data_file)], workers=0, again=True)
    assert (kept.missing, anew.missing) == (2, 1)
    assert source(data_file)[18].images[0].known_size == (5, 6)


def test_other_picture_folders_are_another_index(data_file, tmp_path):
    index_sources([source(data_file)], workers=0)
    elsewhere = source(data_file, image_folder=str(tmp_path / "elsewhere"))
    assert kept_index(elsewhere.fingerprint) is None


def test_an_index_that_does_not_fit_is_not_used(data_file):
    index = record_index.RecordIndex(np.array([1]), np.array([3]), np.array([[4, 5]]))
    refs = [PictureFile(name="a", path="a"), PictureFile(name="b", path="b")]
    assert index.with_sizes(0, refs) == refs
    assert index.with_sizes(0, refs[:1])[0].known_size == (4, 5)


def test_a_file_without_records(tmp_path):
    (tmp_path / "a.jsonl").write_text("", encoding="utf-8")
    (summary,) = index_sources([source(tmp_path / "a.jsonl")], workers=2)
    assert summary.records == 0 and summary.characters == (0, 0, 0, 0)


# --- the command ----------------------------------------------------------------------------------


def run(*words):
    return CliRunner().invoke(app, ["data", "index", *map(str, words)])


def test_the_command_shows_a_table(data_file):
    done = run(data_file, "--workers", 0)
    assert done.exit_code == 0, done.output
    heading, row = done.stdout.splitlines()[-2:]
    assert heading.startswith("data set") and "megapixels" in heading
    cells = row.split()
    assert cells[:3] == ["mix", "1,203", "1"] and cells[4] == "2"
    assert len(heading) == len(row)


def test_the_command_takes_several_files_of_a_kind(tmp_path):
    for name in ("a", "b"):
        (tmp_path / f"{name}.txt").write_text("one\ntwo\n", encoding="utf-8")
    done = run(tmp_path / "a.txt", tmp_path / "b.txt", "--kind", "text", "--workers", 0)
    assert [line.split()[:2] for line in done.stdout.splitlines()[-2:]] == [["a", "2"], ["b", "2"]]


def test_the_command_takes_a_recipe(data_file, tmp_path):
    import yaml

    from test_recipes import TINY

    recipe = yaml.safe_load(TINY.read_text(encoding="utf-8"))
    recipe["data"]["sources"] = [
        {"kind": "llava", "path": str(data_file), "name": "first"},
        {"kind": "llava", "path": f"{data_file}#5", "name": "second"},
        {"kind": "scenes", "options": {}},
    ]
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    done = run(file, "--workers", 0)
    assert [line.split()[0] for line in done.stdout.splitlines()[-2:]] == ["first", "second"]


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["none.json"], "none.json is not a file"),
        (["none.yaml"], "no such recipe"),
        (["a.json", "tiny/1_prealign"], "is a recipe; give it alone"),
        (["a.json", "--kind", "lava"], "--kind is 'lava'"),
        (["tiny/1_prealign"], "nothing to index"),
    ],
)
def test_the_command_refuses(words, part):
    done = run(*words)
    assert isinstance(done.exception, ValueError) and part in str(done.exception)
