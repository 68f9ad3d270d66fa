"""How fast tokens are made, by the ways there are, beside the floor of a step.

    python benchmarks/decode_speed.py --shape eve-7b --batch 1,8,32

Ways: `growing` (a cache that grows), `fixed` (a cache of fixed size), `recorded` (its step is
recorded as a CUDA graph), `compiled` (recorded, each decoder layer compiled), `tuned` (compiled,
every kernel tuned on this GPU); the last four with `joined-` in front, with products of one input
joined: on a GPU `--static-cache` is `joined-recorded`, and `--compile-steps` is `joined-compiled`.
And `library` (`generate` over its own static cache, which it compiles by itself).  Without a GPU
nothing is recorded.  Prints a table and one line of JSON.

Easy to get wrong: scores of a half-precision model tie often, so ways that sum in another order
make other tokens from some point on; `alike` says how many of the first are those of `growing`.
"""

import argparse
import json
import time
from collections.abc import Sequence
from typing import Any

import torch
from training_speed import profiled

from eve_vlm.bench.answering import answer_case
from eve_vlm.bench.measuring import Clock, Need, Spread
from eve_vlm.bench.roof import Roof, measured_roof
from eve_vlm.bench.subjects import SHAPES, Subject
from eve_vlm.bench.words import QUESTION, SQUARE, picture
from eve_vlm.serve.engine import EveEngine, user_message
from eve_vlm.serve.static_rows import StaticRows

TUNED = {"coordinate_descent_tuning": True}
WAYS = "growing,recorded,compiled,joined-recorded,joined-compiled,joined-tuned,fixed"


def engine_of(subject: Subject, edge: int, way: str) -> EveEngine:
    """An engine that makes tokens this way."""
    engine = subject.engine(edge)
    if way == "growing":
        return engine
    compiled: dict[str, Any] | None = None
    if way.endswith(("compiled", "tuned")):
        compiled = {"options": TUNED} if way.endswith("tuned") else {}
    record, join = False if way.endswith("fixed") else None, way.startswith("joined-")
    engine.static = StaticRows(subject.model, record=record, compiled=compiled, join=join)
    return engine


def tokens_of(engine: EveEngine, pictures: Sequence[Any], number: int) -> list[list[int]]:
    """What is answered about each picture."""
    asked = [user_message(QUESTION, [one]) for one in pictures]
    return [one.token_ids for one in engine.answer(asked, max_new_tokens=number)]


def by_library(engine: EveEngine, like: dict[str, Any], number: int) -> dict[str, Any]:
    """The same by `generate` over its own static cache, of the smallest batch.

    From the difference of two lengths, so that reading the prompt is not in it.
    """
    pictures = [picture(SQUARE, seed=index) for index in range(like["batch"])]
    prompts = [engine.encode(user_message(QUESTION, [one])) for one in pictures]
    device, model = engine.model.device, engine.model
    given = {
        name: torch.cat([one.pictures_from(0)[name] for one in prompts]).to(device)
        for name in ("pixel_values", "image_grid_thw")
    }
    ids = torch.stack([one.input_ids for one in prompts]).to(device)
    clock = Clock(device)

    @torch.inference_mode()
    def run(more: int) -> float:
        started = clock()
        model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=more,
            min_new_tokens=more,
            do_sample=False,
            cache_implementation="static",
            **given,
        )
        return clock() - started

    prepared = run(number) + run(2)
    seconds = [(run(number) - run(2)) / (number - 2) for _ in range(2)]
    found = {"seconds": Spread.of(seconds)._asdict(), "first_run_seconds": prepared}
    return like | found | {"alike": None}


def measured(
    engine: EveEngine,
    edge: int,
    batch: int,
    growing: dict[int, list[list[int]]],
    *,
    number: int,
    repeats: int,
    clock: Clock,
    profile: str | None = None,
) -> dict[str, Any]:
    """One way with one batch; the first way's tokens are kept in `growing`, to compare with."""
    pictures = [picture(SQUARE, seed=index) for index in range(batch)]
    started = time.perf_counter()
    tokens = tokens_of(engine, pictures, number)
    prepared = time.perf_counter() - started
    case = answer_case(engine, edge, pictures, "", new_tokens=number)
    times = [case.run(clock)["token"] for _ in range(repeats)]
    if profile is not None:
        profiled(lambda: case.run(clock), f"{profile}, {batch} rows, {number} tokens")
    if engine.static is not None:
        engine.static.forget()  # fixed caches of all ways would not fit
    pairs = zip(tokens, growing.setdefault(batch, tokens), strict=True)
    alike = [first_difference(*both) for both in pairs]
    return {
        "batch": batch,
        "seconds": Spread.of(times)._asdict(),
        "need": case.needs["token"]._asdict(),
        "first_run_seconds": prepared,
        "alike": sum(alike) / len(alike),
    }


def first_difference(one: Sequence[int], other: Sequence[int]) -> int:
    """How many of the first tokens are the same.

    >>> first_difference([3, 4, 5], [3, 4, 6])
    2
    """
    differ = (
        place for place, both in enumerate(zip(one, other, strict=True)) if len(set(both)) > 1
    )
    return next(differ, len(one))


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="small", choices=SHAPES)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", help="bfloat16 on a GPU, float32 elsewhere")
    parser.add_argument("--longest-edge", type=int)
    parser.add_argument("--batch", default="1,8,32")
    parser.add_argument("--ways", default=WAYS)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=100.0, help="begin nothing new after it")
    parser.add_argument("--profile", action="store_true", help="of each way, its kernels")
    given = parser.parse_args()
    device = torch.device(given.device)
    dtype = getattr(torch, given.dtype or ("bfloat16" if device.type == "cuda" else "float32"))
    subject, clock = Subject(given.shape, device=device, dtype=dtype), Clock(device)
    edge = given.longest_edge or subject.edges[0]
    batches = [int(one) for one in given.batch.split(",")]
    roof = measured_roof(clock, dtype, quick=given.shape == "tiny")
    print(f"{given.shape}, {edge} px, {dtype}, {torch.get_num_threads()} threads; {roof}")
    print(
        f"{'way':15} {'batch':>5} {'ms/token':>9} {'tokens/s':>9} {'of floor':>8} {'GB/s':>7} "
        f"{'first run':>9} {'alike':>6}",
        flush=True,
    )
    figures: list[dict[str, Any]] = []
    growing: dict[int, list[list[int]]] = {}
    begun = time.perf_counter()
    for way in given.ways.split(","):
        engine = engine_of(subject, edge, "growing" if way == "library" else way)
        for batch in batches[:1] if way == "library" else batches:
            if time.perf_counter() - begun > given.seconds:
                print(f"left out, as {given.seconds:.0f} s are over: {way} with {batch}")
                continue
            if way == "library":
                one = by_library(engine, figures[0], given.tokens)
            else:
                one = measured(
                    *(engine, edge, batch, growing),
                    number=given.tokens,
                    repeats=given.repeats,
                    clock=clock,
                    profile=way if given.profile and device.type == "cuda" else None,
                )
            figures.append(one | {"way": way})
            show(figures[-1], roof)
    line = {"shape": given.shape, "edge": edge, "dtype": str(dtype), "device": str(device)}
    print(json.dumps(line | {"roof": roof.as_data(), "figures": figures}))


def show(one: dict[str, Any], roof: Roof) -> None:
    """A line of the table; adds the share of the floor."""
    need, seconds = Need(**one["need"]), one["seconds"]["median"]
    one |= {"floor_seconds": roof.floor(need), "share": roof.floor(need) / seconds}
    alike = "-" if one["alike"] is None else f"{one['alike']:.1f}"
    print(
        f"{one['way']:15} {one['batch']:5} {1e3 * seconds:9.3f} {one['batch'] / seconds:9.1f} "
        f"{one['share']:8.1%} {need.bytes / seconds / 1e9:7.1f} "
        f"{one['first_run_seconds']:8.1f}s {alike:>6}",
        flush=True,
    )


if __name__ == "__main__":
    main()
