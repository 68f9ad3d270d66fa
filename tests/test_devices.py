"""Several processes give what one gives: DDP and ZeRO through `eve train`, FSDP2 on the model.

Two processes with gloo on a CPU.  Tolerances: 1e-5 for losses and 1e-5 for weights after six steps:
float32 sums in another order.
What needs GPUs (nccl, FSDP through the trainer, which leaves it out on a CPU) is not tried here;
there the settings are checked.
"""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
import yaml
from accelerate.utils import FullyShardedDataParallelPlugin
from accelerate.utils.fsdp_utils import fsdp2_prepare_auto_wrap_policy
from safetensors.torch import load_file
from transformers import TrainingArguments

import tiny
from eve_vlm.data.rows import Position, Rows
from eve_vlm.train import devices
from eve_vlm.train.devices import check_device, strategy_arguments
from eve_vlm.train.recipe import load_recipe
from eve_vlm.train.run import train
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


@pytest.fixture(scope="module")
def stopped(tmp_path_factory, data_file, teacher_folder):
    """A run of two processes, as it stands after three of its six steps."""
    folder = tmp_path_factory.mktemp("stopped")
    file = written_recipe(
        folder, data_file, teacher=teacher_folder, save_strategy="steps", save_steps=3
    )
    run_in_ranks(2, "-m", "eve_vlm.cli", "train", file)
    assert (folder / "run" / "checkpoint-6").is_dir()
    shutil.rmtree(folder / "run" / "checkpoint-6")
    for name in ("run.json", "model.safetensors"):
        (folder / "run" / name).unlink()
    return folder


def copied(stopped, folder):
    """The stopped run in a folder of its own."""
    shutil.copytree(stopped / "run", folder / "run")
    keys = yaml.safe_load((stopped / "recipe.yaml").read_text())
    keys["output_dir"] = str(folder / "run")
    (folder / "recipe.yaml").write_text(yaml.safe_dump(keys, sort_keys=False))
    return folder / "recipe.yaml"


def test_one_process_goes_on_where_two_stopped(tmp_path, stopped, one_process):
    """Two micro-batches take the place of two processes; the rest of the run is the same."""
    file = copied(stopped, tmp_path)
    told = run_in_ranks(
        1, "-m", "eve_vlm.cli", "train", file, "training.gradient_accumulation_steps=2"
    )
    assert "checkpoint-3" in told and "gradient_accumulation_steps" in told
    assert_same_run(tmp_path, one_process)


def test_steps_of_another_size_are_refused(tmp_path, stopped):
    file = copied(stopped, tmp_path)
    done = subprocess.run(
        [sys.executable, "-m", "eve_vlm.cli", "train", str(file)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=900,
    )
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "steps took 2 rows each but now they would take 1" in done.stderr


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


@pytest.mark.parametrize("offload", [False, True])
def test_fsdp_settings_arrive(tmp_path, offload):
    """The library leaves unknown keys out without a word; these it reads."""
    given = strategy_arguments(DevicesSection(strategy="fsdp2", cpu_offload=offload))
    arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, **given)
    plugin = dict(arguments.fsdp_plugin_args)
    assert plugin.pop("fsdp_version") == 2 and plugin.pop("reshard_after_forward") is True
    assert plugin.pop("cpu_offload", False) == offload
    assert plugin.pop("state_dict_type") == "FULL_STATE_DICT"
    assert plugin.pop("auto_wrap_policy") == "TRANSFORMER_BASED_WRAP"


@pytest.mark.parametrize("model_type", ["llama", "qwen3", "mistral"])
def test_fsdp_units(model_type):
    """Asked of accelerate: what it shards by itself is what the sharded model above does."""
    model = tiny.model(tiny.config(model_type=model_type, aligned=True))
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="TRANSFORMER_BASED_WRAP"
    )
    chosen = fsdp2_prepare_auto_wrap_policy(plugin, model)
    units = [module for module in model.modules() if chosen(module)]
    assert units == sharded_model.units_of(model)


# --- the example ----------------------------------------------------------------------------------


def test_the_slurm_example_starts_every_process_as_the_trainer_expects(tmp_path):
    """Run with stand-ins for Slurm's commands: what `eve` is given, in each process."""
    tools = tmp_path / "bin"
    tools.mkdir()
    say = 'echo "$@ RANK=$RANK LOCAL_RANK=$LOCAL_RANK WORLD_SIZE=$WORLD_SIZE $MASTER_ADDR:$MASTER_PORT"'
    for name, text in {
        "scontrol": 'if [ "$1" = show ]; then echo host-a; echo host-b; else echo "$@" >> $LOG; fi',
        "srun": 'shift; for n in 0 1; do SLURM_PROCID=$n SLURM_LOCALID=$n "$@" || exit $?; done',
        "eve": f'{say} >> "$LOG"; exit $CODE',
    }.items():
        (tools / name).write_text(f"#!/bin/bash\n{text}\n")
        (tools / name).chmod(0o755)
    log = tmp_path / "log"
    for code in (0, 143):
        environment = {
            "PATH": f"{tools}:{os.environ['PATH']}",
            **{"LOG": str(log), "CODE": str(code), "SLURM_NTASKS": "2"},
            **{"SLURM_JOB_NODELIST": "host-[a-b]", "SLURM_JOB_ID": "77"},
        }
        command = ["bash", "examples/slurm/train.sbatch", "tiny/1_prealign", "seed=1 2"]
        done = subprocess.run(command, cwd=ROOT, env=environment, timeout=60)
        assert done.returncode == code
    first = "train tiny/1_prealign seed=1 2 RANK=0 LOCAL_RANK=0 WORLD_SIZE=2 host-a:29500"
    second = first.replace("RANK=0", "RANK=1")
    assert log.read_text().splitlines() == [first, second, first, "requeue 77"]


# --- a device that is not here --------------------------------------------------------------------


def test_a_recipe_for_a_gpu_is_refused_where_there_is_none(monkeypatch, tmp_path):
    """At once, with the keys and the remedy; the library's own words name arguments of its own."""
    for name in ("is_torch_bf16_gpu_available", "is_torch_tf32_available"):
        monkeypatch.setattr(devices, name, lambda: False)
    output = f"output_dir={tmp_path / 'run'}"
    recipe = load_recipe("eve_small_gpu/1_prealign", [output])
    text = tiny.refused(lambda: train(recipe))
    assert "training.bf16 and training.tf32 want a GPU" in text and "recipe for a CPU" in text
    assert "give training.bf16=false training.tf32=false" in text
    assert not (tmp_path / "run").exists()
    given = [output, "training.bf16=false", "training.tf32=false"]
    check_device(load_recipe("eve_small_gpu/1_prealign", given))
    text = tiny.refused(lambda: check_device(load_recipe("eve_small_gpu/1_prealign", given[:2])))
    assert text.startswith("training.tf32 wants a GPU")
    check_device(load_recipe("eve_small_cpu/1_prealign"))
    on_tpu = load_recipe("eve_small_gpu/1_prealign", [output, "training.tf32=false"])
    monkeypatch.setattr(devices, "is_torch_xla_available", lambda: True)
    check_device(on_tpu)
    monkeypatch.setattr(devices, "is_torch_xla_available", lambda: False)
    assert "training.bf16 wants a GPU" in tiny.refused(lambda: check_device(on_tpu))
    monkeypatch.setattr(devices, "is_torch_bf16_gpu_available", lambda: True)
    monkeypatch.setattr(devices, "is_torch_tf32_available", lambda: True)
    check_device(recipe)
