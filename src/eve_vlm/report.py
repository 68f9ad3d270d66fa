"""The quickstart's report: one HTML file with its pictures inside, for looking rather than reading.

Easy to get wrong: the file must open anywhere, so nothing in it points outside.
"""

import io
from pathlib import Path
from typing import TYPE_CHECKING

from eve_vlm.html_report import figure_of, picture_uri, png_uri, render

if TYPE_CHECKING:
    from eve_vlm.quickstart import Quickstart
    from eve_vlm.train.run import RunResult

TERMS = {"loss_lm": "language", "loss_alignment": "alignment"}


def write_report(path: Path, run: "Quickstart") -> None:
    """Renders the report to `path`."""
    examples = [
        {
            "picture": picture_uri(example.picture),
            "question": example.question,
            "answer": example.answer,
            "truth": example.truth,
            "right": example.right,
        }
        for example in run.examples
    ]
    html = render(
        "report.html.jinja",
        run=run,
        examples=examples,
        curves=_loss_curves(run.stages),
        output=path.parent.as_posix(),
    )
    path.write_text(html, encoding="utf-8")


def _loss_curves(stages: "dict[str, RunResult]") -> str:
    """A row of small plots, one per stage, each loss term a line; as a data URI."""
    figure = figure_of((3.2 * len(stages), 2.6), extra="demo")
    for place, (stage, result) in enumerate(stages.items(), start=1):
        axes = figure.add_subplot(1, len(stages), place)
        for key, label in TERMS.items():
            points = [(entry["step"], entry[key]) for entry in result.losses if key in entry]
            if points:
                axes.plot(*zip(*points, strict=True), label=label)
        axes.set_title(stage)
        axes.set_xlabel("step")
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return png_uri(buffer.getvalue())


__all__ = ["write_report"]
