"""A run that is killed, stopped, moved or robbed of a checkpoint ends as if nothing had happened.

Compared with an uninterrupted run bit for bit, tolerance none: weights, optimizer, schedule, random
numbers and every logged loss.  The model has dropout, so that random numbers matter, a step has two
micro-batches, and logs (every 3 steps) do not fall together with checkpoints (every 2).
"""

import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from fnmatch import filter as matching
from pathlib import Path

import pytest
import torch
import transformers
import yaml
from packaging import version
from transformers.trainer import safe_globals

import tiny
from eve_processes import Processes, wait_until
from eve_vlm.train import whole_checkpoints
from eve_vlm.train.checkpoints import (
    CHECKSUMS_FILE,
    checkpoints_in,
    last_whole_checkpoint,
    problem_of,
)
from eve_vlm.train.recipe import _training_hints, load_recipe
from eve_vlm.train.run import finished_run, train
from eve_vlm.train.run_folder import MAY_CHANGE

# What is logged of the clock and the machine differs from run to run; these must not.
LOGGED = ("loss", "grad", "learning_rate", "step", "epoch", "left_out", "utilisation")


pytestmark = pytest.mark.usefixtures("no_drawings")  # one at each checkpoint


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("resume")


@pytest.fixture(scope="module")
def recipe_file(folder):
    """A recipe with dropout; `output_dir` and `training.max_steps` are given by each test."""
    keys = tiny.recipe_data(tiny.llava_file(folder / "data"), folder / "unused")
    keys["model"]["text_config"]["attention_dropout"] = 0.2
    keys["training"] |= {
        "gradient_accumulation_steps": 2,
        "logging_steps": 3,
        "save_strategy": "steps",
        "save_steps": 2,
        "save_total_limit": 3,
    }
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump(keys, sort_keys=False), encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def processes(folder):
    with Processes(folder / "processes") as started:
        yield started


@pytest.fixture(scope="module")
def whole(processes, recipe_file, folder):
    """Uninterrupted runs by their number of steps, made when first asked for."""
    made: dict[int, Path] = {}

    def run(steps):
        if steps not in made:
            made[steps] = folder / f"whole-{steps}"
            code, process = processes.finish("train", recipe_file, *settings(made[steps], steps))
            assert code == 0, process.err
        return made[steps]

    return run


@pytest.fixture
def make(recipe_file, tmp_path):
    """The recipe with some overrides, for `tmp_path / "run"` and 6 steps."""

    def made(*overrides, output=tmp_path / "run", steps=6):
        return load_recipe(recipe_file, (*settings(output, steps), *overrides))

    return made


def settings(output, steps):
    return (f"output_dir={output}", f"training.max_steps={steps}")


def logged(entries):
    return [
        {key: value for key, value in entry.items() if key.startswith(LOGGED)}
        for entry in entries
        if "loss" in entry
    ]


def read(file):
    return json.loads(file.read_text(encoding="utf-8"))


def assert_same(made, expected, where="top"):
    """Nested states of optimizers and generators, tensors bit for bit."""
    assert type(made) is type(expected), where
    if isinstance(expected, torch.Tensor):
        assert made.dtype == expected.dtype and torch.equal(made, expected), where
    elif isinstance(expected, dict):
        assert list(made) == list(expected), where
        for key, value in expected.items():
            assert_same(made[key], value, f"{where}.{key}")
    elif isinstance(expected, (list, tuple)):
        assert len(made) == len(expected), where
        for index, value in enumerate(expected):
            assert_same(made[index], value, f"{where}.{index}")
    elif hasattr(expected, "tobytes"):
        assert made.tobytes() == expected.tobytes(), where
    else:
        assert made == expected, where


def load(file):
    """What the library saved; its own list of safe types lets numpy's generator through."""
    with safe_globals():
        return torch.load(file, weights_only=True)


def assert_same_run(made, expected, *, ranks=1):
    """Everything that a run leaves, save what the clock says."""
    wanted = (expected / "model.safetensors").read_bytes()
    assert (made / "model.safetensors").read_bytes() == wanted
    losses = [logged(read(run / "run.json")["losses"]) for run in (made, expected)]
    assert losses[0] == losses[1]
    last, aim = checkpoints_in(made)[-1], checkpoints_in(expected)[-1]
    assert last.name == aim.name and problem_of(last) is None
    assert {file.name for file in last.iterdir()} == {file.name for file in aim.iterdir()}
    assert (last / "model.safetensors").read_bytes() == wanted
    names = ["rng_state.pth"] if ranks == 1 else [f"rng_state_{rank}.pth" for rank in range(ranks)]
    for name in ("optimizer.pt", "scheduler.pt", *names):
        assert_same(load(last / name), load(aim / name), name)
    for rank in range(ranks):
        kept = [load(one / f"kept_{rank}.pt") for one in (last, aim)]
        assert_same(kept[0]["loss"], kept[1]["loss"])
        assert kept[0]["logged"] == kept[1]["logged"]
    states = [read(one / "trainer_state.json") for one in (last, aim)]
    assert logged(states[0]["log_history"]) == logged(states[1]["log_history"])
    assert states[0]["stateful_callbacks"] == states[1]["stateful_callbacks"]
    positions = [file.name for file in aim.iterdir() if file.name.startswith("data_state")]
    assert len(positions) == ranks
    assert all(read(last / name) == read(aim / name) for name in positions)


def rests(output):
    return list(output.glob(".checkpoint-*.part-*"))


# --- kill -9 --------------------------------------------------------------------------------------


def kill_often(processes, recipe_file, output, *, kills, steps, seed):
    """Kills the run `kills` times at moments that the seed draws, then lets it finish.

    Returns how many kills left a half-written or half-removed folder behind.
    """
    draw = random.Random(seed)
    halves = 0
    for _ in range(kills):
        workers = draw.choice((0, 2))  # it may change from start to start
        arguments = (*settings(output, steps), f"training.dataloader_num_workers={workers}")
        before = set(checkpoints_in(output))
        process = processes.start("train", recipe_file, *arguments)
        moment = draw.choice(("any", "between", "saving", "saving"))
        if moment == "any":  # also while it loads, or checks the last checkpoint
            time.sleep(draw.uniform(0.0, 2.0))
        elif moment == "between":
            wait_until(
                lambda old=before, one=process: set(checkpoints_in(output)) - old or not one.alive,
                what=f"a checkpoint ({process.err})",
            )
            time.sleep(draw.uniform(0.0, 0.2))
        else:
            wait_until(
                lambda one=process: rests(output) or not one.alive,
                what=f"saving ({process.err})",
            )
            time.sleep(draw.choice((0.0, 0.005, 0.01, 0.02)))
        assert process.alive, f"it ended before it could be killed: {process.err}"
        process.send(signal.SIGKILL)
        wait_until(lambda one=process: not one.alive)
        halves += bool(rests(output))
        for checkpoint in checkpoints_in(output):
            assert problem_of(checkpoint) is None
    code, process = processes.finish("train", recipe_file, *settings(output, steps))
    assert code == 0, process.err
    assert not rests(output) and not list(output.glob("broken-*"))
    assert len(checkpoints_in(output)) == 3  # save_total_limit
    return halves


def test_killed_four_times(processes, recipe_file, whole, tmp_path):
    kill_often(processes, recipe_file, tmp_path / "run", kills=4, steps=60, seed=1)
    assert_same_run(tmp_path / "run", whole(60))


@pytest.mark.slow
def test_killed_25_times(processes, recipe_file, whole, tmp_path, record_property):
    started = time.perf_counter()
    halves = kill_often(processes, recipe_file, tmp_path / "run", kills=25, steps=240, seed=2)
    seconds = time.perf_counter() - started
    record_property("seconds", seconds)
    record_property("kills within a save", halves)
    print(f"25 kills, {halves} of them within a save: {seconds:.0f} s")
    assert halves >= 3  # of about twelve that are aimed at one
    assert_same_run(tmp_path / "run", whole(240))


# Runs in the process that trains, and kills it when a function is called for the n-th time.
KILL_AT = """
import os, {module} as module
plain, calls = module.{name}, []
def kill(*args, **kwargs):
    calls.append(1)
    if len(calls) == {call}:
        {after}
        os.kill(os.getpid(), 9)
    return plain(*args, **kwargs)
module.{name} = kill
"""
TRAINER, FILES = "eve_vlm.train.whole_checkpoints", "eve_vlm.train.checkpoints"
MOMENTS = {
    "before the weights": (TRAINER, "WholeCheckpoints._save", 2, ""),
    "before the optimizer": (TRAINER, "WholeCheckpoints._save_optimizer_and_scheduler", 2, ""),
    "before our own state": (TRAINER, "WholeCheckpoints._save_kept", 2, ""),
    "before the sums": (TRAINER, "flush_and_sum", 2, ""),
    "before the list of sums": (TRAINER, "seal", 2, ""),
    "before the name": (FILES, "Path.rename", 2, ""),
    "after the name": (FILES, "Path.rename", 2, "plain(*args, **kwargs)"),
    "before old ones are removed": (TRAINER, "remove_old", 4, ""),
    "while an old one is removed": (
        *(FILES, "shutil.rmtree", 2),
        "[os.unlink(os.path.join(args[0], name)) for name in os.listdir(args[0])[:3]]",
    ),
    "before the model": (TRAINER, "WholeCheckpoints.save_model", 6, ""),
    "while the model is written": (
        *(TRAINER, "WholeCheckpoints.save_model", 6),
        "open(os.path.join(args[1], 'model.safetensors'), 'wb').write(b'half')",
    ),
    "before the recipe": ("eve_vlm.train.run", "write_recipe", 1, ""),
    "before the result": ("eve_vlm.train.run", "flush_files", 1, ""),
}


OFTEN = ("before the list of sums", "before the name", "while an old one is removed")


@pytest.mark.parametrize(
    "moment",
    [one if one in OFTEN else pytest.param(one, marks=pytest.mark.slow) for one in MOMENTS],
)
def test_killed_at_a_moment(processes, recipe_file, whole, tmp_path, moment):
    """Of saving, removing, beginning and ending; 10 steps make 5 checkpoints, of which 3 stay."""
    module, name, call, after = MOMENTS[moment]
    code = KILL_AT.format(module=module, name=name, call=call, after=after or "pass")
    arguments = ("train", recipe_file, *settings(tmp_path / "run", 10))
    status, process = processes.finish(*arguments, before=(code,))
    assert status == -signal.SIGKILL, process.err
    status, process = processes.finish(*arguments)
    assert status == 0, process.err
    assert not rests(tmp_path / "run") and len(checkpoints_in(tmp_path / "run")) == 3
    assert_same_run(tmp_path / "run", whole(10))


def test_resumed_at_every_step(make, tmp_path):
    """A checkpoint of each step, the last one too; each copy of the folder goes on from another."""
    keep = ("training.save_steps=1", "training.save_total_limit=null")
    train(make(*keep, output=tmp_path / "whole", steps=7))
    for step in range(1, 8):
        copy = tmp_path / f"from-{step}"
        shutil.copytree(tmp_path / "whole", copy)
        (copy / "run.json").unlink()
        (copy / "model.safetensors").unlink()
        for later in range(step + 1, 8):
            shutil.rmtree(copy / f"checkpoint-{later}")
        said = []
        result = train(make(*keep, output=copy, steps=7), say=said.append)
        assert f"it goes on from step {step}." in said[-1]
        assert result.steps == 7
        assert_same_run(copy, tmp_path / "whole")


# --- signals --------------------------------------------------------------------------------------

# Steps that last long enough to be hit by a signal.
SLOW_STEPS = """
import os, time, eve_vlm.train.trainer as module
plain = module.EveTrainer.training_step
def slow(*args, **kwargs):
    os.write(2, b"in a step\\n")
    time.sleep({seconds})
    return plain(*args, **kwargs)
module.EveTrainer.training_step = slow
"""


@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 143), ("SIGUSR1", 143), ("SIGINT", 130)])
def test_a_signal_saves_and_stops(processes, recipe_file, whole, tmp_path, name, code):
    output = tmp_path / "run"
    arguments = ("train", recipe_file, *settings(output, 10))
    process = processes.start(*arguments, before=(SLOW_STEPS.format(seconds=0.05),))
    wait_until(lambda: checkpoints_in(output) or not process.alive)
    process.send(signal.Signals[name])
    wait_until(lambda: not process.alive)
    step = int(checkpoints_in(output)[-1].name.split("-")[1])
    text = f"eve: stopped at step {step} of 10; the same command goes on from there."
    assert process.err.splitlines()[-1] == text
    assert "Traceback" not in process.err
    assert processes.exit_code(process) == code
    status, process = processes.finish(*arguments)
    assert status == 0 and f"it goes on from step {step}." in process.err
    assert_same_run(output, whole(10))


def test_a_second_interrupt_stops_at_once(processes, recipe_file, tmp_path):
    output = tmp_path / "run"
    arguments = ("train", recipe_file, *settings(output, 10))
    process = processes.start(*arguments, before=(SLOW_STEPS.format(seconds=30),))
    wait_until(lambda: "in a step" in process.err)
    process.send(signal.SIGINT)
    wait_until(lambda: "stopping at the end of this step (once more stops at once)" in process.err)
    process.send(signal.SIGINT)
    wait_until(lambda: not process.alive, seconds=15)  # a step takes 60
    assert processes.exit_code(process) == 130 and not checkpoints_in(output)


def test_sigterm_to_a_fresh_command_and_all_it_started(processes, recipe_file, whole, tmp_path):
    """As Slurm does it: `python -m eve_vlm.cli`, and the processes that read data are told too."""
    output = tmp_path / "run"
    arguments = (*settings(output, 10), "training.dataloader_num_workers=2")
    process = subprocess.Popen(
        [sys.executable, "-m", "eve_vlm.cli", "train", str(recipe_file), *arguments],
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    wait_until(lambda: checkpoints_in(output) or process.poll() is not None)
    os.killpg(process.pid, signal.SIGTERM)
    err = process.communicate(timeout=60)[1]
    assert process.returncode == 143, err
    assert "the same command goes on from there" in err and "Traceback" not in err
    code, again = processes.finish("train", recipe_file, *arguments)
    assert code == 0, again.err
    assert_same_run(output, whole(10))


READER = """
import multiprocessing, subprocess, time, types
from torch.utils.data import DataLoader
from eve_vlm.train.stopping import StopOnSignal
loader = DataLoader(range(1000), num_workers=1)
arguments = types.SimpleNamespace(world_size=1)
StopOnSignal().on_train_begin(arguments, None, None, train_dataloader=loader)
batches = iter(loader)  # alive to the end, as a trainer's may be after an exception
assert next(batches) == 0
(reader,) = multiprocessing.active_children()
for name in ("TERM", "TERM", "INT", "USR1"):
    subprocess.run(["kill", "-" + name, str(reader.pid)], check=True)
    time.sleep(0.2)
assert [int(next(batches)) for _ in range(99)] == list(range(1, 100)) and reader.is_alive()
print("read on")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only there the sender is known")
def test_a_process_that_reads_data_ends_with_the_one_that_trains_only():
    """Signals of others do not end it; the end of the interpreter, which sends SIGTERM, does."""
    done = subprocess.run(
        [sys.executable, "-c", READER], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "read on\n"


def test_training_in_a_thread(make):
    """Where no signal can be caught."""
    results = []
    thread = threading.Thread(target=lambda: results.append(train(make(steps=2))))
    thread.start()
    thread.join()
    assert results[0].steps == 2


# --- several processes ----------------------------------------------------------------------------


def free_port():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def start_ranks(processes, *arguments, before=()):
    """Two processes of one run, as torchrun starts them."""
    places = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    places |= {"MASTER_PORT": str(free_port()), "DS_ACCELERATOR": "cpu"}
    return [
        processes.start(
            *("train", *arguments),
            env=places | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            before=before,
        )
        for rank in range(2)
    ]


def ended(processes, ranks):
    wait_until(lambda: not any(rank.alive for rank in ranks))
    return [processes.exit_code(rank) for rank in ranks]


@pytest.mark.parametrize("strategy", ["ddp", pytest.param("zero2", marks=pytest.mark.slow)])
def test_two_processes_stop_at_the_same_step_and_go_on(processes, recipe_file, tmp_path, strategy):
    """Only the second is told to stop; later both are killed while they save; then they end.

    Each has a process that reads its data, which must not keep it from ending.
    """
    if strategy == "zero2":
        pytest.importorskip("deepspeed", reason="needs the extra train")
    whole, output = tmp_path / "whole", tmp_path / "run"
    if strategy == "ddp" and version.parse(transformers.__version__) < version.parse("5.23"):
        pytest.skip("5.17 cannot load an optimizer in several processes on a CPU (cpu:0)")
    command = (recipe_file, f"devices.strategy={strategy}", "training.dataloader_num_workers=1")
    ranks = start_ranks(processes, *command, *settings(whole, 10))
    assert ended(processes, ranks) == [0, 0], ranks[0].err
    command, slow = (*command, *settings(output, 10)), (SLOW_STEPS.format(seconds=0.05),)

    ranks = start_ranks(processes, *command, before=slow)
    wait_until(lambda: checkpoints_in(output) or not ranks[0].alive)
    ranks[1].send(signal.SIGTERM)
    assert ended(processes, ranks) == [143, 143], ranks[0].err

    killed = start_ranks(processes, *command, before=slow)
    wait_until(lambda: rests(output) or not killed[0].alive)
    for rank in killed:
        rank.send(signal.SIGKILL)
    assert ended(processes, killed) == [-9, -9], killed[0].err

    last = start_ranks(processes, *command)
    assert ended(processes, last) == [0, 0], last[0].err
    if strategy == "ddp":
        assert_same_run(output, whole, ranks=2)
    else:  # optimizer and schedule are in files of DeepSpeed's own
        wanted = (whole / "model.safetensors").read_bytes()
        assert (output / "model.safetensors").read_bytes() == wanted
        losses = [logged(read(run / "run.json")["losses"]) for run in (output, whole)]
        assert losses[0] == losses[1]
        assert problem_of(checkpoints_in(output)[-1]) is None


# --- broken checkpoints ---------------------------------------------------------------------------


def flip_a_byte(checkpoint):
    file = checkpoint / "optimizer.pt"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def cut_short(checkpoint):
    file = checkpoint / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])


BREAK = {
    "optimizer.pt is not what was written": flip_a_byte,
    "instead of": cut_short,
    "rng_state.pth is missing": lambda checkpoint: (checkpoint / "rng_state.pth").unlink(),
    f"it has no {CHECKSUMS_FILE}": lambda checkpoint: (checkpoint / CHECKSUMS_FILE).unlink(),
    f"{CHECKSUMS_FILE} cannot be read": lambda checkpoint: (checkpoint / CHECKSUMS_FILE).write_text(
        "{"
    ),
}


@pytest.mark.parametrize("problem", BREAK)
def test_a_broken_checkpoint_is_passed_over_and_kept(make, whole, tmp_path, caplog, problem):
    """The one before is taken; the broken one is named, and its files stay for who wants them."""
    output = tmp_path / "run"
    shutil.copytree(whole(10), output)
    (output / "run.json").unlink()
    BREAK[problem](output / "checkpoint-10")
    files = {file.name: file.read_bytes() for file in (output / "checkpoint-10").iterdir()}
    said = []
    train(make(steps=10), say=said.append)
    assert "it goes on from step 8." in said[-1]
    assert problem in caplog.text and "kept as broken-checkpoint-10" in caplog.text
    kept = output / "broken-checkpoint-10"
    assert {file.name: file.read_bytes() for file in kept.iterdir()} == files
    assert_same_run(output, whole(10))


def test_no_whole_checkpoint_means_from_the_beginning(make, whole, tmp_path):
    output = tmp_path / "run"
    shutil.copytree(whole(10), output)
    (output / "run.json").unlink()
    for checkpoint in checkpoints_in(output):
        flip_a_byte(checkpoint)
    (output / "checkpoint-1000").mkdir()  # empty
    said = []
    train(make(steps=10), say=said.append)
    assert "it goes on from the beginning." in said[-1]
    assert len(list(output.glob("broken-checkpoint-*"))) == 4
    assert_same_run(output, whole(10))


def test_a_second_broken_one_takes_another_name(tmp_path):
    for _ in range(2):
        (tmp_path / "checkpoint-3").mkdir()
        assert last_whole_checkpoint(tmp_path) is None
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"broken-checkpoint-3", "broken-checkpoint-3-2"}


# --- a full disk ----------------------------------------------------------------------------------


def test_too_little_room_is_said_before_anything_is_written(make, tmp_path, monkeypatch):
    """Free bytes as a full disk would tell them from the second checkpoint on."""
    output = tmp_path / "run"
    plain = shutil.disk_usage

    def usage(path):
        return plain(path)._replace(free=1000) if checkpoints_in(output) else plain(path)

    monkeypatch.setattr(whole_checkpoints.shutil, "disk_usage", usage)
    text = tiny.refused(lambda: train(make()))
    assert f"{output} has no room for the checkpoint of step 4: at least " in text
    assert "1,000 are free (the last whole one is checkpoint-2)" in text
    needed = int(text.split("at least ")[1].split(" bytes")[0].replace(",", ""))
    size = sum(file.stat().st_size for file in (output / "checkpoint-2").iterdir())
    assert size < needed < size + 20e6
    assert problem_of(output / "checkpoint-2") is None and not rests(output)


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 24 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(folder)], capture_output=True
    )
    if mounted.returncode:
        pytest.skip("mounting a small disk is not allowed here")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.parametrize(
    "before", ["_save", "_save_optimizer_and_scheduler", "_save_rng_state", "_save_kept"]
)
def test_a_disk_that_gets_full_while_saving(make, whole, small_disk, monkeypatch, before):
    """Really full: somebody else takes the rest just before this part of the second checkpoint."""
    output, filler = small_disk / "run", small_disk / "filler"
    plain = getattr(whole_checkpoints.WholeCheckpoints, before)

    def fill(self, *args, **kwargs):
        if self.state.global_step == 4:
            with pytest.raises(OSError), filler.open("wb", buffering=0) as file:
                while True:
                    file.write(bytes(4096))
        return plain(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(whole_checkpoints.WholeCheckpoints, before, fill)
        text = tiny.refused(lambda: train(make(output=output, steps=10)))
    assert f"{output} has no room for the checkpoint of step 4" in text
    assert "the last whole one is checkpoint-2" in text
    assert not rests(output) and problem_of(output / "checkpoint-2") is None
    filler.unlink()
    train(make(output=output, steps=10))
    assert_same_run(output, whole(10))


@pytest.mark.parametrize(
    ("error", "full"),
    [
        (OSError(28, "No space left on device"), True),
        (OSError(122, "Disk quota exceeded"), True),
        (RuntimeError("Error: I/O error: No space left on device (os error 28)"), True),
        (RuntimeError("CUDA out of memory"), False),
        (PermissionError(13, "Permission denied"), False),
    ],
)
def test_only_a_full_disk_is_called_one(make, tmp_path, monkeypatch, error, full):
    """Where bytes are free, as on a disk with quotas, the error itself must say it."""

    def fail(self, part):
        raise error

    monkeypatch.setattr(whole_checkpoints.WholeCheckpoints, "_save_kept", fail)
    with pytest.raises(ValueError if full else type(error)):
        train(make())
    assert not rests(tmp_path / "run") and not checkpoints_in(tmp_path / "run")


# --- one run, one folder --------------------------------------------------------------------------


def test_two_processes_do_not_train_in_one_folder(processes, recipe_file, tmp_path):
    output = tmp_path / "run"
    slow = (SLOW_STEPS.format(seconds=1),)
    arguments = ("train", recipe_file, *settings(output, 6))
    first = processes.start(*arguments, before=slow)
    wait_until(lambda: (output / ".lock").exists() and (output / ".lock").read_text())
    code, second = processes.finish(*arguments)
    assert code == 2 and f"eve: Process {first.pid} on " in second.err
    assert f"trains in {output} already" in second.err
    first.send(signal.SIGKILL)
    wait_until(lambda: not first.alive)
    code, third = processes.finish(*arguments)  # the lock of a dead process is none
    assert code == 0, third.err
    assert not (output / ".lock").exists()


HARMLESS = (
    *("training.logging_steps=1", "training.save_steps=1", "training.save_total_limit=9"),
    *("training.dataloader_num_workers=2", "name=other", "guards.collapse=stop"),
)


@pytest.mark.parametrize("override", HARMLESS)
def test_keys_that_change_nothing_may_change(make, whole, tmp_path, override):
    output = tmp_path / "run"
    shutil.copytree(whole(10), output)
    (output / "run.json").unlink()
    shutil.rmtree(output / "checkpoint-10")
    said = []
    train(make(override, steps=10), say=said.append)
    key = override.partition("=")[0]
    assert any(key in text and "changes nothing of what is learnt" in text for text in said)
    final = (output / "model.safetensors").read_bytes()
    assert final == (whole(10) / "model.safetensors").read_bytes()
    steps = [entry["step"] for entry in read(output / "run.json")["losses"]]
    assert steps == ([3, 6, 9, 10] if "logging_steps" in override else [3, 6, 9])
    # The new value counts, not the one that the checkpoint remembers.
    assert (output / "checkpoint-9").is_dir() == ("save_steps" in override)
    # Finished, it still is the same run under either recipe.
    assert finished_run(make(override, steps=10)) and finished_run(make(steps=10))


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("seed=5", "seed was 3 and is 5"),
        ("training.max_steps=7", "training.max_steps was 6 and is 7"),
        ("training.warmup_steps=1", "training.warmup_steps was not given and is 1"),
        ("stage.learning_rates={'*': 2.0e-3}", "stage.learning_rates.* was 0.001 and is 0.002"),
        ("data.format=plain", "data.format was chat and is plain"),
        ("training.save_only_model=true", "training.save_only_model was not given and is True"),
    ],
)
def test_other_runs_are_refused_by_their_keys(make, whole, tmp_path, override, said):
    output = tmp_path / "run"
    output.mkdir()
    text = (whole(10) / "recipe.resolved.yaml").read_text()
    (output / "recipe.resolved.yaml").write_text(text.replace("max_steps: 10", "max_steps: 6"))
    text = tiny.refused(lambda: train(make("training.logging_steps=1", override)))
    assert f"already holds a different run ({said}; see " in text  # and not the harmless one


def test_every_glob_of_keys_that_may_change_means_a_key():
    """A name that the library drops would stand there for nothing."""
    names = [f"training.{name}" for name in _training_hints()]
    for glob in MAY_CHANGE:
        if glob.startswith("training."):
            assert matching(names, glob), glob


def test_weights_alone_are_nothing_to_go_on_from(make, tmp_path):
    recipe = make("training.save_only_model=true")
    train(recipe)
    (tmp_path / "run" / "run.json").unlink()
    text = tiny.refused(lambda: train(recipe))
    assert "holds no optimizer" in text and "checkpoint-6" in text


def test_saving_on_each_machine_is_refused(make):
    text = tiny.refused(lambda: train(make("training.save_on_each_node=true")))
    assert "training.save_on_each_node is true" in text


def test_a_checkpoint_holds_no_pickle_with_code(whole):
    """The library's `training_args.bin` is one; all else is read as plain tensors and types."""
    checkpoint = checkpoints_in(whole(10))[-1]
    assert not list(checkpoint.glob("*.bin"))
    pickles = list(checkpoint.glob("*.pt*"))
    assert len(pickles) == 4
    for file in pickles:
        load(file)
