"""A run as one page: `report.html` in its folder, made of the files beside it and nothing else.

So it can be made at any time, by `eve report` on another machine or after a crash too; the run
itself writes it at every checkpoint and at its end.  Easy to get wrong: no file but the recipe need
be there, and a run that has just begun has no curve yet.
"""

import json
import logging
import math
import time
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from PIL import Image
from transformers import TrainerCallback, TrainingArguments

from eve_vlm.html_report import NO_MATPLOTLIB, Points, can_draw, line_plot, picture_uri, render
from eve_vlm.json_lines import read_lines
from eve_vlm.output_folder import written_whole
from eve_vlm.train.data_log import BAD_RECORDS_FILE, DataLog
from eve_vlm.train.progress import human_time
from eve_vlm.train.run_log import LOG_FILE
from eve_vlm.train.sample_answers import SAMPLES_FILE
from eve_vlm.versions import VERSIONS_FILE

logger = logging.getLogger(__name__)

REPORT_FILE = "report.html"
RECIPE_FILE, PARAMETERS_FILE, RESULT_FILE = "recipe.resolved.yaml", "parameters.txt", "run.json"
MOST_ANSWERS = 8  # of a record: the first, the last and some between
MOST_REASONS = 50
MOST_EXAMPLES = 3  # ids of records for each reason


class Plot(NamedTuple):
    """One drawing: entries of the log whose names begin alike, or are listed."""

    name: str
    title: str
    keys: tuple[str, ...] = ()
    prefix: str = ""
    but: str = "\0"
    """Entries that begin so are in another drawing."""
    unit: str = ""
    log: bool = False
    share: bool = False


PLOTS = (
    Plot("loss", "Loss by term", keys=("loss",), prefix="loss_", but="loss_of/"),
    Plot("source", "Language loss by data set", prefix="loss_of/"),
    Plot("rate", "Learning rate", prefix="learning_rate"),
    Plot("norm", "Gradient norms", prefix="grad_norm", log=True),
    Plot("speed", "Tokens per second", keys=("tokens_per_second",)),
    Plot("shares", "Shares", keys=("utilisation", "data_wait", "mfu"), share=True),
    Plot("memory", "Memory", keys=("memory_gib",), unit="GiB"),
    Plot("eval", "Scores of tasks", prefix="eval_"),
    Plot(
        "skipped", "Skipped steps and records left out", keys=("skipped_steps", "left_out_records")
    ),
)


class RunReport(TrainerCallback):
    """Writes the page at checkpoints, and the records left out until then.

    Drawing takes some seconds, so the page waits until fifty times that has passed since the last.

    Args:
        folder: of the run.
        data_log: what this process could not use.
        page: whether the page is written; without it only the records left out are.
    """

    def __init__(self, folder: Path, data_log: DataLog | None = None, *, page: bool = True):
        self.folder, self.data_log = folder, data_log
        self._not_before = 0.0 if page else math.inf

    def on_save(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        """Writes it."""
        if not state.is_world_process_zero:
            return
        if self.data_log is not None:
            self.data_log.write(self.folder, self.data_log.bad)
        began = time.monotonic()
        if began < self._not_before:
            return
        try:
            write_run_report(self.folder)
        except OSError as error:  # a page is not worth a run
            logger.warning("%s was not written: %s", self.folder / REPORT_FILE, error)
        ended = time.monotonic()
        self._not_before = ended + 50 * (ended - began)


def write_run_report(folder: Path) -> Path:
    """Writes `report.html` of a run, whatever of it is there.

    Raises:
        ValueError: if the folder holds no run.
    """
    recipe_file = folder / RECIPE_FILE
    if not recipe_file.is_file():
        raise ValueError(f"{folder} holds no run (no {RECIPE_FILE}); name the output_dir of one.")
    text = recipe_file.read_text(encoding="utf-8")
    recipe, log = yaml.safe_load(text), read_lines(folder / LOG_FILE)
    html = render(
        "train/run_report.html.jinja",
        name=recipe["name"],
        stage=recipe["stage"]["name"],
        status=status_of(folder, log),
        plots=drawings(log) if can_draw() else None,
        lacking=NO_MATPLOTLIB.format(extra="train"),
        last=log_table(log),
        answers=answers_of(folder),
        mixture=[mixture_row(source) for source in recipe["data"]["sources"]],
        bad=bad_records(folder),
        parameters=_text(folder / PARAMETERS_FILE),
        recipe=text,
        environment=_environment(folder),
    )
    with written_whole(folder / REPORT_FILE) as part:
        part.write_text(html, encoding="utf-8")
    return folder / REPORT_FILE


def status_of(folder: Path, log: list[dict[str, Any]]) -> str:
    """How far the run is, in a sentence."""
    begun = [entry for entry in log if "max_steps" in entry]
    step = max((entry["step"] for entry in log), default=0)
    if (folder / RESULT_FILE).is_file():
        result = json.loads((folder / RESULT_FILE).read_text(encoding="utf-8"))
        return (
            f"Finished: {result['steps']:,} steps, {result['records']:,} records, "
            f"{human_time(result['seconds'])}."
        )
    if not begun:
        return "Nothing was logged yet."
    resumed = f", resumed {len(begun) - 1} times" if len(begun) > 1 else ""
    spent = human_time(log[-1]["time"] - begun[0]["time"])
    return (
        f"Not finished: step {step:,} of {begun[-1]['max_steps']:,} was logged {spent} after the "
        f"start{resumed}."
    )


def curves_of(plot: Plot, log: list[dict[str, Any]]) -> dict[str, Points]:
    """The lines of a drawing by what they are called in it; none where nothing was logged."""
    lines: dict[str, list[tuple[float, float]]] = {}
    for entry in log:
        for key, value in entry.items():
            begins = plot.prefix and key.startswith(plot.prefix) and not key.startswith(plot.but)
            if (key in plot.keys or begins) and isinstance(value, (int, float)):
                point = entry["step"], value if math.isfinite(value) else math.nan
                lines.setdefault(_label(plot, key), []).append(point)
    return dict(lines)


def _label(plot: Plot, key: str) -> str:
    short = key.removeprefix(plot.prefix) if plot.prefix else key
    return short.strip("_").replace("_", " ") or "all"


def drawings(log: list[dict[str, Any]]) -> list[dict[str, str]]:
    """Title and SVG of every drawing that has a line."""
    return [
        {
            "title": plot.title,
            "svg": line_plot(plot.name, lines, unit=plot.unit, log=plot.log, share=plot.share),
        }
        for plot in PLOTS
        if (lines := curves_of(plot, log))
    ]


def log_table(log: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """The last entry of every figure, for whoever cannot see curves."""
    last: dict[str, float] = {}
    for entry in log:
        last |= {key: value for key, value in entry.items() if isinstance(value, (int, float))}
    hidden = {"time", "max_steps", "epoch"}
    return [(key, f"{value:,.6g}") for key, value in last.items() if key not in hidden]


def answers_of(folder: Path) -> list[dict[str, Any]]:
    """Sample answers by record, over time, with its pictures."""
    records: dict[tuple[str, str], dict[str, Any]] = {}
    for entry in read_lines(folder / SAMPLES_FILE):
        record = records.setdefault((entry["source"], entry["id"]), {**entry, "said": []})
        record["said"].append((entry["step"], entry["answer"]))
    for record in records.values():
        said = record["said"]
        places = range(min(MOST_ANSWERS, len(said)))
        chosen = [round(place * (len(said) - 1) / max(len(places) - 1, 1)) for place in places]
        record["said"] = [said[place] for place in chosen]
        record["pictures"] = [
            picture_uri(Image.open(folder / name))
            for name in record["pictures"]
            if (folder / name).is_file()
        ]
    return list(records.values())


def mixture_row(source: dict[str, Any]) -> list[str]:
    """Name, kind, part, and how often: by weight, or so many times an epoch."""
    name = source["name"] or source["path"] or source["kind"]
    part = source["split"] or source["options"].get("split") or "all"
    often = (
        f"{source['repeat']:g} x" if source["weight"] is None else f"weight {source['weight']:g}"
    )
    return [name, source["kind"], part, often]


def bad_records(folder: Path) -> list[tuple[str, int, str]]:
    """Reason, count and some ids of records left out, the most frequent reason first."""
    counts: Counter[str] = Counter()
    ids: dict[str, list[str]] = {}
    for entry in read_lines(folder / BAD_RECORDS_FILE):
        reason = entry["reason"].removeprefix(f"Record {entry['id']!r}: ")
        counts[reason] += 1
        ids.setdefault(reason, []).append(entry["id"])
    return [
        (reason, count, ", ".join(ids[reason][:MOST_EXAMPLES]))
        for reason, count in counts.most_common(MOST_REASONS)
    ]


def _environment(folder: Path) -> list[tuple[str, str]]:
    text = _text(folder / VERSIONS_FILE)
    facts = json.loads(text) if text else {}
    return [(name, str(value)) for name, value in facts.items() if value is not None]


def _text(file: Path) -> str:
    return file.read_text(encoding="utf-8") if file.is_file() else ""


__all__ = [
    "PLOTS",
    "REPORT_FILE",
    "RunReport",
    "answers_of",
    "bad_records",
    "curves_of",
    "mixture_row",
    "status_of",
    "write_run_report",
]
