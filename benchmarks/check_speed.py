"""How fast `eve data check` is: records a second with pictures decoded, and with headers alone.

    python benchmarks/check_speed.py --records 4000
    python benchmarks/check_speed.py --records 4000 --tokens

One picture a record, every one in a file of its own (pictures of several records are decoded once,
so shared files would flatter).  Easy to get wrong: the files were just written, so they are in the
memory of the operating system, as they are not on a first run over a cold disk.
"""

import argparse
import json
import os
import tempfile
import time
from pathlib import Path

import numpy as np
from index_speed import make_records
from PIL import Image

from eve_vlm.data.check import Numbered, check_data_sets
from eve_vlm.data.encode import Encoder
from eve_vlm.data.sources import build_source
from eve_vlm.data.tokenizer import train_tokenizer
from eve_vlm.image_processing_eve import EveImageProcessor
from eve_vlm.processing_eve import EveProcessor

SIZES = (336, 640, 1024)  # pixels of the longer side; the shorter has three quarters of it


def make_pictures(folder: Path, count: int, edge: int) -> list[str]:
    """JPEG files of a soft pattern with noise, as large as photographs are."""
    dice, names = np.random.default_rng(edge), []
    height, width = edge * 3 // 4, edge
    noise = dice.integers(-12, 13, (height, width, 1))
    for number in range(count):
        soft = Image.fromarray(dice.integers(0, 256, (12, 16, 3), dtype=np.uint8))
        pixels = np.asarray(soft.resize((width, height), Image.Resampling.BICUBIC)) + noise
        picture = Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))
        names.append(f"{edge}-{number:06}.jpg")
        picture.save(folder / names[-1], quality=80)
    return names


def make_encoder() -> Encoder:
    """A byte-level tokenizer of 2,000 words, the short template and the pictures of EVE-7B."""
    words = train_tokenizer(["the red cat sits on two boxes near the picture " * 4])
    return Encoder(
        EveProcessor(EveImageProcessor(), words, chat_template=words.chat_template),
        format="chat",
        max_length=4096,
    )


def main() -> None:
    """Makes the data in a folder that vanishes, checks them, and prints what it took."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--records", type=int, default=4000)
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--tokens", action="store_true", help="count tokens, as with a recipe")
    wanted = parser.parse_args()
    encoder = make_encoder() if wanted.tokens else None
    for edge in SIZES:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            os.environ["EVE_CACHE"] = str(folder / "cache")
            names = make_pictures(folder, wanted.records, edge)
            file = folder / "data.json"
            make_records(file, wanted.records, names, lines=False)
            size = sum((folder / one).stat().st_size for one in names) / len(names)
            result = {"pixels": f"{edge} x {edge * 3 // 4}", "kilobytes": round(size / 1e3, 1)}
            for title, fast in (("decoded", False), ("fast", True)):
                source = build_source("llava", path=str(file), seed=0)
                before, started = sum(os.times()[:4]), time.perf_counter()
                checked = check_data_sets(
                    [Numbered(source)], encoder, fast=fast, workers=wanted.workers
                )
                spent = time.perf_counter() - started
                worked = sum(os.times()[:4]) - before  # of this process and its workers
                assert checked.ok and checked.records == wanted.records
                result |= {
                    f"{title}_per_second": round(wanted.records / spent),
                    f"{title}_core_ms_per_record": round(worked / wanted.records * 1e3, 2),
                }
        result |= {"workers": wanted.workers, "tokens": wanted.tokens}
        print(json.dumps(result | {"load": round(os.getloadavg()[0], 1)}), flush=True)


if __name__ == "__main__":
    main()
