"""How fast a training step is, by attention, row length, precision and more.

    python benchmarks/training_speed.py --shape eve-small
    python benchmarks/training_speed.py --shape eve-7b

A step is forward and backward over packed rows of captions with pictures of mixed shapes, where
everything (or adapters) learns; with `optim=adamw` a fused AdamW step is in it.  The share is that
of the operations that have to be done (`eve_vlm.flops`: no padding, no pair across records, nothing
twice) in what the same run measured for products of large matrices in half precision.  Prints a
table and one line of JSON.

Easy to get wrong: the first steps compile and fill memory, so two of them are not counted; and a
host that waits for the device within a step (`waits`) hides how fast the device is.
"""

import argparse
import json
import statistics
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import torch

from eve_vlm import language_loss_eve, pooled_attention_eve
from eve_vlm.bench.measuring import Clock
from eve_vlm.bench.roof import measured_roof
from eve_vlm.bench.subjects import SHAPES, Subject
from eve_vlm.bench.training import batch_of, step_work
from eve_vlm.bench.words import records
from eve_vlm.data.encode import EncodedRecord, Encoder
from eve_vlm.flops import flops_of, terms_of
from eve_vlm.layer_taps_eve import layers_of
from eve_vlm.train.lora import make_trainable
from eve_vlm.train.sections import LoraSection

USUAL = {
    "attention": "sdpa_by_record",
    "tokens": 16384,
    "rows": 1,
    "compile": False,
    "dynamic": True,
    "tf32": False,
    "checkpointing": False,
    "loss_mib": 128,
    "optim": "none",
    "lora": 0,
    "cast": True,
    "frozen": False,
    "cells": 8192,
}
# What is tried unless --try says otherwise; the first is what the others are compared with.  Not
# flex attention: for a mask of 16,384 positions an assembler worked for minutes (H200, torch 2.11).
TRIED = {
    "eve-small": [
        {},
        {"attention": "sdpa"},
        {"tf32": True},
        {"tf32": True, "tokens": 32768},
        {"tf32": True, "tokens": 65536},
        {"tf32": True, "tokens": 32768, "loss_mib": 2048},
        {"tf32": True, "tokens": 32768, "optim": "adamw"},
        {"tf32": True, "tokens": 32768, "cells": 512},
        {"tf32": True, "tokens": 32768, "frozen": True},
        {"tf32": True, "tokens": 32768, "compile": True},
        {"tf32": True, "tokens": 32768, "checkpointing": True},
        {"tf32": True, "tokens": 32768, "lora": 64},
        {"tf32": True, "tokens": 32768, "lora": 64, "cast": False},
        {"tf32": True, "tokens": 32768, "lora": 64, "cast": False, "compile": True},
    ],
    "eve-7b": [
        {"tokens": 8192},
        {"tokens": 8192, "attention": "sdpa"},
        {"tokens": 8192, "tf32": True},
        {"tokens": 8192, "tf32": True, "loss_mib": 2048},
        {"tokens": 8192, "tf32": True, "compile": True},
        {"tokens": 16384, "tf32": True, "checkpointing": True},
        {"tokens": 8192, "tf32": True, "optim": "adamw"},
        {"tokens": 8192, "tf32": True, "lora": 64},
    ],
}
TRIED["small"] = TRIED["eve-small"]
TRIED["tiny"] = [{"tokens": 200}, {"tokens": 200, "lora": 4, "cast": False, "loss_mib": 1}]


def records_of(subject: Subject, edge: int, tokens: int) -> list[EncodedRecord]:
    """Captions with pictures of mixed shapes, as many as fit a row of so many tokens."""
    encode = Encoder(subject.processor(edge), format="plain", max_length=tokens)
    few = [encode(record) for record in records(16, "pretrain")]
    found: list[EncodedRecord] = []
    left = tokens
    while len((one := few[len(found) % len(few)]).input_ids) <= left:
        found.append(one)
        left -= len(one.input_ids)
    return found


def prepared(subject: Subject, how: dict[str, Any], *, amp: bool) -> torch.nn.Module:
    """The subject's model set up this way; adapters are put on for good."""
    model = subject.model
    model.set_attn_implementation(how["attention"])
    torch.set_float32_matmul_precision("high" if how["tf32"] else "highest")
    language_loss_eve.LOGIT_BYTES = how["loss_mib"] * 2**20
    pooled_attention_eve.CELLS_ON_GPU = how["cells"]
    if how["lora"] and not any(".lora_" in name for name, _ in model.named_parameters()):
        section = LoraSection(rank=how["lora"], alpha=2 * how["lora"])
        stage = SimpleNamespace(trainable=["*"])
        start = SimpleNamespace(init_from="random")
        make_trainable(model, SimpleNamespace(lora=section, stage=stage, model=start))
    elif not how["lora"]:
        model.requires_grad_(True)
        if how["frozen"]:
            model.model.language_model.requires_grad_(False)
            model.lm_head.requires_grad_(False)
    for module in model.modules():
        if how["lora"] and "cast_input_dtype_enabled" in vars(type(module)) | vars(module):
            module.cast_input_dtype_enabled = how["cast"]
    if how["checkpointing"]:
        with warnings.catch_warnings(action="ignore"):
            model.gradient_checkpointing_enable({"use_reentrant": False})
    elif model.is_gradient_checkpointing:
        model.gradient_checkpointing_disable()
    for layer in layers_of(model.model.language_model):
        layer._compiled_call_impl = None
        if how["compile"]:
            layer.compile(dynamic=how["dynamic"] or None)
    return model.train()


def step_of(
    model: torch.nn.Module, batch: dict[str, torch.Tensor], how: dict[str, Any], *, amp: bool
) -> Callable[[], torch.Tensor]:
    """One step; returns its loss."""
    device = batch["input_ids"].device.type
    learning = [part for part in model.parameters() if part.requires_grad]
    optimizer = torch.optim.AdamW(learning, 1e-6, fused=True) if how["optim"] == "adamw" else None

    def step() -> torch.Tensor:
        with torch.autocast(device, torch.bfloat16) if amp else nullcontext():
            loss = model(**batch).loss
        loss.backward()
        if optimizer is not None:
            optimizer.step()
        for part in learning:
            part.grad = None
        return loss.detach()

    return step


def waits_of(step: Callable[[], Any]) -> int:
    """Times that the host waits for the device within a step; 0 without one."""
    if not torch.cuda.is_available():
        return 0
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(one.message) for one in found)


def measured(
    subject: Subject, edge: int, how: dict[str, Any], clock: Clock, *, amp: bool, repeats: int
) -> dict[str, Any]:
    """Seconds, operations and memory of one way."""
    cuda = clock.device.type == "cuda"
    row = records_of(subject, edge, how["tokens"])
    batch = batch_of(row, subject, packed=True)
    model = prepared(subject, how, amp=amp)
    step = step_of(model, batch, how, amp=amp)
    started = clock()
    loss = float(step())
    first = clock() - started
    step()
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    times = []
    for _ in range(repeats):
        started = clock()
        step()
        times.append(clock() - started)
    work = step_work(row, subject, aligned=None)
    seconds = statistics.median(times)
    return {
        "first_seconds": first,
        "seconds": seconds,
        "all_seconds": times,
        "tokens": work.tokens,
        "records": len(row),
        "labels": work.labels,
        "needed_flops": flops_of(terms_of(model), work).needed,
        "waits": waits_of(step),
        "peak_bytes": torch.cuda.max_memory_allocated() if cuda else None,
        "loss": loss,
    }


def profiled(step: Callable[[], Any], name: str) -> None:
    """Prints where the device's time goes; an operation's is that of its kernels once more."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as found:
        step()
        torch.cuda.synchronize()
    kernels = [one for one in found.key_averages() if one.self_device_time_total > 0]
    kernels.sort(key=lambda one: -one.self_device_time_total)
    alone = [one for one in kernels if one.device_type == DeviceType.CUDA]
    print(f"profile of {name}: {sum(one.self_device_time_total for one in alone) / 1e3:.1f} ms")
    for one in kernels[:22]:
        print(f"  {one.self_device_time_total / 1e3:8.2f} ms {one.count:6} {one.key[:90]}")


def parsed(text: str) -> dict[str, Any]:
    """`tokens=8192,compile=true` as settings."""
    found: dict[str, Any] = {}
    for part in filter(None, text.split(",")):
        name, value = part.split("=")
        if name not in USUAL:
            raise SystemExit(f"{name} is none of {', '.join(USUAL)}.")
        kind = type(USUAL[name])
        found[name] = value == "true" if kind is bool else kind(value)
    return found


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="eve-small", choices=SHAPES)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--longest-edge", type=int)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--try", dest="tried", action="append", type=parsed, metavar="a=1,b=2")
    parser.add_argument("--weights", choices=("float32", "bfloat16"), help="float32 with autocast")
    parser.add_argument("--profile", action="store_true", help="of the first way, its kernels")
    parser.add_argument("--seconds", type=float, default=100.0, help="begin nothing new after it")
    given = parser.parse_args()
    begun, device = time.perf_counter(), torch.device(given.device)
    weights = given.weights or ("bfloat16" if given.shape == "eve-7b" else "float32")
    subject = Subject(given.shape, device=device, dtype=getattr(torch, weights))
    amp, clock = weights == "float32" and device.type == "cuda", Clock(device)
    edge = given.longest_edge or subject.edges[0]
    half = torch.bfloat16 if device.type == "cuda" else torch.float32
    roof = measured_roof(clock, half, quick=given.shape == "tiny")
    ways: Sequence[dict[str, Any]] = given.tried or TRIED[given.shape]
    print(f"{given.shape}, {edge} px, weights {weights}{', autocast' * amp}; {roof}")
    print(
        f"{'seconds':>8} {'first':>6} {'tokens/s':>9} {'records/s':>9} {'share':>6} {'waits':>5} "
        f"{'GiB':>6} {'loss':>8}  way",
        flush=True,
    )
    figures = []
    for place, way in enumerate(ways):
        if time.perf_counter() - begun > given.seconds:
            print(f"left out, as {given.seconds:.0f} s are over: {ways[place:]}")
            break
        how = USUAL | way
        name = ", ".join(f"{key}={value}" for key, value in way.items()) or "usual"
        try:
            one = measured(subject, edge, how, clock, amp=amp, repeats=given.repeats)
        except (RuntimeError, ValueError, ImportError) as error:
            print(f"failed: {name}: {type(error).__name__}: {str(error).strip().splitlines()[0]}")
            traceback.print_exc(limit=-3)
            continue
        rate = one["needed_flops"] / one["seconds"]
        one |= {"way": way, "flops_per_second": rate, "share": rate / roof.flops}
        memory = "-" if one["peak_bytes"] is None else f"{one['peak_bytes'] / 2**30:.1f}"
        print(
            f"{one['seconds']:8.3f} {one['first_seconds']:6.1f} "
            f"{one['tokens'] / one['seconds']:9.0f} {one['records'] / one['seconds']:9.1f} "
            f"{one['share']:6.1%} {one['waits']:5} "
            f"{memory:>6} {one['loss']:8.4f}  {name}",
            flush=True,
        )
        figures.append(one)
        if given.profile and place == 0 and device.type == "cuda":
            batch = batch_of(records_of(subject, edge, how["tokens"]), subject, packed=True)
            profiled(step_of(subject.model, batch, how, amp=amp), name)
    line = {"shape": given.shape, "edge": edge, "weights": weights, "device": str(device)}
    print(json.dumps(line | {"roof": roof.as_data(), "figures": figures}))


if __name__ == "__main__":
    main()
