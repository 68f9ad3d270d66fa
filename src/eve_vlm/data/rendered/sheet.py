"""A page in the making: a pen that goes down the sheet, and what names, dates and sums look like.

Easy to get wrong: nothing here measures writing, because that differs between builds of Pillow and
would change which texts a page holds; rooms are wide enough for the longest words of the
vocabulary instead, which the tests measure.
"""

from collections.abc import Sequence
from datetime import date, timedelta
from typing import TypeVar

from eve_vlm.data.phrases import Box
from eve_vlm.data.rendered.page import Align, Page, Question, Shape, Text
from eve_vlm.data.rendered.vocabulary import VOCABULARY, PageSplit
from eve_vlm.data.splits import SIZE_STEP, Colour, Dice, draw_background, draw_ink, size_rest

MONTHS = (
    *("January", "February", "March", "April", "May", "June", "July", "August", "September"),
    *("October", "November", "December"),
)
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
FIRST_DAY, NUM_DAYS = date(2015, 1, 1), 4200
Item = TypeVar("Item")
SIDES: tuple[Align, ...] = ("left", "middle", "right")
WHITE: Colour = (255, 255, 255)
SPLIT_KEYS: dict[PageSplit, int] = {"train": 0, "held_out": 1}


class Sheet:
    """A page that is being written, from the words and bins of a split."""

    def __init__(
        self, kind: str, canvas: tuple[int, int], *, dice: Dice, split: PageSplit, title_size: int
    ) -> None:
        """Take the (height, width), and about how large a title is, in pixels."""
        self.kind, self.canvas, self.dice, self.split = kind, canvas, dice, split
        self.words = VOCABULARY[split]
        self.size = 18 if split == "held_out" else dice.choice((16, 20))
        self.title_size = title_size + size_rest(split) + SIZE_STEP * dice.below(2)
        self.shade = draw_background(dice, split).corners[0]
        self.ink = draw_ink(dice, split)
        self.paper = WHITE if dice.below(2) else _paler(self.shade)
        self.money = dice.choice(("", "$"))
        self._date_style = dice.below(4)
        self.margin, self.y = 32, 0
        self._texts: list[Text] = []
        self._shapes: list[Shape] = []
        self._questions: list[Question] = []

    @property
    def step(self) -> int:
        """From one base line of the body to the next."""
        return self.size * 7 // 4

    @property
    def width(self) -> int:
        """Of the canvas."""
        return self.canvas[1]

    def down(self, pixels: int) -> None:
        """Move the pen."""
        self.y += pixels

    def write(
        self,
        words: str,
        x: int,
        *,
        align: Align = "left",
        size: int = 0,
        bold: bool = False,
        up: int = 0,
    ) -> None:
        """Put words on the base line of the pen, or `up` pixels above it."""
        self._texts.append(Text(words, x, self.y - up, size or self.size, align, bold))

    def title(self, words: str, align: Align) -> None:
        """Large words at a side or in the middle."""
        self.write(words, self.side(align), align=align, size=self.title_size, bold=True)

    def side(self, align: Align) -> int:
        """The x at which words of this alignment stand."""
        return {
            "left": self.margin,
            "middle": self.width // 2,
            "right": self.width - self.margin,
        }[align]

    def pair(self, label: str, value: str, *, bold: bool = False) -> None:
        """A label at the left and its value at the right, and the pen one line down."""
        self.write(label, self.side("left"), bold=bold)
        self.write(value, self.side("right"), align="right", bold=bold)
        self.down(self.step)

    def rule(self, *, left: int = 0, right: int = 0) -> None:
        """A line across on the pen's height, from margin to margin unless told."""
        box = Box(left or self.margin, self.y, right or self.width - self.margin, self.y + 2)
        self.box(box, self.ink)

    def box(self, box: Box, colour: Colour, *, frame: int = 0) -> None:
        """A box below the texts."""
        self._shapes.append(Shape(box, colour, frame))

    def ask(self, kind: str, text: str, *answers: str) -> None:
        """Something that can be asked of this page; an amount counts without its currency too."""
        bare = tuple(answer.removeprefix("$") for answer in answers if answer.startswith("$"))
        self._questions.append(Question(text, (*answers, *bare), kind))

    def page(self) -> Page:
        """What was written."""
        return Page(
            self.kind,
            self.canvas,
            self.paper,
            self.ink,
            tuple(self._shapes),
            tuple(self._texts),
            tuple(self._questions),
        )

    # --- what is written ----------------------------------------------------------------------

    def person(self) -> str:
        """First and last name."""
        return (
            f"{self.dice.choice(self.words.first_names)} {self.dice.choice(self.words.last_names)}"
        )

    def firm(self, *kinds: str) -> str:
        """A name of the split with a kind of firm."""
        return f"{self.dice.choice(self.words.stems)} {self.dice.choice(kinds)}"

    def street(self) -> str:
        """Number and street."""
        street = self.dice.choice(("Street", "Road", "Lane"))
        return f"{1 + self.dice.below(190)} {self.dice.choice(self.words.streets)} {street}"

    def number(self, digits: int) -> str:
        """A number that does not begin with zero."""
        low = 10 ** (digits - 1)
        return str(low + self.dice.below(9 * low))

    def phone(self) -> str:
        """Of two parts."""
        return f"{self.number(3)} {self.number(4)}"

    def amount(self, cents: int) -> str:
        """As the page writes sums.

        Args:
            cents: hundredths.
        """
        return f"{self.money}{cents // 100}.{cents % 100:02d}"

    def day(self, *, years_ago: int = 0) -> date:
        """Some day of the years about 2020, or so long before."""
        return FIRST_DAY + timedelta(days=self.dice.below(NUM_DAYS) - 365 * years_ago)

    def written_day(self, day: date) -> str:
        """As the page writes dates: one of four ways."""
        month = MONTHS[day.month - 1]
        return (
            f"{day.day} {month} {day.year}",
            f"{month} {day.day}, {day.year}",
            f"{day.year}-{day.month:02d}-{day.day:02d}",
            f"{day.day:02d}/{day.month:02d}/{day.year}",
        )[self._date_style]

    def clock(self) -> str:
        """A time of day, in steps of five minutes."""
        return f"{6 + self.dice.below(17)}:{5 * self.dice.below(12):02d}"


def different(dice: Dice, items: Sequence[Item], number: int) -> list[Item]:
    """So many of the items, none twice."""
    return dice.shuffled(items)[:number]


def _paler(colour: Colour) -> Colour:
    """Two thirds of the way to white."""
    red, green, blue = ((510 + part) // 3 for part in colour)
    return red, green, blue


__all__ = ["DAYS", "MONTHS", "SIDES", "SPLIT_KEYS", "Sheet", "different"]
