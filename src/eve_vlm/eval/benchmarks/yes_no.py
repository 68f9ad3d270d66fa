"""Benchmarks of yes and no: POPE with its three samplings, MME with two questions a picture.

Their scores are no means over questions: POPE has F1, MME sums of accuracies of pairs.  Easy to get
wrong: which statistic of POPE the published tables hold is said nowhere; ours is the mean of the
three F1 scores, because LLaVA-1.5's 85.9 is the mean of the F1 scores that its authors list.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from eve_vlm.eval.metrics import pair_scores, pair_units, yes_no, yes_no_marks, yes_no_scores
from eve_vlm.eval.task import COUNT, Row, Sample, Sums

from .base import Benchmark


class Pope(Benchmark):
    """POPE."""

    name = "pope"
    title = "Whether things are in a photo"
    metric = "f1"
    columns = ("question_id", "question", "answer", "image_source", "category")

    def fields(self, row: Mapping[str, Any], number: int) -> dict[str, Any]:
        """A row is a question of one sampling; the samplings number theirs alike."""
        return {
            "id": f"{row['category']} {row['question_id']}",
            "question": row["question"],
            "answers": (row["answer"].strip().lower(),),
            "group": row["category"],
            "unit": f"image {row['image_source']}",
        }

    def marks(self, sample: Sample, answer: str) -> dict[str, float]:
        """True and false positives and negatives."""
        return yes_no_marks(answer, sample.answers[0])

    def units(self, rows: Sequence[Row]) -> list[dict[str, float]]:
        """Photos: marks kept apart by sampling."""
        found: dict[str, dict[str, float]] = {}
        for row in rows:
            sums = found.setdefault(row.unit, {COUNT: 0.0})
            sums[COUNT] += 1
            for name, value in {COUNT: 1.0, **row.marks}.items():
                key = f"{row.group}/{name}"
                sums[key] = sums.get(key, 0.0) + value
        return list(found.values())

    def scores(self, sums: Sums) -> dict[str, np.ndarray]:
        """The mean over the samplings of each of POPE's columns."""
        samplings = [name.removesuffix(f"/{COUNT}") for name in sums if name.endswith(f"/{COUNT}")]
        columns = [
            yes_no_scores({mark: sums[f"{one}/{mark}"] for mark in (COUNT, "tp", "fp", "fn", "tn")})
            for one in samplings
        ]
        means = {name: np.mean([one[name] for one in columns], axis=0) for name in columns[0]}
        return {"f1": means.pop("f1"), **means}


class Mme(Benchmark):
    """MME."""

    name = "mme"
    title = "Yes and no about pictures, fourteen kinds"
    metric = "perception"
    columns = ("question_id", "question", "answer", "category")

    def fields(self, row: Mapping[str, Any], number: int) -> dict[str, Any]:
        """A row is one of the two questions about a picture, which share their `question_id`."""
        return {
            "id": f"{row['question_id']} {number}",
            "question": row["question"],
            "answers": (row["answer"].strip().rstrip(".").lower(),),
            "group": row["category"],
            "unit": f"{row['category']} {row['question_id']}",
        }

    def marks(self, sample: Sample, answer: str) -> dict[str, float]:
        """Whether the answer begins with what is right."""
        return {"accuracy": float(yes_no(answer, rule="mme") == sample.answers[0])}

    def units(self, rows: Sequence[Row]) -> list[dict[str, float]]:
        """Pictures."""
        return pair_units(rows)

    def scores(self, sums: Sums) -> dict[str, np.ndarray]:
        """Points of each kind, of perception (at most 2000) and of cognition (at most 800)."""
        return pair_scores(sums)


__all__ = ["Mme", "Pope"]
