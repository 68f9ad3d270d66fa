"""How fast `eve data index` is: records per second on made-up LLaVA conversations with pictures.

    python benchmarks/index_speed.py --records 1000000

One picture a record.  The records share a few thousand picture files (`--files`), because a million
files would measure how fast a disk makes files; every record still opens its file and reads the
header.  So the files are in the memory of the operating system, as they are not on a first run over
a cold disk.  Easy to get wrong: the time is that of the whole command's work, offsets included.
"""

import argparse
import json
import os
import random
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

from eve_vlm.data.indexing import index_sources
from eve_vlm.data.sources import build_source

WORDS = (
    *("the", "a", "red", "cat", "sits", "on", "of", "two", "boxes", "near", "left", "and"),
    *("picture", "shows", "what", "is", "where", "how"),
)


def make_pictures(folder: Path, count: int, dice: np.random.Generator) -> list[str]:
    """JPEG files of 224 to 640 pixels a side, as photographs of data sets are."""
    names = []
    for number in range(count):
        width, height = dice.integers(224, 641, 2).tolist()
        small = dice.integers(0, 256, (8, 8, 3), dtype=np.uint8)
        name = f"{number:06}.jpg"
        Image.fromarray(small).resize((width, height)).save(folder / name, quality=80)
        names.append(name)
    return names


def make_records(file: Path, count: int, names: list[str], *, lines: bool) -> None:
    """Conversations of 1 to 4 questions, about 1 kB each."""
    dice = random.Random(0)

    def words(least: int, most: int) -> str:
        return " ".join(dice.choices(WORDS, k=dice.randint(least, most)))

    samples = []
    for _ in range(2000):
        turns = []
        for number in range(dice.randint(1, 4)):
            mark = "<image>\n" * (number == 0)
            turns += [{"from": "human", "value": mark + words(5, 15)}]
            turns += [{"from": "gpt", "value": words(5, 100)}]
        samples.append(json.dumps(turns))
    with file.open("w", encoding="utf-8") as stream:
        for number in range(count):
            body = f'{{"id": "{number:09}", "image": "{names[number % len(names)]}", '
            body += f'"conversations": {samples[number % len(samples)]}}}'
            stream.write((body if lines else f"{', ' if number else '['}{body}") + "\n" * lines)
        if not lines:
            stream.write("]")


def main() -> None:
    """Makes the data in a folder that vanishes, indexes them, and prints what it took."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--records", type=int, default=1_000_000)
    parser.add_argument("--files", type=int, default=5000)
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--lines", action="store_true", help=".jsonl instead of .json")
    wanted = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ["EVE_CACHE"] = str(folder / "cache")
        names = make_pictures(folder, wanted.files, np.random.default_rng(0))
        file = folder / ("data.jsonl" if wanted.lines else "data.json")
        make_records(file, wanted.records, names, lines=wanted.lines)
        before = sum(os.times()[:4])
        started = time.perf_counter()
        source = build_source("llava", path=str(file), seed=0)
        offsets = time.perf_counter()
        (row,) = index_sources([source], workers=wanted.workers)
        ended = time.perf_counter()
        worked = sum(os.times()[:4]) - before  # of this process and its workers
        again = time.perf_counter()
        index_sources([build_source("llava", path=str(file), seed=0)], workers=wanted.workers)
        kept = time.perf_counter() - again
        size = file.stat().st_size
    assert (row.records, row.unread, row.missing) == (wanted.records, 0, 0)
    result = {
        "records": row.records,
        "gigabytes": round(size / 1e9, 2),
        "workers": wanted.workers,
        "offsets_seconds": round(offsets - started, 1),
        "index_seconds": round(ended - offsets, 1),
        "records_per_second": round(row.records / (ended - started)),
        "seconds_per_million": round((ended - started) / row.records * 1e6, 1),
        "core_seconds_per_million": round(worked / row.records * 1e6, 1),
        "load": round(os.getloadavg()[0], 1),  # processes that wanted a core at the end
        "again_seconds": round(kept, 2),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
