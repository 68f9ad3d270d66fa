"""What a run found, for people: a table of text, drawings, and one page with all of it.

Made of the run's plain data alone, so that an old `bench.json` can be drawn again.  Easy to get
wrong: a roof is drawn over operations per byte, so work without matrix products (preprocessing) has
no place below it and is left out there.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from eve_vlm.html_report import figure_of, render, svg_of
from eve_vlm.memory.machine import human_bytes
from eve_vlm.output_folder import written_whole

from .paper_table import PARTS, paper_lines

RESULTS, PAGE, TIMES = "bench.json", "bench.html", "where_time_goes.svg"
COLOURS = {"eve": "#2e6fd0", "llava-1.5": "#c0392b", "llava-1.6": "#e08e2b"}
PART_COLOURS = dict(zip(PARTS, ("#9aa5b4", "#c0392b", "#2e6fd0"), strict=True))
Data = Mapping[str, Any]


def table_of(data: Data) -> list[list[str]]:
    """A line for each figure, the heading first."""
    lines = [["part", "model", "case", "figure", "median", "quartiles", "floor", "bound", "share"]]
    lines[0] += ["tokens/s", "GFLOP/s", "memory"]
    for one in data["figures"]:
        seconds = one["seconds"]
        lines.append(
            [
                *(one[name] for name in ("section", "model", "case", "figure")),
                _time(seconds["median"]),
                f"{_time(seconds['low'])} to {_time(seconds['high'])}",
                _time(one["floor_seconds"]),
                one["bound"],
                f"{one['share_of_floor']:.0%}",
                f"{one['tokens_per_second']:,.1f}",
                f"{one['flops'] / seconds['median'] / 1e9:,.1f}" if one["flops"] else "-",
                "-" if one["memory_bytes"] is None else human_bytes(one["memory_bytes"]),
            ]
        )
    return lines


def growth_table(data: Data) -> list[list[str]]:
    """A line for each kind of growth, the heading first."""
    lines = [["what", "grows with", "sizes", "seconds", "exponent", "of operations"]]
    for one in data["growth"]:
        lines.append(
            [
                one["what"],
                one["by"],
                ", ".join(str(size) for size, _, _ in one["points"]),
                ", ".join(_time(seconds) for _, seconds, _ in one["points"]),
                f"{one['exponent']:.2f}",
                f"{one['flops_exponent']:.2f}",
            ]
        )
    return lines


def roof_line(data: Data) -> str:
    """The machine's rates in one sentence."""
    roof, settings = data["roof"], data["settings"]
    return (
        f"{settings['device']}, {settings['dtype']}, {_threads(settings['threads'])}: at most "
        f"{roof['flops_per_second'] / 1e9:,.1f} GFLOP/s in matrix products and "
        f"{roof['bytes_per_second'] / 1e9:,.1f} GB/s in memory, both measured in this run; load "
        f"{data['load'][0]:.1f} before and {data['load'][-1]:.1f} after."
    )


def _threads(count: int) -> str:
    return f"{count} thread{'' if count == 1 else 's'}"


def write_results(data: Data, folder: Path) -> list[Path]:
    """Writes the JSON file, the page and, with the published table, the drawing of its times."""
    folder.mkdir(parents=True, exist_ok=True)
    files = {RESULTS: json.dumps(data, indent=1) + "\n", PAGE: page_of(data)}
    if data.get("paper"):
        files[TIMES] = '<?xml version="1.0" encoding="utf-8"?>\n' + times_plot(data)
    for name, text in files.items():
        with written_whole(folder / name) as part:
            part.write_text(text, encoding="utf-8")
    return [folder / name for name in files]


def page_of(data: Data) -> str:
    """The page."""
    paper = data.get("paper")
    return render(
        "bench/report.html.jinja",
        subject=data["settings"]["subject"],
        date=data["date"],
        roof=roof_line(data),
        table=table_of(data),
        growth=growth_table(data) if data["growth"] else None,
        growth_plots=[_growth_plot(one, place) for place, one in enumerate(data["growth"])],
        roofline=roofline_plot(data),
        paper=paper_lines(paper, data["settings"]["subject"]) if paper else None,
        times=times_plot(data) if paper else None,
        facts=data["settings"] | {"versions": data["versions"]},
    )


def roofline_plot(data: Data) -> str:
    """Operations per second over operations per byte, below the measured roof."""

    def draw(axes: Any) -> None:
        roof = data["roof"]
        shown = [one for one in data["figures"] if one["flops"] and one["bytes"]]
        places = [one["flops"] / one["bytes"] for one in shown] or [1.0]
        corner = roof["flops_per_second"] / roof["bytes_per_second"]
        reach = [min(*places, corner) / 2, corner, max(*places, corner) * 2]
        heights = [min(one * roof["bytes_per_second"], roof["flops_per_second"]) for one in reach]
        axes.plot(reach, heights, color="#1d2430", linewidth=1.4, label="roof, measured")
        for model, colour in COLOURS.items():
            for section, mark in MARKS.items():
                points = [
                    (one["flops"] / one["bytes"], one["flops"] / one["seconds"]["median"])
                    for one in shown
                    if (one["model"], one["section"]) == (model, section)
                ]
                if points:
                    x, y = zip(*points, strict=True)
                    label = f"{model}: {section}"
                    axes.scatter(x, y, color=colour, marker=mark, s=22, label=label)
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlabel("operations per byte that must be moved")
        axes.set_ylabel("operations per second")
        axes.figure.legend(frameon=False, fontsize="small", loc="outside right upper")

    return _drawn("roofline", (8.0, 4.6), draw)


MARKS = {"embedding": "o", "prefill": "s", "decode": "^", "training": "D"}


def times_plot(data: Data) -> str:
    """Stacked bars: pictures made ready, put into tokens, and the decoder's part of a prefill."""

    def draw(axes: Any) -> None:
        rows = [row for row in data["paper"] if row["measured"]][::-1]
        for place, row in enumerate(rows):
            start = 0.0
            for part in PARTS:
                width = row["measured"][part]
                label = part if place == 0 else None
                colour = PART_COLOURS[part]
                axes.barh(place, width, left=start, color=colour, height=0.6, label=label)
                start += width
            axes.text(start, place, f" {_time(start)}", va="center", fontsize="small")
        axes.set_yticks(range(len(rows)), [row["model"] for row in rows])
        axes.set_xlabel(f"seconds, one square picture, decoder of {data['settings']['subject']}")
        axes.margins(x=0.12)
        axes.figure.legend(
            frameon=False, fontsize="small", ncols=len(PARTS), loc="outside upper center"
        )

    return _drawn("times", (8.0, 2.8), draw)


def _growth_plot(growth: Data, place: int) -> str:
    def draw(axes: Any) -> None:
        sizes, seconds, _ = zip(*growth["points"], strict=True)
        axes.plot(sizes, seconds, marker="o", color=COLOURS["eve"])
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlabel(growth["by"])
        axes.set_ylabel("seconds")
        text = f"{growth['what']}: exponent {growth['exponent']:.2f}"
        axes.set_title(f"{text}, operations {growth['flops_exponent']:.2f}", fontsize="medium")

    return _drawn(f"growth{place}", (4.2, 2.8), draw)


def _drawn(name: str, size: tuple[float, float], draw: Callable[[Any], None]) -> str:
    """A drawing as SVG for a page."""
    figure = figure_of(size, extra="train")

    axes = figure.add_subplot()
    axes.grid(alpha=0.3)
    axes.set_axisbelow(True)
    draw(axes)
    return svg_of(figure, name)


def _time(seconds: float) -> str:
    """Three digits with a unit.

    >>> _time(0.01234), _time(12.345)
    ('12.3 ms', '12.3 s')
    """
    if seconds >= 1:
        return f"{seconds:.3g} s"
    return f"{seconds * 1e3:.3g} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.3g} us"


def in_columns(lines: Sequence[Sequence[str]], *, left: int) -> str:
    """Rows in columns, the first `left` of them on the left."""
    from eve_vlm.memory.machine import table

    return table([list(line) for line in lines], right=lambda column: column >= left)


__all__ = [
    "PAGE",
    "RESULTS",
    "TIMES",
    "growth_table",
    "in_columns",
    "page_of",
    "roof_line",
    "roofline_plot",
    "table_of",
    "times_plot",
    "write_results",
]
