"""A curation as one page that opens anywhere: the funnel with examples, histograms, rates, costs.

The same figures stand in `report.json` beside it.  Easy to get wrong: pictures that were dropped
because they cannot be opened cannot be shown either, and files may be gone by now, so a missing
example must not end the page.
"""

import json
from pathlib import Path
from typing import Any

from PIL import Image

from eve_vlm.curate.cost import bill_of
from eve_vlm.curate.places import open_bytes, read_bytes
from eve_vlm.curate.recipe import CurateRecipe
from eve_vlm.curate.summary import StageSummary, dropped_examples, kept_examples, summarize
from eve_vlm.html_report import picture_uri, render
from eve_vlm.output_folder import written_whole

PAGE, FIGURES = "report.html", "report.json"
THUMBNAIL = 96  # pixels, the longer side
KEPT = 12  # records shown as they will be written
BAR = 300  # pixels of the longest bar of a histogram
WIDEST = 620  # pixels of the widest bar of the funnel


def write_curation_report(recipe: CurateRecipe) -> Path:
    """Writes page and figures of a run, finished or not, and gives the page's place."""
    folder = Path(recipe.output_dir).absolute()
    stages = summarize(recipe, folder)
    bill = bill_of(recipe, stages)
    figures = {
        "name": recipe.name,
        "stages": [one.as_json() for one in stages],
        "cost": bill,
    }
    html = render(
        "curate/report.html.jinja",
        name=recipe.name,
        funnel=_funnel(recipe, folder, stages),
        histograms=[
            _bars(f"{name} ({one.name})", counter)
            for one in stages
            for name, counter in one.counts.items()
            if counter
        ],
        rates=stages,
        bill=bill,
        kept=[
            {
                "row": row,
                "picture": _thumbnail(recipe, row),
                # Before the stages of captions there is only what the source has.
                "words": row.get("caption") or row["text"] or "",
            }
            for row in kept_examples(recipe, folder, KEPT)
        ],
    )
    for name, text in ((PAGE, html), (FIGURES, json.dumps(figures, indent=1) + "\n")):
        with written_whole(folder / name) as part:
            part.write_text(text, encoding="utf-8")
    return folder / PAGE


def _funnel(recipe: CurateRecipe, folder: Path, stages: list[StageSummary]) -> list[dict[str, Any]]:
    """A bar for what each stage kept and, below it, what each of its rules took."""
    most = max((one.rows_in for one in stages), default=0) or 1
    funnel = []
    for one in stages:
        examples = dropped_examples(recipe, folder, one) if one.dropped else {}
        funnel.append(
            {
                "name": one.name,
                "what": one.what,
                "rows_in": one.rows_in,
                "rows_out": one.rows_out,
                "width": round(WIDEST * one.rows_out / most, 1),
                "lost": round(WIDEST * (one.rows_in - one.rows_out) / most, 1),
                "dropped": [
                    {
                        "reason": reason,
                        "count": count,
                        "share": count / max(one.rows_in, 1),
                        "examples": [
                            {"row": row, "picture": _thumbnail(recipe, row)}
                            for row in examples[reason]
                        ],
                    }
                    for reason, count in one.dropped.most_common()
                ],
            }
        )
    return funnel


def _bars(title: str, counter: Any) -> dict[str, Any]:
    """Bars as numbers that the page draws, 18 pixels each, in the order of their first numbers."""
    most = max(counter.values(), default=1)
    names = sorted(counter, key=lambda name: int(name.split()[0].replace(",", "")))
    bars = [
        {
            "label": name,
            "count": counter[name],
            "width": round(BAR * counter[name] / most, 1),
            "y": 18 * at,
        }
        for at, name in enumerate(names)
    ]
    return {"title": title, "bars": bars, "height": 18 * len(bars)}


def _thumbnail(recipe: CurateRecipe, row: dict[str, Any]) -> str | None:
    """A small copy for the page; None where the picture cannot be read any more."""
    try:
        picture = open_bytes(read_bytes(row), row, recipe.decode).picture
    except ValueError:
        return None
    picture.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.BILINEAR)
    return picture_uri(picture)


__all__ = ["FIGURES", "PAGE", "write_curation_report"]
