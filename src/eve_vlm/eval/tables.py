"""Results of several models beside each other and beside published scores, as rows of text.

Easy to get wrong: a difference to a published score is shown without a test, because nobody has
published the answers that a test would need; two of our own runs are compared by `comparing.py`.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .results import RESULTS_FILE, read_results

Results = Sequence[dict[str, Any]]


def all_results(output: Path) -> list[dict[str, Any]]:
    """The results of every model below a folder, models before their baselines.

    The name of each one's folder is added as `slug`.

    Raises:
        ValueError: if there are none.
    """
    files = sorted(output.glob(f"*/{RESULTS_FILE}"))
    found = [read_results(file) | {"slug": file.parent.name} for file in files]
    if not found:
        read_results(output)  # says what is wrong
    order = ("model", "blind", "majority")
    return sorted(found, key=lambda one: order.index(one["model"]["kind"]))


def score_table(results: Results) -> list[list[str]]:
    """Headline scores: a row for each task, a column for each model, published ones behind."""
    others = list(
        dict.fromkeys(name for _, entry in _finished(results) for name in entry["published"])
    )
    names = [one["model"]["name"] for one in results]
    table = [["task", "score", "samples", *names, *others]]
    for task in dict.fromkeys(task for task, _ in _finished(results)):
        entries = [finished_entry(one, task) for one in results]
        first = next(entry for entry in entries if entry)
        published = [first["published"].get(name) for name in others]
        ours = headline(entries[0])
        table.append(
            [
                task,
                first["metric"],
                f"{first['samples']:,}",
                *(_cell(entry) for entry in entries),
                *(_beside(score, ours) for score in published),
            ]
        )
    return table


def headline(entry: dict[str, Any] | None) -> dict[str, Any] | None:
    """The score that stands for a task; None if it has none (yet)."""
    if not entry or not entry.get("scores"):
        return None
    return entry["scores"][entry["metric"]]


def notes(results: Results) -> list[str]:
    """What a reader of the scores must know: failures, empty answers, tasks that were left out."""
    said = []
    for one in results:
        name = one["model"]["name"]
        for task, entry in one["tasks"].items():
            if "samples" not in entry:
                said.append(f"{name}: {task} is not finished.")
                continue
            failed, empty, count = sum(entry["failed"].values()), entry["empty"], entry["samples"]
            if failed:
                first = next(iter(entry["failed"]))
                said.append(f"{name}: {failed} of {count} samples of {task} failed: {first}")
            if empty:
                said.append(f"{name}: {empty} of {count} answers to {task} are empty.")
            if entry["scores"] is None:
                files = ", ".join(entry["uploads"]) or "no file"
                note = f" {entry['upload_note']}" if entry["upload_note"] else ""
                said.append(f"{name}: {task} is scored by its server; give it {files}.{note}")
        said += [f"{name}: {task} was left out: {why}" for task, why in one["skipped"].items()]
    published = dict.fromkeys(
        f"{task}, published scores: {entry['published_note']}"
        for task, entry in _finished(results)
        if entry["published"] and entry["published_note"]
    )
    return [*said, *published]


def _finished(results: Results) -> list[tuple[str, dict[str, Any]]]:
    return [item for one in results for item in one["tasks"].items() if "samples" in item[1]]


def finished_entry(one: dict[str, Any], task: str) -> dict[str, Any] | None:
    """What a result says of a task; None if it has not finished it."""
    entry = one["tasks"].get(task)
    return entry if entry and "samples" in entry else None


def _cell(entry: dict[str, Any] | None) -> str:
    score = headline(entry)
    if score is None:
        return "" if entry is None else "upload"
    if score["low"] is None:
        return f"{score['value']:.1f}"
    return f"{score['value']:.1f} [{score['low']:.1f}, {score['high']:.1f}]"


def _beside(published: float | None, ours: dict[str, Any] | None) -> str:
    if published is None:
        return ""
    return f"{published:g}" if ours is None else f"{published:g} ({ours['value'] - published:+.1f})"


__all__ = ["all_results", "finished_entry", "headline", "notes", "score_table"]
