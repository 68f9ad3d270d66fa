"""Benchmarks with options and their letters: ScienceQA, MMBench, SEED-Bench, MMMU, AI2D.

Which letter is meant is read by `option_letter`, by the rule of the benchmark's own programme where
it has one.  Easy to get wrong: MMBench asks a question again with its options rotated, and only
who gets all of these right has the point (its "circular" evaluation).
"""

import ast
import csv
import io
from collections.abc import Mapping, Sequence
from string import ascii_uppercase
from typing import Any, ClassVar

import numpy as np
from PIL import Image

from eve_vlm.eval.choices import OptionRule
from eve_vlm.eval.metrics import open_match, option_letter
from eve_vlm.eval.task import COUNT, Row, Sample, Sums, ratio

from .base import Benchmark

ROTATED = 1_000_000  # MMBench's rotations of question 7 are 1000007, 2000007 ...


class ChoiceBenchmark(Benchmark):
    """Questions with options; what is expected is a letter."""

    rule: ClassVar[OptionRule] = "lenient"

    def marks(self, sample: Sample, answer: str) -> dict[str, float]:
        """Whether the letter of the right option is said."""
        letter = option_letter(answer, sample.options, rule=self.rule)
        return {"accuracy": float(letter in sample.answers)}


class ScienceQa(ChoiceBenchmark):
    """ScienceQA, the questions with a picture."""

    name = "sqa"
    title = "Science questions of schools, with pictures"
    rule = "scienceqa"
    columns = ("question", "choices", "answer", "hint", "subject")

    def fields(self, row: Mapping[str, Any], number: int) -> dict[str, Any]:
        """A row numbers its right choice."""
        return {
            "id": str(number),
            "question": row["question"],
            "options": tuple(row["choices"]),
            "answers": (ascii_uppercase[row["answer"]],),
            "group": row["subject"] or "",
            "facts": {"hint": row["hint"] or ""},
        }


class Ai2d(ChoiceBenchmark):
    """AI2D."""

    name = "ai2d"
    title = "Questions about diagrams of school books"
    columns = ("question", "options", "answer")

    def fields(self, row: Mapping[str, Any], number: int) -> dict[str, Any]:
        """A row numbers its right option, in words."""
        return {
            "id": str(number),
            "question": row["question"],
            "options": tuple(row["options"]),
            "answers": (ascii_uppercase[int(row["answer"])],),
        }


class SeedBench(ChoiceBenchmark):
    """SEED-Bench, pictures and videos."""

    name = "seed"
    title = "Questions about pictures and videos, twelve kinds"
    rule = "seed"
    columns = (
        *("question_id", "question", "choice_a", "choice_b", "choice_c", "choice_d"),
        *("answer", "data_type", "data_id"),
    )

    def fields(self, row: Mapping[str, Any], number: int) -> dict[str, Any]:
        """A row is a question; several may be about one picture or video."""
        return {
            "id": str(row["question_id"]),
            "question": row["question"],
            "options": tuple(row[f"choice_{letter}"] for letter in "abcd"),
            "answers": (row["answer"],),
            "group": row["data_type"],
            "unit": f"{row['data_type']} {row['data_id']}",
        }

    def open(self, number: int, fields: Mapping[str, Any]) -> Sequence[Image.Image]:
        """The picture, or of a video the frames around its middle."""
        every = super().open(number, fields)
        first = max(len(every) - self.preset.frames, 0) // 2
        return every[first : first + self.preset.frames]


class MmBench(ChoiceBenchmark):
    """MMBench in English."""

    name = "mmbench"
    title = "Questions of twenty kinds, asked again with rotated options"
    columns = (
        *("index", "question", "hint", "answer", "A", "B", "C", "D"),
        *("category", "L2-category"),
    )
    upload_note = (
        "The server takes a workbook: open the .tsv in a spreadsheet program, text columns as text,"
        " and save it as .xlsx."
    )

    def fields(self, row: Mapping[str, Any], number: int) -> dict[str, Any]:
        """A row is one rotation of a question."""
        index = int(row["index"])
        options = tuple(row[letter] for letter in "ABCD" if _said(row[letter]))
        return {
            "id": str(index),
            "question": row["question"],
            "options": options,
            "answers": (row["answer"],) if _said(row["answer"]) else (),
            "group": row["category"] or "",
            "unit": f"question {index % ROTATED}",
            "facts": {
                "hint": row["hint"] if _said(row["hint"]) else "",
                "upload": {
                    "index": index,
                    "question": row["question"],
                    **dict(zip("ABCD", (*options, "", "", "", ""), strict=False)),
                    "answer": row["answer"] if _said(row["answer"]) else "",
                    "category": row["category"] or "",
                    "l2-category": row["L2-category"] or "",
                },
            },
        }

    def units(self, rows: Sequence[Row]) -> list[dict[str, float]]:
        """Questions: how many rotations are right, and whether all are."""
        return [
            {
                **sums,
                "questions": 1.0,
                "all_right": float(sums["accuracy"] == sums[COUNT]),
            }
            for sums in super().units(rows)
        ]

    def scores(self, sums: Sums) -> dict[str, np.ndarray]:
        """`accuracy` counts whole questions, as the published tables do; `each` every rotation."""
        return {
            "accuracy": 100 * ratio(sums["all_right"], sums["questions"]),
            "each": 100 * ratio(sums["accuracy"], sums[COUNT]),
        }

    def upload(self, rows: Sequence[Row]) -> dict[str, str]:
        """A table with a line for each row, of dev too: the published scores are the server's."""
        if not rows:
            return {}
        lines = [{**row.facts["upload"], "prediction": row.answer} for row in rows]
        text = io.StringIO()
        table = csv.DictWriter(text, list(lines[0]), delimiter="\t", lineterminator="\n")
        table.writeheader()
        table.writerows(lines)
        return {f"mmbench_{self.split}.tsv": text.getvalue()}


class Mmmu(ChoiceBenchmark):
    """MMMU: options mostly, some questions open, up to seven pictures."""

    name = "mmmu"
    title = "College exams of thirty subjects"
    rule = "mmmu"
    columns = ("id", "question", "options", "answer", "question_type")
    pictures = tuple(f"image_{number}" for number in range(1, 8))

    def fields(self, row: Mapping[str, Any], number: int) -> dict[str, Any]:
        """A row has its options, and several open answers, as the text of a Python list."""
        is_open = row["question_type"] == "open"
        answer = row["answer"]
        if answer in ("", "?", None):
            answers: tuple[str, ...] = ()
        else:
            answers = tuple(_listed(answer)) if is_open else (answer,)
        return {
            "id": row["id"],
            "question": row["question"],
            "options": () if is_open else tuple(_listed(row["options"])),
            "answers": answers,
            "group": row["id"].split("_", 1)[1].rsplit("_", 1)[0],
        }

    def marks(self, sample: Sample, answer: str) -> dict[str, float]:
        """The letter, or what an open question asks for."""
        if sample.options:
            return super().marks(sample, answer)
        return {"accuracy": open_match(answer, sample.answers)}


def _listed(text: str) -> list[str]:
    """The words of a Python list; a text that is none stands for itself."""
    if not text.startswith("["):
        return [text]
    return [str(one) for one in ast.literal_eval(text)]


def _said(cell: str | None) -> bool:
    """Whether a cell has words; the Hub's copy has "nan" where the original is empty."""
    return cell not in (None, "", "nan")


__all__ = ["Ai2d", "ChoiceBenchmark", "MmBench", "Mmmu", "ScienceQa", "SeedBench"]
