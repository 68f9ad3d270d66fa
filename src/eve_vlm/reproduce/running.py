"""One process of `eve reproduce`: some stages after each other, then the questions.

A finished stage is kept as it stands in its folder and an unfinished one goes on from its
checkpoint, so a process may be stopped at any time.  Easy to get wrong: a stage's seconds are those
of its last process, so of a stage that was stopped half-way they are too few.
"""

import json
import logging
import os
import sys
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch

from eve_vlm.loading import load_config, load_model, load_processor
from eve_vlm.output_folder import new_folder, written_whole
from eve_vlm.quickstart import ask_about, scenes_to_ask
from eve_vlm.serve.engine import EveEngine
from eve_vlm.train.collapse import CollapseAlarm
from eve_vlm.train.run import RunResult, finished_run, train
from eve_vlm.train.sections import Recipe
from eve_vlm.train.stopping import RunStopped

from .variants import DIGITS, Run, Stage

POINTS = 100  # of a loss curve that is kept
DECIMALS = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class Segment:
    """Stages for one process: no other process needs one of them but the last."""

    name: str
    """What is shown."""
    stages: tuple[Stage, ...]
    """In order."""
    run: Run | None
    """The run that ends with them; None where others go on from here."""

    @property
    def first(self) -> Stage:
        """The stage that it begins with."""
        return self.stages[0]

    @property
    def steps(self) -> int:
        """Steps of all its stages, a measure of what it costs."""
        return sum(stage.recipe.training["max_steps"] for stage in self.stages)


def run_segment(segment: Segment, log: Path, results: Path, commit: str | None) -> None:
    """The whole of a process: trains, asks, writes; all that is said goes to `log`."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a", encoding="utf-8") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    torch.set_num_threads(1)
    logging.basicConfig(level=logging.WARNING)
    try:
        for stage in segment.stages:
            train_stage(stage)
        if segment.run is not None:
            write_result(segment.run, results, commit=commit)
    except RunStopped as stopped:
        sys.exit(stopped.exit_code)


def train_stage(stage: Stage) -> RunResult:
    """The result of a stage, which is trained where it is not yet."""
    found = finished_run(stage.recipe)
    if found is not None:
        return found
    if stage.without:
        _switch_off(stage)
    # All claims have 168 stages, and a page takes 1.3 s; the curves are on the page of the claim.
    return train(stage.recipe, resume=True, report=False)


def _switch_off(stage: Stage) -> None:
    """Writes the start of a stage: the language stage's model without some attentions."""
    start = Path(str(stage.recipe.model.init_from))
    if start.is_dir():
        return
    before = start.with_name(str(stage.before)[:DIGITS])
    config = load_config(before)
    for attention in stage.without:
        setattr(config.vision_config, attention, False)
    weights = load_model(before)
    model = type(weights)._from_config(config)
    kept = model.state_dict().keys()
    model.load_state_dict(
        {name: value for name, value in weights.state_dict().items() if name in kept}
    )
    model.generation_config = weights.generation_config
    with new_folder(start) as folder:
        model.save_pretrained(folder)
        load_processor(before).save_pretrained(folder)


def write_result(run: Run, folder: Path, *, commit: str | None) -> Path:
    """Asks the trained model and writes what is kept of a run: one small JSON file."""
    trained = {stage.name: finished_run(stage.recipe) for stage in run.stages}
    done = {name: result for name, result in trained.items() if result is not None}
    last = run.stages[-1].recipe
    values = {
        "variant": run.variant.name,
        "seed": run.seed,
        "scale": run.scale,
        "digest": run.digest,
        "commit": commit,
        "date": date.today().isoformat(),
        "device": "cuda" if torch.cuda.is_available() else "cpu",
        "torch": torch.__version__,
        "steps": {name: result.steps for name, result in done.items()},
        "seconds": {name: round(result.seconds, 1) for name, result in done.items()},
        "curves": {
            name: curve_of(result.losses) for name, result in done.items() if name != "language"
        },
        "collapse": {name: collapse_of(result.losses) for name, result in done.items()},
        "questions": run.questions if run.variant.scored else 0,
        "scores": scores_of(last, run.questions) if run.variant.scored else None,
    }
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{run.name}.json"
    with written_whole(file) as part:
        part.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
    return file


def scores_of(recipe: Recipe, questions: int) -> dict[str, float]:
    """Share of exact answers by family, on held-out scenes as the last stage drew them.

    Which scenes those are follows from the seed, so all variants of a seed answer the same ones.
    """
    engine = EveEngine.from_pretrained(recipe.output_dir)
    found = {}
    for family, scenes in scenes_to_ask(recipe, split="held_out", size=questions).items():
        rows = ask_about(engine, scenes, lambda _: None)
        found[family] = round(sum(row.right for row in rows) / len(rows), DECIMALS)
    return found


def curve_of(losses: list[dict[str, Any]]) -> dict[str, list[float]]:
    """Steps and language losses, `POINTS` at most; each point is the mean of its entries."""
    size = -(-len(losses) // POINTS)
    groups = [losses[first : first + size] for first in range(0, len(losses), size)]
    return {
        "steps": [group[-1]["step"] for group in groups],
        "loss": [
            round(sum(entry["loss_lm"] for entry in group) / len(group), DECIMALS)
            for group in groups
        ],
    }


def collapse_of(losses: list[dict[str, Any]]) -> dict[str, float] | None:
    """What the collapse alarm saw in the language loss of a stage; None where it did not ring."""
    alarm, before = CollapseAlarm(), 0
    for entry in losses:
        seen = alarm.update(entry["step"], entry["loss_lm"], steps=entry["step"] - before)
        before = entry["step"]
        if seen is not None:
            return {"since": seen.since, "before": seen.before, "after": seen.after}
    return None


__all__ = [
    "Segment",
    "collapse_of",
    "curve_of",
    "run_segment",
    "scores_of",
    "train_stage",
    "write_result",
]
