"""What a run did, as plain figures: the funnel, the histograms, the rates, the costs, examples.

Everything is added up from the facts that stand in the ledger, so a report can be made at any time,
of an unfinished run too.  Easy to get wrong: a rate per core is rows over *processor* seconds; wall
seconds of a worker count what it waited for others on the same machine.
"""

from collections import Counter
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from eve_vlm.curate.blocks import BECAUSE, WHY, read_unit
from eve_vlm.curate.ledger import Ledger
from eve_vlm.curate.recipe import CurateRecipe
from eve_vlm.curate.stages import READ, stages_of
from eve_vlm.curate.tasks import Stage

EXAMPLES = 6  # pictures shown for each reason
LOOKED_THROUGH = 50  # units that are searched for them


@dataclass(kw_only=True, slots=True)
class StageSummary:
    """What one stage did so far."""

    name: str
    """Its name."""
    what: str
    """What it does."""
    units: int = 0
    """Units of its last step that are done."""
    rows_in: int = 0
    """Pictures that came in."""
    rows_out: int = 0
    """Pictures that were kept."""
    dropped: Counter[str] = field(default_factory=Counter)
    """Pictures that were not, by reason."""
    seconds: float = 0.0
    """Of all workers together."""
    cpu_seconds: float = 0.0
    """Of processors."""
    peak_mib: int = 0
    """Most memory that a worker had, MiB."""
    counts: dict[str, Counter[str]] = field(default_factory=dict)
    """Histograms."""
    sums: Counter[str] = field(default_factory=Counter)
    """Other figures, such as tokens."""

    @property
    def per_core(self) -> float | None:
        """Pictures of a second on one core; None where no time was taken."""
        return self.rows_in / self.cpu_seconds if self.cpu_seconds else None

    def as_json(self) -> dict[str, Any]:
        """All of it, the rate too."""
        values = {one.name: getattr(self, one.name) for one in fields(self)}
        return values | {"per_core": self.per_core}


SUMMED = ("asked", "requests", "failed_requests", "prompt_tokens", "caption_tokens")


def summarize(recipe: CurateRecipe, folder: Path) -> list[StageSummary]:
    """A summary of every stage that was begun, in order."""
    ledger = Ledger(folder)
    found = []
    for stage in stages_of(recipe):
        if any(ledger.done(step.name) for step in stage.steps):
            found.append(_stage(stage, ledger))
    return found


def _stage(stage: Stage, ledger: Ledger) -> StageSummary:
    summary = StageSummary(name=stage.name, what=stage.what)
    for step in stage.steps:
        done = ledger.done(step.name)
        for facts in done.values():
            summary.seconds += facts["seconds"]
            summary.cpu_seconds += facts["cpu_seconds"]
            summary.peak_mib = max(summary.peak_mib, facts["peak_mib"])
            summary.dropped.update(facts.get("dropped", {}))
            summary.sums.update({name: facts[name] for name in SUMMED if name in facts})
            for name, counter in facts["counts"].items():
                summary.counts.setdefault(name, Counter()).update(counter)
        if step is stage.steps[-1]:
            summary.units = len(done)
            summary.rows_in = sum(_rows(facts, "in") for facts in done.values())
            summary.rows_out = sum(_rows(facts, "out") for facts in done.values())
    return summary


def _rows(facts: dict[str, Any], key: str) -> int:
    return sum(facts["blocks"].values()) if "blocks" in facts else facts.get("records", facts[key])


def dropped_examples(
    recipe: CurateRecipe, folder: Path, summary: StageSummary
) -> dict[str, list[dict[str, Any]]]:
    """A few rows for each reason of a stage, from its first units."""
    import pyarrow.compute as pc

    found: dict[str, list[dict[str, Any]]] = {reason: [] for reason in summary.dropped}
    ledger = Ledger(folder)
    for unit in sorted(ledger.done(summary.name))[:LOOKED_THROUGH]:
        if all(len(rows) >= EXAMPLES for rows in found.values()):
            break
        table = read_unit(ledger.path(summary.name, unit))
        if WHY in table.column_names:
            for row in table.filter(pc.is_valid(table[WHY])).to_pylist():
                if len(found[row[WHY]]) < EXAMPLES:
                    found[row[WHY]].append(row)
    return found


def kept_examples(recipe: CurateRecipe, folder: Path, count: int) -> list[dict[str, Any]]:
    """A few rows that the last finished stage of rows kept, spread over its units."""
    import pyarrow.compute as pc

    ledger = Ledger(folder)
    names = [s.name for s in stages_of(recipe) if s.name not in (READ, "write")]
    names = [name for name in names if ledger.done(name)]
    if not names:
        return []
    units = sorted(ledger.done(names[-1]))
    step = max(len(units) // count, 1)
    rows: list[dict[str, Any]] = []
    for unit in units[::step]:
        table = read_unit(ledger.path(names[-1], unit))
        kept = table.filter(pc.is_null(table[WHY])).drop_columns([WHY, BECAUSE])
        take = max(count // max(len(units[::step]), 1), 1)
        rows += kept.slice(0, take).to_pylist()
    return rows[:count]


__all__ = [
    "StageSummary",
    "dropped_examples",
    "kept_examples",
    "summarize",
]
