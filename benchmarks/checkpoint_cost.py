"""What a whole checkpoint costs beside writing it: flushing, SHA-256, checking it at a start.

`python benchmarks/checkpoint_cost.py FOLDER` writes 1.2 GB (weights, and twice as much optimizer)
into FOLDER three times each way and prints the best seconds, on the clock and of processor time.
Easy to get wrong: the clock tells of the disk and of whoever else uses it; processor time does not.
"""

import os
import shutil
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

from eve_vlm.train.checkpoints import files_below, flush_and_sum, flush_files, problem_of, seal

NUMBERS, TENSORS = 12_500_000, 8  # 0.4 GB of weights


def main(folder: Path) -> None:
    """Measures and prints."""
    weights = {f"weight_{index}": torch.randn(NUMBERS) for index in range(TENSORS)}
    moments = {name: (torch.randn(NUMBERS), torch.rand(NUMBERS)) for name in weights}
    part, whole = folder / "part", folder / "checkpoint-1"
    best: dict[str, tuple[float, float]] = {}

    def measure(kind, action):
        began, used = time.perf_counter(), time.process_time()
        action()
        took = time.perf_counter() - began, time.process_time() - used
        best[kind] = tuple(map(min, best.get(kind, took), took))

    def write():
        part.mkdir(parents=True)
        save_file(weights, part / "model.safetensors")
        torch.save(moments, part / "optimizer.pt")

    def write_and_flush():
        write()
        flush_files(part, files_below(part))

    def write_flush_and_sum():
        write()
        seal(part, whole, flush_and_sum(part, files_below(part)))

    for _ in range(3):
        for action in (write, write_and_flush, write_flush_and_sum):
            for old in (part, whole):
                shutil.rmtree(old, ignore_errors=True)
            os.sync()
            measure(action.__name__, action)
        measure("check", lambda: problem_of(whole))
    size = sum(file.stat().st_size for file in whole.iterdir()) / 1e9
    shutil.rmtree(whole)
    for kind, (clock, processor) in best.items():
        print(f"{kind:20s} {clock:6.2f} s on the clock, {processor:5.2f} s of processor time")
    print(f"{size:.2f} GB, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
