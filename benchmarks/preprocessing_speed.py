"""Pictures to model inputs: seconds of this package and of the published shape of work, in one run.

    OMP_NUM_THREADS=1 python benchmarks/preprocessing_speed.py     # about a minute
    python benchmarks/preprocessing_speed.py --threads 2           # and batches in two threads

The published shape is `tests/oracle/published_pixels.py`: a canvas with a mask for every picture,
normalised by the library.  "resize" is Pillow's resizing alone, which both do and neither can do
without.  Pictures are RGB, in memory, and their values random.  All kinds take turns.  What counts
is the ratio of processor seconds, since other programs stretch wall seconds.  Ends with one line of
JSON.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from eve_vlm import EveImageProcessor
from eve_vlm.picture_pixels_eve import resize_picture
from oracle.published_pixels import published_tensor

# Width and height; the batch has grids of 24 x 24, 8 x 24, 24 x 12 and 18 x 24.
CASES = {
    "640 x 480": [(640, 480)],
    "1920 x 1080": [(1920, 1080)],
    "4000 x 3000": [(4000, 3000)],
    "four, mixed": [(1000, 1000), (1500, 500), (600, 1200), (640, 480)],
}
EDGES = {672: 28, 1344: 56}  # the longest edge, and the multiple of the shorter one


def pictures(sizes: list[tuple[int, int]]) -> list[Image.Image]:
    """Random ones; what they show changes nothing in the work."""
    rng = np.random.default_rng(0)
    return [
        Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
        for width, height in sizes
    ]


def resize_all(images: list[Image.Image], processor: EveImageProcessor) -> None:
    """What nobody can do without."""
    for image in images:
        resize_picture(image, *processor.grid_of(image.height, image.width)[:2])


def in_threads(work: Callable[[], object], threads: int) -> None:
    """The work with another number of threads than one."""
    torch.set_num_threads(threads)
    try:
        work()
    finally:
        torch.set_num_threads(1)


def kinds(sizes: list[tuple[int, int]], edge: int, threads: int) -> dict[str, Callable]:
    """Everything that takes turns."""
    images = pictures(sizes)
    processor = EveImageProcessor(size={"longest_edge": edge}, size_multiple=EDGES[edge])
    settings = {
        **{"image_size": edge, "image_size_clip": 336, "patch_stride": 14, "conv_stride": 2},
        **{"patch_stride_clip": 14, "image_mean": processor.image_mean},
        "image_std": processor.image_std,
    }
    ours = partial(processor, images, return_tensors="pt")
    made = {
        "published": partial(published_tensor, images, settings),
        "ours": ours,
        "resize": partial(resize_all, images, processor),
    }
    if threads > 1 and len(images) > 1:
        made[f"{threads} threads"] = partial(in_threads, ours, threads)
    return made


def measure(work: dict[str, Callable], repeats: int) -> dict[str, dict[str, list[float]]]:
    """Processor and wall seconds of each kind, in turns, because the machine's speed drifts."""
    seconds: dict[str, dict[str, list[float]]] = {name: {"cpu": [], "wall": []} for name in work}
    for repeat in range(repeats + 1):
        for name, run in work.items():
            cpu, wall = time.process_time(), time.perf_counter()
            run()
            spent = {"cpu": time.process_time() - cpu, "wall": time.perf_counter() - wall}
            if repeat:  # the first is to warm up
                for clock, value in spent.items():
                    seconds[name][clock].append(value)
    return seconds


def ratios(seconds: dict[str, dict[str, list[float]]], name: str, clock: str) -> list[float]:
    """Lower quartile, median and upper quartile of published / `name`, turn by turn."""
    pairs = zip(seconds["published"][clock], seconds[name][clock], strict=True)
    return statistics.quantiles(sorted(a / b for a, b in pairs), n=4)


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1, help="for batches")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    found = {}
    print("| edge | pictures | kind | cpu, ms | wall, ms | published / it, cpu | wall |")
    print("|---|---|---|---|---|---|---|")
    for edge in EDGES:
        for case, sizes in CASES.items():
            seconds = measure(kinds(sizes, edge, asked.threads), asked.repeats)
            for name, clocks in seconds.items():
                medians = {clock: statistics.median(values) for clock, values in clocks.items()}
                found[f"{edge}, {case}, {name}"] = medians | {
                    f"ratio_{clock}": ratios(seconds, name, clock) for clock in clocks
                }
                low, middle, high = ratios(seconds, name, "cpu")
                wall = ratios(seconds, name, "wall")[1]
                print(
                    f"| {edge} | {case} | {name} | {medians['cpu'] * 1e3:.1f} | "
                    f"{medians['wall'] * 1e3:.1f} | {middle:.2f} ({low:.2f} to {high:.2f}) | "
                    f"{wall:.2f} |",
                    flush=True,
                )
    print(json.dumps(found))


if __name__ == "__main__":
    main()
