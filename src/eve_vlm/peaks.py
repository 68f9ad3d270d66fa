"""What a device can do at most: matrix products per second, from its maker or measured here.

A share of the peak (MFU) is only worth as much as the peak, so there is no guess: a GPU that is not
in the table, or is known under a name that several kinds share, has none.  Easy to get wrong: data
sheets since Ampere print figures "with sparsity", which are twice what a dense product can reach;
those here are dense, and those of GeForce cards with float32 sums, as training needs them.
"""

import re
import time
from functools import lru_cache
from typing import NamedTuple

import torch

TERA = 10**12
SIZES = (256, 1024)  # of matrices by which a CPU is measured


class Peak(NamedTuple):
    """Most operations per second of one device."""

    flops: float
    source: str


class Rates(NamedTuple):
    """Dense matrix products by the type of their factors, 10^12 operations per second."""

    float32: float
    tf32: float | None
    half: float
    """bfloat16 and float16 with float32 sums; of Volta and Turing float16 only."""
    source: str


H100_SHEET = "NVIDIA H100 data sheet, halved (it prints sparse figures)"
H200_SHEET = "NVIDIA H200 data sheet, halved (it prints sparse figures)"
# Words that must all be in the device's name; the first entry that fits decides.
GPUS: dict[tuple[str, ...], Rates] = {
    ("H200", "NVL"): Rates(60, 417.5, 835.5, H200_SHEET),
    ("H200",): Rates(67, 494.5, 989.5, H200_SHEET),
    ("H100", "PCIE"): Rates(51.2, 378, 756, H100_SHEET),
    ("H100", "NVL"): Rates(60, 417.5, 835.5, H100_SHEET),
    ("H100", "HBM3"): Rates(67, 494.5, 989.5, H100_SHEET),  # SXM: "NVIDIA H100 80GB HBM3"
    ("A100",): Rates(19.5, 156, 312, "NVIDIA A100 data sheet"),
    ("A10",): Rates(31.2, 62.5, 125, "NVIDIA A10 data sheet"),
    ("L40S",): Rates(91.6, 183, 362, "NVIDIA L40S data sheet"),
    ("L4",): Rates(30.3, 60, 121, "NVIDIA L4 data sheet, halved (it prints sparse figures)"),
    ("RTX", "A6000"): Rates(38.7, 77.4, 154.8, "NVIDIA RTX A6000: GA102 white paper, appendix"),
    ("RTX", "4090"): Rates(82.6, 82.6, 165.2, "NVIDIA Ada white paper, appendix A"),
    ("RTX", "3090"): Rates(35.6, 35.6, 71, "NVIDIA GA102 white paper, appendix A"),
    ("V100", "SXM2"): Rates(15.7, None, 125, "NVIDIA V100 data sheet"),
    ("V100", "PCIE"): Rates(14, None, 112, "NVIDIA V100 data sheet"),
    ("T4",): Rates(8.1, None, 65, "NVIDIA T4 data sheet"),
    ("MI300X",): Rates(163.4, 653.7, 1307.4, "AMD Instinct MI300X data sheet"),
}
# Names in which one of these stands mean less than the card (a slice), or another one.
OTHERS = {"MIG", "TI", "LAPTOP", "MAX", "D", "MOBILE"}


def gpu_peak(name: str, dtype: torch.dtype, *, tf32: bool = False) -> Peak | None:
    """The peak of a GPU by the name that torch gives it; None where it is not known.

    >>> gpu_peak("NVIDIA A100-SXM4-80GB", torch.bfloat16).flops
    312000000000000.0
    >>> gpu_peak("NVIDIA H100", torch.bfloat16) is None  # several kinds, of different speed
    True

    Args:
        dtype: of the factors of matrix products, with autocast its own.
        tf32: float32 products may be rounded to TF32.
    """
    words = set(re.split(r"[\s-]+", name.upper()))
    if words & OTHERS:
        return None
    rates = next((rates for known, rates in GPUS.items() if words.issuperset(known)), None)
    if rates is None or (dtype == torch.bfloat16 and rates.tf32 is None):  # before Ampere: none
        return None
    half = dtype in (torch.bfloat16, torch.float16)
    value = rates.half if half else rates.tf32 if tf32 and rates.tf32 else rates.float32
    return Peak(float(value * TERA), rates.source)


def measured_peak(
    dtype: torch.dtype, *, sizes: tuple[int, ...] = SIZES, seconds: float = 0.3
) -> Peak:
    """The fastest of many products of square matrices on this machine's CPU, in under a second.

    Small ones take a fraction of a millisecond, and on a machine with other work some of them still
    run undisturbed; large ones use all cores.  What other work takes all the time is missing here
    as it is in training.  Draws no random numbers: training has the same ones with and without it.
    """
    factors = [torch.full((size, size), 0.5, dtype=dtype) for size in sizes]
    torch.mm(factors[-1], factors[-1])  # the first one also starts threads
    ended, best, size = time.perf_counter() + seconds, 0.0, 0
    while time.perf_counter() < ended:
        for factor in factors:
            started = time.perf_counter()
            torch.mm(factor, factor)
            rate = 2 * len(factor) ** 3 / (time.perf_counter() - started)
            if rate > best:
                best, size = rate, len(factor)
    threads = torch.get_num_threads()
    source = f"measured: products of {size} x {size} {dtype} matrices on {threads} threads"
    return Peak(best, source.replace("torch.", ""))


def peak_of(device: torch.device, dtype: torch.dtype) -> Peak | None:
    """The peak of a device of this machine: known, measured on a CPU, or None."""
    if device.type == "cpu":
        return _measured_once(dtype, torch.get_num_threads())
    if device.type != "cuda":
        return None
    # Not `torch.get_float32_matmul_precision`, which fails where this name was used to set it, as
    # transformers does for `training.tf32`.
    tf32 = torch.backends.cuda.matmul.fp32_precision == "tf32"
    return gpu_peak(torch.cuda.get_device_name(device), dtype, tf32=tf32)


@lru_cache
def _measured_once(dtype: torch.dtype, threads: int) -> Peak:
    """Stages that follow one another in a process are on the same machine."""
    return measured_peak(dtype)


__all__ = ["GPUS", "Peak", "Rates", "gpu_peak", "measured_peak", "peak_of"]
