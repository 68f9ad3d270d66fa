"""Measures peak memory and time of the language loss, beside plain cross-entropy on all logits.

    python benchmarks/loss_memory.py                      # the table of docs/loss.md, ten minutes
    python benchmarks/loss_memory.py --labels 2048 --words 32000

Every row is one process of its own with one thread, timed in processor seconds: a head of `--width`
and random states in float32, one forward and one backward pass after a small one to warm up.  What
is measured is the highest resident size that Linux saw (VmHWM), less the resident size before; it
holds the gradients of states and head, which nothing can do without.  Plain cross-entropy is left
out where it would need more than 6 GB.

Easy to get wrong: without the two MALLOC variables below glibc keeps freed memory, and the resident
size says what was once needed in pieces, not what is needed at once.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": "65536",  # larger blocks come from, and go back to, the system
    "MALLOC_TRIM_THRESHOLD_": "65536",
}
MIB = 2**20
LIMIT = 6e9  # bytes
# Name, and whether the loss of every label is asked for (weights, losses by data set).
KINDS = {
    "plain": ("plain", False),
    "chunked": ("chunked", False),
    "chunked, by label": ("chunked", True),
    "torch": ("torch", False),
    "torch, by label": ("torch", True),
    "cut": ("cut", False),
}


def resident(field: str) -> int:
    """A line of /proc/self/status in bytes."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def measure(kind: str, labels: int, words: int, width: int) -> dict[str, float]:
    """Peak and time of one kind, in this process."""
    import torch
    import torch.nn.functional as F

    from eve_vlm.language_loss_eve import language_loss

    name, each = KINDS[kind]
    torch.manual_seed(0)
    head = torch.nn.Linear(width, words, bias=False)
    hidden = torch.randn(1, labels + 1, width, requires_grad=True)
    targets = torch.randint(0, words, (1, labels + 1))
    groups = torch.zeros_like(targets) if each else None

    def loss(count: int) -> torch.Tensor:
        states, chosen = hidden[:, :count], targets[:, :count]
        if name == "plain":
            return F.cross_entropy(head(states[0, :-1]), chosen[0, 1:])
        settings = {} if groups is None else {"groups": groups[:, :count], "num_groups": 1}
        return language_loss(states, head, chosen, implementation=name, **settings).total

    loss(9).backward()
    hidden.grad = head.weight.grad = None
    before, start = resident("VmRSS"), time.process_time()
    value = loss(labels + 1)
    forward = time.process_time() - start
    value.backward()
    return {
        "loss": value.item(),
        "forward": forward,
        "seconds": time.process_time() - start,
        "peak": resident("VmHWM") - before,
    }


def in_a_process(*arguments: object) -> dict[str, float] | None:
    """The same in a process of its own; None where the kind cannot run."""
    done = subprocess.run(
        [sys.executable, __file__, "--one", json.dumps(arguments)],
        env=os.environ | ENVIRONMENT,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        print(f"{arguments[0]}: {done.stderr.strip().splitlines()[-1]}", file=sys.stderr)
        return None
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--labels", type=int, nargs="*", default=[2048, 8192])
    parser.add_argument("--words", type=int, nargs="*", default=[32_000, 150_000])
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--one", type=json.loads, help=argparse.SUPPRESS)
    settings = parser.parse_args()
    if settings.one:
        print(json.dumps(measure(*settings.one)))
        return
    print("| words | labels | implementation | peak, MiB | forward, s | with backward, s | loss |")
    print("|---|---|---|---|---|---|---|")
    for words in settings.words:
        for labels in settings.labels:
            for kind in KINDS:
                needed = 3 * 4 * words * labels  # logits, their log-softmax, a gradient
                if kind == "plain" and needed > LIMIT:
                    cells = [f"(3 x {needed / 3 / MIB:,.0f})", "not run", "", ""]
                elif (seen := in_a_process(kind, labels, words, settings.width)) is None:
                    continue
                else:
                    cells = [
                        f"{seen['peak'] / MIB:,.0f}",
                        *(f"{seen[name]:.1f}" for name in ("forward", "seconds")),
                        f"{seen['loss']:.5f}",
                    ]
                row = [f"{words:,}", f"{labels:,}", kind, *cells]
                print("| " + " | ".join(row) + " |", flush=True)


if __name__ == "__main__":
    main()
