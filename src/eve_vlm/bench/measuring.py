"""Times of several pieces of work, taken in turns, and the memory that each takes.

A machine that is shared is fast in one minute and slow in the next, so what is compared is measured
in turns: every round runs every piece once, and a median with its quartiles is kept.  The first
round warms up and is not counted; in it the memory is looked at, which costs time.  Easy to get
wrong: a GPU works on while Python goes on, so the clock waits for it before it is read.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import nn

from eve_vlm.memory.trace import LiveBytes


class Clock:
    """Seconds, read when the device has done all it was given."""

    def __init__(self, device: torch.device):
        self.device = device

    def __call__(self) -> float:
        """Seconds since some moment, once the device has nothing left to do."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        elif self.device.type == "mps":
            torch.mps.synchronize()
        return self.now()

    def now(self) -> float:
        """The same seconds, without waiting for the device."""
        return time.perf_counter()


class Spread(NamedTuple):
    """A median between the quartiles."""

    median: float
    low: float
    high: float
    repeats: int

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """Of at least one value.

        >>> Spread.of([4.0, 1.0, 2.0, 3.0, 5.0])
        Spread(median=3.0, low=2.0, high=4.0, repeats=5)
        """
        low, median, high = (
            statistics.quantiles(values, n=4, method="inclusive")
            if (len(values) > 1)
            else [values[0]] * 3
        )
        return cls(median, low, high, len(values))


class Need(NamedTuple):
    """What a piece of work cannot do without."""

    flops: float
    """Operations in matrix products."""
    bytes: float
    """Memory that must be read or written once."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """One piece of work that is timed."""

    section: str
    """Part of the benchmark that it belongs to."""
    model: str
    """Whose work it is: eve, llava-1.5 or llava-1.6."""
    name: str
    """What it is, in words."""
    run: Callable[[Clock], dict[str, float]]
    """Does it once; seconds by the name of the figure."""
    needs: dict[str, Need]
    """What each figure cannot do without."""
    tokens: dict[str, int]
    """Tokens (of pictures and words) of each figure, or those made."""
    facts: dict[str, Any] = field(default_factory=dict)
    """Settings, as they stand in the JSON line."""
    modules: Sequence[nn.Module] = ()
    """Models whose weights are used; they count as memory once."""


class Measured(NamedTuple):
    """What was found out about one case."""

    case: Case
    seconds: dict[str, Spread]
    memory: int | None
    """Bytes of weights and of all tensors made, at the peak; None of work without a model."""


def timed(clock: Callable[[], float], work: Callable[[], Any]) -> float:
    """Seconds that `work` takes."""
    started = clock()
    work()
    return clock() - started


def measure(
    cases: Sequence[Case],
    clock: Clock,
    *,
    repeats: int,
    tick: Callable[[Case], None] = lambda case: None,
) -> list[Measured]:
    """Runs all cases in turns: a round to warm up, then `repeats` rounds that count.

    Args:
        tick: told of every case that is about to run.
    """
    memory: list[int | None] = []
    for case in cases:
        tick(case)
        memory.append(peak_bytes(case, clock))
    times: list[dict[str, list[float]]] = [{} for _ in cases]
    for _ in range(repeats):
        for case, kept in zip(cases, times, strict=True):
            tick(case)
            for name, seconds in case.run(clock).items():
                kept.setdefault(name, []).append(seconds)
    return [
        Measured(case, {name: Spread.of(values) for name, values in kept.items()}, peak)
        for case, kept, peak in zip(cases, times, memory, strict=True)
    ]


def peak_bytes(case: Case, clock: Clock) -> int | None:
    """Runs a case once and says how much memory it took: weights, and every tensor alive at once.

    Pictures are made ready by Pillow and numpy, whose memory nobody counts: None.  On a GPU the
    allocator is asked; on a CPU, which has none to ask, tensors are counted as they come and go.
    """
    if not case.modules:
        case.run(clock)
        return None
    if clock.device.type == "cuda":
        clock()
        # Other models and the inputs of other cases lie there too.
        before = torch.cuda.memory_allocated(clock.device)
        torch.cuda.reset_peak_memory_stats(clock.device)
        case.run(clock)
        clock()
        made = torch.cuda.max_memory_allocated(clock.device) - before
        return made + weight_bytes(case.modules)
    with LiveBytes() as counter:
        for module in case.modules:
            counter.ignore(module)
        case.run(clock)
    return counter.peak.bytes + weight_bytes(case.modules)


def weight_bytes(modules: Sequence[nn.Module]) -> int:
    """Bytes of parameters and buffers; what several modules share counts once."""
    tensors = {
        tensor.data_ptr(): tensor.nbytes
        for module in modules
        for tensor in [*module.parameters(), *module.buffers()]
    }
    return sum(tensors.values())


__all__ = ["Case", "Clock", "Measured", "Need", "Spread", "measure", "peak_bytes", "timed"]
