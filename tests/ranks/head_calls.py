"""Run by two processes: the language loss of a small head that is copied or sharded between them.

Started by `test_language_loss.py`.  One process has fourteen labels (five chunks of three), the other
one label, which is what a batch of short answers beside one of long ones looks like.  Easy to get
wrong: with a sharded head that is wrapped by itself, unequal numbers of calls end in a time limit,
not in an error.
"""

import os
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from eve_vlm import language_loss_eve
from eve_vlm.language_loss_eve import language_loss

WIDTH, WORDS = 8, 20
LABELS = (14, 1)


class Model(nn.Module):
    """One layer and a head."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.lm_head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WORDS, bias=False)
        self.calls = 0
        self.lm_head.register_forward_hook(self.count)

    def count(self, *call):
        self.calls += torch.is_grad_enabled()

    def forward(self, states, labels):
        hidden = self.layer(states)
        return language_loss(hidden, self.lm_head, labels, num_items_in_batch=sum(LABELS)).total


def batch(rank):
    generator = torch.Generator().manual_seed(rank)
    states = torch.randn(1, LABELS[rank] + 1, WIDTH, generator=generator)
    return states, torch.randint(0, WORDS, (1, LABELS[rank] + 1), generator=generator)


def zero3(model):
    """DeepSpeed's engine; every parameter is cut, however small."""
    import deepspeed

    settings = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
        "zero_allow_untested_optimizer": True,
    }
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    return deepspeed.initialize(model=model, optimizer=optimizer, config=settings)[0]


def run(strategy):
    """Loss, the head's full gradient (summed over processes) and this process's calls."""
    model = Model()
    before = model.lm_head.weight.detach().clone()
    made = model
    if strategy == "ddp":
        made = DistributedDataParallel(model)
    elif strategy == "fsdp2":
        mesh = init_device_mesh("cpu", (2,))
        fully_shard(model.lm_head, mesh=mesh)
        fully_shard(model, mesh=mesh)
    else:
        made = zero3(model)
    loss = made(*batch(dist.get_rank()))
    calls = model.calls
    if strategy == "zero3":
        import deepspeed

        made.backward(loss)
        made.step()
        with deepspeed.zero.GatheredParameters([model.lm_head.weight]):
            gradient = before - model.lm_head.weight.detach().clone()  # one step of SGD, rate 1
    else:
        loss.backward()
        gradient = model.lm_head.weight.grad
        gradient = gradient.full_tensor() if strategy == "fsdp2" else gradient
    return loss.detach(), gradient * 2, calls  # they average over two processes


def main(strategy, folder):
    language_loss_eve.LOGIT_BYTES = 3 * 4 * WORDS
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    loss, gradient, calls = run(strategy)
    dist.all_reduce(loss)
    counts = [None, None]
    dist.all_gather_object(counts, calls)
    if dist.get_rank() == 0:
        torch.save({"loss": loss, "gradient": gradient, "calls": counts}, folder / "made.pt")
        alone = Model()
        expected = sum(alone(*batch(rank)) for rank in (0, 1))
        expected.backward()
        expected = {"loss": expected.detach(), "gradient": alone.lm_head.weight.grad}
        torch.save(expected, folder / "expected.pt")
    dist.barrier()
    dist.destroy_process_group()
    # Not by the interpreter's end, where a thread of gloo may abort a process that has done its work.
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
