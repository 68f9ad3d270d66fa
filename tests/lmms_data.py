"""Data of lmms-eval's own tasks in the forms of their Hub repositories, with pictures of ours.

`datasets.load_dataset("lmms-lab-encoder/POPE")` reads a folder of that name below the working
directory as it would read the repository, so the tasks run unchanged and offline. One thing a
reader would get wrong: a repository with several configurations needs the header of its README.
"""

import io
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import datasets
from PIL import Image


class Item(NamedTuple):
    """A picture, a thing that is in it, one that is not, and a question with its answer."""

    picture: Image.Image
    present: str
    absent: str
    question: str
    answer: str
    choices: Sequence[str]


Rows = Iterator[dict[str, Any]]


def pope(items: Sequence[Item]) -> Rows:
    for number, item in enumerate(items):
        for yes, name in ((True, item.present), (False, item.absent)):
            yield {
                "id": str(2 * number + (not yes)),
                "question_id": str(2 * number + (not yes)),
                "question": f"Is there a {name} in the image?",
                "answer": "yes" if yes else "no",
                "image_source": f"scene-{number}",
                "image": item.picture,
                "category": ("random", "popular", "adversarial")[number % 3],
            }


def mme(items: Sequence[Item]) -> Rows:
    for number, item in enumerate(items):
        category = ("existence", "count", "commonsense_reasoning")[number % 3]
        for name, answer in ((item.present, "Yes"), (item.absent, "No")):
            yield {
                "question_id": f"{category}/{number}.png",
                "image": item.picture,
                "question": f"Is there a {name}? Please answer yes or no.",
                "answer": answer,
                "category": category,
            }


def science(items: Sequence[Item]) -> Rows:
    for item in items:
        yield {
            "image": item.picture,
            "question": item.question,
            "choices": list(item.choices),
            "answer": list(item.choices).index(item.answer),
            "hint": "",
            "task": "closed choice",
            "grade": "grade2",
        }


def charts(items: Sequence[Item]) -> Rows:
    for number, item in enumerate(items):
        yield {
            "type": ("human_test", "augmented_test")[number % 2],
            "question": item.question,
            "answer": item.answer,
            "image": item.picture,
        }


def seed(items: Sequence[Item]) -> Rows:
    for number, item in enumerate(items):
        letters = dict(zip("abcd", item.choices, strict=True))
        yield {
            "question_id": str(number),
            "data_id": f"scene-{number}",
            "data_type": "image",
            "question": item.question,
            "answer": "ABCD"[list(item.choices).index(item.answer)],
            "image": [item.picture],
            **{f"choice_{letter}": choice for letter, choice in letters.items()},
        }


class Repository(NamedTuple):
    """Where a task looks for its data."""

    name: str
    split: str
    rows: Callable[[Sequence[Item]], Rows]
    config: str = ""


TASKS = {
    "pope": Repository("lmms-lab-encoder/POPE", "test", pope),
    "mme": Repository("lmms-lab-encoder/MME", "test", mme),
    "scienceqa_img": Repository("lmms-lab-encoder/ScienceQA", "test", science, "ScienceQA-IMG"),
    "chartqa": Repository("lmms-lab-encoder/ChartQA", "test", charts),
    "seedbench_ppl": Repository("lmms-lab-encoder/SEED-Bench", "test", seed),
}


def _bytes(picture: Image.Image | list[Image.Image]) -> Any:
    """As repositories hold them: PNG files."""
    if isinstance(picture, list):
        return [_bytes(one) for one in picture]
    file = io.BytesIO()
    picture.save(file, "PNG")
    return {"bytes": file.getvalue(), "path": None}


def make(
    folder: Path, task: str, items: Sequence[Item], *, damaged: int | None = None
) -> list[dict[str, Any]]:
    """Writes the repository of a task below the folder where the harness will run; its rows.

    Args:
        damaged: number of a row whose picture is none; one that is cut short is shown as far as it
            goes, because tasks of the harness ask Pillow for that (LOAD_TRUNCATED_IMAGES).
    """
    repository = TASKS[task]
    rows = list(repository.rows(items))
    stored = [{**row, "image": _bytes(row["image"])} for row in rows]
    if damaged is not None:
        stored[damaged]["image"] = {"bytes": b"no picture", "path": None}
    data = datasets.Dataset.from_list(stored)
    pictures = datasets.Image() if task != "seedbench_ppl" else datasets.List(datasets.Image())
    data = data.cast_column("image", pictures)
    place = folder / repository.name
    place.mkdir(parents=True)
    data.to_parquet(place / f"{repository.split}-00000-of-00001.parquet")
    header = ["---", "configs:", f"- config_name: {repository.config or 'default'}"]
    header += [
        "  data_files:",
        f"  - split: {repository.split}",
        "    path: '*.parquet'",
        "---",
        "",
    ]
    (place / "README.md").write_text("\n".join(header), encoding="utf-8")
    return rows
