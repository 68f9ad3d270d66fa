"""Which processes train what, side by side, until all is done or the time is up.

Stages that several runs begin with are trained first and by one process each; from there on every
run has a process of its own.  A process that fails is reported, with what waited for it, and the
others go on.

Easy to get wrong: a process that is stopped has to be waited for, because it saves its state at the
end of its step; what is killed instead begins its stage again.
"""

import json
import multiprocessing
import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import eve_vlm
from eve_vlm.train.run import finished_run
from eve_vlm.versions import commit_of

from .running import Segment, run_segment
from .variants import Run, Stage

PRELOADED = ["eve_vlm.reproduce.running"]  # so that a process begins at once, not in 7 seconds
POLL = 0.2  # seconds
SAVING = 60  # seconds that a stopped process may take to save
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}

Say = Callable[[str], object]


@dataclass(kw_only=True, slots=True)
class Outcome:
    """What became of the runs."""

    done: list[str] = field(default_factory=list)
    """Names of runs with results, from before or from now."""
    failed: dict[str, str] = field(default_factory=dict)
    """Name of a process to where its words are."""
    left: list[str] = field(default_factory=list)
    """Names of runs without results."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """How many processes, and how long."""

    workers: int = 1
    """Processes side by side, each with one thread."""
    minutes: float | None = None
    """Time after which nothing begins and what runs is stopped; None is as long as it takes."""
    device: str = "cpu"
    """`cpu` or `cuda`."""
    commit: str | None = None
    """Noted in the results; None asks git."""


def has_result(run: Run, results: Path) -> bool:
    """Whether the results of exactly this run are there."""
    file = results / f"{run.name}.json"
    return file.is_file() and json.loads(file.read_text(encoding="utf-8"))["digest"] == run.digest


def segments_of(runs: Iterable[Run]) -> list[Segment]:
    """Processes for some runs: shared stages by themselves, else whole chains; each once."""
    runs = list(runs)
    stages = {stage.digest: stage for run in runs for stage in run.stages}
    children = Counter(stage.before for stage in stages.values())
    ends = Counter(run.stages[-1].digest for run in runs)
    made: dict[str, Segment] = {}
    for run in runs:
        waiting: list[Stage] = []
        for stage in run.stages:
            waiting.append(stage)
            last = stage is run.stages[-1]
            if last or children[stage.digest] > 1 or ends[stage.digest]:
                names = "+".join(one.name for one in waiting)
                made.setdefault(
                    f"{stage.digest}{run.name if last else ''}",
                    Segment(
                        name=f"{run.name} {names}",
                        stages=tuple(waiting),
                        run=run if last else None,
                    ),
                )
                waiting = []
    return list(made.values())


def run_all(runs: Sequence[Run], results: Path, *, logs: Path, limits: Limits, say: Say) -> Outcome:
    """Trains and asks what has no results yet; never raises for what one process does.

    Args:
        runs: what is wanted.
        results: folder of the results.
        logs: folder for what processes say.
        limits: how many processes, and how long.
        say: is told of each process that ends, and how much time is left.
    """
    missing = [run for run in runs if not has_result(run, results)]
    outcome = Outcome()
    if missing:
        pool = _Pool(segments_of(missing), results, logs, limits, say)
        with _environment(limits.device):
            pool.work()
        outcome.failed = pool.failed
    for run in runs:
        (outcome.done if has_result(run, results) else outcome.left).append(run.name)
    return outcome


class _Pool:
    """The processes of one call."""

    def __init__(
        self, segments: list[Segment], results: Path, logs: Path, limits: Limits, say: Say
    ) -> None:
        self.results, self.logs, self.limits, self.say = results, logs, limits, say
        here = Path(eve_vlm.__file__).resolve().parent
        self.commit = limits.commit or commit_of(here)
        self.began = time.monotonic()
        self.finished = {
            stage.digest
            for segment in segments
            for stage in segment.stages
            if finished_run(stage.recipe) is not None
        }
        self.waiting = [
            segment
            for segment in segments
            if segment.run is not None or segment.stages[-1].digest not in self.finished
        ]
        self.running: dict[Any, tuple[Segment, float]] = {}
        self.failed: dict[str, str] = {}
        self.total = sum(segment.steps for segment in self.waiting)
        self.made = self.number = 0
        self.all = len(self.waiting)

    def work(self) -> None:
        """Until nothing is left that can run, or the time is up."""
        context = _context()
        minutes = self.limits.minutes
        end = None if minutes is None else self.began + 60 * minutes
        self.say(f"{self.all} processes to run, {self.limits.workers} side by side.")
        try:
            while self.waiting or self.running:
                if end is not None and time.monotonic() > end:
                    self.say("The time is up; what runs is stopped and saved.")
                    break
                self._start(context)
                if not self.running:
                    break  # all that waits needs something that failed
                time.sleep(POLL)
                self._collect()
        finally:
            self._stop()

    def _start(self, context: Any) -> None:
        """Fills free places, what others wait for and what takes longest first."""
        needed = {segment.first.before for segment in self.waiting}
        ready = [
            segment
            for segment in self.waiting
            if segment.first.before is None or segment.first.before in self.finished
        ]
        ready.sort(key=lambda one: (one.stages[-1].digest not in needed, -one.steps))
        for segment in ready:
            # With very few steps two variants may be the same; the second finds it finished.
            busy = {one.digest for running, _ in self.running.values() for one in running.stages}
            full = len(self.running) >= self.limits.workers
            if full or busy & {stage.digest for stage in segment.stages}:
                continue
            log = self._log(segment)
            process = context.Process(
                target=run_segment, args=(segment, log, self.results, self.commit)
            )
            process.start()
            self.waiting.remove(segment)
            self.running[process] = (segment, time.monotonic())

    def _log(self, segment: Segment) -> Path:
        return self.logs / f"{segment.name.replace(' ', '-')}.log"

    def _collect(self) -> None:
        """Looks which processes ended, and how."""
        for process in [process for process in self.running if not process.is_alive()]:
            segment, began = self.running.pop(process)
            self.number += 1
            self.made += segment.steps
            seconds = time.monotonic() - began
            if process.exitcode == 0:
                self.finished |= {stage.digest for stage in segment.stages}
                self.say(
                    f"{self.number}/{self.all} {segment.name}: {seconds:.0f} s, {self._left()}"
                )
            else:
                log = self._log(segment)
                self.failed[log.stem] = str(log)
                self.say(f"{self.number}/{self.all} {segment.name}: FAILED; see {log}")

    def _left(self) -> str:
        """The time left in words, by the steps so far."""
        now = time.monotonic()
        # What runs counts by its share of time, as a step costs about as much everywhere.
        half = sum(segment.steps for segment, _ in self.running.values()) / 2
        seconds = (now - self.began) * (self.total - self.made - half) / (self.made + half)
        return f"about {max(seconds, 0) / 60:.0f} min left"

    def _stop(self) -> None:
        """Asks what runs to save and end; kills what does not."""
        for process in self.running:
            process.terminate()
        for process in self.running:
            process.join(SAVING)
            if process.is_alive():
                process.kill()
                process.join()


@contextmanager
def _environment(device: str) -> Iterator[None]:
    """What processes that begin now inherit; this process keeps its own."""
    values = ENVIRONMENT | ({"CUDA_VISIBLE_DEVICES": ""} if device == "cpu" else {})
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _context() -> Any:
    """How processes begin: from one that has read the libraries already, where there is such."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context


__all__ = ["Limits", "Outcome", "has_result", "run_all", "segments_of"]
