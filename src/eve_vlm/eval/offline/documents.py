"""The task `documents`: questions on small rendered documents, in the manner of DocVQA.

Receipts, letters, tables, forms and notices of `data/rendered/documents.py`, with names, goods,
towns and titles that its training pages do not have.  Easy to get wrong: several questions share
a page, so pages, not questions, are the independent units of an interval.
"""

import hashlib
from collections.abc import Sequence
from functools import partial

from PIL import Image

from eve_vlm.data.rendered.documents import document
from eve_vlm.data.rendered.page import Page, Question, draw_page
from eve_vlm.data.splits import Dice
from eve_vlm.eval.metrics import anls, exact_match
from eve_vlm.eval.offline.fixed import FixedTask
from eve_vlm.eval.task import Sample

ASKING_KEY = 61  # tells these dice from those of the pages


class Documents(FixedTask):
    """Small documents."""

    name = "documents"
    version = 1
    title = "find what a document says"
    metric = "anls"
    max_new_tokens = 24

    def draw(self) -> Sequence[Sample]:
        """So many pages of the seed as the split says, with so many questions each."""
        seed, number = int(self.split["seed"]), int(self.split["questions"])
        samples = []
        for index in range(int(self.split["pages"])):
            page = document(index, split="held_out", seed=seed)
            layout = hashlib.sha256(repr(page[:-1]).encode()).hexdigest()[:16]
            for question in asked(page.questions, number, dice=Dice(seed, ASKING_KEY, index)):
                samples.append(
                    Sample(
                        id=f"{index}-{question.text}",
                        question=question.text,
                        images=partial(_pictures, page),
                        answers=question.answers,
                        group=page.kind,
                        unit=f"page {index}",
                        facts={"kind": question.kind, "layout": layout},
                    )
                )
        return samples

    def mark(self, sample: Sample, answer: str) -> dict[str, float]:
        """How much of it is right, letter by letter, and whether all is."""
        return {
            "anls": anls(answer, sample.answers),
            "exact_match": exact_match(answer, sample.answers),
        }


TASK = Documents


def asked(questions: Sequence[Question], number: int, *, dice: Dice) -> list[Question]:
    """So many questions of different kinds, or of fewer kinds if there are not so many."""
    chosen: dict[str, Question] = {}
    shuffled = dice.shuffled(questions)
    for question in shuffled:
        chosen.setdefault(question.kind, question)
    first = list(chosen.values())
    rest = [question for question in shuffled if question not in first]
    return (first + rest)[:number]


def _pictures(page: Page) -> list[Image.Image]:
    return [draw_page(page)]


__all__ = ["TASK", "Documents", "asked"]
