"""What this machine has, whether a workload fits it, and the smallest change that makes it fit.

A workload fits where its estimated peak and a safety margin are within a device's whole memory;
what other programs hold at the moment is shown, not subtracted. Changes are tried from the one that
costs least (a fused optimizer step) to the one that costs most (more GPUs), first alone, then
together.

Easy to get wrong: inside a container the memory of the machine is not what a process may take; the
limit of its control group is.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

from eve_vlm.memory.estimate import Estimate, MemoryModel
from eve_vlm.memory.formulas import Workload

UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([a-z]+)\s*", re.IGNORECASE)
CGROUP_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
LORA_RANK = 16  # tried as a remedy
MOST_GPUS = 64  # tried as a remedy
WORDS_LEFT = 64  # a shorter sequence still has this many words beside its pictures


@dataclass(frozen=True)
class Device:
    """One kind of memory: the machine's RAM, or a GPU's."""

    name: str
    kind: Literal["cpu", "cuda"]
    bytes: int
    free: int | None = None


class Remedy(NamedTuple):
    """Changes that make a workload fit, in words, and what it then takes."""

    words: str
    work: Workload
    estimate: Estimate


def parse_bytes(text: str) -> int:
    """Bytes of a size with its unit.

    >>> parse_bytes("40GiB"), parse_bytes("1.5 GB")
    (42949672960, 1500000000)

    Raises:
        ValueError: if it is no size.
    """
    found = SIZE.fullmatch(text)
    unit = UNITS.get(found[2].upper()) if found else None
    if found is None or unit is None or float(found[1]) == 0:
        raise ValueError(f"{text!r} is no size of memory; write a number and a unit, as in 40GiB.")
    return int(float(found[1]) * unit)


def human_bytes(size: int) -> str:
    """A size as people say it, in powers of 1024.

    >>> human_bytes(25_100_000_000), human_bytes(700 * 2**20)
    ('23.4 GiB', '700 MiB')
    """
    gib = size / 2**30
    if gib < 1:
        return f"{size / 2**20:.0f} MiB" if size >= 2**20 else "< 1 MiB"
    return f"{gib:,.0f} GiB" if gib >= 100 else f"{gib:.1f} GiB"


def this_machine() -> list[Device]:
    """RAM, within the limit of the control group, and every CUDA device."""
    import psutil  # comes with accelerate

    memory = psutil.virtual_memory()
    devices = [Device("RAM", "cpu", min(memory.total, *_cgroup_limits()), memory.available)]
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        name = f"GPU {index} ({torch.cuda.get_device_name(index)})"
        devices.append(Device(name, "cuda", total, free))
    return devices


def _cgroup_limits() -> list[int]:
    """Limits of this process's control group, if any; a number that nothing reaches otherwise."""
    limits = [2**62]
    for file in map(Path, CGROUP_LIMITS):
        if file.is_file() and (text := file.read_text().strip()).isdigit():
            limits.append(int(text))
    return limits


def fits(estimate: Estimate, device: Device) -> bool:
    """Whether the peak and the safety margin are within the device's memory."""
    return estimate.wanted <= device.bytes


def smallest_change(memory: MemoryModel, work: Workload, device: Device) -> Remedy | None:
    """The first change, or the first few together, that make a workload fit; None if none does."""
    for change in CHANGES:
        for words, changed in change(work):
            if (estimate := _fitting(memory, changed, device)) is not None:
                return Remedy(words, changed, estimate)
    together: list[str] = []
    for change in CHANGES:  # each as far as it goes, on top of those before it
        variants = change(work)
        for words, changed in variants:
            if (estimate := _fitting(memory, changed, device)) is not None:
                return Remedy(", ".join([*together, words]), changed, estimate)
        if variants:
            words, work = variants[-1]
            together.append(words)
    return None


def _fitting(memory: MemoryModel, work: Workload, device: Device) -> Estimate | None:
    """The estimate where it fits; a lower bound without activations saves most of the runs."""
    if memory.at_least(work) > device.bytes:
        return None
    estimate = memory.estimate(work)
    return estimate if fits(estimate, device) else None


Change = list[tuple[str, Workload]]  # in words; the smallest of its kind first


def _fused(work: Workload) -> Change:
    if not work.training or work.optimizer != "adamw":
        return []
    return [("optim adamw_torch_fused", replace(work, optimizer="adamw_fused"))]


def _checkpointing(work: Workload) -> Change:
    if not work.training or work.gradient_checkpointing:
        return []
    return [("gradient checkpointing", replace(work, gradient_checkpointing=True))]


def _bfloat16(work: Workload) -> Change:
    """On GPUs; on common CPUs its products are 25 to 70 times slower than float32's."""
    if work.device == "cpu" or work.dtype != torch.float32:
        return []
    return [("bfloat16", replace(work, dtype=torch.bfloat16))]


def _batch(work: Workload) -> Change:
    """Half the batch, a quarter, ... with as many more accumulated."""
    found, batch = [], work.batch // 2
    while batch:
        changed = replace(work, batch=batch, padded=work.padded and batch > 1)
        words = f"batch {batch}"
        if work.training:
            steps = work.accumulation * (work.batch // batch)
            changed, words = replace(changed, accumulation=steps), f"{words} x {steps} accumulated"
        found.append((words, changed))
        batch //= 2
    return found


def _shorter(work: Workload) -> Change:
    """Three quarters of a sequence's words, and half, where that leaves enough."""
    rest = work.picture_tokens + (0 if work.training else work.new_tokens)
    words = work.length - rest
    return [
        (f"sequences of {rest + left:,} tokens", replace(work, length=rest + left))
        for left in (words * 3 // 4, words // 2)
        if left >= WORDS_LEFT
    ]


def _lora(work: Workload) -> Change:
    if not work.training or work.lora or "*" not in work.trainable:
        return []
    return [(f"LoRA of rank {LORA_RANK}", replace(work, lora=LORA_RANK))]


def _zero3(work: Workload) -> Change:
    if not work.training or work.device == "cpu" or work.sharding == "fsdp" or work.muon:
        return []
    counts = [2**power for power in range(1, MOST_GPUS.bit_length())]
    return [
        (f"ZeRO-3 on {count} GPUs", replace(work, gpus=count, sharding="zero3"))
        for count in counts
        if count > work.gpus or (count == work.gpus and work.sharding != "zero3")
    ]


# The least costly first.
CHANGES = (_fused, _checkpointing, _bfloat16, _batch, _shorter, _lora, _zero3)


def table(rows: list[list[str]], *, right: Callable[[int], bool]) -> str:
    """Rows in columns, the first row a heading; `right` says which columns hold numbers."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [
            cell.rjust(width) if right(column) else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:]])


def parts_table(estimate: Estimate) -> str:
    """Every part in every phase; the phases with the largest sum are what decides."""
    phases = list(estimate.phases)
    parts = list(dict.fromkeys(part for phase in phases for part in estimate.phases[phase]))
    parts.sort(key=lambda part: not part.startswith("weights"))
    rows = [["part", *phases]]
    for part in parts:
        sizes = [estimate.phases[phase].get(part, 0) for phase in phases]
        if any(sizes):
            rows.append([part, *(human_bytes(size) if size else "-" for size in sizes)])
    rows.append(["torch and libraries", *([human_bytes(estimate.framework)] * len(phases))])
    sums = [sum(estimate.phases[phase].values()) + estimate.framework for phase in phases]
    rows.append(["together", *map(human_bytes, sums)])
    return table(rows, right=bool)


def as_data(work: Workload, estimate: Estimate, devices: list[Device]) -> dict[str, Any]:
    """An estimate for a program to read; sizes in bytes."""
    return {
        "phases": estimate.phases,
        "framework": estimate.framework,
        "peak_phase": estimate.peak_phase,
        "peak": estimate.peak,
        "with_margin": estimate.wanted,
        "host": estimate.host,
        "sequence": {
            "length": work.length,
            "batch": work.batch,
            "pictures": work.pictures,
            "picture_tokens": work.picture_tokens,
        },
        "dtype": str(work.dtype).removeprefix("torch."),
        "devices": [
            {"name": device.name, "bytes": device.bytes, "fits": fits(estimate, device)}
            for device in devices
        ],
    }


__all__ = [
    "Device",
    "Remedy",
    "as_data",
    "fits",
    "human_bytes",
    "parse_bytes",
    "parts_table",
    "smallest_change",
    "table",
    "this_machine",
]
