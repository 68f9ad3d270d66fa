"""Makes one unit of one step: reads its rows, calls the step, writes what came with its facts.

This runs in a worker, on a laptop as on a node of a cluster.  Easy to get wrong: a unit may be
asked for again after it is finished (its worker was killed before it could say so), and is then not
made again but read.
"""

import os
import resource
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eve_vlm.curate.blocks import (
    WHY,
    gather,
    read_facts,
    read_kept,
    read_unit,
    write_unit,
)
from eve_vlm.curate.ledger import unit_file
from eve_vlm.curate.recipe import CurateRecipe
from eve_vlm.curate.stages import LISTED, READ, find_step, stages_of
from eve_vlm.curate.tasks import Layout, Step, Task

if TYPE_CHECKING:
    import pyarrow as pa

Range = tuple[str, int, int]
"""A block, and the first and the end of its rows that a shard takes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Order:
    """What a worker is sent: all that it needs to make units of one step."""

    recipe: CurateRecipe
    """The recipe."""
    folder: Path
    """The output folder, as every node sees it."""
    layout: Layout
    """How the run is cut."""
    step: str
    """Which step."""


def make_unit(order: Order, unit: str, ranges: tuple[Range, ...] = ()) -> dict[str, Any]:
    """The facts of a unit, which is made if it is not there.

    Args:
        ranges: the rows of a shard.

    Raises:
        ValueError: for what a user can mend.
        OSError: if the disk is full or away.
    """
    file = unit_file(order.folder, order.step, unit)
    if file.is_file():
        return read_facts(file)
    step = find_step(order.recipe, order.step)
    task = Task(recipe=order.recipe, folder=order.folder, layout=order.layout, unit=unit)
    wall, processor = time.perf_counter(), time.process_time()
    rows = _rows_of(order, step, unit, ranges)
    made: Any = step.work(rows, task)
    if step.over == "inputs":
        made = _write_blocks(made, order, unit)
        blocks = zip(made["block"].to_pylist(), made["rows"].to_pylist(), strict=True)
        task.facts["blocks"] = dict(blocks)
    facts = task.facts | {"in": len(rows), "out": len(made)}
    if WHY in made.column_names:
        found = made[WHY].drop_null().value_counts().to_pylist()
        facts["dropped"] = {one["values"]: one["counts"] for one in found}
        facts["out"] = len(made) - sum(facts["dropped"].values())
    facts["counts"] = {name: dict(counter) for name, counter in task.counts.items()}
    facts["seconds"] = round(time.perf_counter() - wall, 4)
    facts["cpu_seconds"] = round(time.process_time() - processor, 4)
    # In KiB on Linux; of the worker since it began, so a leak shows as growth over units.
    facts["peak_mib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    facts["process"] = os.getpid()
    write_unit(file, made, facts)
    for action in task.afterwards:
        action()
    return facts


def _rows_of(order: Order, step: Step, unit: str, ranges: tuple[Range, ...]) -> "pa.Table":
    """What a unit is made of."""
    import pyarrow as pa

    def path(name: str, of: str) -> Path:
        return unit_file(order.folder, name, of)

    if step.over == "once":
        return pa.table({})
    if step.over == "inputs":
        return read_unit(path(LISTED, "all")).slice(int(unit), 1)
    if step.over == "buckets":
        assert step.reads is not None, "a step over buckets reads the pieces of another"
        files = [path(step.reads, block) for block in order.layout.blocks]
        return gather(files, int(unit))
    if step.over == "shards":
        before = _stage_before(order)
        parts = [
            read_kept(path(before, block)).slice(begin, end - begin) for block, begin, end in ranges
        ]
        return pa.concat_tables(parts)
    return (
        read_unit(path(step.reads, unit))
        if step.reads
        else read_kept(path(_stage_before(order), unit))
    )


def _stage_before(order: Order) -> str:
    """The stage whose rows a step of another stage takes."""
    names = [stage.name for stage in stages_of(order.recipe)]
    return names[names.index(order.step.partition(".")[0]) - 1]


def _write_blocks(tables: Any, order: Order, unit: str) -> "pa.Table":
    """Writes the blocks of an input; the table names them."""
    import pyarrow as pa

    names, rows = [], []
    for number, table in enumerate(tables):
        names.append(f"{unit}-{number:05d}")
        rows.append(len(table))
        file = unit_file(order.folder, READ, names[-1])
        write_unit(file, table, {"in": len(table), "out": len(table)})
    return pa.table({"block": pa.array(names, pa.string()), "rows": pa.array(rows, pa.int64())})


__all__ = ["Order", "Range", "make_unit"]
