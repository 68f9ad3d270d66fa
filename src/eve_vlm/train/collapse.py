"""The alarm for what the paper calls collapse: the loss jumps and then stays on a higher level.

It compares means of blocks of steps, never single steps, so a spike that heals is none.  Easy to
get wrong: in both collapses of the paper (figure 5) the loss afterwards is flat and well below what
it was at first, so an alarm that compares with the first steps never rings.
"""

import math
from dataclasses import dataclass, field
from typing import Any

BLOCK = 100
"""Steps in a block. A mean of 100 is known to a tenth of the noise of a single step."""
RATIO = 1.2
"""Half way, by factors, between a level that is kept (1.0) and those of the paper's two collapses:
0.80 after 0.55 without prealign (1.45), and 2.0 after 1.4 from scratch (1.43)."""
PATIENCE = 2
"""Blocks in a row that must lie above. A jump in the middle of a block is seen two whole blocks
later, so the alarm rings at most 300 steps after it; the paper's runs have 16,000."""


@dataclass(kw_only=True, slots=True)
class Block:
    """Sums over some steps."""

    steps: int = 0
    """Steps in it."""
    total: float = 0.0
    """Sum of their losses."""
    squares: float = 0.0
    """Sum of the squares of their losses."""
    first: int = 0
    """The first of the steps."""

    @property
    def mean(self) -> float:
        """Mean loss."""
        return self.total / self.steps

    @property
    def noise(self) -> float:
        """Standard deviation of one step."""
        return math.sqrt(max(self.squares / self.steps - self.mean**2, 0.0))


@dataclass(frozen=True, kw_only=True, slots=True)
class Collapse:
    """What the alarm saw."""

    step: int
    """The step at which it rang."""
    since: int
    """The first step of the first block that lies above."""
    before: float
    """The lowest level that was reached: mean loss of a block."""
    after: float
    """The level now."""

    def __str__(self) -> str:
        return (
            f"The loss collapsed: it stays at {self.after:.3g} since about step {self.since}, "
            f"{self.after / self.before:.2f} times the {self.before:.3g} that it had reached"
        )


@dataclass(kw_only=True, slots=True)
class CollapseAlarm:
    """Takes losses in the order of the steps and rings once."""

    current: Block = field(default_factory=Block)
    """The block that is being filled."""
    best: Block | None = None
    """The block with the lowest mean."""
    above: list[Block] = field(default_factory=list)
    """The last blocks in a row that lie above the best one."""
    rang: bool = False
    """Whether it has rung."""

    def update(self, step: int, loss: float, *, steps: int = 1) -> Collapse | None:
        """Takes the mean loss of the `steps` steps up to `step`; a Collapse the first time."""
        block = self.current
        block.first = block.first if block.steps else step - steps + 1
        block.steps += steps
        block.total += steps * loss
        block.squares += steps * loss * loss
        if block.steps < BLOCK:
            return None
        self.current = Block()
        if self.best is None or block.mean < self.best.mean:
            self.best = block
        # Beside the factor the noise of a step: a loss that is almost zero triples by chance.
        rise = max((RATIO - 1) * self.best.mean, self.best.noise)
        high = block.mean > self.best.mean + rise
        self.above = [*self.above, block][-PATIENCE:] if high else []
        if len(self.above) < PATIENCE or self.rang:
            return None
        self.rang = True
        level = sum(item.mean for item in self.above) / len(self.above)
        return Collapse(step=step, since=self.above[0].first, before=self.best.mean, after=level)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "CollapseAlarm":
        """The alarm that `dataclasses.asdict` took apart."""
        best = values["best"]
        return cls(
            current=Block(**values["current"]),
            best=None if best is None else Block(**best),
            above=[Block(**block) for block in values["above"]],
            rang=values["rang"],
        )


__all__ = ["BLOCK", "PATIENCE", "RATIO", "Block", "Collapse", "CollapseAlarm"]
