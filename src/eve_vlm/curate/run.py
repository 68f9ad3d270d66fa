"""A curation from its recipe to its shards: stage after stage, unit after unit, none twice.

Everything that is finished stands in the output folder, so running the same recipe again goes on
where it stopped, whatever stopped it.  Easy to get wrong: results of a stage are good only for the
settings that it and all stages before it had; when one was changed, the run says so and touches
nothing until `begin` names the stage to start over from.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from filelock import FileLock, Timeout

from eve_vlm.curate.blocks import remove_parts
from eve_vlm.curate.cluster import made_units, ray_session
from eve_vlm.curate.cost import estimate
from eve_vlm.curate.ledger import Ledger, marks_of, read_marks, write_marks
from eve_vlm.curate.manifest import write_manifest
from eve_vlm.curate.recipe import CurateRecipe
from eve_vlm.curate.stages import FILES, LISTED, READ, STAGES, stages_of
from eve_vlm.curate.tasks import Layout, Stage, Step
from eve_vlm.curate.units import Order, Range

LOCK = "run.lock"


class Progress(NamedTuple):
    """How far a step is."""

    stage: str
    """The stage."""
    step: str
    """The step, which has the stage's name where there is one only."""
    rows: int
    """Rows that are done, those of earlier runs too."""
    kept: int
    """How many of them were kept."""
    units: int
    """Units that are done."""
    all_units: int
    """Units in all."""
    per_second: float
    """Rows of a second, in this run."""
    seconds_left: float
    """At this rate."""


class Result(NamedTuple):
    """What a run did."""

    folder: Path
    """The output folder."""
    read: int
    """Pictures that were read."""
    kept: int
    """Pictures that the last stage kept."""
    made: int
    """Units that this run made; 0 if all was there."""


def curate(
    recipe: CurateRecipe,
    *,
    only: str | None = None,
    begin: str | None = None,
    address: str | None = None,
    cores: int | None = None,
    progress: Callable[[Progress], None] = lambda progress: None,
    say: Callable[[str], None] = lambda text: None,
) -> Result:
    """Runs a recipe, or goes on with it.

    Args:
        recipe: what to do.
        only: this stage alone; those before it must be finished.
        begin: removes the results of this stage and all after it, and makes them again.
        address: of a Ray cluster; None runs on this machine.
        cores: of this machine; None takes all.
        progress: told after every unit.
        say: told what captions will cost.

    Raises:
        ValueError: for what a user can mend; what is finished stays.
    """
    stages = stages_of(recipe)
    _known(only, stages, "--only")
    _known(begin, stages, "--from")
    if None not in (only, begin) and only != begin:
        raise ValueError(
            f"--only names {only} and --from {begin}, so results would be removed and not made "
            "again; name the same stage in both, or one alone."
        )
    _check_workers(recipe)
    folder = Path(recipe.output_dir).absolute()
    with _alone(folder):
        remove_parts(folder)
        ledger = Ledger(folder)
        _check_marks(recipe, folder, stages, begin, ledger)
        run = _Run(recipe, folder, ledger, progress, say)
        with ray_session(address, cores):
            for stage in stages:
                if only in (None, stage.name):
                    run.stage(stage)
                if stage.name == only:
                    break
                if only is not None:
                    run.require(stage, only)
        last = stages[-1].name if only is None else only
        return Result(folder, run.layout.rows, run.kept_of(last), run.made)


class _Run:
    """The state of a run: what is known so far of how it is cut."""

    def __init__(
        self,
        recipe: CurateRecipe,
        folder: Path,
        ledger: Ledger,
        progress: Callable[[Progress], None],
        say: Callable[[str], None],
    ):
        self.recipe, self.folder, self.ledger, self.progress = recipe, folder, ledger, progress
        self.say = say
        self.made = 0
        self._layout: Layout | None = None

    @property
    def layout(self) -> Layout:
        """How the rows are cut; known when all files are read."""
        if self._layout is None:
            units = self.ledger.done(FILES)
            blocks = [pair for unit in sorted(units) for pair in units[unit]["blocks"].items()]
            names = tuple(name for name, _ in blocks)
            self._layout = Layout(blocks=names, rows=sum(rows for _, rows in blocks))
        return self._layout

    def stage(self, stage: Stage) -> None:
        """Makes what a stage lacks."""
        if stage.name == "recaption":
            self._check_cost()
        for step in stage.steps:
            self._step(stage, step)
        if stage.name == READ:
            self._layout = None
            if not self.layout.rows:
                raise ValueError(
                    "The sources hold no picture; check their paths, and that their files end with "
                    "a kind of picture."
                )
        if stage.name == "write":
            write_manifest(self.recipe, self.folder)

    def _check_cost(self) -> None:
        """Says what captions will cost, and does not begin if that is above the recipe's limit."""
        section = self.recipe.recaption
        assert section is not None, "the stage is left out without its section"
        names = [stage.name for stage in stages_of(self.recipe)]
        before = names[names.index("recaption") - 1]
        asked = sum(facts["in"] for facts in self.ledger.done("recaption").values())
        pictures = self.kept_of(before) - asked
        if not pictures:
            return
        expected = estimate(section.cost, pictures)
        currency = section.cost.currency
        self.say(f"recaption: about {expected:,.2f} {currency} for up to {pictures:,} captions")
        if section.cost.most is not None and expected > section.cost.most:
            raise ValueError(
                f"Captions of {pictures:,} pictures are estimated at {expected:,.2f} {currency}, "
                f"more than recaption.cost.most ({section.cost.most:,.2f}); raise it, or keep "
                "fewer pictures."
            )

    def require(self, stage: Stage, wanted: str) -> None:
        """Checks that a stage before the wanted one is finished."""
        for step in stage.steps:
            lacking = [
                unit for unit, _ in self._units(step) if unit not in self.ledger.done(step.name)
            ]
            if lacking:
                raise ValueError(
                    f"The stage {stage.name} is not finished ({len(lacking)} units are lacking) "
                    f"and {wanted} needs it; run without --only, or with --only {stage.name} first."
                )

    def kept_of(self, stage: str) -> int:
        """Rows that a stage kept; of shards, records."""
        return sum(_rows(facts, "out") for facts in self._results(stage).values())

    def _results(self, stage: str) -> dict[str, dict[str, Any]]:
        if stage == READ:
            return {name: {"out": self._rows_read(name)} for name in self.layout.blocks}
        return self.ledger.done(stage)

    def _rows_read(self, block: str) -> int:
        return self.ledger.done(FILES)[block.partition("-")[0]]["blocks"][block]

    def _units(self, step: Step) -> list[tuple[str, tuple[Range, ...]]]:
        """The units of a step, in order."""
        if step.over == "once":
            return [("all", ())]
        if step.over == "inputs":
            count = self.ledger.done(LISTED)["all"]["out"]
            return [(f"{number:06d}", ()) for number in range(count)]
        if step.over == "shards":
            return self._shards()
        names = self.layout.blocks if step.over == "blocks" else self.layout.bucket_names
        return [(name, ()) for name in names]

    def _shards(self) -> list[tuple[str, tuple[Range, ...]]]:
        """Which rows of which blocks go into each shard: all that are kept, in order."""
        names = [stage.name for stage in stages_of(self.recipe)]
        done = self._results(names[-2])
        size = self.recipe.write.pictures
        shards: list[list[Range]] = []
        room = 0
        for block in self.layout.blocks:
            at, kept = 0, done[block]["out"]
            while at < kept:
                if not room:
                    shards.append([])
                    room = size
                taken = min(room, kept - at)
                shards[-1].append((block, at, at + taken))
                at, room = at + taken, room - taken
        return [(f"{number:06d}", tuple(ranges)) for number, ranges in enumerate(shards)]

    def _step(self, stage: Stage, step: Step) -> None:
        units = self._units(step)
        done = self.ledger.done(step.name)
        todo = [pair for pair in units if pair[0] not in done]
        if not todo:
            return
        order = Order(recipe=self.recipe, folder=self.folder, layout=self.layout, step=step.name)
        worker = self.recipe.worker(step.name)
        rows, kept = (sum(_rows(facts, key) for facts in done.values()) for key in ("in", "out"))
        before, began = rows, time.monotonic()
        # Closed at an error too: what Ray still works on must end before Ray does.
        with closing(made_units(order, todo, worker=worker)) as made:
            for number, one in enumerate(made, start=1):
                if one.error is not None:
                    raise ValueError(f"{stage.name} stopped: {one.error}")
                self.ledger.add(step.name, one.unit, one.facts)
                self.made += 1
                rows, kept = rows + _rows(one.facts, "in"), kept + _rows(one.facts, "out")
                spent = time.monotonic() - began
                self.progress(
                    Progress(
                        stage=stage.name,
                        step=step.name,
                        rows=rows,
                        kept=kept,
                        units=len(units) - len(todo) + number,
                        all_units=len(units),
                        per_second=(rows - before) / max(spent, 1e-9),
                        seconds_left=spent / number * (len(todo) - number),
                    )
                )


def _rows(facts: dict[str, Any], key: str) -> int:
    """Rows of a unit; of an input those of its blocks, of a shard its records."""
    if "blocks" in facts:
        return sum(facts["blocks"].values())
    return facts.get("records", facts[key])


def _known(name: str | None, stages: list[Stage], option: str) -> None:
    names = [stage.name for stage in stages]
    if name is not None and name not in names:
        raise ValueError(
            f"{option} names {name!r}, but the stages of this recipe are {', '.join(names)}; give "
            "one of them."
        )


def _check_workers(recipe: CurateRecipe) -> None:
    known = {
        name for stage in STAGES for name in (stage.name, *(step.name for step in stage.steps))
    }
    for name in recipe.workers:
        if name not in known:
            raise ValueError(
                f"workers has {name!r}, which is neither a stage nor a step; use one of "
                f"{', '.join(sorted(known))}."
            )


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """The folder for one run at a time; the system lets go of it when a process dies."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / LOCK)
    try:
        with lock.acquire(timeout=0):
            yield
    except Timeout:
        raise ValueError(
            f"Another run writes to {folder}; wait for it, or give another output_dir."
        ) from None


def _check_marks(
    recipe: CurateRecipe, folder: Path, stages: list[Stage], begin: str | None, ledger: Ledger
) -> None:
    """Compares settings with those of the results that stand, and removes what is to start over.

    Results of a stage that the recipe has no more stand too, captions above all, until a stage
    before them starts over.
    """
    marks = marks_of({stage.name: stage.settings(recipe) for stage in stages})
    steps = [path.name for path in (folder / "work").glob("*") if any(path.iterdir())]
    begun = {step.partition(".")[0] for step in steps}
    stood = {name: mark for name, mark in read_marks(folder).items() if name in begun}
    names = list(marks)
    fresh = names if begin is None else names[: names.index(begin)]
    for name in fresh:
        if name in stood and stood[name] != marks[name]:
            raise ValueError(
                f"{folder} holds results of {name} that were made with other settings of it or of "
                f"a stage before; run with --from {name} to make it and what follows again, or "
                "give another output_dir."
            )
    if begin is not None:
        order = [stage.name for stage in STAGES]
        again = order[order.index(begin) :]
        ledger.forget([step for step in steps if step.partition(".")[0] in again])
        stood = {name: mark for name, mark in stood.items() if name not in again}
    write_marks(folder, stood | marks)


__all__ = ["Progress", "Result", "curate"]
