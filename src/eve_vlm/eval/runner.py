"""Runs tasks with a model and writes what came out, again and again from where it was stopped.

One process or many (accelerate): each answers every so-many-th sample that is still open, the first
one puts the rows together and makes scores of them.  Easy to get wrong: an evaluation that begins
where another model left off would mix two models; what identifies the model and the way of asking
is written first and compared at every start.
"""

import random
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from tqdm.auto import tqdm

from eve_vlm.versions import versions

from .answerers import Subject, majority_answers
from .asking import Reply, row_of, rows_of
from .results import FORMAT, RESULTS_FILE, RowFiles, read_results, write_results
from .statistics import interval
from .task import Row, Sample, Task

CHUNK = 4  # batches that are asked, and written, together
SHOWN = 8  # examples whose pictures are kept for the page
SHOWN_PIXELS = 224


@dataclass(frozen=True, kw_only=True, slots=True)
class RunSettings:
    """How a run asks."""

    limit: int | None = None
    """Samples of each task at most, whole units, the same ones every time; None takes all."""
    batch_size: int = 16
    """Conversations that are answered together."""
    max_image_tokens: int | None = None
    """Most tokens for each picture; None leaves it to the model."""
    resamples: int = 1000
    """Draws of units for the intervals."""


def evaluate(
    subject: Subject,
    tasks: Sequence[Task],
    folder: Path,
    settings: RunSettings | None = None,
    *,
    published: Callable[[str], dict[str, float]] = lambda name: {},
    published_note: Callable[[str], str] = lambda name: "",
    skipped: dict[str, str] | None = None,
) -> dict[str, Any]:
    """Answers every task, or what is left of it, and writes results after each.

    Args:
        folder: of this model; `Subject.slug` below the folder of the run, usually.
        published: scores of others by task name, to stand beside ours.
        published_note: what a reader of those must know, by task name.
        skipped: tasks that cannot be run, and why; they are named in the result.

    Returns:
        What is in `results.json`; in other processes than the first, before scores are made.

    Raises:
        ValueError: if the folder holds results of another model or way of asking.
        MissingDataError: if the data of a task is not there.
    """
    settings, state = settings or RunSettings(), processes()
    data = _begin(folder, subject, tasks, settings, skipped or {}, first=state.is_main_process)
    state.wait_for_everyone()
    for task in tasks:
        samples = chosen(task.samples(), settings.limit)
        files = RowFiles(folder, task.name, rank=state.process_index)
        _answer_open(task, samples, subject, files, settings, state)
        state.wait_for_everyone()
        if state.is_main_process:
            rows, seconds = files.finish([sample.id for sample in samples])
            data["tasks"][task.name] |= summary(task, rows, resamples=settings.resamples) | {
                "seconds": round(seconds, 3),
                "published": published(task.name),
                "published_note": published_note(task.name),
                "upload_note": task.upload_note,
                "examples": _examples(task, samples, rows, folder),
                "uploads": _write_uploads(task, rows, folder),
            }
            data["skipped"].pop(task.name, None)
            data["finished"] = _now()
            write_results(folder, data)
        state.wait_for_everyone()
    return data


def summary(task: Task, rows: Sequence[Row], *, resamples: int = 1000) -> dict[str, Any]:
    """Counts and scores of rows, whole and by group; no scores where a server keeps the answers."""
    marked = bool(rows) and all(row.marks for row in rows)
    groups = sorted({row.group for row in rows} - {""}) if marked else []
    units = task.units(rows) if marked else []
    return {
        "samples": len(rows),
        "units": len(units),
        "failed": dict(Counter(row.failed for row in rows if row.failed)),
        "empty": sum(not row.answer.strip() and not row.failed for row in rows),
        "prompt": rows[0].prompt if rows else "",
        "scores": _scores(task, units, resamples) if marked else None,
        "groups": {
            group: {
                "samples": len(part),
                "scores": _scores(task, task.units(part), resamples),
            }
            for group in groups
            for part in [[row for row in rows if row.group == group]]
        },
    }


def chosen(samples: Sequence[Sample], limit: int | None) -> list[Sample]:
    """All samples, or whole units in a fixed random order until there are enough, in their order.

    Raises:
        ValueError: if two samples have one id.
    """
    every = list(samples)
    twice = [name for name, count in Counter(sample.id for sample in every).items() if count > 1]
    if twice:
        raise ValueError(f"{len(twice)} sample ids stand twice in the data, {twice[0]!r} first.")
    if limit is None or limit >= len(every):
        return every
    units: dict[str, list[int]] = {}
    for number, sample in enumerate(every):
        units.setdefault(sample.unit or f"sample {sample.id}", []).append(number)
    order = list(units)
    random.Random(0).shuffle(order)
    taken: list[int] = []
    for name in order:
        if len(taken) >= limit:
            break
        taken += units[name]
    return [every[number] for number in sorted(taken)]


def processes() -> PartialState:
    """This process among the others; on a machine without GPUs accelerate must be told to look."""
    return PartialState(cpu=not torch.accelerator.is_available())


# --- inside ---------------------------------------------------------------------------------------


def _begin(
    folder: Path,
    subject: Subject,
    tasks: Sequence[Task],
    settings: RunSettings,
    skipped: dict[str, str],
    *,
    first: bool,
) -> dict[str, Any]:
    """What is there of these results, checked to be of the same model; or a new beginning."""
    made_by = {
        "name": subject.name,
        "kind": subject.kind,
        **subject.facts,
        "max_image_tokens": settings.max_image_tokens,
    }
    data: dict[str, Any] = {
        "format": FORMAT,
        "model": made_by,
        "begun": _now(),
        "tasks": {},
        "skipped": {},
    }
    if (folder / RESULTS_FILE).is_file():
        data = read_results(folder)
        _check_same(folder, "the model's", data["model"], made_by)
    for task in tasks:
        identity = {
            "version": task.version,
            "max_new_tokens": task.max_new_tokens,
            **task.settings(),
        }
        entry = data["tasks"].setdefault(task.name, {})
        _check_same(folder, f"{task.name}'s", entry.get("identity", identity), identity)
        entry |= {"identity": identity, "title": task.title, "metric": task.metric}
    data["skipped"] |= skipped
    data["versions"] = versions(world_size=processes().num_processes)
    data["decoding"] = {"temperature": 0, "num_beams": 1, "batch_size": settings.batch_size}
    if first:
        folder.mkdir(parents=True, exist_ok=True)
        write_results(folder, data)
    return data


def _check_same(folder: Path, whose: str, there: dict[str, Any], now: dict[str, Any]) -> None:
    names = sorted({*there, *now} - {"device"})
    for name in names:
        if there.get(name) != now.get(name):
            raise ValueError(
                f"{folder} holds results where {whose} {name} is {there.get(name)!r}, but now it "
                f"is {now.get(name)!r}; name another --output, or remove that folder."
            )


def _answer_open(
    task: Task,
    samples: Sequence[Sample],
    subject: Subject,
    files: RowFiles,
    settings: RunSettings,
    state: PartialState,
) -> None:
    """Answers this process's part of the samples that have no row yet."""
    files.begin()
    state.wait_for_everyone()
    known = files.known()
    state.wait_for_everyone()  # nobody adds while another still reads
    if surplus := known.keys() - {sample.id for sample in samples}:
        raise ValueError(
            f"{files.whole.parent} holds {len(surplus)} answers to {task.name} that this run does "
            "not ask for; leave out --limit, or name another --output."
        )
    left = [sample for sample in samples if sample.id not in known or known[sample.id].failed]
    mine = left[state.process_index :: state.num_processes]
    if subject.answerer is None:
        constant = dict(
            zip((one.id for one in samples), majority_answers(task, samples), strict=True)
        )
        rows = [row_of(task, sample, Reply(constant[sample.id])) for sample in mine]
        files.add(rows, seconds=0.0)
        return
    asking = (
        {} if settings.max_image_tokens is None else {"max_image_tokens": settings.max_image_tokens}
    )
    bar = tqdm(
        total=len(mine),
        desc=f"{subject.name}: {task.name}",
        unit="sample",
        dynamic_ncols=True,
        disable=not state.is_main_process or not mine,
    )
    size = CHUNK * settings.batch_size
    with bar:
        for first in range(0, len(mine), size):
            began = time.perf_counter()
            part = mine[first : first + size]
            rows = rows_of(task, part, subject.answerer, batch_size=settings.batch_size, **asking)
            files.add(rows, seconds=time.perf_counter() - began)
            bar.update(len(part))


def _scores(task: Task, units: list[dict[str, float]], resamples: int) -> dict[str, Any]:
    return {
        name: {
            "value": round(one.value, 4),
            "low": None if one.low is None else round(one.low, 4),
            "high": None if one.high is None else round(one.high, 4),
        }
        for name, one in interval(units, task.scores, resamples=resamples).items()
    }


def _examples(
    task: Task, samples: Sequence[Sample], rows: Sequence[Row], folder: Path
) -> list[dict[str, Any]]:
    """Some samples spread over the task, with small copies of their pictures."""
    place = folder / "pictures"
    place.mkdir(exist_ok=True)
    kept = []
    step = max(len(samples) // SHOWN, 1)
    for number in range(0, min(len(samples), SHOWN * step), step):
        sample, row, names = samples[number], rows[number], []
        try:
            pictures = [] if row.failed else list(sample.images())
        except (ValueError, OSError):
            pictures = []
        for count, picture in enumerate(pictures):
            small = picture.convert("RGB")
            small.thumbnail((SHOWN_PIXELS, SHOWN_PIXELS))
            names.append(f"pictures/{task.name}-{number}-{count}.png")
            small.save(folder / names[-1])
        kept.append({"id": sample.id, "pictures": names})
    return kept


def _write_uploads(task: Task, rows: Sequence[Row], folder: Path) -> list[str]:
    files = task.upload(rows)
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8")
    return list(files)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


__all__ = ["RunSettings", "chosen", "evaluate", "processes", "summary"]
