"""What reports are made of: one HTML file with its pictures and curves inside, that opens anywhere.

Easy to get wrong: nothing in the file may point outside, and names inside two drawings on one page
must differ, or a browser takes the clip path of one for the other; hence a salt for each drawing.
"""

import base64
import io
import math
from collections.abc import Mapping, Sequence
from importlib import resources
from importlib.util import find_spec
from typing import Any

import jinja2
from PIL import Image

Points = Sequence[tuple[float, float]]

NO_MATPLOTLIB = "The report needs matplotlib; run: pip install 'eve-vlm[{extra}]'."
FEW_LINES = 4
MOST_POINTS = 2000  # of a line; a curve on a page has fewer pixels


def render(template: str, **values: Any) -> str:
    """A template of the package with values put in; texts are escaped, and none may be missing."""
    environment = jinja2.Environment(
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        loader=jinja2.FunctionLoader(_source),
        trim_blocks=True,
    )
    return environment.get_template(template).render(**values)


def _source(name: str) -> str:
    return (resources.files("eve_vlm") / name).read_text(encoding="utf-8")


def picture_uri(picture: Image.Image) -> str:
    """A picture as text that an `img` shows."""
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG")
    return png_uri(buffer.getvalue())


def png_uri(data: bytes) -> str:
    """A PNG file as text that an `img` shows."""
    return "data:image/png;base64," + base64.b64encode(data).decode("ascii")


def can_draw() -> bool:
    """Whether matplotlib is there."""
    return find_spec("matplotlib") is not None


def figure_of(size: tuple[float, float], *, extra: str) -> Any:
    """An empty matplotlib figure; no window system is touched.

    Raises:
        ValueError: with the extra to install, if matplotlib is not there.
    """
    try:
        from matplotlib.figure import Figure  # no pyplot
    except ImportError:
        raise ValueError(NO_MATPLOTLIB.format(extra=extra)) from None
    return Figure(figsize=size, layout="constrained")


def line_plot(
    name: str,
    lines: Mapping[str, Points],
    *,
    unit: str = "",
    log: bool = False,
    share: bool = False,
) -> str:
    """Curves over steps as SVG for a page, its texts escaped; every line is a group `NAME-LABEL`.

    What is no number is left out of a line, as a gap.

    Args:
        name: of the drawing, once on a page.
        unit: of the values.
        log: values over decades.
        share: values from 0 to 1, in per cent.
    """
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    figure = figure_of((5.4, 3.0), extra="train")
    axes = figure.add_subplot()
    for label, points in lines.items():
        step = max(math.ceil(len(points) / MOST_POINTS), 1)
        kept = [*points[::step], points[-1]]  # the last one is what people look for
        x, y = zip(*kept, strict=True)
        mark = "o" if len(points) == 1 else None
        text = label.replace("$", r"\$")  # or a name becomes a formula
        axes.plot(x, y, label=text, gid=f"{name}-{label}", linewidth=1.4, marker=mark)
    axes.set_xlabel("step")
    axes.set_ylabel(unit)
    axes.grid(alpha=0.3)
    positive = all(value > 0 for points in lines.values() for _, value in points)
    if log and positive:
        axes.set_yscale("log")
    elif not log:
        axes.set_ylim(bottom=0)
    if share:
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if len(lines) > FEW_LINES:  # beside the curves, which have no room
        figure.legend(frameon=False, fontsize="small", loc="outside right upper")
    elif len(lines) > 1:
        axes.legend(frameon=False, fontsize="small")
    return svg_of(figure, name)


def svg_of(figure: Any, name: str) -> str:
    """A figure as SVG for a page; `name` is once on it.

    Letters stay letters, and names inside are made from `name` alone.
    """
    from matplotlib import rc_context

    buffer = io.StringIO()
    with rc_context({"svg.hashsalt": name, "svg.fonttype": "none"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None}, transparent=True)
    text = buffer.getvalue()
    return text[text.index("<svg") :]


__all__ = [
    "NO_MATPLOTLIB",
    "Points",
    "can_draw",
    "figure_of",
    "line_plot",
    "picture_uri",
    "png_uri",
    "render",
    "svg_of",
]
