"""Whole curations on a real Ray cluster of two local nodes: nothing is lost, doubled or made again.

Everything is counted by ids, exactly.  One thing a reader would get wrong: starting the cluster
takes seconds, so all tests of this file share it, and each run has a folder of its own.
"""

import dataclasses
import json
import logging
import shutil
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image

import tiny
from curating import SENTENCE, folder_of, recipe, waves, with_section
from eve_vlm.curate.blocks import WHY, read_unit
from eve_vlm.curate.ledger import Ledger
from eve_vlm.curate.page import write_curation_report
from eve_vlm.curate.run import curate
from eve_vlm.curate.stages import stages_of
from eve_vlm.data.picture_ref import open_image
from eve_vlm.data.sources.build import build_source

ray = pytest.importorskip("ray", reason="needs the extra curate")
pytest.importorskip("faiss", reason="needs the extra curate")

WAVES = 36


@pytest.fixture(scope="module")
def cluster():
    """Two nodes of one core each, started as processes of their own."""
    from ray.cluster_utils import Cluster

    settings = {"num_cpus": 1, "object_store_memory": 80 * 2**20}
    made = Cluster(initialize_head=True, head_node_args=settings | {"include_dashboard": False})
    made.add_node(**settings)
    ray.init(address=made.address, log_to_driver=False, logging_level=logging.ERROR)
    yield made
    ray.shutdown()
    made.shutdown()


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """36 good pictures, and one or two of each fault."""
    folder = tmp_path_factory.mktemp("pictures")
    folder_of(folder, WAVES)
    faults = folder / "zz"
    faults.mkdir()
    shutil.copy(folder / "000/00003.png", faults / "copy.png")
    waves(5).resize((80, 66)).save(faults / "near.jpg", quality=80)
    waves(100, 60, 60).save(faults / "small.png")
    waves(101, 700, 100).save(faults / "thin.png")
    Image.new("RGB", (200, 200), "grey").save(faults / "blank.png")
    (faults / "damaged.jpg").write_bytes(b"\xff\xd8\xff\xe0 not a picture")
    waves(102).save(faults / "wordless.png")
    waves(103).save(faults / "unfinished.png")
    (faults / "unfinished.txt").write_text("Waves in many colours that never come to")
    return folder


EXPECTED = {
    "copy.png": "same file",
    "near.jpg": "near duplicate",
    "small.png": "too small",
    "thin.png": "too long and thin",
    "blank.png": "blank",
    "damaged.jpg": "cannot be opened",
    "wordless.png": "no caption",
    "unfinished.png": "unfinished caption",
}


def fates(of):
    """{id: why or None} of all pictures; fails where an id was lost or doubled by any stage."""
    ledger = Ledger(Path(of.output_dir))
    names = [stage.name for stage in stages_of(of) if stage.name != "write"]
    dropped: dict[str, str] = {}
    before: Counter[str] | None = None
    for name in names:
        rows = [
            row
            for unit in ledger.done(name)
            for row in read_unit(ledger.path(name, unit)).to_pylist()
        ]
        ids = Counter(row["id"] for row in rows)
        assert before is None or ids == before, f"{name} was not given what the stage before kept"
        assert set(ids.values()) <= {1} and not set(ids) & set(dropped)
        dropped |= {row["id"]: row[WHY] for row in rows if row.get(WHY)}
        before = Counter({row["id"]: 1 for row in rows if not row.get(WHY)})
    return dropped | dict.fromkeys(before or (), None)


def written_ids(of):
    """The ids of the shards, in order, and the manifest."""
    folder = Path(of.output_dir)
    manifest = json.loads((folder / "manifest.json").read_text())
    ids = []
    for line in manifest["shards"]:
        source = build_source("captions", path=str(folder / line["file"]), seed=0)
        assert len(source) == line["records"]
        ids += [source[number].id for number in range(len(source))]
    return ids, manifest


@pytest.fixture(scope="module")
def first(cluster, pictures, tmp_path_factory):
    """A whole run, with what it said on the way."""
    of = recipe(pictures, tmp_path_factory.mktemp("out") / "set")
    said = []
    return of, curate(of, progress=said.append), said


def test_every_picture_has_one_fate_and_it_is_the_right_one(first):
    of, result, _ = first
    found = fates(of)
    assert len(found) == result.read == WAVES + len(EXPECTED) and result.kept == WAVES
    assert {id.partition("/zz/")[2]: why for id, why in found.items() if why} == EXPECTED


def test_the_shards_are_read_as_captions_and_hold_the_files(first, pictures):
    """By our own source of kind captions: ids, words, and the pixels of the first of each shard."""
    of, _, _ = first
    ids, manifest = written_ids(of)
    assert ids == [f"waves/000/{number:05d}.png" for number in range(WAVES)]
    assert [line["records"] for line in manifest["shards"]] == [25, 11]
    assert manifest["licences"] == {"CC0-1.0": WAVES} and manifest["records"] == WAVES
    source = build_source("captions", path=f"{of.output_dir}/shards/000001.tar", seed=0)
    record = source[0]
    assert record.messages[1]["content"][0]["text"] == SENTENCE.format(25)
    assert open_image(record.images[0]).tobytes() == waves(25).tobytes()
    assert record.images[0].read() == (pictures / "000/00025.png").read_bytes()


def test_a_second_run_makes_nothing(first):
    of, result, _ = first
    before = {path: path.stat().st_mtime_ns for path in result.folder.rglob("*.parquet")}
    again = curate(of)
    assert (again.made, again.kept) == (0, WAVES)
    assert {path: path.stat().st_mtime_ns for path in result.folder.rglob("*.parquet")} == before


def test_progress_counts_rows_and_time(first):
    said = [one for one in first[2] if one.step == "decode"]
    assert [one.units for one in said] == list(range(1, len(said) + 1))
    assert said[-1].rows == WAVES + len(EXPECTED) and said[-1].seconds_left == 0
    assert said[-1].kept == said[-1].rows - 1 and all(one.per_second > 0 for one in said)


def test_settings_that_changed_are_said_and_from_makes_that_stage_again(first, tmp_path):
    of, result, _ = first
    folder = tmp_path / "copy"
    shutil.copytree(result.folder, folder)
    of = dataclasses.replace(of, output_dir=str(folder))
    changed = with_section(of, "captions", least_words=20)
    text = tiny.refused(lambda: curate(changed))
    assert "captions" in text and "--from captions" in text
    looked = {path: path.stat().st_mtime_ns for path in (folder / "work/decode").iterdir()}
    again = curate(changed, begin="captions")
    assert {path: path.stat().st_mtime_ns for path in (folder / "work/decode").iterdir()} == looked
    assert again.kept == 0 and json.loads((folder / "manifest.json").read_text())["records"] == 0
    assert list((folder / "shards").iterdir()) == []


def test_stages_run_alone_and_ask_for_those_before(cluster, pictures, tmp_path):
    of = recipe(pictures, tmp_path / "set", block=100)
    assert "read is not finished" in tiny.refused(lambda: curate(of, only="decode"))
    assert curate(of, only="read").made > 0
    assert curate(of, only="decode").kept == WAVES + len(EXPECTED) - 1
    assert not (tmp_path / "set/work/filter").exists()
    assert "stages of this recipe" in tiny.refused(lambda: curate(of, only="decod"))


def test_two_runs_of_one_folder_are_refused(tmp_path, pictures):
    from filelock import FileLock

    of = recipe(pictures, tmp_path)
    with FileLock(tmp_path / "run.lock"):
        assert "Another run" in tiny.refused(lambda: curate(of))


def test_the_page_shows_every_reason_with_an_example(first):
    of, _, _ = first
    html = write_curation_report(of).read_text(encoding="utf-8")
    assert all(f"<b>{reason}</b>: 1 " in html for reason in EXPECTED.values())
    assert html.count("data:image/png") >= len(EXPECTED) - 1  # all but the damaged one
    assert "http://" not in html and "https://" not in html  # nothing points outside
    figures = json.loads((write_curation_report(of).parent / "report.json").read_text())
    assert [one["rows_in"] for one in figures["stages"]][:2] == [44, 44]
