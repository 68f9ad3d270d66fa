"""Scores of tasks while a model learns, every so many steps: `evaluation` in a recipe.

The tasks, the marks and the intervals are those of `eve eval`, so a score here is the score that
the same weights get there.  Easy to get wrong: all processes answer their share, so all have to
come here at the same step; with weights in shards none of them could answer.
"""

import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainingArguments

from eve_vlm.eval.answerers import Subject
from eve_vlm.eval.registry import build_task, task_names
from eve_vlm.eval.runner import RunSettings, evaluate
from eve_vlm.eval.tables import headline
from eve_vlm.processing_eve import EveProcessor
from eve_vlm.serve.engine import EveEngine
from eve_vlm.train.sample_answers import model_inside, undisturbed
from eve_vlm.train.sections import EvaluationSection

logger = logging.getLogger(__name__)

FOLDER = "eval"  # in the run's folder, with one for each step


def check_tasks(section: EvaluationSection | None) -> None:
    """Says before training what would end it later.

    Raises:
        ValueError: if a task does not exist, needs a judge, or its data is not there.
    """
    for name in task_names(section.tasks) if section is not None else ():
        task = build_task(name)
        if task.needs_judge:
            raise ValueError(f"evaluation.tasks has {name}, which needs a judge; leave it out.")
        task.samples()


class Evaluation(TrainerCallback):
    """Evaluates and logs `eval_TASK`; results are in `eval/step-N` of the run's folder.

    Args:
        section: which tasks, how often, how many samples.
        processor: of the model that trains.
        folder: of the run.
        sharded: weights are spread over processes, so no process can answer.
    """

    def __init__(
        self,
        section: EvaluationSection,
        processor: EveProcessor,
        folder: Path,
        *,
        sharded: bool = False,
    ):
        self.section, self.processor, self.sharded = section, processor, sharded
        self.folder = folder / FOLDER
        self.tasks = [build_task(name) for name in task_names(section.tasks)]
        self.show: Callable[[dict[str, float]], None] | None = None
        """Gets the scores by name."""

    def on_train_begin(
        self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any
    ) -> None:
        """Takes results out that a resumed run will make again."""
        if self.sharded and state.is_world_process_zero:
            logger.warning(
                "No evaluation: weights are spread over processes, and none can answer alone; take "
                "evaluation out of the recipe, or use devices.strategy ddp."
            )
        if state.is_world_process_zero:
            for place in self.folder.glob("step-*"):
                if int(place.name.removeprefix("step-")) > state.global_step:
                    shutil.rmtree(place)

    def on_step_end(
        self,
        args: TrainingArguments,
        state: Any,
        control: Any,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        """Evaluates at every so many-th step, and at the last."""
        last = state.global_step == state.max_steps
        if (
            model is None
            or self.sharded
            or not (last or state.global_step % self.section.every == 0)
        ):
            return
        settings = RunSettings(limit=self.section.limit, batch_size=self.section.batch_size)
        with undisturbed(model):
            subject = Subject(
                name=f"step {state.global_step}",
                answerer=EveEngine(
                    model_inside(model), self.processor, batch_size=self.section.batch_size
                ),
            )
            place = self.folder / f"step-{state.global_step}"
            results = evaluate(subject, self.tasks, place, settings)
        if state.is_world_process_zero and self.show is not None:
            scores = {name: headline(entry) for name, entry in results["tasks"].items()}
            self.show({f"eval_{name}": one["value"] for name, one in scores.items() if one})


__all__ = ["Evaluation", "check_tasks"]
