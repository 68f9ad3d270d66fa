"""What a step of a stage is given: the recipe, which unit it makes, and what lies around it.

A step is a function of the rows of one unit; it returns a table and counts things on the way.  Easy
to get wrong: pieces.  Rows are sent to one of `layout.buckets` pieces by a key (what belongs
together must meet) and sent back by their block (a block asks for its own piece), and both use the
same number of pieces.
"""

import itertools
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from eve_vlm.curate.blocks import gather
from eve_vlm.curate.ledger import unit_file
from eve_vlm.curate.recipe import CurateRecipe

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa

BUCKET_ROWS = 200_000
"""Pictures for each piece: 10 keys of each take about 220 MB in memory."""

NO_EXTRA = (
    "eve curate needs Ray, FAISS and more, which are not installed; run `pip install "
    "'eve-vlm[curate]'`."
)

Over = Literal["once", "inputs", "blocks", "buckets", "shards"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """How the rows of a run are cut."""

    blocks: tuple[str, ...] = ()
    """Names of the blocks, in order."""
    rows: int = 0
    """Pictures that were read."""

    @property
    def buckets(self) -> int:
        """Number of pieces."""
        return max(1, math.ceil(self.rows / BUCKET_ROWS))

    @property
    def bucket_names(self) -> tuple[str, ...]:
        """Units of a step over buckets."""
        return tuple(f"{number:05d}" for number in range(self.buckets))

    def piece_of_block(self, block: str) -> int:
        """The piece that holds what is sent back to a block."""
        return self.blocks.index(block) % self.buckets


@dataclass(kw_only=True, slots=True)
class Task:
    """One unit of one step."""

    recipe: CurateRecipe
    """The recipe."""
    folder: Path
    """The output folder."""
    layout: Layout
    """How the run is cut."""
    unit: str
    """Which unit."""
    facts: dict[str, Any] = field(default_factory=dict)
    """Figures that stay with the unit."""
    counts: dict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    """Histograms that are added up over all units: name, bin, number."""

    afterwards: list[Callable[[], None]] = field(default_factory=list)
    """What to do when the unit's result stands."""

    def files(self, step: str, over: Over) -> list[Path]:
        """The results of all units of a step over blocks or buckets."""
        units = self.layout.blocks if over == "blocks" else self.layout.bucket_names
        return [unit_file(self.folder, step, unit) for unit in units]

    def sent_back(self, step: str) -> "pa.Table":
        """What a step over buckets sends to this block's piece, its rows and others'."""
        return gather(self.files(step, "buckets"), self.layout.piece_of_block(self.unit))

    def pieces_of_blocks(self) -> dict[str, int]:
        """The piece of every block."""
        return {name: place % self.layout.buckets for place, name in enumerate(self.layout.blocks)}


Work = Callable[["pa.Table", Task], "pa.Table | Iterator[pa.Table]"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """A part of a stage that is made unit by unit."""

    name: str
    """The folder of its results; the stage's own name where it makes the stage's rows."""
    over: Over
    """What its units are."""
    work: Work
    """Makes one."""
    reads: str | None = None
    """The step whose results it is given; None gives the rows of the stage before."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Stage:
    """A part of a curation that can be run alone."""

    name: str
    """What `--only` and `--from` call it."""
    what: str
    """What it does, in a line."""
    steps: tuple[Step, ...]
    """In order; the last one makes its rows."""
    settings: Callable[[CurateRecipe], Any]
    """What its results depend on."""
    wanted: Callable[[CurateRecipe], bool] = lambda recipe: True
    """Whether the recipe has it."""


def bins(values: "np.ndarray", edges: tuple[int, ...]) -> Counter[str]:
    """How many values lie in each bin; names sort by number.

    >>> import numpy
    >>> bins(numpy.array([1, 5, 12]), (0, 10, 20))
    Counter({'0 to 9': 2, '10 to 19': 1})
    """
    import numpy as np

    names = [
        *(
            f"{low:,}" if high == low + 1 else f"{low:,} to {high - 1:,}"
            for low, high in itertools.pairwise(edges)
        ),
        f"{edges[-1]:,} or more",
    ]
    places = np.searchsorted(edges, values, side="right") - 1
    found = Counter(names[place] for place in places.tolist())
    return Counter({name: found[name] for name in names if found[name]})


__all__ = ["BUCKET_ROWS", "NO_EXTRA", "Layout", "Over", "Stage", "Step", "Task", "Work", "bins"]
