"""The stage `filter`: which pictures are kept, by what decoding measured; opens none.

Each rule has one short reason, and a picture is dropped by the first rule that it breaks, so the
numbers of the funnel add up.  Easy to get wrong: the paper keeps pictures *above* 448 x 448, so one
of exactly 448 pixels goes.
"""

import operator
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from eve_vlm.curate.blocks import with_reasons
from eve_vlm.curate.recipe import FilterSection
from eve_vlm.curate.tasks import Task

if TYPE_CHECKING:
    import pyarrow as pa

MEASURES = ("width", "height", "contrast", "detail", "text_share")


def keep_good(rows: "pa.Table", task: Task) -> "pa.Table":
    """The rows, each with why it is dropped or None."""
    reasons = [broken_rule(row, task.recipe.filter) for row in rows.select(MEASURES).to_pylist()]
    return with_reasons(rows, [one[0] for one in reasons], [one[1] for one in reasons])


def broken_rule(row: dict[str, Any], section: FilterSection) -> tuple[str | None, str | None]:
    """The first rule that a picture breaks, and the figure that broke it."""
    shorter, longer = sorted((row["width"], row["height"]))
    rules: tuple[tuple[str, float, Callable[[float, float], bool], float | None], ...] = (
        ("too small", shorter, operator.le, section.shorter_side_above),
        ("too long and thin", longer / shorter, operator.gt, section.most_aspect),
        ("blank", row["contrast"], operator.lt, section.least_contrast),
        ("little detail", row["detail"], operator.lt, section.least_detail),
        ("mostly text", row["text_share"], operator.gt, section.most_text),
    )
    for name, figure, broken, limit in rules:
        if limit is not None and broken(figure, limit):
            return name, f"{figure:.4g} against {limit:g}"
    return None, None


__all__ = ["broken_rule", "keep_good"]
