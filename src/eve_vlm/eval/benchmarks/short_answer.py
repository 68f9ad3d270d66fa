"""Benchmarks that ask for a word or phrase: VQAv2, GQA, VizWiz, TextVQA, OCRBench, ChartQA.

Each has the rule of its own evaluation programme, from `eval/metrics.py`.  Easy to get wrong:
VQAv2's test-dev and VizWiz's test have no answers; for them there is only a file for the server,
with answers in the form that the server's programme compares (small letters, no articles).
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
from PIL import Image

from eve_vlm.eval.metrics import (
    VqaRule,
    exact_match,
    normalise_vqa,
    relaxed_accuracy,
    vqa_accuracy,
)
from eve_vlm.eval.task import COUNT, Row, Sample, Sums, ratio

from .base import Benchmark, hidden, usual_first
from .hub_data import Table


class VqaBenchmark(Benchmark):
    """Answers of ten people, and a file for the server where they are not known."""

    rule: ClassVar[VqaRule] = "textvqa"

    def marks(self, sample: Sample, answer: str) -> dict[str, float]:
        """VQA accuracy."""
        return {"accuracy": vqa_accuracy(answer, sample.answers, rule=self.rule)}

    def upload(self, rows: Sequence[Row]) -> dict[str, str]:
        """`[{"question_id": ..., "answer": ...}]` where a server keeps the answers."""
        if not hidden(rows):
            return {}
        lines = [
            # As LLaVA and EVE prepare answers: the server compares some of them as they are.
            {**row.facts["upload"], "answer": normalise_vqa(row.answer, rule="textvqa")}
            for row in rows
        ]
        return {f"{self.name}_{self.split}.json": json.dumps(lines, ensure_ascii=False)}


class VqaV2(VqaBenchmark):
    """VQAv2."""

    name = "vqav2"
    title = "Questions about photos, in a word or phrase"
    rule = "vqa"
    columns = ("question_id", "image_id", "question", "answers", "answer_type")
    upload_note = (
        "The server's test-dev phase takes answers to all of test: with --split vqav2=test the "
        "file has them."
    )

    def fields(self, row: Mapping[str, Any], number: int) -> dict[str, Any]:
        """A row is a question; photos have several."""
        return {
            "id": str(row["question_id"]),
            "question": row["question"],
            "answers": usual_first(one["answer"] for one in row["answers"] or ()),
            "group": row["answer_type"] or "",
            "unit": f"image {row['image_id']}",
            "facts": {"upload": {"question_id": row["question_id"]}},
        }


class VizWiz(VqaBenchmark):
    """VizWiz."""

    name = "vizwiz"
    title = "Questions of blind people about their own photos"
    columns = ("question_id", "question", "answers", "category")

    def fields(self, row: Mapping[str, Any], number: int) -> dict[str, Any]:
        """A row is a photo with its question."""
        return {
            "id": row["question_id"],
            "question": row["question"],
            "answers": usual_first(row["answers"] or ()),
            "group": row["category"] or "",
            "facts": {"upload": {"image": f"{row['question_id'].removesuffix('.jpg')}.jpg"}},
        }


class TextVqa(VqaBenchmark):
    """TextVQA."""

    name = "textvqa"
    title = "Questions about words in photos"
    columns = ("question_id", "image_id", "question", "answers", "ocr_tokens")

    def fields(self, row: Mapping[str, Any], number: int) -> dict[str, Any]:
        """A row is a question; OCR tokens are kept only if the preset asks with them."""
        facts: dict[str, Any] = {"upload": {"question_id": row["question_id"]}}
        if "{ocr}" in self.preset.prompt:
            facts["ocr_tokens"] = row["ocr_tokens"]
        return {
            "id": str(row["question_id"]),
            "question": row["question"],
            # The test split has empty words for answers.
            "answers": usual_first(filter(None, row["answers"] or ())),
            "unit": f"image {row['image_id']}",
            "facts": facts,
        }


class Gqa(Benchmark):
    """GQA, whose pictures have a table of their own."""

    name = "gqa"
    title = "Questions made from scene graphs"
    columns = ("id", "imageId", "question", "answer")

    def fields(self, row: Mapping[str, Any], number: int) -> dict[str, Any]:
        """A row is a question and names its picture."""
        return {
            "id": row["id"],
            "question": row["question"],
            "answers": (row["answer"],),
            "unit": f"image {row['imageId']}",
            "facts": {"image": row["imageId"]},
        }

    def marks(self, sample: Sample, answer: str) -> dict[str, float]:
        """The whole answer, in small letters, without the full stop."""
        return {"accuracy": exact_match(answer, sample.answers, rule="gqa")}

    def table(self) -> Table:
        """The questions; the pictures are opened beside them, so that a lack shows at once."""
        config = self.preset.pictures_config.format(split=self.split)
        self._pictures = Table(self.preset.data, split=self.split, config=config, root=self.root)
        self._rows_of = {row["id"]: n for n, row in enumerate(self._pictures.words(("id",)))}
        return super().table()

    def open(self, number: int, fields: Mapping[str, Any]) -> Sequence[Image.Image]:
        """The picture that the question names."""
        image = fields["facts"]["image"]
        if image not in self._rows_of:
            raise ValueError(f"{self._pictures.name} has no picture {image}; fetch it again.")
        return self._pictures.pictures(self._rows_of[image], self.pictures)


class OcrBench(Benchmark):
    """OCRBench."""

    name = "ocrbench"
    title = "Reading: words, documents, forms, formulas"
    metric = "points"
    columns = ("dataset", "question", "question_type", "answer")

    def fields(self, row: Mapping[str, Any], number: int) -> dict[str, Any]:
        """A row has a list of answers, or one."""
        answers = row["answer"] if isinstance(row["answer"], list) else [row["answer"]]
        return {
            "id": str(number),
            "question": row["question"],
            "answers": tuple(answers),
            "group": row["question_type"],
            "facts": {"dataset": row["dataset"]},
        }

    def marks(self, sample: Sample, answer: str) -> dict[str, float]:
        """Whether a right answer occurs in what is said; formulas without their spaces."""
        if sample.facts["dataset"] == "HME100k":
            given, wanted = "".join(answer.split()), ["".join(a.split()) for a in sample.answers]
        else:
            given, wanted = _line(answer), [_line(one) for one in sample.answers]
        return {"accuracy": float(any(one in given for one in wanted))}

    def scores(self, sums: Sums) -> dict[str, np.ndarray]:
        """`points` is the published unit: right answers, if there were 1000 questions."""
        share = ratio(sums["accuracy"], sums[COUNT])
        return {"points": 1000 * share, "accuracy": 100 * share}


class ChartQa(Benchmark):
    """ChartQA."""

    name = "chartqa"
    title = "Questions about charts"
    columns = ("type", "question", "answer")

    def fields(self, row: Mapping[str, Any], number: int) -> dict[str, Any]:
        """A row is a question of a person (`human_test`) or a machine (`augmented_test`)."""
        return {
            "id": str(number),
            "question": row["question"],
            "answers": (row["answer"],),
            "group": row["type"],
        }

    def marks(self, sample: Sample, answer: str) -> dict[str, float]:
        """Relaxed accuracy: numbers may be 5 % off."""
        return {"accuracy": relaxed_accuracy(answer, sample.answers[0])}


def _line(text: str) -> str:
    return text.lower().strip().replace("\n", " ")


__all__ = ["ChartQa", "Gqa", "OcrBench", "TextVqa", "VizWiz", "VqaBenchmark", "VqaV2"]
