"""What the machine can do at most, measured, and the time below which no work can be done.

Two rates: products of large square matrices, and bytes moved by copies that no cache can hold.
Nothing is faster than the larger of its operations over the one and its bytes over the other: its
floor (the roofline model).  Easy to get wrong: the rates must come from the same run as the times,
because a shared machine gives a share that changes; they are taken again between the parts of a
run, and the best of all of them stands.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from .measuring import Clock, Need, timed

# Sides of square matrices, and bytes of what is copied: far beyond caches (a server's CPU: 256 MiB
# shared by all; its one user's part is smaller).
SIDES = {"cpu": (512, 1024, 2048), "cuda": (4096, 8192), "mps": (2048, 4096)}
COPIED = {"cpu": 2**28, "cuda": 2**31, "mps": 2**28}
QUICK_SIDES, QUICK_COPIED = (256, 512), 2**25
ROUNDS = 3
AT_ONCE = 8  # 1.4 ms each on a large GPU, and about 0.02 ms to start and to wait


class Roof(NamedTuple):
    """Most operations and most bytes per second."""

    flops: float
    bandwidth: float

    def best(self, other: "Roof") -> "Roof":
        """The better of both, rate by rate."""
        return Roof(max(self.flops, other.flops), max(self.bandwidth, other.bandwidth))

    def floor(self, need: Need) -> float:
        """Seconds below which it cannot be done.

        >>> Roof(100.0, 10.0).floor(Need(200.0, 5.0))
        2.0
        """
        return max(need.flops / self.flops, need.bytes / self.bandwidth)

    def bound(self, need: Need) -> str:
        """What the floor is made of: `compute` or `memory`."""
        computing = need.flops / self.flops >= need.bytes / self.bandwidth
        return "compute" if computing else "memory"

    def as_data(self) -> dict[str, float]:
        """For the JSON line."""
        return {"flops_per_second": self.flops, "bytes_per_second": self.bandwidth}


def measured_roof(clock: Clock, dtype: torch.dtype, *, quick: bool = False) -> Roof:
    """Both rates of a device, each the best of a few rounds; draws no random numbers.

    Args:
        dtype: of the factors of the matrix products.
        quick: smaller sizes, which caches may hold in part.
    """
    device = clock.device
    sides = QUICK_SIDES if quick else SIDES.get(device.type, SIDES["cpu"])
    size = QUICK_COPIED if quick else COPIED.get(device.type, COPIED["cpu"])
    return Roof(
        max(_matrix_rate(clock, side, dtype) for side in sides), _copy_rate(clock, size // 4)
    )


def _matrix_rate(clock: Clock, side: int, dtype: torch.dtype) -> float:
    # Not all alike: a GPU multiplies zeros or equal numbers an eighth faster than others.
    numbers = torch.arange(side * side, dtype=torch.float32, device=clock.device).sin_()
    factor = numbers.view(side, side).to(dtype)
    made = torch.empty_like(factor)
    return 2 * side**3 / _least(clock, lambda: torch.mm(factor, factor, out=made))


def _copy_rate(clock: Clock, count: int) -> float:
    """The better of copying (2 x 4 bytes a number) and a sum of two (3 x 4)."""
    one, two = (torch.ones(count, device=clock.device) for _ in range(2))
    made = torch.empty_like(one)
    copying = _least(clock, lambda: made.copy_(one))
    adding = _least(clock, lambda: torch.add(one, two, alpha=3.0, out=made))
    return max(8 * count / copying, 12 * count / adding)


def _least(clock: Clock, work: Callable[[], Any]) -> float:
    """Seconds of `work`; on a GPU of one among several, so that waiting for it counts little."""
    times = 1 if clock.device.type == "cpu" else AT_ONCE

    def several() -> None:
        for _ in range(times):
            work()

    several()
    return min(timed(clock, several) for _ in range(ROUNDS)) / times


__all__ = ["Roof", "measured_roof"]
