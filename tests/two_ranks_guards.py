"""What `test_guards.py` starts as two processes: guards under DDP, gradient norms under FSDP2.

    torchrun --nproc-per-node 2 tests/two_ranks_guards.py FOLDER

Each process writes what it saw to FOLDER/rank-R.json; judging is the test's part. The bad picture is
read by the second process alone.
"""

import json
import os
import sys
from pathlib import Path

import torch
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

sys.path.insert(0, str(Path(__file__).parent))

import guarded
import tiny
from eve_vlm.train.gradients import GradientNorms
from eve_vlm.train.sections import GuardsSection

BAD_STEP = 2


def skipping(folder: Path) -> dict:
    """Four steps of two processes; in the second one of them meets a picture that is NaN."""
    data = guarded.records(8)
    # Rows go to the processes in turn, so record 3 is the second of rank 1.
    data[3] = guarded.with_nan_picture(data[3])
    trainer = guarded.trainer(folder, data, batch=1, steps=4, guards=GuardsSection(bad_step="skip"))
    watch = guarded.Weights(BAD_STEP)
    trainer.add_callback(watch)
    trainer.train()
    first = torch.cat([weight.detach().flatten() for weight in trainer.model.parameters()])
    all_of_them = [torch.empty_like(first) for _ in range(2)]
    distributed.all_gather(all_of_them, first)
    return {
        "skipped": trainer.guards.memory.skipped,
        "unchanged": watch.unchanged,
        "equal": bool(torch.equal(*all_of_them)),
        "finite": bool(first.isfinite().all()),
        "mean": trainer.guards.running_mean,
    }


def stopping(folder: Path) -> str:
    """The message that this process stops with."""
    data = guarded.records(8)
    data[3] = guarded.with_nan_picture(data[3])
    trainer = guarded.trainer(folder, data, batch=1, steps=4)
    try:
        trainer.train()
    except ValueError as error:
        return str(error)
    return ""


def sharded() -> dict[str, dict[str, float]]:
    """Norms by part of one backward pass, whole, whole on every process, and sharded."""
    batch = guarded.one_batch()
    norms = {}
    for way in ("whole", "sharded"):
        model = tiny.model(tiny.config(aligned=True)).train()
        if way == "sharded":
            mesh = init_device_mesh("cpu", (2,))
            for layer in model.model.language_model.layers:
                fully_shard(layer, mesh=mesh)
            fully_shard(model, mesh=mesh)
        model(**batch)["loss"].backward()
        watch = GradientNorms(model, processes=2)
        squares = watch.share(torch.device("cpu"))
        distributed.all_reduce(squares)
        norms[way] = dict(zip(watch.names, squares.sqrt().tolist(), strict=True))
    return norms


def main() -> None:
    """Runs all of it and writes what was seen."""
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    seen = {"skip": skipping(folder / "skip"), "stop": stopping(folder / "stop")}
    seen["norms"] = sharded()
    rank = distributed.get_rank()
    (folder / f"rank-{rank}.json").write_text(json.dumps(seen), encoding="utf-8")
    distributed.barrier()
    distributed.destroy_process_group()
    # Not by the interpreter's end, where a thread of gloo may abort a process that has done its work.
    os._exit(0)


if __name__ == "__main__":
    main()
