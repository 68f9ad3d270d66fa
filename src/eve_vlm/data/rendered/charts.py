"""Data of charts with questions: bars, groups of bars, lines and pies.

Chart `index` of a split and seed is always the same, whatever was made before it, and needs no
matplotlib until it is drawn (`chart_figure.py`).  Categories, series, titles and tones of colours
of `held_out` are in no chart of `train`.  Easy to get wrong: values without labels lie on grid
lines or half-way between two, so that they can be read exactly, and no two values that are compared
are equal, so that every question has one answer.
"""

from typing import Literal, NamedTuple

from eve_vlm.data.rendered.page import Question
from eve_vlm.data.rendered.sheet import SPLIT_KEYS, different
from eve_vlm.data.rendered.vocabulary import VOCABULARY, PageSplit, Theme
from eve_vlm.data.splits import Colour, Dice

CHART_KEY = 62  # tells these dice from those of other generators with the same seed
ChartKind = Literal["bar", "grouped", "line", "pie"]
KINDS: tuple[ChartKind, ...] = ("bar", "grouped", "line", "pie")
QUESTION_KINDS = ("value", "extreme", "difference", "count", "colour")
SIZES = ((336, 448), (392, 504), (420, 560))  # (height, width), pixels
TICKS = 10  # of the axis of values above zero; a half of the distance of two is a step
STEPS = (1, 2, 5, 10, 50, 250)  # what half of a tick is worth
SMALLEST = 2  # steps; a lower bar could not be told from the axis
ORDERED = ("month", "year", "day", "season")  # nouns whose categories keep their order
MOST = 2 * TICKS - 1  # steps; room for a label above the highest bar

TONES: dict[str, dict[PageSplit, tuple[Colour, ...]]] = {
    "red": {"train": ((214, 39, 40), (180, 0, 0)), "held_out": ((200, 20, 20),)},
    "blue": {"train": ((31, 90, 200), (0, 0, 190)), "held_out": ((20, 50, 210),)},
    "green": {"train": ((30, 140, 50), (80, 180, 80)), "held_out": ((50, 160, 60),)},
    "orange": {"train": ((255, 127, 14), (255, 165, 0)), "held_out": ((255, 145, 10),)},
    "purple": {"train": ((128, 0, 128), (120, 50, 170)), "held_out": ((130, 40, 160),)},
    "brown": {"train": ((120, 70, 20), (90, 45, 10)), "held_out": ((105, 55, 15),)},
    "pink": {"train": ((255, 150, 200), (250, 180, 210)), "held_out": ((255, 165, 205),)},
    "gray": {"train": ((128, 128, 128), (160, 160, 160)), "held_out": ((145, 145, 145),)},
    "yellow": {"train": ((250, 220, 0), (255, 235, 60)), "held_out": ((255, 228, 30),)},
    "black": {"train": ((0, 0, 0), (28, 28, 28)), "held_out": ((18, 18, 18),)},
}
"""Name of a colour: its tones; those that are held out lie between those of training."""
SPELLINGS = {"gray": ("gray", "grey")}


class Chart(NamedTuple):
    """What a chart shows and how, enough to draw it and to check every answer."""

    kind: ChartKind
    canvas: tuple[int, int]
    """(height, width)."""
    theme: Theme
    categories: tuple[str, ...]
    series: tuple[str, ...]
    """Empty for bars and pies, whose values have no second name; of a line, maybe."""
    values: tuple[tuple[float, ...], ...]
    """By series, then category; those of a pie are shares in percent, 100 in all."""
    colours: tuple[str, ...]
    """Names: of each series, slice or bar; of a single series, one for all."""
    tones: tuple[Colour, ...]
    """The colours themselves."""
    tick: float
    """Value between two grid lines; 0 for a pie."""
    labelled: bool
    """Whether values are written beside what shows them."""
    sideways: bool
    """Whether bars lie."""
    questions: tuple[Question, ...]


def chart(index: int, *, split: PageSplit, seed: int = 0) -> Chart:
    """Chart `index`: the four kinds take turns."""
    kind = KINDS[index % len(KINDS)]
    dice = Dice(seed, CHART_KEY, SPLIT_KEYS[split], index)
    words = VOCABULARY[split]
    timely = kind == "line"  # a line between towns would say nothing
    theme = dice.until(words.themes, lambda theme: theme.noun in ORDERED or not timely)
    categories = _categories(kind, words.categories[theme.noun], dice)
    if theme.noun in ORDERED:
        categories = tuple(sorted(categories, key=words.categories[theme.noun].index))
    num_series = {"bar": 1, "grouped": 2 + dice.below(2), "line": 1 + dice.below(3), "pie": 1}[kind]
    series = tuple(different(dice, words.series, num_series)) if num_series > 1 else ()
    step = 0 if kind == "pie" else dice.choice(STEPS)
    labelled = kind == "pie" or (num_series == 1 and dice.below(2) == 1)
    if kind == "pie":
        values: tuple[tuple[float, ...], ...] = (_shares(len(categories), dice),)
    else:
        values = _values(num_series, len(categories), step=step, exact=labelled, dice=dice)
    own = kind == "pie" or (kind == "bar" and dice.below(2) == 1)  # a colour for each category
    colours = tuple(different(dice, tuple(TONES), len(categories) if own else num_series))
    drawn = Chart(
        kind,
        dice.choice(SIZES),
        theme,
        categories,
        series,
        values,
        colours,
        tuple(dice.choice(TONES[name][split]) for name in colours),
        2.0 * step,
        labelled,
        kind == "bar" and dice.below(2) == 1,
        (),
    )
    return drawn._replace(questions=_questions(drawn, dice))


def number(value: float) -> str:
    """A value as charts write it.

    >>> number(3.0), number(7.5), number(1250)
    ('3', '7.5', '1250')
    """
    return f"{value:.10g}"


def _categories(kind: ChartKind, names: tuple[str, ...], dice: Dice) -> tuple[str, ...]:
    """Neighbours in their order for a line, any for others."""
    if kind == "line":
        count = 5 + dice.below(3)
        first = dice.below(len(names) - count + 1)
        return names[first : first + count]
    return tuple(different(dice, names, (3 if kind == "grouped" else 4) + dice.below(3)))


def _values(
    num_series: int, num_categories: int, *, step: int, exact: bool, dice: Dice
) -> tuple[tuple[float, ...], ...]:
    """Values by series and category, all different within a series and within a category.

    Args:
        exact: whether they are written, and so may lie between the steps.
    """
    parts = 5 if exact and step >= 5 else 1  # of a step
    levels = tuple(range(SMALLEST * parts, MOST * parts + 1))
    rows: list[list[int]] = []
    while len(rows) < num_series:
        row = different(dice, levels, num_categories)
        if all(a != b for other in rows for a, b in zip(row, other, strict=True)):
            rows.append(row)
    return tuple(tuple(level * step / parts for level in row) for row in rows)


def _shares(count: int, dice: Dice) -> tuple[float, ...]:
    """Different whole percents, each at least 5, that are 100 together."""
    while True:
        cuts = sorted(dice.below(101) for _ in range(count - 1))
        shares = [b - a for a, b in zip([0, *cuts], [*cuts, 100], strict=True)]
        if min(shares) >= 5 and len(set(shares)) == count:
            return tuple(shares)


# --- questions ------------------------------------------------------------------------------------


def _questions(drawn: Chart, dice: Dice) -> tuple[Question, ...]:
    """One of each kind, in the order of `QUESTION_KINDS`."""
    place = dice.below(len(drawn.values))
    values, of = drawn.values[place], ""
    if drawn.series:
        of = f" of {drawn.series[place]}"
    first, second = different(dice, drawn.categories, 2)
    by_name = dict(zip(drawn.categories, values, strict=True))
    unit = "%" if drawn.kind == "pie" else ""
    word, pick = (("largest", max), ("smallest", min))[dice.below(2)]
    # Half-way between two neighbouring values, so that none is on the limit; how many lie above
    # comes in even shares.
    ordered = sorted(values, reverse=True)
    above = 1 + dice.below(len(values) - 1)
    limit = (ordered[above - 1] + ordered[above]) / 2
    noun, within = drawn.theme.noun, f" in the values{of}" if of else ""
    return (
        _asked("value", f"What is the value{of} for {first}?", by_name[first], unit),
        Question(
            f"Which {noun} has the {word} value{of}?",
            (pick(by_name, key=by_name.__getitem__),),
            "extreme",
        ),
        _asked(
            "difference",
            f"What is the difference between {first} and {second}{within}?",
            abs(by_name[first] - by_name[second]),
            unit,
        ),
        Question(
            f"How many {_plural(noun)} have a value{of} above {number(limit)}{unit}?",
            (str(above),),
            "count",
        ),
        _colour_question(drawn, dice),
    )


def _asked(kind: str, text: str, value: float, unit: str) -> Question:
    """A question for a number, with and without its unit."""
    answers = (f"{number(value)}{unit}", number(value)) if unit else (number(value),)
    return Question(text, answers, kind)


def _colour_question(drawn: Chart, dice: Dice) -> Question:
    names = drawn.series or drawn.categories
    place = dice.below(len(drawn.colours))
    colour = drawn.colours[place]
    if len(drawn.colours) == 1:
        thing = "the line" if drawn.kind == "line" else "the bars"
        text = f"What is the color of {thing}?"
    elif dice.below(2):
        thing = f"the {drawn.theme.noun} {names[place]}" if not drawn.series else names[place]
        text = f"What is the color of {thing}?"
    else:
        thing = "series" if drawn.series else drawn.theme.noun
        return Question(f"Which {thing} is shown in {colour}?", (names[place],), "colour")
    return Question(text, SPELLINGS.get(colour, (colour,)), "colour")


def _plural(noun: str) -> str:
    return f"{noun[:-1]}ies" if noun == "city" else f"{noun}s"


__all__ = ["KINDS", "QUESTION_KINDS", "TONES", "Chart", "ChartKind", "chart", "number"]
