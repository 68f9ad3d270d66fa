"""A check as one page that opens anywhere: problems with examples, histograms, records in colours.

Easy to get wrong: pictures of bad records may be the very thing that is wrong, so a thumbnail that
cannot be made must not end the page.
"""

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from eve_vlm.data.check.data_sets import DataSet
from eve_vlm.data.check.histograms import Histogram
from eve_vlm.data.check.plan import Plan
from eve_vlm.data.check.run import CheckResult
from eve_vlm.data.check.summary import (
    counted,
    histograms,
    learnt_share,
    mixture_table,
    not_checked,
    plan_lines,
    quantiles,
    shrunk,
    verdicts,
)
from eve_vlm.data.check.tally import FINE
from eve_vlm.data.check.view import view_of
from eve_vlm.data.encode import Encoder
from eve_vlm.data.picture_ref import open_image
from eve_vlm.data.records import Record
from eve_vlm.html_report import picture_uri, render
from eve_vlm.output_folder import written_whole

SHOWN = 6  # records without problems on the page
MOST_PICTURES = 8  # thumbnails of a record
MOST_LETTERS = 4000  # of a piece of text
THUMBNAIL = 160  # pixels, the longer side


def write_page(
    file: Path, result: CheckResult, data_sets: list[DataSet], plan: Plan | None
) -> None:
    """Writes the page of a check."""
    whole, learnt, share = learnt_share(result)
    html = render(
        "data/check/report.html.jinja",
        ok=result.ok,
        verdicts=verdicts(result),
        not_checked=not_checked(result),
        problems=counted(result),
        shrunk=shrunk(result),
        unit="letters" if result.encoder is None else "tokens",
        quantiles=quantiles(result),
        learnt=f"{learnt:,} of {whole:,} ({share:.1%})",
        histograms=[_bars(one) for one in histograms(result)],
        mixture=None if plan is None else mixture_table(plan),
        plan=[] if plan is None else plan_lines(plan),
        bad_records=_bad_records(result, data_sets),
        records=_some_records(result, data_sets),
    )
    with written_whole(file) as part:
        part.write_text(html, encoding="utf-8")


def _bars(histogram: Histogram) -> dict[str, Any]:
    """Bars as numbers that the page draws: 18 pixels a bin, the longest bar 320."""
    bars = [
        {
            "label": label,
            "count": count,
            "width": round(320 * count / histogram.most, 1),
            "y": 18 * number,
            "beyond": 0 <= histogram.beyond <= number,
        }
        for number, (label, count) in enumerate(
            zip(histogram.labels, histogram.counts, strict=True)
        )
    ]
    return {"title": histogram.title, "bars": bars, "height": 18 * len(bars)}


def _bad_records(result: CheckResult, data_sets: list[DataSet]) -> list[dict[str, Any]]:
    """One record of each kind of problem, where it can be read."""
    shown = []
    for one in counted(result):
        number, name, problem = one.examples[0]
        for record in data_sets[number].fetch([problem.number]).values():
            said = {"title": one.kind.title, "message": problem.message}
            shown.append(_shown(record, name, problem.number, result.encoder) | said)
    return shown


def _some_records(result: CheckResult, data_sets: list[DataSet]) -> list[dict[str, Any]]:
    """A few records without problems, spread over each data set."""
    each = max(SHOWN // len(data_sets), 1)
    shown = []
    for data_set, check in zip(data_sets, result.data_sets, strict=True):
        fine = np.flatnonzero(check.columns.states == FINE)
        if data_set.records is None:
            fine = fine[:each]  # a stream is read from its beginning
        chosen = fine[np.linspace(0, len(fine) - 1, min(each, len(fine))).astype(int)].tolist()
        for index, record in data_set.fetch(chosen).items():
            shown.append(_shown(record, check.name, index, result.encoder))
    return shown


def _shown(record: Record, source: str, index: int, encoder: Encoder | None) -> dict[str, Any]:
    segments = view_of(record, encoder)
    return {
        "id": record.id,
        "source": source,
        "index": index,
        "segments": [one._replace(text=_cut(one.text)) for one in segments],
        "tokens": sum(one.tokens for one in segments),
        "learnt": sum(one.tokens for one in segments if one.learnt),
        "pictures": [_thumbnail(image) for image in record.images[:MOST_PICTURES]],
        "more_pictures": max(len(record.images) - MOST_PICTURES, 0),
    }


def _cut(text: str) -> str:
    left = len(text) - MOST_LETTERS
    return text if left <= 0 else f"{text[:MOST_LETTERS]} ... ({left:,} letters more)"


def _thumbnail(image: Any) -> str | None:
    """A small copy for the page; None where the picture cannot be read."""
    try:
        picture = open_image(image)
    except ValueError:
        return None
    small = picture.convert("RGB")
    small.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.BILINEAR)
    return picture_uri(small)


__all__ = ["write_page"]
