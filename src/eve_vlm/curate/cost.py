"""What captions cost: an estimate from the recipe before the first question, the bill afterwards.

Both are given for the set and for a million pictures.  Easy to get wrong: tokens that failed tries
took are paid for too where the server counted them; what it never answered is not known here.
"""

from collections.abc import Sequence
from typing import Any

from eve_vlm.curate.recipe import CostSection, CurateRecipe
from eve_vlm.curate.summary import StageSummary

MILLION = 1_000_000


def estimate(section: CostSection, pictures: int) -> float:
    """What captions of so many pictures are expected to cost.

    >>> estimate(CostSection(per_million_prompt_tokens=1.0, prompt_tokens=500), 10_000)
    5.0
    """
    cost = tokens_cost(section, pictures * section.prompt_tokens, pictures * section.caption_tokens)
    if section.per_hour and section.captions_per_second:
        cost += section.per_hour * pictures / section.captions_per_second / 3600
    return cost


def tokens_cost(section: CostSection, prompt_tokens: float, caption_tokens: float) -> float:
    """The price of tokens."""
    return (
        section.per_million_prompt_tokens * prompt_tokens
        + section.per_million_caption_tokens * caption_tokens
    ) / MILLION


def bill_of(recipe: CurateRecipe, stages: Sequence[StageSummary]) -> dict[str, Any] | None:
    """What was spent so far; None where no caption was made."""
    done = next((one for one in stages if one.name == "recaption"), None)
    if recipe.recaption is None or done is None or not done.sums["asked"]:
        return None
    section, sums = recipe.recaption.cost, done.sums
    spent = tokens_cost(section, sums["prompt_tokens"], sums["caption_tokens"])
    # Workers wait for one another's answers, so hours are those of the estimate's rate.
    if section.per_hour and section.captions_per_second:
        spent += section.per_hour * sums["asked"] / section.captions_per_second / 3600
    return {
        "currency": section.currency,
        "captions": sums["asked"],
        "requests": sums["requests"],
        "failed_requests": sums["failed_requests"],
        "prompt_tokens": sums["prompt_tokens"],
        "caption_tokens": sums["caption_tokens"],
        "spent": spent,
        "per_million": spent / sums["asked"] * MILLION,
        "estimated_per_million": estimate(section, MILLION),
    }


__all__ = ["bill_of", "estimate", "tokens_cost"]
