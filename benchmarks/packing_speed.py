"""Padded against packed training steps on one mix of records, tokens per second in one run.

    python benchmarks/packing_speed.py            # about two minutes on two CPU cores

The mix imitates instruction data: two thirds of the records have one picture of mixed shape, and
lengths of their texts are log-normal (median 60 tokens, a long tail up to 700).  Both kinds of
batches come from the same collator and hold about as many tokens; the model is a small random one.
Ends with one line of JSON.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

import tiny
from eve_vlm.data.collator import EveCollator
from eve_vlm.data.encode import Encoder
from eve_vlm.data.packing import Budget, Size, pack
from eve_vlm.data.records import Record

WIDTH, LAYERS, VOCABULARY, EDGE, MULTIPLE = 256, 4, 4096, 64, 8


def records(number: int, encoder: Encoder) -> list:
    """Encoded records of the mix."""
    rng = np.random.default_rng(0)
    made = []
    for index in range(number):
        words = int(np.clip(rng.lognormal(4.1, 0.9), 8, 700))
        text = "".join(chr(97 + letter) for letter in rng.integers(0, 26, words))
        pictures = int(rng.random() < 2 / 3)
        shape = [int(side) for side in rng.integers(EDGE // 3, EDGE + 1, 2)]
        image = Image.fromarray(rng.integers(0, 256, (*shape, 3), dtype=np.uint8))
        messages = tiny.conversation("What is this?", text, pictures=pictures)
        made.append(encoder(Record(id=str(index), messages=messages, images=[image] * pictures)))
    return made


def seconds_of(model: torch.nn.Module, batches: list[dict]) -> float:
    """Forward and backward passes of all batches."""
    started = time.perf_counter()
    for batch in batches:
        model(**batch).loss.backward()
        model.zero_grad()
    return time.perf_counter() - started


def main() -> None:
    """Measures and prints."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--records", type=int, default=256)
    arguments.add_argument("--batch", type=int, default=8, help="records of a padded batch")
    arguments.add_argument("--row", type=int, default=1024, help="positions of a packed row")
    arguments.add_argument("--repeats", type=int, default=5)
    asked = arguments.parse_args()
    encoder = Encoder(tiny.processor(edge=EDGE, multiple=MULTIPLE), format="chat", max_length=1024)
    encoded = records(asked.records, encoder)
    model = tiny.model(
        tiny.config(
            hidden_size=WIDTH,
            intermediate_size=3 * WIDTH,
            num_hidden_layers=LAYERS,
            num_attention_heads=8,
            num_key_value_heads=8,
            head_dim=WIDTH // 8,
            vocab_size=VOCABULARY,
            max_position_embeddings=2048,
        )
    ).train()
    sizes = [Size(len(one.input_ids), len(one.pixel_values)) for one in encoded]
    kinds = {
        "padded": (
            False,
            [
                [[one] for one in encoded[start : start + asked.batch]]
                for start in range(0, len(encoded), asked.batch)
            ],
        ),
        "packed": (
            True,
            [[[encoded[index] for index in row]] for row in pack(sizes, Budget(asked.row))],
        ),
    }
    batches, filled = {}, {}
    for name, (packed, rows) in kinds.items():
        made = [EveCollator(0, packed=packed)(batch) for batch in rows]
        tokens = sum(batch["num_tokens"] for batch in made)
        filled[name] = tokens / sum(batch["input_ids"].numel() for batch in made)
        batches[name] = [
            {key: value for key, value in batch.items() if isinstance(value, torch.Tensor)}
            for batch in made
        ]
    tokens = sum(size.tokens for size in sizes)
    rates: dict[str, list[float]] = {name: [] for name in kinds}
    for name in kinds:
        seconds_of(model, batches[name][:2])  # warm
    for _ in range(asked.repeats):
        for name in kinds:  # in turns, because the machine's speed drifts
            rates[name].append(tokens / seconds_of(model, batches[name]))
    ratios = sorted(b / a for a, b in zip(rates["padded"], rates["packed"], strict=True))
    for name in kinds:
        median = sorted(rates[name])[asked.repeats // 2]
        print(f"{name}: {median:8,.0f} tokens/s, {filled[name]:.1%} of positions are tokens")
    print(
        f"packed / padded: {ratios[asked.repeats // 2]:.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"
    )
    print(json.dumps({"filled": filled, "rates": rates, "ratios": ratios}))


if __name__ == "__main__":
    main()
