"""The report of `eve reproduce`: findings in words, figures beside the published ones, all scores.

Made of the results alone, so every figure can be drawn again without training.  Easy to get wrong:
results in one folder may come from several scales or commits; the report says which, and compares
nothing across scales.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

from eve_vlm.html_report import can_draw, figure_of, render, svg_of
from eve_vlm.output_folder import written_whole

from .claims import Claim, Finding
from .variants import VARIANTS
from .verdicts import Difference, Result, Verdict, compare, joined, measure

PAGE, TABLE = "report.html", "claims.md"
COLOURS = ("#2e6fd0", "#c0392b", "#1e8449", "#e08e2b")
UNITS = {"score": " points", "early_loss": "", "collapsed": ""}
Results = Mapping[tuple[str, int], Result]


class Judged(NamedTuple):
    """A finding and what became of it here."""

    finding: Finding
    difference: Difference

    @property
    def sentence(self) -> str:
        """The finding in one sentence, with its interval."""
        unit = UNITS[self.finding.metric]
        text = self.finding.text[0].upper() + self.finding.text[1:]
        published = self.finding.published
        beside = "" if published is None else f"; published {published:+.4g}{unit}"
        if self.difference.middle is None:
            return f"{text}: not known yet, no seed has all results{beside}."
        found = f"{self.difference.middle:+.2f}{unit}"
        if self.difference.low is None or self.difference.high is None:
            return f"{text}: not known yet ({found} with one seed{beside})."
        return (
            f"{text}: {self.difference.verdict} ({found}, 95 % interval "
            f"{self.difference.low:+.2f} to {self.difference.high:+.2f}, "
            f"{len(self.difference.values)} seeds{beside})."
        )


def read_results(folder: Path) -> dict[tuple[str, int], Result]:
    """Everything that is kept in a folder, by variant and seed.

    Raises:
        ValueError: if there is nothing, or results of several scales.
    """
    found = [
        json.loads(file.read_text(encoding="utf-8")) for file in sorted(folder.glob("*-s*.json"))
    ]
    if not found:
        raise ValueError(
            f"{folder} holds no results yet; run `eve reproduce CLAIM` without --report-only, or "
            "name the folder by --results."
        )
    scales = sorted({result["scale"] for result in found})
    if len(scales) > 1:
        raise ValueError(
            f"{folder} holds results of the scales {', '.join(map(str, scales))}, which cannot be "
            "compared; keep each scale in a folder of its own."
        )
    return {(result["variant"], result["seed"]): result for result in found}


def judge(claim: Claim, results: Results) -> list[Judged]:
    """Every finding of a claim beside its difference here."""
    return [
        Judged(finding, compare(results, finding.terms, finding.metric))
        for finding in claim.findings
    ]


def verdict_of(judged: Sequence[Judged]) -> Verdict:
    """The verdict of a claim, from its main findings."""
    return joined([one.difference.verdict for one in judged if one.finding.main])


def write_report(claims: Sequence[Claim], folder: Path) -> tuple[str, list[Path]]:
    """Writes the table and, where matplotlib is there, the page; returns the table too.

    With one claim the files carry its name, so that the reports of others stay.
    """
    results = read_results(folder)
    prefix = f"{claims[0].name}-" if len(claims) == 1 else ""
    text = markdown(claims, results)
    files = {f"{prefix}{TABLE}": text}
    if can_draw():
        files[f"{prefix}{PAGE}"] = page(claims, results)
    for name, content in files.items():
        with written_whole(folder / name) as part:
            part.write_text(content, encoding="utf-8")
    return text, [folder / name for name in files]


def markdown(claims: Sequence[Claim], results: Results) -> str:
    """The table of claims, with a sentence for each finding below."""
    lines = [
        f"{facts(results)}",
        "",
        "| claim | in the paper | here | finding | difference | 95 % interval | published |",
        "|---|---|---|---|---|---|---|",
    ]
    for claim in claims:
        judged = judge(claim, results)
        for place, one in enumerate(judged):
            head = (claim.title, claim.where, f"**{verdict_of(judged)}**")
            cells = [*(head if place == 0 else ("", "", "")), *row_of(one)]
            lines.append(f"| {' | '.join(cells)} |")
    for claim in claims:
        judged = judge(claim, results)
        lines += ["", f"**{claim.title}** {verdict_of(judged).capitalize()}. {claim.note}", ""]
        lines += [f"- {one.sentence}" for one in judged]
    return "\n".join(lines) + "\n"


def row_of(one: Judged) -> list[str]:
    """Finding, difference, interval and published difference as texts."""
    found, published = one.difference, one.finding.published
    interval = "-" if found.low is None else f"{found.low:+.2f} to {found.high:+.2f}"
    return [
        f"{one.finding.text}: {found.verdict}",
        "-" if found.middle is None else f"{found.middle:+.2f}{UNITS[one.finding.metric]}",
        interval,
        "-" if published is None else f"{published:+.4g}",
    ]


def facts(results: Results) -> str:
    """What the results were made with, in a sentence or two."""
    some = list(results.values())
    seconds = sum(sum(result["seconds"].values()) for result in some)
    commits = sorted({str(result["commit"])[:10] for result in some})
    devices = sorted({result["device"] for result in some})
    seeds = sorted({result["seed"] for result in some})
    asked = max(result["questions"] for result in some)
    return (
        f"{len(some)} runs, seeds {', '.join(map(str, seeds))}, {some[0]['scale']:g} of the steps "
        f"of the tiny recipes, {asked} held-out questions of each of six families; on "
        f"{', '.join(devices)}, commit {', '.join(commits)}; {seconds / 3600:.1f} hours of one "
        "process, shared stages counted in each run. Scores are the mean exact answers of the "
        "families, in per cent. Differences are paired by seed; intervals are Student's t over "
        "seeds. A claim is confirmed if the intervals of all its main findings are above zero, "
        "contrary if one is below."
    )


def page(claims: Sequence[Claim], results: Results) -> str:
    """The page with all figures."""
    shown = []
    for claim in claims:
        judged = judge(claim, results)
        shown.append(
            {
                "title": claim.title,
                "where": claim.where,
                "note": claim.note,
                "verdict": verdict_of(judged),
                "findings": [
                    (one.finding.main, one.difference.verdict, one.sentence) for one in judged
                ],
                "curves": curves_figure(claim, results) if claim.curves else None,
                "scores": scores_figure(claim, results),
                "table": scores_table(claim, results),
            }
        )
    return render("reproduce/report.html.jinja", facts=facts(results), claims=shown)


def scores_table(claim: Claim, results: Results) -> list[list[str]]:
    """Scores of every variant by family, means over seeds; the heading first."""
    families = list(dict.fromkeys(name for one in results.values() for name in one["scores"] or ()))
    lines = [["variant", "seeds", "mean", *families]]
    for name in claim.variants:
        some = [one for (variant, _), one in results.items() if variant == name and one["scores"]]
        if some:
            cells = [mean(measure(one, "score") for one in some)]
            cells += [100 * mean(one["scores"][family] for one in some) for family in families]
            lines.append([VARIANTS[name].title, str(len(some)), *(f"{cell:.1f}" for cell in cells)])
    return lines


# --- figures --------------------------------------------------------------------------------------


def scores_figure(claim: Claim, results: Results) -> str:
    """Our scores with intervals, and the published ones beside them, as SVG."""
    names = ["here", *claim.published]
    figure = figure_of((3.6 * len(names), 3.2), extra="demo")
    axes = figure.subplots(1, len(names), squeeze=False)[0]
    _ours(axes[0], claim, results)
    for one, benchmark in zip(axes[1:], claim.published, strict=True):
        published = claim.published[benchmark]
        _dress(one, f"published, {benchmark}", [x for line in published.values() for x, _ in line])
        for colour, (label, line) in zip(COLOURS, published.items(), strict=False):
            places, values = zip(*line, strict=True)
            one.plot(places, values, marker="o", color=colour, label=label)
        if len(published) > 1:
            one.legend(frameon=False, fontsize="small")
    return svg_of(figure, f"{claim.name}-scores")


def _ours(axes: Any, claim: Claim, results: Results) -> None:
    """Means with the t intervals of single variants, and every seed as a dot."""
    _dress(
        axes, "here, mean of six families", [x for line in claim.lines.values() for x, _ in line]
    )
    for colour, (label, line) in zip(COLOURS, claim.lines.items(), strict=False):
        for place, name in line:
            values = [
                measure(one, "score") for (variant, _), one in results.items() if variant == name
            ]
            axes.plot([place] * len(values), values, ".", color=colour, alpha=0.5)
        bars = [
            (place, found.middle, 0.0 if found.high is None else found.high - found.middle)
            for place, name in line
            if (found := compare(results, ((1, name),), "score")).middle is not None
        ]
        if bars:
            places, middles, reach = zip(*bars, strict=True)
            axes.errorbar(
                places, middles, yerr=reach, color=colour, marker="o", capsize=3, label=label
            )
    if len(claim.lines) > 1:
        axes.legend(frameon=False, fontsize="small")


def _dress(axes: Any, title: str, places: Sequence[str]) -> None:
    """Title and categories, these in the order of the longest line."""
    axes.set_title(title, fontsize="medium")
    axes.grid(alpha=0.3)
    order = sorted(dict.fromkeys(places), key=_amount) if _are_amounts(places) else places
    for place in dict.fromkeys(order):
        axes.plot([place], [float("nan")])


def _are_amounts(places: Sequence[str]) -> bool:
    return all(place.rstrip("M").replace("/", "").replace(".", "").isdigit() for place in places)


def _amount(place: str) -> float:
    above, _, below = place.rstrip("M").partition("/")
    return float(above) / float(below or 1)


def curves_figure(claim: Claim, results: Results) -> str:
    """Losses of stage 2, every seed a line, beside the published ones, as SVG."""
    figure = figure_of((10.8, 3.4), extra="demo")
    ours, theirs = figure.subplots(1, 2)
    for axes, title, unit in (
        (ours, "here, language loss of stage 2", "step"),
        (theirs, "published, loss of stage 2", "thousand steps"),
    ):
        axes.set_title(title, fontsize="medium")
        axes.set_xlabel(unit)
        axes.grid(alpha=0.3)
        axes.set_yscale("log")
    for colour, (label, name) in zip(COLOURS, claim.curves.items(), strict=False):
        shown: str | None = label
        for (variant, _), one in results.items():
            if variant == name:
                curve = one["curves"]["pretrain"]
                ours.plot(curve["steps"], curve["loss"], color=colour, linewidth=1, label=shown)
                shown = None
    for colour, (label, points) in zip(COLOURS, claim.published_curves.items(), strict=False):
        theirs.plot(*zip(*points, strict=True), color=colour, linewidth=1.4, label=label)
    for axes in (ours, theirs):
        axes.legend(frameon=False, fontsize="small")
    return svg_of(figure, f"{claim.name}-curves")


__all__ = [
    "PAGE",
    "TABLE",
    "Judged",
    "judge",
    "markdown",
    "page",
    "read_results",
    "verdict_of",
    "write_report",
]
