"""Rates and memory of `eve curate`, on pictures that are made here.

`python benchmarks/curate_rates.py rates` runs all stages without captions over photographs of two
sizes with one core and with two, and prints pictures per second of a core (processor time) and of
the machine (wall time).  `memory` runs small pictures in growing numbers and prints the most memory
that the command and its workers had.  Easy to get wrong: pictures of noise decode slower than
photographs and compress worse, so these are smooth waves with a little noise, saved as JPEG.
"""

import argparse
import json
import resource
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

from eve_vlm.curate.page import write_curation_report
from eve_vlm.curate.recipe import (
    CaptionsSection,
    CurateRecipe,
    FilterSection,
    SourceSection,
    SpreadSection,
    WriteSection,
)
from eve_vlm.curate.run import curate

SIZES = {"web": (1024, 768), "sa-1b": (2250, 1500)}


def photograph(seed: int, size: tuple[int, int], noise: float) -> Image.Image:
    """Eight waves in each colour on a coarse grid, made larger, with noise."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:1:96j, 0:1:128j]
    layers = []
    for _ in range(3):
        waves = [
            rng.normal() * np.sin(6.3 * (rng.uniform(-9, 9) * x + rng.uniform(-9, 9) * y))
            for _ in range(8)
        ]
        layers.append(128 + 40 * sum(waves))
    coarse = Image.fromarray(np.clip(np.stack(layers, -1), 0, 255).astype(np.uint8))
    large = np.asarray(coarse.resize(size, Image.Resampling.BICUBIC), np.int16)
    grain = rng.normal(0, noise, large.shape) if noise else 0
    return Image.fromarray(np.clip(large + grain, 0, 255).astype(np.uint8))


def make(folder: Path, count: int, size: tuple[int, int], noise: float) -> int:
    """Writes pictures with words beside them; the mean bytes of one."""
    total = 0
    for number in range(count):
        place = folder / f"{number // 1000:04d}"
        place.mkdir(parents=True, exist_ok=True)
        file = place / f"{number:07d}.jpg"
        photograph(number, size, noise).save(file, quality=90)
        file.with_suffix(".txt").write_text("Smooth waves in several colours cross one another.")
        total += file.stat().st_size
    return total // count


def recipe(source: Path, output: Path, *, side: int, block: int, spread: bool) -> CurateRecipe:
    """All stages but captions."""
    return CurateRecipe(
        name="rates",
        output_dir=str(output),
        block=block,
        sources=[
            SourceSection(
                name="made",
                kind="folder",
                path=str(source),
                licence="CC0-1.0",
                columns={"text": "txt"},
            )
        ],
        filter=FilterSection(shorter_side_above=side),
        spread=SpreadSection(centres=8, nearest=None) if spread else None,
        captions=CaptionsSection(),
        write=WriteSection(pictures=block),
    )


def rates(count: int) -> None:
    """Both sizes, one core and two."""
    for name, size in SIZES.items():
        with tempfile.TemporaryDirectory() as folder:
            mean = make(Path(folder) / "in", count, size, noise=3)
            for cores in (1, 2):
                of = recipe(
                    Path(folder) / "in",
                    Path(folder) / f"out{cores}",
                    side=448,
                    block=max(count // 8, 1),
                    spread=True,
                )
                seconds: dict[str, float] = {}
                began = [time.perf_counter()]

                def tick(progress, seconds=seconds, began=began):
                    now = time.perf_counter()
                    seconds[progress.stage] = seconds.get(progress.stage, 0) + now - began[0]
                    began[0] = now

                curate(of, cores=cores, progress=tick)
                write_curation_report(of)
                figures = json.loads((Path(of.output_dir) / "report.json").read_text())
                for one in figures["stages"]:
                    wall = one["rows_in"] / seconds[one["name"]]
                    print(
                        f"{name} {size[0]}x{size[1]} {mean // 1000} kB, {cores} cores, "
                        f"{one['name']}: {one['per_core']:,.1f}/s of a core, "
                        f"{wall:,.1f}/s by wall, "
                        f"{one['peak_mib']:,} MiB",
                        flush=True,
                    )


def memory(counts: list[int], block: int) -> None:
    """Small pictures in growing numbers, each in a run of its own process."""
    for count in counts:
        with tempfile.TemporaryDirectory() as folder:
            make(Path(folder) / "in", count, (96, 72), noise=0)
            of = recipe(
                Path(folder) / "in", Path(folder) / "out", side=64, block=block, spread=False
            )
            curate(of, cores=1)
            write_curation_report(of)
            figures = json.loads((Path(of.output_dir) / "report.json").read_text())
            workers = max(one["peak_mib"] for one in figures["stages"])
            here = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
            print(f"{count:,} pictures: command {here:,} MiB, workers {workers:,} MiB", flush=True)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("rates", "memory"))
    parser.add_argument("counts", type=int, nargs="*")
    parser.add_argument("--block", type=int, default=500)
    given = parser.parse_args()
    if given.what == "rates":
        rates(given.counts[0] if given.counts else 160)
    else:
        memory(given.counts or [1000, 4000, 16000], given.block)


if __name__ == "__main__":
    sys.exit(main())
