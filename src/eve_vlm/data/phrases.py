"""The short English of the synthetic scenes: captions, questions and answers from a layout.

Every text is a pure function of what was placed where, so an answer cannot contradict its picture.
Texts are kept to a few words because two cores pay for each token. Easy to get wrong: places (`top
left`) are judged by the middle of the *visible box*, not by the cell of the grid in which the
pictogram was placed.
"""

from typing import NamedTuple

from eve_vlm.data.pictograms import SEEN, UNSEEN

QUESTION_FAMILIES = ("name", "presence", "count", "position", "corner", "word")
CAPTION_FAMILIES = (
    "caption_name",
    "caption_list",
    "caption_place",
    "caption_relation",
    "caption_word",
)
FAMILIES = QUESTION_FAMILIES + CAPTION_FAMILIES

SEEN_WORDS = (
    "milk",
    "stop",
    "open",
    "exit",
    "hello",
    "blue",
    "red",
    "green",
    "jazz",
    "tea",
    "park",
    "zoo",
    "king",
    "west",
    "five",
    "happy",
    "cold",
    "hot",
    "love",
    "game",
    "music",
    "taxi",
    "wow",
    "bank",
)
"""Written words of training, in the order in which `num_words` takes them."""
UNSEEN_WORDS = ("fun", "shop", "lake", "rain", "sweet", "job", "north", "sky")
"""Written words that no training scene or text holds."""

NUMBERS = ("one", "two", "three", "four", "five", "six")
ABSENT_ANSWERS = {"count": "none", "position": "nowhere"}
"""What is answered about a thing that is not there, by family."""
SEES = (
    "What do you see?",
    "Describe the picture.",
    "What is in the picture?",
    "What does the picture show?",
)
"""Phrasings of the question whose answer is a caption."""
SEE = SEES[0]
PLACES = ("top left", "top right", "bottom left", "bottom right")
RELATION = "Is the {x} left of, right of, above or below the {y}?"
"""The question for the relation of two things; its answer is one of `RELATIONS`."""
RELATIONS = ("left of", "right of", "above", "below")
IRREGULAR = {
    **{"goose": "geese", "mouse": "mice", "leaf": "leaves", "wolf": "wolves"},
    **{"knife": "knives", "scarf": "scarves", "foot": "feet", "tooth": "teeth"},
}
"""Last words of names whose plural is made in another way."""

# The first phrasing of each family is the default; {a} has the article, {s} is the plural.
QUESTIONS: dict[str, tuple[str, ...]] = {
    "name": ("What is this?", "Name this.", "What is it?", "What is shown here?"),
    "presence": (
        "Is there {a}?",
        "Do you see {a}?",
        "Is there {a} in the picture?",
        "Can you see {a}?",
    ),
    "count": (
        "How many {s}?",
        "Count the {s}.",
        "How many {s} are there?",
        "How many {s} do you see?",
    ),
    "position": (
        "Where is the {x}?",
        "Find the {x}.",
        "Where is the {x} in the picture?",
        "Where do you see the {x}?",
    ),
    "corner": (
        "What is {place}?",
        "Name the one {place}.",
        "What is in the {place} corner?",
        "What do you see {place}?",
    ),
    "word": (
        "What does it say?",
        "Read the word.",
        "What is written here?",
        "Which word is this?",
    ),
}
MOST_PHRASINGS = min(map(len, QUESTIONS.values()))


class Box(NamedTuple):
    """Pixels, right and bottom exclusive."""

    left: int
    top: int
    right: int
    bottom: int

    @property
    def middle(self) -> tuple[int, int]:
        """(x, y), rounded down."""
        return (self.left + self.right) // 2, (self.top + self.bottom) // 2

    @property
    def width(self) -> int:
        """Pixels across."""
        return self.right - self.left

    @property
    def height(self) -> int:
        """Pixels down."""
        return self.bottom - self.top


class Placement(NamedTuple):
    """One thing in a scene: a pictogram, or a written word if it has an ink."""

    concept: str
    box: Box
    size: int
    angle: int
    ink: tuple[int, int, int] | None = None


class Turn(NamedTuple):
    """A question (empty for a caption) and its answer."""

    question: str
    answer: str


def with_article(concept: str) -> str:
    """`an apple`, `a cat`."""
    return f"{'an' if concept[0] in 'aeiou' else 'a'} {concept}"


def plural(concept: str) -> str:
    """`cats`, `boxes`, `berries`, `maple leaves`, `fish`."""
    if concept.endswith(("fish", "sheep")):
        return concept
    for one, many in IRREGULAR.items():
        if concept == one or concept.endswith(f" {one}"):
            return concept.removesuffix(one) + many
    if concept.endswith("y") and concept[-2:-1] not in "aeiou":
        return f"{concept[:-1]}ies"
    return concept + ("es" if concept.endswith(("s", "x", "ch", "sh")) else "s")


def counted(concept: str, number: int) -> str:
    """`a cat`, `two cats`."""
    return with_article(concept) if number == 1 else f"{NUMBERS[number - 1]} {plural(concept)}"


def place_of(box: Box, canvas: tuple[int, int]) -> str:
    """The quarter of the (height, width) canvas that holds the middle of the box."""
    x, y = box.middle
    return f"{'top' if 2 * y < canvas[0] else 'bottom'} {'left' if 2 * x < canvas[1] else 'right'}"


def is_clear_place(box: Box, canvas: tuple[int, int]) -> bool:
    """Whether the middle is at least an eighth of the canvas away from both lines between places.

    One pixel is allowed for the rounding of middles.
    """
    x, y = box.middle
    return (
        abs(x - canvas[1] / 2) + 1 >= canvas[1] / 8 and abs(y - canvas[0] / 2) + 1 >= canvas[0] / 8
    )


def relation_of(first: Box, second: Box) -> str:
    """Where the first is, seen from the second, along the axis on which they are further apart."""
    across = first.middle[0] - second.middle[0]
    down = first.middle[1] - second.middle[1]
    if abs(across) > abs(down):
        return "left of" if across < 0 else "right of"
    return "above" if down < 0 else "below"


def turn_about(
    family: str,
    placements: tuple[Placement, ...],
    *,
    subject: str,
    canvas: tuple[int, int],
    phrasing: int = 0,
) -> Turn:
    """The caption, or question about `subject` and answer, that is true of the placements."""
    if family in CAPTION_FAMILIES:
        return Turn("", _caption(family, placements, canvas))
    boxes = [placement.box for placement in placements if placement.concept == subject]
    place = place_of(boxes[0], canvas) if boxes else ""
    question = QUESTIONS[family][phrasing].format(
        a=with_article(subject), s=plural(subject), x=subject, place=place
    )
    if family == "presence":
        return Turn(question, "yes" if boxes else "no")
    if not boxes and family in ABSENT_ANSWERS:
        return Turn(question, ABSENT_ANSWERS[family])
    if family == "count":
        return Turn(question, NUMBERS[len(boxes) - 1])
    return Turn(question, place if family == "position" else subject)


def _caption(family: str, placements: tuple[Placement, ...], canvas: tuple[int, int]) -> str:
    concepts = [placement.concept for placement in placements]
    if family == "caption_name":
        return with_article(concepts[0])
    if family == "caption_word":
        return f"the word {concepts[0]}"
    if family == "caption_relation":
        first, second = placements
        relation = relation_of(first.box, second.box)
        return f"{with_article(first.concept)} {relation} {with_article(second.concept)}"
    if family == "caption_place":
        return _joined([f"{with_article(p.concept)} {place_of(p.box, canvas)}" for p in placements])
    return _joined(
        [counted(concept, concepts.count(concept)) for concept in dict.fromkeys(concepts)]
    )


def _joined(parts: list[str]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    return " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)


def vocabulary() -> tuple[str, ...]:
    """Every word and mark that a scene of any split can say, sorted: what a tokenizer must know."""
    texts = [
        *SEES,
        *ABSENT_ANSWERS.values(),
        RELATION.format(x="", y=""),
        *NUMBERS,
        *PLACES,
        *RELATIONS,
        *SEEN_WORDS,
        *UNSEEN_WORDS,
        "yes no a an and the word ,",
    ]
    texts += [f"{concept} {plural(concept)}" for concept in (*SEEN, *UNSEEN)]
    for phrasings in QUESTIONS.values():
        texts += [text.format(a="", s="", x="", place="") for text in phrasings]
    words = " ".join(texts).replace("?", " ? ").replace(".", " . ").split()
    return tuple(sorted(set(words)))


__all__ = [
    "ABSENT_ANSWERS",
    "CAPTION_FAMILIES",
    "FAMILIES",
    "MOST_PHRASINGS",
    "QUESTION_FAMILIES",
    "RELATION",
    "SEE",
    "SEEN_WORDS",
    "SEES",
    "UNSEEN_WORDS",
    "Box",
    "Placement",
    "Turn",
    "is_clear_place",
    "place_of",
    "turn_about",
    "vocabulary",
]
