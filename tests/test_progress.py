"""What is seen of a run while it goes on: bar and lines, log file, trackers, sample answers.

Independent sides: TensorBoard's own reader, the stores of Weights & Biases and trackio, an engine
that loads the saved model, a run that nobody watches.  Weights are compared bit for bit: watching
must not change one operation.
"""

import io
import json
import logging
import math
import os
import random
import re
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import tiny
from eve_vlm.data.encode import Encoder
from eve_vlm.data.records import Record
from eve_vlm.json_lines import append_lines, read_lines
from eve_vlm.serve.engine import EveEngine
from eve_vlm.train import progress, trackers
from eve_vlm.train.progress import StageProgress, human_time, shown_figures
from eve_vlm.train.run import train
from eve_vlm.train.run_log import LOG_FILE, cut_lines
from eve_vlm.train.sample_answers import (
    SampleAnswers,
    as_table,
    caption,
    held_out,
    plain_processor,
    undisturbed,
)
from eve_vlm.train.sections import SamplesSection, SourceSection
from eve_vlm.train.trackers import check_trackers
from eve_vlm.train.trainer import EveTrainer
from eve_vlm.versions import commit_of, versions

LOGS = {
    "loss": 2.5,
    "loss_lm": 2.0,
    "loss_alignment": 0.5,
    "loss_of/captions": 1.9,
    "tokens_per_second": 1234.5,
    "mfu": 0.414,
    "data_wait": 0.02,
    "utilisation": 0.97,
    "memory_gib": 61.25,
}


@pytest.fixture(scope="module")
def conversations(tmp_path_factory):
    return tiny.llava_file(tmp_path_factory.mktemp("conversations"))


@pytest.fixture
def make(tmp_path, conversations):
    """A recipe with some overrides; folders below `tmp_path`."""

    def made(*overrides, name="run", data=None, samples=None, **start):
        keys = tiny.recipe_data(data or conversations, tmp_path / name, **start)
        keys["samples"] = samples
        return tiny.recipe(tmp_path / f"{name}.yaml", keys, *overrides)

    return made


# --- bar and lines --------------------------------------------------------------------------------


class Terminal(io.StringIO):
    def isatty(self):
        return True


class Clock:
    """A clock that moves when it is told to."""

    now = 100.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    made = Clock()
    monkeypatch.setattr(progress.time, "perf_counter", made)
    return made


def state(step, steps=10, *, first=True):
    return SimpleNamespace(global_step=step, max_steps=steps, is_world_process_zero=first)


def walk(shown, clock, *, start=0, steps=10, seconds=10.0, logging_steps=1):
    """A run of so many steps as the trainer calls its callbacks."""
    shown.on_train_begin(None, state(start, steps), None)
    for step in range(start + 1, steps + 1):
        clock.now += seconds
        shown.on_step_end(None, state(step, steps), None)
        if step % logging_steps == 0:
            shown.on_log(None, state(step, steps), None, logs=LOGS)
    shown.on_train_end(None, state(steps, steps), None)


def test_a_log_file_gets_plain_lines(clock):
    """At the first log, then every 30 seconds at least, and at the end; no carriage return."""
    stream = io.StringIO()
    walk(StageProgress("my stage", stream=stream), clock)
    text = stream.getvalue()
    assert "\r" not in text and "\x1b" not in text and text.endswith("\n")
    steps = [int(line.split("step ")[1].split(" ")[0]) for line in text.splitlines()]
    assert steps == [1, 4, 7, 10]
    assert text.splitlines()[1] == (
        "my stage: step 4 of 10 (40%), 1 min 0 s left, loss 2.500, lm 2.000, alignment 0.500, "
        "tokens/s 1,234, MFU 41.4 %, filled 97.0 %, data wait 2.0 %, memory 61.2 GiB"
    )


def test_time_left_counts_from_where_this_run_began(clock):
    """Resumed at step 6 of 10: 10 s a step, and not (10 s / 7)."""
    stream = io.StringIO()
    walk(StageProgress("stage", stream=stream), clock, start=6)
    assert "step 7 of 10 (70%), 30 s left" in stream.getvalue().splitlines()[0]


def test_rare_logs_do_not_leave_a_log_file_silent(clock):
    """Logged every 500 steps of 10 s; a line comes every ten minutes, with what is known."""
    stream = io.StringIO()
    walk(StageProgress("s", stream=stream), clock, steps=200, logging_steps=500)
    steps = [int(line.split("step ")[1].split(" ")[0]) for line in stream.getvalue().splitlines()]
    assert steps == [60, 120, 180, 200]


def test_a_terminal_gets_a_bar(clock):
    stream = Terminal()
    walk(StageProgress("my stage", stream=stream), clock)
    last = stream.getvalue().split("\r")[-1]
    assert "my stage: 100%" in last and "10/10" in last
    for words in ("lm=2.000", "alignment=0.500", "tokens/s=1,234", "MFU=41.4 %", "memory=61.2 GiB"):
        assert words in last
    assert "captions" not in last  # as many data sets as there are would not fit


def test_other_processes_are_silent(clock):
    stream = Terminal()
    shown = StageProgress("my stage", stream=stream)
    shown.on_train_begin(None, state(0, first=False), None)
    shown.on_step_end(None, state(1, first=False), None)
    shown.on_log(None, state(1, first=False), None, logs=LOGS)
    shown.on_train_end(None, state(1, first=False), None)
    assert stream.getvalue() == ""


def test_a_share_that_is_not_known_is_not_shown():
    assert "MFU" not in shown_figures({"loss": 1.0, "tokens_per_second": 2.0})
    assert shown_figures({"loss": math.nan})["loss"] == "nan"
    assert human_time(59.6) == "1 min 0 s" and human_time(86_399.7) == "1 d 0 h"


def test_a_run_shows_its_figures(make, capsys):
    """Through the real trainer, which is where figures come from."""
    train(make("training.max_steps=3"))
    lines = capsys.readouterr().err.splitlines()
    first = next(line for line in lines if line.startswith("test: step 1 of 3"))
    for words in ("left, loss ", "lm ", "tokens/s ", "MFU ", "filled ", "data wait ", "memory "):
        assert words in first
    share = float(re.search(r"MFU ([0-9.]+) %", first)[1])
    assert 0 <= share < 100
    assert any(line.startswith("test: step 3 of 3 (100%), 0 s left") for line in lines)


# --- the log file ---------------------------------------------------------------------------------


def test_the_log_has_what_the_trainer_logged(make, tmp_path):
    result = train(make())
    entries = read_lines(tmp_path / "run" / LOG_FILE)
    assert entries[0].keys() == {"step", "time", "max_steps"} and entries[0]["max_steps"] == 4
    logged = [entry for entry in entries if "loss" in entry]
    expected = [dict(entry) for entry in result.losses]
    for entry in logged:
        assert entry.pop("time") > 1.7e9
    assert [{**entry} for entry in logged] == expected
    assert {"mfu", "memory_gib", "data_wait", "utilisation", "tokens_per_second"} <= set(logged[0])


def test_lines_survive_a_crash(tmp_path):
    file = tmp_path / LOG_FILE
    append_lines(file, [{"step": 1}, {"step": 2, "text": "ä\nb"}, {"step": 3}])
    with file.open("a") as out:
        out.write('{"step": 4, "lo')  # the machine went off here
    assert [entry["step"] for entry in read_lines(file)] == [1, 2, 3]
    cut_lines(file, behind=2)
    append_lines(file, [{"step": 3}])
    assert [entry["step"] for entry in read_lines(file)] == [1, 2, 3]
    assert read_lines(tmp_path / "none.jsonl") == []


class Stopped(BaseException):
    """As when the machine is switched off."""


def test_a_resumed_run_has_one_log(make, tmp_path, monkeypatch):
    """Stopped behind step 5, resumed from step 3: every step once, in log and answers."""
    settings = ("training.max_steps=7", "training.save_strategy=steps", "training.save_steps=3")
    samples = {"every": 1, "number": 2, "max_new_tokens": 4}
    recipe = make(*settings, name="stopped", samples=samples)
    plain = EveTrainer.training_step

    def training_step(self, *args, **kwargs):
        if self.state.global_step == 5:
            raise Stopped
        return plain(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(EveTrainer, "training_step", training_step)
        with pytest.raises(Stopped):
            train(recipe)
    assert read_lines(tmp_path / "stopped" / LOG_FILE)[-1]["step"] == 5
    train(recipe, resume=True)
    # That the numbers are the same is the matter of the tests of resuming.
    logged = without_clock(read_lines(tmp_path / "stopped" / LOG_FILE))
    assert [entry["step"] for entry in logged] == [1, 2, 3, 4, 5, 6, 7]
    answers = read_lines(tmp_path / "stopped" / "samples.jsonl")
    assert [entry["step"] for entry in answers] == [1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7]
    assert len({entry["id"] for entry in answers}) == 2
    begun = [entry for entry in read_lines(tmp_path / "stopped" / LOG_FILE) if "max_steps" in entry]
    assert [entry["step"] for entry in begun] == [0, 3]


def without_clock(entries):
    """Entries of steps without what depends on time."""
    timed = {"time", "mfu", "memory_gib", "tokens_per_second", "data_wait"}
    return [
        {key: value for key, value in entry.items() if key not in timed}
        for entry in entries
        if "loss" in entry or "answer" in entry
    ]


def test_versions_say_what_it_ran_on(make, tmp_path):
    train(make("training.max_steps=1"))
    said = json.loads((tmp_path / "run" / "versions.json").read_text())
    assert said["torch"] == torch.__version__ and said["world_size"] == 1
    assert said["python"] == ".".join(map(str, sys.version_info[:3]))
    assert set(said) == set(versions()) and said["flash-attn"] is None


def test_the_commit_of_a_checkout(tmp_path):
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    assert commit_of(tmp_path) is None
    (tmp_path / "file").write_text("1")
    for arguments in (["init", "-q"], ["add", "file"], ["commit", "-q", "-m", "one"]):
        subprocess.run([*git, *arguments], check=True)
    clean = commit_of(tmp_path)
    assert re.fullmatch("[0-9a-f]{40}", clean)
    (tmp_path / "file").write_text("2")
    assert commit_of(tmp_path) == clean + "+"


# --- trackers -------------------------------------------------------------------------------------


def test_a_tracker_that_is_missing_is_said_before_anything_is_built(make, tmp_path, monkeypatch):
    present = trackers.find_spec
    monkeypatch.setattr(
        trackers, "find_spec", lambda name: None if name == "wandb" else present(name)
    )
    recipe = make("training.report_to=['tensorboard', 'wandb']")
    message = tiny.refused(lambda: train(recipe), end=".")
    assert "pip install wandb" in message and not (tmp_path / "run").exists()
    other = tiny.refused(lambda: check_trackers(["tensorbored"]), end=".")
    assert "tensorbored" in other and "tensorboard" in other
    for fine in (None, "none", [], "all"):
        check_trackers(fine)


SAMPLES = {"every": 2, "number": 2, "max_new_tokens": 6}
FIGURES = ("loss", "loss_lm", "learning_rate", "grad_norm", "mfu", "data_wait", "utilisation")


def test_tensorboard_gets_figures_and_answers(make, tmp_path):
    """Read back by TensorBoard itself; it keeps float32, hence 1e-6."""
    pytest.importorskip("tensorboard", reason="needs the extra train")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.util.tensor_util import make_ndarray

    result = train(make("training.report_to=['tensorboard']", samples=SAMPLES))
    [file] = (tmp_path / "run").rglob("events.out.tfevents*")
    events = EventAccumulator(str(file.parent))
    events.Reload()
    for name in (*FIGURES, "grad_norm_projector", "tokens_per_second", "memory_gib"):
        seen = [(event.step, event.value) for event in events.Scalars(f"train/{name}")]
        expected = [(entry["step"], entry[name]) for entry in result.losses]
        assert [step for step, _ in seen] == [step for step, _ in expected] == [1, 2, 3, 4]
        assert [value for _, value in seen] == pytest.approx(
            [value for _, value in expected], rel=1e-6
        )
    texts = events.Tensors("train/samples/text_summary")
    assert [event.step for event in texts] == [2, 4]
    said = make_ndarray(texts[-1].tensor_proto)[0].decode()
    asked = [
        entry for entry in read_lines(tmp_path / "run" / "samples.jsonl") if entry["step"] == 4
    ]
    assert said == as_table(asked) and said.count("\n") == 3


ELSEWHERE = """
import json, sys
sys.path.insert(0, {tests!r})
from eve_vlm.train.recipe import load_recipe
from eve_vlm.train.run import train
result = train(load_recipe({recipe!r}))
{read}
print("READ " + json.dumps([seen, result.losses[-1]]))
"""
READ = {
    "wandb": """
import wandb
summary = dict(wandb.run.summary)
seen = {name: summary[name] for name in summary if not isinstance(summary[name], dict)}
wandb.finish()
""",
    "trackio": """
from trackio.sqlite_storage import SQLiteStorage
[project] = SQLiteStorage.get_projects()
[run] = SQLiteStorage.get_runs(project)
seen = {}
for entry in SQLiteStorage.get_logs(project, run):
    seen |= entry
""",
}


@pytest.mark.slow  # 20 to 60 s: both start processes of their own
@pytest.mark.parametrize("tracker", READ)
def test_other_trackers_get_the_same_names(make, tmp_path, tracker):
    """Offline, in a process of its own; read back from where the tracker keeps it."""
    pytest.importorskip(tracker)
    make(f"training.report_to=['{tracker}']", samples=SAMPLES)
    recipe = tmp_path / "set.yaml"
    text = (tmp_path / "run.yaml").read_text()
    recipe.write_text(text.replace("use_cpu: true", f"use_cpu: true\n  report_to: [{tracker}]"))
    script = ELSEWHERE.format(
        tests=os.path.dirname(__file__), recipe=str(recipe), read=READ[tracker]
    )
    home = {"HOME": str(tmp_path / "home"), "TRACKIO_DIR": str(tmp_path / "trackio")}
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=os.environ | home | {"WANDB_MODE": "offline", "WANDB_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    line = next(line for line in done.stdout.splitlines() if line.startswith("READ "))
    seen, last = json.loads(line.removeprefix("READ "))
    for name in FIGURES:
        assert seen[f"train/{name}"] == pytest.approx(last[name], rel=1e-6)
    assert "wanted" in str(seen["train/samples"])


# --- sample answers -------------------------------------------------------------------------------


def weights_of(folder):
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("kind", ["chat", "aligned, checkpointed, dropout", "plain"])
def test_training_does_not_notice(make, tmp_path, kind):
    """Weights, optimizer, random states and losses of the last checkpoint are the same bits."""
    settings = ["training.save_strategy=steps", "training.save_steps=2"]
    start = {}
    if kind == "plain":
        start["data"] = tiny.llava_file(tmp_path / "captions", captions=True)
        settings.append("data.format=plain")
    elif "aligned" in kind:
        start["teacher"] = tiny.teacher_folder(tmp_path / "teacher")
        settings += [
            "training.gradient_checkpointing=true",
            "model.text_config.attention_dropout=0.3",
        ]
    alone = train(make(*settings, name="alone", **start))
    samples = {"every": 1, "number": 3, "max_new_tokens": 5}
    watched = train(make(*settings, name="watched", samples=samples, **start))
    assert without_clock(watched.losses) == without_clock(alone.losses)
    for part in ("", "checkpoint-2", "checkpoint-4"):
        expected, seen = (
            weights_of(tmp_path / "alone" / part),
            weights_of(tmp_path / "watched" / part),
        )
        assert expected.keys() == seen.keys()
        assert all(torch.equal(expected[name], seen[name]) for name in expected)
    for file in ("optimizer.pt", "rng_state.pth"):
        both = [
            # Random states are pickled arrays of numpy; written by this test.
            torch.load(tmp_path / name / "checkpoint-4" / file, weights_only=False)
            for name in ("alone", "watched")
        ]
        assert equal(*both), file
    entries = read_lines(tmp_path / "watched" / "samples.jsonl")
    assert [entry["step"] for entry in entries] == [1] * 3 + [2] * 3 + [3] * 3 + [4] * 3
    assert len({entry["id"] for entry in entries}) == 3
    assert not (tmp_path / "alone" / "samples.jsonl").exists()


def equal(one, other):
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(equal, one, other))
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, np.ndarray):
        return np.array_equal(one, other)
    return one == other


def test_an_answer_is_what_ask_would_say(make, tmp_path, conversations):
    """The last answers are of the saved model: loaded again and asked, it says the same."""
    train(make("training.max_steps=5", samples={"every": 2, "number": 6, "max_new_tokens": 12}))
    entries = read_lines(tmp_path / "run" / "samples.jsonl")
    assert [entry["step"] for entry in entries] == [2] * 6 + [4] * 6 + [5] * 6
    engine = EveEngine.from_pretrained(tmp_path / "run")
    samples = {sample["id"]: sample for sample in json.loads(conversations.read_text())}
    pictures = 0
    for entry in entries[-6:]:
        sample = samples[entry["id"]]
        names = [conversations.parent / sample["image"]] if "image" in sample else []
        pictures += len(names)
        assert entry["question"] == sample["conversations"][0]["value"].replace("<image>\n", "")
        assert entry["wanted"] == sample["conversations"][1]["value"]
        assert engine.ask(entry["question"], names, max_new_tokens=12) == entry["answer"]
        assert len(entry["pictures"]) == len(names)
    assert pictures


def asker(records, tmp_path, **settings):
    settings.setdefault("format", "chat")
    section = SamplesSection(every=1, number=settings.pop("number", 1), max_new_tokens=4)
    return SampleAnswers(section, records, tiny.processor(), tmp_path, **settings)


def test_captions_are_asked_as_they_are_taught(tmp_path):
    """The prompt is the beginning of the encoded record, up to the first label."""
    content = [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "Describe it."}]
    record = Record(
        id="a",
        messages=[
            {"role": "user", "content": content},
            {"role": "assistant", "content": [{"type": "text", "text": "a red square"}]},
        ],
        images=[tiny.picture(20, 30), tiny.picture(9, 9)],
    )
    asked = asker([record], tmp_path, format="plain")
    asked.on_train_begin(None, state(0), None)
    [question] = asked.questions
    engine = EveEngine(tiny.model(), plain_processor(tiny.processor()))
    prompt = engine.encode(question.messages)
    encoded = Encoder(tiny.processor(), format="plain", max_length=200)(record)
    first = int((encoded.labels != -100).argmax())
    assert prompt.input_ids.tolist() == encoded.input_ids[:first].tolist()
    assert torch.equal(prompt.pixel_values, torch.from_numpy(encoded.pixel_values))
    assert (question.question, question.wanted) == ("Describe it.", "a red square")
    # Greedily as a loop without a cache has it, which reads everything again for each word.
    ids, made = prompt.input_ids.tolist(), []
    pictures = {"pixel_values": prompt.pixel_values, "image_grid_thw": prompt.image_grid_thw}
    for _ in range(9):
        with torch.no_grad():
            logits = engine.model(input_ids=torch.tensor([ids + made]), **pictures).logits[0, -1]
        logits[3] = -torch.inf  # the placeholder
        made.append(int(logits.argmax()))
        if made[-1] == 2 or "\n" in engine.tokenizer.decode(made):
            break
    words = engine.tokenizer.decode([one for one in made if one != 2], skip_special_tokens=True)
    assert (
        caption(engine, question.messages, max_new_tokens=9) == words.split("\n")[0].strip() != ""
    )


def test_records_that_cannot_be_asked_are_named(tmp_path, caplog):
    """Missing pictures and answers are left out, others take their place, and it is said."""
    good = {"role": "user", "content": "hello"}, {"role": "assistant", "content": "yes"}
    lost = {"role": "user", "content": [{"type": "image"}]}, good[1]
    records = [
        Record(id="good", messages=list(good), images=[]),
        Record(id="lost", messages=list(lost), images=[tmp_path / "none.png"]),
        Record(id="mute", messages=[good[0]], images=[]),
    ]
    asked = asker(records, tmp_path, number=2)
    with caplog.at_level(logging.WARNING):
        asked.on_train_begin(None, state(0), None)
    assert [one.id for one in asked.questions] == ["good"]
    for words in ("none.png", "'mute' has no answer", "1 of 2 records"):
        assert words in caplog.text


def test_shards_cannot_answer_and_say_so(tmp_path, caplog):
    asked = asker([], tmp_path, sharded=True)
    with caplog.at_level(logging.WARNING):
        asked.on_train_begin(None, state(0), None)
        asked.on_step_end(None, state(1), None, model=tiny.model())
    assert caplog.text.count("No sample answers") == 1
    assert not list(tmp_path.iterdir())


def test_nothing_is_left_behind():
    """Modes, and the states of three sources of random numbers, whatever happens inside."""
    model = tiny.model().train()
    model.lm_head.eval()
    before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    with pytest.raises(RuntimeError), undisturbed(model):
        model.eval()
        torch.rand(3), np.random.rand(3), random.random()
        raise RuntimeError
    after = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    assert torch.equal(before[0], after[0]) and before[1:] == after[1:]
    assert model.training and model.model.training and not model.lm_head.training


def test_lora_answers_with_its_adapters(make, tmp_path):
    """At the last step, as the folder of the run answers when it is loaded with its adapters."""
    pytest.importorskip("peft", reason="needs the extra lora")
    train(make("training.max_steps=2", name="base"))
    recipe = make(
        *("training.max_steps=3", "stage.learning_rates={'*': 3.0e-2}"),
        "stage.trainable=['model.vision_tower.*','model.multi_modal_projector.*']",
        "lora={rank: 4, alpha: 32}",
        name="lora",
        init_from=tmp_path / "base",
        samples={"every": 3, "number": 2, "max_new_tokens": 8},
    )
    train(recipe)
    entries = read_lines(tmp_path / "lora" / "samples.jsonl")
    tuned, base = (EveEngine.from_pretrained(tmp_path / name) for name in ("lora", "base"))
    pictures = [[tmp_path / "lora" / name for name in entry["pictures"]] for entry in entries]
    said = [entry["answer"] for entry in entries]
    asked = [entry["question"] for entry in entries]
    # Copies for the report are no larger than the model's own pictures, so they are the same.
    again, before = (
        [
            engine.ask(one, images, max_new_tokens=8)
            for one, images in zip(asked, pictures, strict=True)
        ]
        for engine in (tuned, base)
    )
    assert said == again != before


@pytest.mark.parametrize(
    ("given", "left"),
    [
        ("[:95%]", "[95%:]"),
        ("train[:1000]", "train[1000:]"),
        ("[5%:]", "[:5%]"),
        ("[5%:95%]", None),
        ("[:]", None),
        ("train", None),
        (None, None),
    ],
)
def test_the_other_side_of_a_slice(given, left):
    source = SourceSection(kind="llava", path="x.json", split=given, weight=0.5)
    expected = [SourceSection(kind="llava", path="x.json", split=left)] if left else []
    assert held_out([source]) == expected


def test_held_out_scenes():
    options = {"size": 10, "families": {"name": 1}}
    source = SourceSection(kind="scenes", options=options)
    [left] = held_out([source])
    assert left.options == {**options, "split": "held_out"}
    assert held_out([left]) == []


def test_questions_come_from_what_is_held_out(make, tmp_path):
    """Of twelve records nine are trained on; only the other three are asked."""
    recipe = make(
        "training.max_steps=1",
        samples={"every": 1, "number": 3, "max_new_tokens": 2},
    )
    text = (
        (tmp_path / "run.yaml")
        .read_text()
        .replace("kind: llava", "kind: llava\n    split: '[:75%]'")
    )
    (tmp_path / "cut.yaml").write_text(text)
    from eve_vlm.train.recipe import load_recipe

    recipe = load_recipe(tmp_path / "cut.yaml")
    train(recipe)
    asked = {entry["id"] for entry in read_lines(tmp_path / "run" / "samples.jsonl")}
    assert asked == {"r9", "r10", "r11"}


def test_tables_keep_their_shape():
    entry = {"id": "a", "question": "x | y\nz", "answer": "", "wanted": "w"}
    assert as_table([entry]).splitlines()[2] == "| a | x \\| y z |  | w |"
