"""The task `charts`: questions on bars, lines and pies drawn by matplotlib, as ChartQA asks.

A value, the largest or smallest, a difference, how many lie above a limit, and colours; a group is
a kind of question.  Easy to get wrong: only values and differences are right within 5 %; a count, a
year or a name must be the one, although ChartQA's own rule also lets 2014 pass for 2015.
"""

import hashlib
from collections.abc import Sequence
from functools import lru_cache, partial

from PIL import Image

from eve_vlm.data.rendered.chart_figure import NEEDS_MATPLOTLIB, can_draw_charts, draw_chart
from eve_vlm.data.rendered.charts import KINDS, QUESTION_KINDS, Chart, chart
from eve_vlm.eval.metrics import exact_match, relaxed_accuracy
from eve_vlm.eval.offline.fixed import FixedTask
from eve_vlm.eval.task import MissingDataError, Sample

NUMERIC = frozenset({"value", "difference"})
TURN = 3  # how far the first question moves from one chart of a kind to the next; no divisor of 5


class Charts(FixedTask):
    """Charts."""

    name = "charts"
    version = 1
    title = "read a chart"
    metric = "relaxed_accuracy"

    def draw(self) -> Sequence[Sample]:
        """So many charts of the seed as the split says; kinds of questions take turns on them."""
        if not can_draw_charts():
            raise MissingDataError(NEEDS_MATPLOTLIB)
        samples = []
        for index in range(int(self.split["charts"])):
            drawn = chart(index, split="held_out", seed=int(self.split["seed"]))
            layout = hashlib.sha256(repr(drawn[:-1]).encode()).hexdigest()[:16]
            for place in range(int(self.split["questions"])):
                turn = index // len(KINDS) * TURN + place
                question = drawn.questions[turn % len(QUESTION_KINDS)]
                samples.append(
                    Sample(
                        id=f"{index}-{question.kind}",
                        question=question.text,
                        images=partial(_pictures, drawn),
                        answers=question.answers,
                        group=question.kind,
                        unit=f"chart {index}",
                        facts={"chart": drawn.kind, "layout": layout},
                    )
                )
        return samples

    def mark(self, sample: Sample, answer: str) -> dict[str, float]:
        """Whether it is right, numbers within 5 %; and whether it is right to the last digit."""
        exact = exact_match(answer, sample.answers)
        relaxed = exact
        if sample.group in NUMERIC:
            relaxed = relaxed_accuracy(answer, sample.answers[0], rule="lenient")
        return {"relaxed_accuracy": max(relaxed, exact), "exact_match": exact}


TASK = Charts


@lru_cache(maxsize=4)  # the questions of a chart follow one another; it takes 0.1 s to draw
def _picture(drawn: Chart) -> Image.Image:
    return draw_chart(drawn)


def _pictures(drawn: Chart) -> list[Image.Image]:
    return [_picture(drawn).copy()]


__all__ = ["TASK", "Charts"]
