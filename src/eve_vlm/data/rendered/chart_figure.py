"""Charts drawn by matplotlib, as RGB pictures.

matplotlib's own settings hold while a chart is drawn, not those of the user's `matplotlibrc`.  Easy
to get wrong: those settings belong to the process, hence a lock for threads that draw at once; and
nothing here may import pyplot, which would choose a window system.
"""

from importlib.util import find_spec
from threading import Lock
from typing import Any

import numpy as np
from PIL import Image

from eve_vlm.data.rendered.charts import TICKS, Chart, number

NEEDS_MATPLOTLIB = "Charts need matplotlib; run: pip install 'eve-vlm[demo]'."
DPI = 100
GRID = "#dddddd"
_LOCK = Lock()


def can_draw_charts() -> bool:
    """Whether matplotlib is there."""
    return find_spec("matplotlib") is not None


def draw_chart(chart: Chart) -> Image.Image:
    """A chart as an RGB picture.

    Raises:
        ValueError: with the extra to install, if matplotlib is not there.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.style import context
    except ImportError:
        raise ValueError(NEEDS_MATPLOTLIB) from None
    with _LOCK, context("default"):
        canvas = FigureCanvasAgg(chart_figure(chart))
        canvas.draw()
        pixels = np.asarray(canvas.buffer_rgba())
    return Image.fromarray(pixels[..., :3].copy())


def chart_figure(chart: Chart) -> Any:
    """The matplotlib figure of a chart."""
    from matplotlib.figure import Figure

    height, width = chart.canvas
    figure = Figure(figsize=(width / DPI, height / DPI), dpi=DPI, layout="constrained")
    axes = figure.add_subplot()
    axes.set_title(chart.theme.title, fontsize=12)
    if chart.kind == "pie":
        _pie(chart, axes)
        return figure
    _DRAWERS[chart.kind](chart, axes)
    values, names = (axes.xaxis, axes.yaxis) if chart.sideways else (axes.yaxis, axes.xaxis)
    ticks = [place * chart.tick for place in range(TICKS + 1)]
    values.set_ticks(ticks, [number(tick) for tick in ticks], fontsize=8)
    values.set_label_text(chart.theme.measure)
    values.grid(True, color=GRID, linewidth=0.8)
    names.set_ticks(range(len(chart.categories)), chart.categories, fontsize=9)
    limit = axes.set_xlim if chart.sideways else axes.set_ylim
    limit(0, TICKS * chart.tick)
    axes.set_axisbelow(True)
    if chart.series:
        figure.legend(loc="outside lower center", ncols=len(chart.series), fontsize=9)
    return figure


def _tones(chart: Chart) -> list[tuple[float, ...]]:
    return [tuple(part / 255 for part in tone) for tone in chart.tones]


def _bar(chart: Chart, axes: Any) -> None:
    places, (values,) = range(len(chart.categories)), chart.values
    draw = axes.barh if chart.sideways else axes.bar
    bars = draw(places, values, 0.6, color=_tones(chart))
    if chart.sideways:
        axes.invert_yaxis()  # the first one on top
    if chart.labelled:
        axes.bar_label(bars, [number(value) for value in values], fontsize=8, padding=2)


def _grouped(chart: Chart, axes: Any) -> None:
    width = 0.8 / len(chart.series)
    for place, (name, values, tone) in enumerate(
        zip(chart.series, chart.values, _tones(chart), strict=True)
    ):
        shift = (place - (len(chart.series) - 1) / 2) * width
        places = [category + shift for category in range(len(chart.categories))]
        axes.bar(places, values, width, color=[tone], label=name)


def _line(chart: Chart, axes: Any) -> None:
    places, names = range(len(chart.categories)), chart.series or ("",)
    axes.margins(x=0.1)  # or the first label lies on the axis
    for name, values, tone in zip(names, chart.values, _tones(chart), strict=True):
        axes.plot(places, values, color=tone, marker="o", label=name, clip_on=False)
        if chart.labelled:
            for x, y in zip(places, values, strict=True):
                axes.annotate(
                    number(y),
                    (x, y),
                    xytext=(0, 6),
                    textcoords="offset points",
                    ha="center",
                    fontsize=8,
                    # Lines pass through; the paper behind keeps the digits clear.
                    bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5, "alpha": 0.8},
                )


def _pie(chart: Chart, axes: Any) -> None:
    (values,) = chart.values
    labels = [
        f"{name}\n{number(value)}%" for name, value in zip(chart.categories, values, strict=True)
    ]
    edge = {"edgecolor": "white", "linewidth": 1}
    text = {"fontsize": 9}
    axes.pie(values, labels=labels, colors=_tones(chart), wedgeprops=edge, textprops=text)


_DRAWERS = {"bar": _bar, "grouped": _grouped, "line": _line}

__all__ = ["NEEDS_MATPLOTLIB", "can_draw_charts", "chart_figure", "draw_chart"]
