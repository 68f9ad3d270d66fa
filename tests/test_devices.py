"""Several processes give what one gives: DDP and ZeRO through `eve train`, FSDP2 on the model.

Two processes with gloo on a CPU.  Tolerances: 1e-5 for losses and 1e-5 for weights after six steps:
float32 sums in another order.
What needs GPUs (nccl, FSDP through the trainer, which leaves it out on a CPU) is not tried here;
there the settings are checked.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
import yaml
from safetensors.torch import load_file

import tiny
from eve_vlm.data.rows import Position, Rows
from eve_vlm.train.devices import strategy_arguments
from eve_vlm.train.sections import DevicesSection
from ranks import sharded_model

ROOT = Path(__file__).resolve().parent.parent


def run_in_ranks(number, *command, **environment):
    """Starts a program in some processes that know of each other; its output."""
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
            *("--nproc-per-node", str(number), *map(str, command)),
        ],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": "tests", **environment},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def data_file(tmp_path_factory):
    """Sixteen conversations; every fourth is text only."""
    return tiny.llava_file(tmp_path_factory.mktemp("data"), records=16)


def written_recipe(folder, data_file, *, teacher=None, **training):
    """A recipe file for a tiny model."""
    keys = tiny.recipe_data(data_file, folder / "run", teacher=teacher)
    keys["training"] |= {
        "max_steps": 6,
        "per_device_train_batch_size": 1,
        "max_grad_norm": 1.0,
        # With the usual 1e-8 a gradient that is rounding alone moves a weight by the whole rate.
        "adam_epsilon": 1.0e-3,
        **training,
    }
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump(keys, sort_keys=False))
    return file


def losses_of(folder):
    logged = json.loads((folder / "run" / "run.json").read_text())["losses"]
    names = ("loss", "loss_lm", "loss_alignment")
    return [{name: entry[name] for name in names if name in entry} for entry in logged]


def assert_same_run(made, expected):
    """Losses by term at every step, and the weights at the end."""
    for ours, theirs in zip(losses_of(made), losses_of(expected), strict=True):
        assert ours == pytest.approx(theirs, abs=1e-5)
    weights, wanted = (
        load_file(folder / "run" / "model.safetensors") for folder in (made, expected)
    )
    assert set(weights) == set(wanted)
    for name, weight in wanted.items():
        assert float((weights[name] - weight).abs().max()) < 1e-5, name


@pytest.fixture(scope="module")
def one_process(tmp_path_factory, data_file, teacher_folder):
    """The same steps in one process, two micro-batches each."""
    folder = tmp_path_factory.mktemp("one")
    file = written_recipe(folder, data_file, teacher=teacher_folder, gradient_accumulation_steps=2)
    run_in_ranks(1, "-m", "eve_vlm.cli", "train", file)
    return folder


def test_some_steps_have_words_alone_on_one_process_only():
    """What the runs below rely on: else the hang that they look for could not come."""
    walk = Rows(16, seed=3).walk(Position())
    steps = [[next(walk)[0][0] % 4 == 3 for _ in range(2)] for _ in range(6)]
    assert [True, False] in steps or [False, True] in steps


def test_ddp_is_one_process(tmp_path, data_file, teacher_folder, one_process):
    file = written_recipe(tmp_path, data_file, teacher=teacher_folder)
    run_in_ranks(2, "-m", "eve_vlm.cli", "train", file)
    assert_same_run(tmp_path, one_process)


@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="needs deepspeed")
@pytest.mark.parametrize("strategy", ["zero2", "zero3"])
def test_zero_is_one_process(tmp_path, data_file, teacher_folder, one_process, strategy):
    file = written_recipe(tmp_path, data_file, teacher=teacher_folder)
    run_in_ranks(
        *(2, "-m", "eve_vlm.cli", "train", file, f"devices.strategy={strategy}"),
        DS_ACCELERATOR="cpu",
    )
    assert_same_run(tmp_path, one_process)


# --- FSDP2 ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sharded")
    run_in_ranks(2, "tests/ranks/sharded_model.py", folder)
    return folder


def alone(steps, model=None, optimizer=None):
    """The same steps in this process: losses, model and optimizer."""
    model = sharded_model.new_model() if model is None else model
    optimizer = optimizer or torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = [
        sharded_model.one_step(model, optimizer, step, sharded_model.batches(step))
        for step in steps
    ]
    return losses, model, optimizer


def test_a_sharded_model_is_one_model(sharded):
    told = json.loads((sharded / "losses.json").read_text())
    losses, _, _ = alone(range(sharded_model.STEPS))
    assert told["losses"] == pytest.approx(losses, abs=1e-5)
    assert told["again"] == told["losses"][2:]  # from its own checkpoint, exactly


def test_a_distributed_checkpoint_goes_on_in_one_process(sharded):
    """Saved by two processes in the middle, loaded by one, which ends where two ended."""
    model = sharded_model.new_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    weights, state = get_state_dict(model, optimizer)
    dcp.load({"model": weights, "optimizer": state}, checkpoint_id=sharded / "middle", no_dist=True)
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=state)
    losses, model, _ = alone(range(2, sharded_model.STEPS), model, optimizer)
    assert losses == pytest.approx(
        json.loads((sharded / "losses.json").read_text())["again"], abs=1e-5
    )
    end = {"model": sharded_model.new_model().state_dict()}
    dcp.load(end, checkpoint_id=sharded / "end", no_dist=True)
    for name, weight in model.state_dict().items():
        assert float((end["model"][name] - weight).abs().max()) < 1e-5, name


# --- settings -------------------------------------------------------------------------------------


def test_one_process_needs_no_settings():
    assert strategy_arguments(DevicesSection()) == {}


@pytest.mark.parametrize(("strategy", "stage"), [("zero2", 2), ("zero3", 3)])
@pytest.mark.parametrize("offload", [False, True])
def test_zero_settings(strategy, stage, offload):
    made = strategy_arguments(DevicesSection(strategy=strategy, cpu_offload=offload))["deepspeed"]
    zero = made["zero_optimization"]
    assert zero["stage"] == stage
    assert ("offload_optimizer" in zero) == offload
    assert ("offload_param" in zero) == (offload and stage == 3)
    assert zero.get("stage3_gather_16bit_weights_on_model_save", False) == (stage == 3)
    assert made["gradient_clipping"] == "auto"
