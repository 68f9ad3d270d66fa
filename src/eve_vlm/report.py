"""The quickstart's report: one HTML file with its pictures inside, for looking rather than reading.

Easy to get wrong: the file must open anywhere, so nothing in it points outside.
"""

import base64
import io
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

import jinja2
from PIL import Image

if TYPE_CHECKING:
    from eve_vlm.quickstart import Quickstart
    from eve_vlm.train.run import RunResult

TERMS = {"loss_lm": "language", "loss_alignment": "alignment"}


def write_report(path: Path, run: "Quickstart") -> None:
    """Renders the report to `path`."""
    source = (resources.files("eve_vlm") / "report.html.jinja").read_text(encoding="utf-8")
    template = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined).from_string(
        source
    )
    examples = [
        {
            "picture": _data_uri(example.picture),
            "question": example.question,
            "answer": example.answer,
            "truth": example.truth,
            "right": example.right,
        }
        for example in run.examples
    ]
    html = template.render(
        run=run, examples=examples, curves=_loss_curves(run.stages), output=path.parent.as_posix()
    )
    path.write_text(html, encoding="utf-8")


def _loss_curves(stages: "dict[str, RunResult]") -> str:
    """A row of small plots, one per stage, each loss term a line; as a data URI."""
    try:
        from matplotlib.figure import Figure  # no pyplot: no window system is touched
    except ImportError:
        raise ValueError("The report needs matplotlib; run: pip install 'eve-vlm[demo]'.") from None
    figure = Figure(figsize=(3.2 * len(stages), 2.6), layout="constrained")
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
    return _png_uri(buffer.getvalue())


def _data_uri(picture: Image.Image) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG")
    return _png_uri(buffer.getvalue())


def _png_uri(data: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(data).decode("ascii")


__all__ = ["write_report"]
