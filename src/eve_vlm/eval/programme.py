"""One whole evaluation: models and their baselines, one after the other, on the same tasks.

What can be known before a model is read for minutes is said before: tasks that do not exist, data
that is not there, a judge without a key.  Easy to get wrong: a task that cannot be run is named in
the results and never scored 0.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from eve_vlm.serve.engine import EveEngine

from .answerers import MAJORITY, Subject
from .answerers import blind as blinded
from .benchmarks.published import published_note, published_scores
from .other_models import TransformersEngine, model_facts
from .page import write_page
from .registry import TaskOptions, build_task, task_names
from .runner import RunSettings, evaluate, processes
from .tables import all_results
from .task import MissingDataError, Task

NO_JUDGE = "it needs a judge; set OPENAI_API_KEY (or --judge-url) and --judge-model."


def run_evaluation(
    models: Mapping[str, str],
    tasks: Iterable[str],
    output: Path,
    *,
    open_model: Callable[[str], EveEngine | TransformersEngine],
    options: TaskOptions | None = None,
    settings: RunSettings | None = None,
    blind: bool = False,
    majority: bool = False,
) -> list[dict[str, Any]]:
    """Scores models and writes a folder for each, and `report.html`.

    Args:
        models: {name in tables: folder or Hub id}.
        tasks: names of tasks or of sets of them.
        output: where to; what is there already of the same models is kept.
        open_model: loads one of them; see `open_answerer`.
        blind: whether each is asked again without pictures.
        majority: whether the most frequent answer is scored too.

    Returns:
        All results in `output`; empty in other processes than the first.

    Raises:
        ValueError: for tasks, data or folders that a user can mend.
    """
    options, settings = options or TaskOptions(), settings or RunSettings()
    every = [build_task(name, options) for name in task_names(tasks)]
    skipped = {task.name: NO_JUDGE for task in every if task.needs_judge and options.judge is None}
    left = [task for task in every if task.name not in skipped]
    require_data(left)
    if not left:
        raise ValueError(f"No task is left to run: {next(iter(skipped))} was left out, {NO_JUDGE}")

    def score(subject: Subject) -> None:
        place = output / subject.slug
        evaluate(
            subject,
            left,
            place,
            settings,
            published=published_scores,
            published_note=published_note,
            skipped=skipped,
        )

    for name, model in models.items():
        engine = open_model(model)
        if settings.max_image_tokens is not None and isinstance(engine, TransformersEngine):
            raise ValueError(
                f"max_image_tokens is {settings.max_image_tokens}, but {model} is no EVE model and "
                "takes none; evaluate it without."
            )
        subject = Subject(name=name, answerer=engine, facts=model_facts(engine))
        score(subject)
        if blind:
            score(blinded(subject))
    if majority:
        score(MAJORITY)
    if not processes().is_main_process:
        return []
    write_page(output)
    return all_results(output)


def require_data(tasks: Sequence[Task]) -> None:
    """Checks that the data of every task is there.

    Raises:
        MissingDataError: with what to fetch for each task that lacks its data.
    """
    missing = []
    for task in tasks:
        try:
            task.samples()
        except MissingDataError as error:
            missing.append(f"{task.name}: {error}")
    if missing:
        raise MissingDataError(" ".join(missing))


__all__ = ["require_data", "run_evaluation"]
