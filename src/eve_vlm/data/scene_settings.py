"""What the synthetic scenes look like, as plain settings, and which of them can be drawn.

The curriculum begins simple and grows by changing these values, so everything that is worth tuning
is here. Easy to get wrong: canvases are (height, width) and belong to a kind of scene: one
pictogram, one word, or several objects.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import get_args

from eve_vlm.data.phrases import FAMILIES, MOST_PHRASINGS, NUMBERS, SEEN_WORDS
from eve_vlm.data.pictograms import SEEN
from eve_vlm.data.splits import Split

SINGLE_FAMILIES = frozenset({"name", "word", "caption_name", "caption_word"})
WORD_FAMILIES = frozenset({"word", "caption_word"})
PLACE_FAMILIES = frozenset({"position", "corner", "caption_place"})
FOLLOW_UPS = ("presence", "position", "corner", "count")
MIN_CELL = 20  # pixels; below it a pictogram has fewer than 12 pixels and cannot be told


@dataclass(frozen=True, kw_only=True, slots=True)
class SceneSettings:
    """What scenes look like; every field may change along the curriculum."""

    canvases: tuple[tuple[int, int], ...] = ((112, 112),)
    """(height, width) of scenes of several objects; one is drawn for each scene."""
    single_canvases: tuple[tuple[int, int], ...] = ((56, 56),)
    """(height, width) of pictures of one pictogram."""
    word_canvases: tuple[tuple[int, int], ...] = ((56, 56),)
    """(height, width) of pictures of one written word."""
    grids: tuple[tuple[int, int], ...] = ((2, 2),)
    """(rows, cols) of cells with at most one object each; one that is large enough is drawn."""
    num_concepts: int = 30
    """How many concepts take part, from the front of `SEEN` (`unseen` has all of `UNSEEN`)."""
    num_words: int = 24
    """How many written words take part."""
    min_objects: int = 2
    """Fewest objects of a scene (a count may still be of one object alone)."""
    max_objects: int = 4
    """Most objects of a scene."""
    max_count: int = 4
    """Largest answer of `count`."""
    distractor_kinds: int = 0
    """Most kinds among the things that a `count` scene shows beside those counted; 0: all differ.

    With kinds the number of all things is drawn apart from the answer, and others come in numbers
    too, so that neither "what comes more than once" nor a full picture tells what is counted.
    """
    size_range: tuple[float, float] = (0.6, 1.0)
    """Size of a pictogram as a share of the largest that fits its cell."""
    word_size_range: tuple[float, float] = (0.8, 1.0)
    """Size of a written word as a share of the largest that fits its canvas."""
    num_turns: int = 1
    """Most questions about one scene; those after the first are `follow_ups`. Captions have one."""
    follow_ups: tuple[str, ...] = FOLLOW_UPS
    """What questions after the first are about, in equal shares of those that the scene allows.

    An answer about a place may follow from an earlier one; a number or a presence hardly does.
    """
    absent: float = 0.0
    """Share of questions for a number or a place about what is not there: "none", "nowhere"."""
    num_phrasings: int = 1
    """Phrasings of a question that take part (1 to 4)."""


def canvases_of(family: str, settings: SceneSettings) -> tuple[tuple[int, int], ...]:
    """The (height, width) of pictures of the family."""
    if family in WORD_FAMILIES:
        return settings.word_canvases
    return settings.single_canvases if family in SINGLE_FAMILIES else settings.canvases


def grids_of(family: str, settings: SceneSettings, number: int) -> tuple[tuple[int, int], ...]:
    """The grids in which so many objects of the family may stand."""
    if family in SINGLE_FAMILIES:
        return ((1, 1),)
    even = family in PLACE_FAMILIES  # no cell may lie on the lines between `left` and `right`
    return tuple(
        (rows, cols)
        for rows, cols in settings.grids
        if rows * cols >= number
        and not (even and (rows % 2 or cols % 2))
        and not (family == "caption_relation" and rows * cols < 2)
    )


def check_settings(
    settings: SceneSettings, *, split: str, families: Mapping[str, float], size: int, seed: int
) -> None:
    """Refuse what cannot be drawn, before the first picture."""
    problem = ""
    if split not in get_args(Split):
        problem = f"split {split!r} is unknown: choose one of {', '.join(get_args(Split))}"
    elif not families or set(families) - set(FAMILIES) or min(families.values()) <= 0:
        problem = (
            f"families {dict(families)} need positive weights for some of {', '.join(FAMILIES)}"
        )
    elif size < 1 or seed < 0:
        problem = f"size {size} and seed {seed} must be at least 1 and 0"
    elif not 10 <= settings.num_concepts <= len(SEEN):
        problem = f"num_concepts {settings.num_concepts} must lie between 10 and {len(SEEN)}"
    elif not 1 <= settings.num_words <= len(SEEN_WORDS):
        problem = f"num_words {settings.num_words} must lie between 1 and {len(SEEN_WORDS)}"
    elif (
        not 1 <= settings.min_objects <= settings.max_objects <= 1 + settings.num_concepts // 5 * 2
    ):
        problem = (
            f"min_objects {settings.min_objects} and max_objects {settings.max_objects} must rise "
            f"from 1 and stay within {1 + settings.num_concepts // 5 * 2}, the most of "
            f"{settings.num_concepts} concepts that training lets meet"
        )
    elif not 1 <= settings.max_count <= min(settings.max_objects, len(NUMBERS)):
        problem = (
            f"max_count {settings.max_count} must lie between 1 and max_objects "
            f"{settings.max_objects}, at most {len(NUMBERS)}"
        )
    elif settings.distractor_kinds < 0 or (
        settings.distractor_kinds and settings.max_objects > len(NUMBERS) + 1
    ):
        problem = (
            f"distractor_kinds {settings.distractor_kinds} must be 0 or more, and max_objects "
            f"{settings.max_objects} at most {len(NUMBERS) + 1} with it, because {len(NUMBERS)} of "
            "a kind have a word"
        )
    elif "caption_list" in families and settings.max_objects > len(NUMBERS):
        problem = (
            f"max_objects {settings.max_objects} must be at most {len(NUMBERS)} with the family "
            f"caption_list, because {len(NUMBERS)} of a kind have a word and all may be of one kind"
        )
    elif not settings.follow_ups or set(settings.follow_ups) - set(FOLLOW_UPS):
        problem = f"follow_ups {settings.follow_ups} must name some of {', '.join(FOLLOW_UPS)}"
    elif not 0 <= settings.absent < 1:
        problem = f"absent {settings.absent} must be a share from 0 to below 1"
    elif not 1 <= settings.num_phrasings <= MOST_PHRASINGS or settings.num_turns < 1:
        problem = (
            f"num_phrasings {settings.num_phrasings} must be 1 to {MOST_PHRASINGS} "
            f"and num_turns {settings.num_turns} at least 1"
        )
    else:
        problem = next(filter(None, (_cell_problem(family, settings) for family in families)), "")
    if problem:
        raise ValueError(f"scenes cannot be made: {problem}")


def _cell_problem(family: str, settings: SceneSettings) -> str:
    """What is wrong with the grids and canvases of a family; empty for nothing."""
    number = {"caption_relation": 2}.get(family, settings.max_objects)
    grids = grids_of(family, settings, number)
    if not grids:
        return f"no grid of {settings.grids} holds {number} objects of the family {family!r}"
    cells = [
        min(height // rows, width // cols)
        for height, width in canvases_of(family, settings)
        for rows, cols in grids
    ]
    if min(cells) < MIN_CELL:
        return (
            f"a cell of the family {family!r} has only {min(cells)} pixels: choose larger canvases "
            f"or smaller grids, so that it has at least {MIN_CELL}"
        )
    return ""


__all__ = [
    "PLACE_FAMILIES",
    "SINGLE_FAMILIES",
    "WORD_FAMILIES",
    "SceneSettings",
    "canvases_of",
    "check_settings",
    "grids_of",
]
