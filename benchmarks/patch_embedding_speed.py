"""Patch embedding and projector against the published shape of work, forward and with the way back.

    OMP_NUM_THREADS=1 python benchmarks/patch_embedding_speed.py        # some ten minutes
    OMP_NUM_THREADS=1 python benchmarks/patch_embedding_speed.py --edges 672 --batches 4

The published shape is `tests/oracle/published_shape.py`: canvases, a round for each picture, keys
and values of every patch.  Both have the same random weights (width 1024, a decoder 576 wide) and
have to give the same tokens.  A batch of one is a square, 24 x 24 cells; larger ones repeat four
pictures, 24 x 24, 8 x 24, 24 x 12 and 18 x 24, at 1344 pixels of twice the cells each way.
Operations are what torch's counter sees.  Both take turns, and so does a product of matrices, whose
rate is that of the run.  Times are processor seconds of one thread, from which other programs take
little away.  Ends with one line of JSON.

Easy to get wrong: the ratio of operations is what a fast processor gets near to; it can be beaten
only where the published shape spends its time on something else.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from eve_vlm import EveConfig, EveModel
from oracle import published_shape

WIDTH, DECODER, PATCH, CELL, SIZE = 1024, 576, 14, 28, 1024
MIX = [(24, 24), (8, 24), (24, 12), (18, 24)]  # cells at 672 pixels
TEXT = {
    **{"model_type": "llama", "hidden_size": DECODER, "intermediate_size": 8, "vocab_size": 8},
    **{"num_hidden_layers": 1, "num_attention_heads": 9, "num_key_value_heads": 3},
}


class Spent(NamedTuple):
    """One case: seconds turn by turn, and operations."""

    seconds: dict[str, list[float]]
    operations: dict[str, int]


def model_of() -> EveModel:
    """Patch embedding and projector of a realistic size; the decoder behind them is never run."""
    torch.manual_seed(0)
    config = EveConfig(text_config=TEXT, vision_config={"hidden_size": WIDTH}, image_token_id=7)
    return EveModel._from_config(config)


def forms(model: EveModel, batch: int, edge: int) -> dict[str, Callable[[], torch.Tensor]]:
    """Both ways from pixels in memory to all tokens of a batch."""
    scale = edge // 672
    grids = [MIX[index % len(MIX)] for index in range(batch)]
    pictures = [torch.randn(3, scale * rows * CELL, scale * cols * CELL) for rows, cols in grids]
    canvases = published_shape.canvases(pictures, edge, PATCH)
    parts = (model.vision_tower, model.multi_modal_projector)
    weights = [published_shape.official(dict(part.named_parameters())) for part in parts]
    pixels = torch.cat([published_shape.patches_of(picture, PATCH) for picture in pictures])
    grid_thw = torch.tensor([(1, *(side // PATCH for side in one.shape[1:])) for one in pictures])
    return {
        "published": lambda: torch.cat(published_shape.embed(canvases, *weights)),
        "ours": lambda: model.multi_modal_projector(model.vision_tower(pixels, grid_thw)),
    }


def forward(form: Callable[[], torch.Tensor]) -> None:
    """Without anything kept for the way back."""
    with torch.no_grad():
        form()


def with_the_way_back(form: Callable[[], torch.Tensor], model: EveModel) -> None:
    """Gradients of all weights."""
    form().square().mean().backward()
    model.zero_grad()


def same(made: dict[str, Callable[[], torch.Tensor]]) -> float:
    """The largest difference of the tokens, relative to the largest entry.

    Raises:
        SystemExit: if the two are not the same function.
    """
    with torch.no_grad():
        ours, published = made["ours"](), made["published"]()
    difference = float((ours - published).abs().max() / published.abs().max())
    if difference > 1e-5:
        raise SystemExit(f"The two forms differ by {difference:.1e}.")
    return difference


def measure(work: dict[str, Callable[[], None]], repeats: int) -> Spent:
    """All kinds in turns, and beside them the rate of products in operations per second."""
    factor, operations = torch.randn(SIZE, SIZE), {}
    for name, run in work.items():  # to warm up, too
        with FlopCounterMode(display=False) as counter:
            run()
        operations[name] = counter.get_total_flops()
    turns = {**work, "product": lambda: torch.mm(factor, factor)}
    operations["product"] = 2 * SIZE**3
    seconds: dict[str, list[float]] = {name: [] for name in turns}
    for _ in range(repeats):
        for name, run in turns.items():
            started = time.process_time()
            run()
            seconds[name].append(time.process_time() - started)
    return Spent(seconds, operations)


def figures(spent: Spent) -> dict[str, object]:
    """Medians, ratios with the quartiles of their turns, and what the machine could have done."""
    seconds, operations = spent
    rate = operations["product"] / statistics.median(seconds["product"])
    pairs = zip(seconds["published"], seconds["ours"], strict=True)
    found: dict[str, object] = {
        "rate_gflops": rate / 1e9,
        "ratio": statistics.quantiles((a / b for a, b in pairs), n=4, method="inclusive"),
        "ratio_of_operations": operations["published"] / operations["ours"],
    }
    for name in ("published", "ours"):
        median = statistics.median(seconds[name])
        found[name] = {
            "seconds": median,
            "gflop": operations[name] / 1e9,
            "seconds_x_rate_gflop": median * rate / 1e9,
            "share_of_rate": operations[name] / median / rate,
        }
    return found


def row(case: str, kind: str, found: dict) -> str:
    """A row of the table."""
    low, middle, high = found["ratio"]
    cells = [case, kind, f"{found['rate_gflops']:.0f}"]
    for name in ("published", "ours"):
        of = found[name]
        cells += [f"{of['seconds'] * 1e3:,.0f}", f"{of['gflop']:.1f}", f"{of['share_of_rate']:.0%}"]
    cells += [f"{middle:.2f} ({low:.2f} to {high:.2f})", f"{found['ratio_of_operations']:.2f}"]
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--edges", type=int, nargs="*", default=[672, 1344])
    parser.add_argument("--batches", type=int, nargs="*", default=[1, 4, 32])
    asked = parser.parse_args()
    torch.set_num_threads(1)
    model, found = model_of(), {}
    titles = ["pictures", "passes", "GFLOP/s", "published, ms", "GFLOP", "of the rate", "ours, ms"]
    titles += ["GFLOP", "of the rate", "published / ours", "of operations"]
    print("| " + " | ".join(titles) + " |")
    print("|" + "---|" * len(titles))
    for edge in asked.edges:
        for batch in asked.batches:
            made = forms(model, batch, edge)
            case = f"{edge}, {batch} " + ("square" if batch == 1 else "mixed")
            differs = same(made)
            for kind, run in (
                ("forward", forward),
                ("forward and backward", lambda form: with_the_way_back(form, model)),
            ):
                work = {name: lambda run=run, form=form: run(form) for name, form in made.items()}
                measured = figures(measure(work, asked.repeats)) | {"difference": differs}
                found[f"{case}, {kind}"] = measured
                print(row(case, kind, measured), flush=True)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
