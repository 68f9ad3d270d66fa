"""Run by two processes: trains a tiny model sharded by FSDP2, saves a distributed checkpoint.

The library's trainer leaves FSDP out on a CPU, so this goes directly to torch.  Started by
`test_devices.py`; what it leaves in the folder that it is given is compared there with one process.
Every process has its own pictures; from the second step on one of them has words alone.
"""

import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

sys.path.insert(0, str(Path(__file__).parent.parent))

import tiny
from eve_vlm.layer_taps_eve import layers_of

STEPS = 4


def batches(step):
    """Two micro-batches of different sizes: for two processes, or one after the other for one."""
    made = []
    for rank, grids in enumerate([[(2, 3), (4, 1)], [(1, 2)] if step == 0 else []]):
        generator = torch.Generator().manual_seed(10 * step + rank)
        pictures = tiny.packed(grids, seed=10 * step + rank) if grids else {}
        ids = [1]
        for rows, cols in grids:
            ids += [tiny.config().image_token_id] * (1 + rows * (cols + 1)) + [9]
        ids += torch.randint(3, 290, (6 + 3 * rank,), generator=generator).tolist()
        labels = torch.tensor([ids])
        labels = labels.masked_fill(labels == tiny.config().image_token_id, -100)
        features = sum(rows * cols for rows, cols in grids)
        teacher = torch.randn(features, tiny.TEACHER_WIDTH, generator=generator)
        made.append(
            {
                "input_ids": torch.tensor([ids]),
                "labels": labels,
                **pictures,
                **({"teacher_features": teacher} if grids else {}),
            }
        )
    return made


def counts(step):
    """Labels and pictures of both micro-batches."""
    both = batches(step)
    labels = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in both)
    pictures = sum(len(batch["image_grid_thw"]) for batch in both if "image_grid_thw" in batch)
    return {"num_items_in_batch": labels, "num_images_in_batch": pictures}


def new_model():
    return tiny.model(tiny.config(aligned=True)).train()


def units_of(model):
    """Modules that are sharded each by itself."""
    return [model.model.vision_tower, *layers_of(model.model.language_model)]


def shard(model):
    """The units of `devices.strategy: fsdp2` (`test_fsdp_units` holds that), the rest as one."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for unit in units_of(model):
        fully_shard(unit, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def one_step(model, optimizer, step, parts, scale=1.0):
    """Forward and backward passes of some micro-batches, and the optimizer's step."""
    loss = 0.0
    for batch in parts:
        out = model(**batch, **counts(step))
        (out.loss * scale).backward()
        loss += float(out.loss.detach())
    optimizer.step()
    optimizer.zero_grad()
    return loss


def main(folder):
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    model = shard(new_model())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for step in range(STEPS):
        if step == 2:
            weights, state = get_state_dict(model, optimizer)
            dcp.save({"model": weights, "optimizer": state}, checkpoint_id=folder / "middle")
        # Gradients are averaged over processes, so the loss is multiplied by their number.
        loss = torch.tensor(one_step(model, optimizer, step, [batches(step)[rank]], scale=world))
        dist.all_reduce(loss)
        losses.append(float(loss))
    # Back to the middle, and the same steps again.
    weights, state = get_state_dict(model, optimizer)
    dcp.load({"model": weights, "optimizer": state}, checkpoint_id=folder / "middle")
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=state)
    again = []
    for step in range(2, STEPS):
        loss = torch.tensor(one_step(model, optimizer, step, [batches(step)[rank]], scale=world))
        dist.all_reduce(loss)
        again.append(float(loss))
    weights, _ = get_state_dict(model, optimizer)
    dcp.save({"model": weights}, checkpoint_id=folder / "end")
    if rank == 0:
        (folder / "losses.json").write_text(json.dumps({"losses": losses, "again": again}))
    dist.barrier()
    dist.destroy_process_group()
    # Not by the interpreter's end, where a thread of gloo may abort a process that has done its work.
    os._exit(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
