"""An evaluation as one page that opens anywhere: scores, a plot, groups, prompts, examples.

Made of the files of a run and nothing else, so `eve eval report` draws it again at any time.  Easy
to get wrong: bars of one task belong beside each other, and a score in points (MME) has another
axis than one in percent, so every task has a drawing of its own.
"""

from pathlib import Path
from typing import Any

from PIL import Image

from eve_vlm.html_report import can_draw, figure_of, picture_uri, render, svg_of
from eve_vlm.output_folder import written_whole

from .results import read_rows
from .tables import all_results, finished_entry, headline, notes, score_table
from .task import Row

PAGE = "report.html"
COLOURS = {"model": "#2e6fd0", "blind": "#9aa5b4", "majority": "#d3d9e2"}
MOST_LETTERS = 600


def write_page(output: Path) -> Path:
    """Writes `report.html` of all models below a folder.

    Raises:
        ValueError: if there are no results.
    """
    results = all_results(output)
    table = score_table(results)
    tasks = [row[0] for row in table[1:]]
    html = render(
        "eval/report.html.jinja",
        table=table,
        notes=notes(results),
        plot=_plot(results, tasks) if can_draw() else None,
        tasks=[_task(output, results, name) for name in tasks],
        models=[_model(one) for one in results],
    )
    page = output / PAGE
    with written_whole(page) as part:
        part.write_text(html, encoding="utf-8")
    return page


def _plot(results: list[dict[str, Any]], tasks: list[str]) -> str:
    """For each task the headline score of every model with its interval, and published scores."""
    columns = 3
    rows = -(-len(tasks) // columns)
    figure = figure_of((11, (0.9 + 0.3 * len(results)) * rows), extra="train")
    for place, task in enumerate(tasks, start=1):
        axes = figure.add_subplot(rows, columns, place)
        entries = [(one["model"], finished_entry(one, task)) for one in results]
        shown = [(model, headline(entry)) for model, entry in entries]
        for level, (model, score) in enumerate(reversed(shown)):
            if score is None:
                continue
            low, high = score["low"], score["high"]
            spread = None if low is None else [[score["value"] - low], [high - score["value"]]]
            axes.barh(level, score["value"], xerr=spread, color=COLOURS[model["kind"]], height=0.7)
        first = next(entry for _, entry in entries if entry)
        for name, score in first["published"].items():
            if name.startswith("EVE"):
                axes.axvline(score, color="#c0392b", linewidth=1, linestyle=":")
        axes.set_yticks(range(len(shown)), [model["name"][:28] for model, _ in reversed(shown)])
        axes.set_title(f"{task}: {first['metric']}", fontsize="medium")
        axes.set_xlim(left=0)
        axes.tick_params(labelsize="small")
    return svg_of(figure, "scores")


def _task(output: Path, results: list[dict[str, Any]], name: str) -> dict[str, Any]:
    """All of one task: every score and group of every model, and examples of the first."""
    entries = [(one["model"], entry) for one in results if (entry := finished_entry(one, name))]
    first = entries[0][1]
    scores = list(first["scores"] or {})
    rows = []
    for model, entry in entries:
        rows.append([model["name"], "all", f"{entry['samples']:,}", *_numbers(entry, scores)])
        for group, part in entry["groups"].items():
            rows.append(["", group, f"{part['samples']:,}", *_numbers(part, scores)])
    return {
        "name": name,
        "title": first["title"],
        "identity": first["identity"],
        "prompt": first["prompt"],
        "heading": ["model", "group", "samples", *scores],
        "rows": rows,
        "times": [f"{model['name']}: {entry['seconds']:,.1f} s" for model, entry in entries],
        "examples": _examples(output, results, name),
    }


def _numbers(entry: dict[str, Any], scores: list[str]) -> list[str]:
    found = []
    for name in scores:
        one = (entry["scores"] or {}).get(name)
        if one is None:
            found.append("")
        elif one["low"] is None:
            found.append(f"{one['value']:.1f}")
        else:
            found.append(f"{one['value']:.1f} [{one['low']:.1f}, {one['high']:.1f}]")
    return found


def _examples(output: Path, results: list[dict[str, Any]], name: str) -> list[dict[str, Any]]:
    """Samples that were kept for showing, with the answers of every model."""
    answered: list[tuple[dict[str, Any], dict[str, Row]]] = []
    for one in results:
        if finished_entry(one, name):
            folder = output / one["slug"]
            answered.append((one, {row.id: row for row in read_rows(folder, name)}))
    first, rows = answered[0]
    shown = []
    for example in first["tasks"][name]["examples"]:
        row = rows[example["id"]]
        answers = [
            (one["model"]["name"], (theirs[row.id].failed or theirs[row.id].answer)[:MOST_LETTERS])
            for one, theirs in answered
            if row.id in theirs
        ]
        shown.append(
            {
                "id": row.id,
                "pictures": [_picture(output / first["slug"] / one) for one in example["pictures"]],
                "prompt": row.prompt[:MOST_LETTERS],
                "expected": " | ".join(dict.fromkeys(row.expected))[:MOST_LETTERS],
                "answers": answers,
            }
        )
    return shown


def _picture(file: Path) -> str:
    with Image.open(file) as picture:
        return picture_uri(picture)


def _model(one: dict[str, Any]) -> dict[str, Any]:
    facts = {**one["model"], **one["decoding"], **one["versions"], "finished": one.get("finished")}
    return {"name": one["model"]["name"], "facts": facts}


__all__ = ["PAGE", "write_page"]
