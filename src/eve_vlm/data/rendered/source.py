"""Rendered words, documents and charts as a data source of a recipe: `options` to records.

    kind: rendered
    options: {what: documents, size: 4000, families: {questions: 3, transcript: 1}, questions: 4}

What is drawn is the training side of the generators whose held-out side the tasks `reading`,
`documents` and `charts` ask about.  Easy to get wrong: a chart is slow to draw and then kept in the
cache folder, so a small `size` that is repeated costs far less than a large one.
"""

from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple, cast

from PIL import Image

from eve_vlm.data.picture_ref import PictureRef
from eve_vlm.data.records import Record, messages_of
from eve_vlm.data.rendered.chart_figure import NEEDS_MATPLOTLIB, can_draw_charts, draw_chart
from eve_vlm.data.rendered.charts import Chart, chart, number
from eve_vlm.data.rendered.documents import document
from eve_vlm.data.rendered.kept_picture import kept_picture
from eve_vlm.data.rendered.page import Page, Question, draw_page
from eve_vlm.data.rendered.sheet import SPLIT_KEYS
from eve_vlm.data.rendered.vocabulary import PageSplit
from eve_vlm.data.rendered.word_pictures import FAMILIES, GROUPS, MORE_GROUPS, WordPictures
from eve_vlm.data.splits import Dice

RECORD_KEY = 64  # tells these dice from those of other generators with the same seed
QUESTIONS = 4  # of a conversation unless told otherwise
TRANSCRIPT_LINES = 8  # a page has up to 20; these say how writing goes on, and a row holds them
COMMON = ("what", "size", "split", "families")
OPTIONS = {
    "words": ("groups", "dictionary"),
    "documents": ("questions",),
    "charts": ("questions",),
}
"""What is rendered: the options that it takes beside `COMMON`."""
PAGE_FAMILIES = ("questions", "transcript")


class RenderedSource:
    """Records by number."""

    def __init__(self, records: "WordPictures | AskedPictures") -> None:
        self.records = records

    @classmethod
    def from_options(cls, options: Mapping[str, Any], *, seed: int) -> "RenderedSource":
        """Reads a recipe's options.

        Raises:
            ValueError: if an option is unknown, missing or does not fit, or what draws or writes is
                not installed.
        """
        what = options.get("what")
        if what not in OPTIONS:
            raise ValueError(
                f"data.sources.options.what is {what!r} for rendered; use one of "
                f"{', '.join(OPTIONS)}."
            )
        known = (*COMMON, *OPTIONS[what])
        if unknown := sorted(set(options) - set(known)):
            raise ValueError(
                f"data.sources.options has {', '.join(unknown)}, which rendered {what} do not "
                f"know; use {', '.join(known)}."
            )
        size, split = _whole(options, "size"), options.get("split", "train")
        if split not in SPLIT_KEYS:
            raise ValueError(
                f"data.sources.options.split is {split!r}; use one of {', '.join(SPLIT_KEYS)}."
            )
        if what == "words":
            return cls(
                WordPictures(
                    split=split,
                    size=size,
                    seed=seed,
                    groups=_weights(
                        options, "groups", dict.fromkeys((*GROUPS, *MORE_GROUPS), 1), GROUPS
                    ),
                    families=_weights(options, "families", dict.fromkeys(FAMILIES, 1), {"word": 1}),
                    dictionary=options.get("dictionary"),
                )
            )
        if what == "charts" and not can_draw_charts():
            raise ValueError(NEEDS_MATPLOTLIB)
        return cls(
            AskedPictures(
                _DRAWN[what],
                split=split,
                size=size,
                seed=seed,
                families=_weights(
                    options, "families", dict.fromkeys(PAGE_FAMILIES, 1), {"questions": 1}
                ),
                questions=_whole(options, "questions", QUESTIONS),
            )
        )

    def __len__(self) -> int:
        """Number of records."""
        return len(self.records)

    def __getitem__(self, index: int) -> Record:
        """Record `index`."""
        if not 0 <= index < len(self):
            raise IndexError("record index out of range")
        return self.records[index]

    def outline(self, index: int) -> Record:
        """Record `index` for measuring, its picture not drawn."""
        return self.records.outline(index)


class Drawn(NamedTuple):
    """A generator of pictures with questions."""

    name: str
    make: Callable[..., Any]
    """(index, split, seed) to its layout, with `questions`."""
    picture: Callable[[Any], Image.Image]
    transcript: Callable[[Any], str]


class AskedPictures:
    """Pages or charts, each with several questions in one conversation or with what it says.

    Args:
        questions: most of a conversation; in a random order, so that each comes first at times.
    """

    def __init__(
        self,
        drawn: Drawn,
        *,
        split: PageSplit,
        size: int,
        seed: int,
        families: Mapping[str, float],
        questions: int,
    ) -> None:
        self.drawn, self.split, self._size, self._seed = drawn, split, size, seed
        self._share = families.get("transcript", 0) / sum(families.values())
        self._questions = questions

    def __len__(self) -> int:
        """Number of records."""
        return self._size

    def __getitem__(self, index: int) -> Record:
        """Record `index`."""
        return self._record(index, self.drawn.picture)

    def outline(self, index: int) -> Record:
        """Record `index` for measuring, its picture not drawn."""
        return self._record(index, _undrawn)

    def _record(self, index: int, picture: Callable[[Any], Image.Image | PictureRef]) -> Record:
        layout = self.layout(index)
        dice = Dice(self._seed, RECORD_KEY, SPLIT_KEYS[self.split], index)
        family: Literal["transcript", "questions"]
        family = "transcript" if dice.unit() < self._share else "questions"
        if family == "transcript":
            turns = [("", self.drawn.transcript(layout))]
        else:
            turns = _turns(dice.shuffled(layout.questions)[: self._questions])
        return Record(
            id=f"{self.drawn.name}-{self.split}-{self._seed}-{index}",
            messages=messages_of(turns),
            images=[picture(layout)],
            family=self.drawn.name if family == "questions" else f"{self.drawn.name}_transcript",
            format="plain" if family == "transcript" else "chat",
        )

    def layout(self, index: int) -> Any:
        """The page or chart behind record `index`, not drawn."""
        return self.drawn.make(index, split=self.split, seed=self._seed)


def page_transcript(page: Page) -> str:
    """The first lines of a page, what stands beside each other in one line.

    Texts at the same height belong together; a frame with a value may lie between two labels.
    """
    lines: dict[int, list[tuple[int, str]]] = {}
    for text in page.texts:
        lines.setdefault(text.base, []).append((text.x, text.words))
    rows = [" ".join(words for _, words in sorted(lines[base])) for base in sorted(lines)]
    return "\n".join(rows[:TRANSCRIPT_LINES])


def chart_transcript(drawn: Chart) -> str:
    """The title of a chart, and each series with its values."""
    unit = "%" if drawn.kind == "pie" else ""
    lines = [drawn.theme.title]
    for place, values in enumerate(drawn.values):
        name = f"{drawn.series[place]}: " if drawn.series else ""
        pairs = zip(drawn.categories, values, strict=True)
        lines.append(name + ", ".join(f"{one} {number(value)}{unit}" for one, value in pairs))
    return "\n".join(lines)


def _turns(questions: list[Question]) -> list[tuple[str, str]]:
    return [(question.text, question.answers[0]) for question in questions]


def _undrawn(layout: Any) -> PictureRef:
    """Of a page or chart, the size alone."""
    height, width = layout.canvas
    return PictureRef(name="not drawn", known_size=(width, height))


def _page_picture(page: Page) -> Image.Image:
    return kept_picture(lambda: draw_page(page), page[:-1])


def _chart_picture(drawn: Chart) -> Image.Image:
    from matplotlib import __version__ as version

    return kept_picture(lambda: draw_chart(drawn), version, drawn[:-1])


_DRAWN = {
    "documents": Drawn("document", document, _page_picture, page_transcript),
    "charts": Drawn("chart", chart, _chart_picture, chart_transcript),
}


# --- reading options ------------------------------------------------------------------------------


def _whole(options: Mapping[str, Any], name: str, default: int | None = None) -> int:
    value = options.get(name, default)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(
            f"data.sources.options.{name} must be a whole number from 1 for rendered, but it is "
            f"{value!r}."
        )
    return value


def _weights(
    options: Mapping[str, Any],
    name: str,
    known: Mapping[str, float],
    default: Mapping[str, float] | None = None,
) -> Mapping[str, float]:
    """Positive weights by name."""
    given = options.get(name, known if default is None else default)
    if (
        not isinstance(given, Mapping)
        or not given
        or set(given) - set(known)
        or not all(isinstance(one, int | float) and one > 0 for one in given.values())
    ):
        raise ValueError(
            f"data.sources.options.{name} must give positive weights to some of "
            f"{', '.join(known)}, but it is {given!r}."
        )
    return cast("Mapping[str, float]", given)


__all__ = [
    "OPTIONS",
    "AskedPictures",
    "Drawn",
    "RenderedSource",
    "chart_transcript",
    "page_transcript",
]
