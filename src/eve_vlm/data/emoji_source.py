"""Single emoji of four styles as a data source of a recipe: what is this, and what goes with it.

    kind: emoji
    options: {size: 20000, families: {name: 3, caption: 1}, styles: [noto, twemoji], split: train}

Every drawing of the split comes equally often.  Half of Noto's drawings are held out
(`emoji_concepts.py`): naming them is what the task `naming` asks, so the three other styles must
teach the meaning.  Easy to get wrong: nothing is mirrored, since arrows, letters and hands to the
left have a name of their own; and neither flags nor what is called by a colour are made grey.
"""

from collections.abc import Callable, Mapping
from typing import Any

from PIL import Image, ImageEnhance, ImageFilter

from eve_vlm.data.emoji_styles import PIXELS, STYLES, EmojiDrawing, emoji_drawings
from eve_vlm.data.picture_ref import PictureRef
from eve_vlm.data.records import Record, messages_of
from eve_vlm.data.rounds import Rounds
from eve_vlm.data.source_options import REQUIRED, Shares, check_size, read_options
from eve_vlm.data.splits import Dice, Split, draw_background

KIND = 0xE307  # sets its dice apart from those of other kinds with the same seed
NAME, CAPTION, TAGS, GROUP = FAMILIES = ("name", "caption", "tags", "group")
OPTIONS: dict[str, tuple[type, Any]] = {
    "size": (int, REQUIRED),
    "families": (dict, REQUIRED),
    "styles": (list, list(STYLES)),
    "split": (str, "train"),
}

QUESTION = "What is this?"  # the one of the task `naming`
QUESTION_SHARE = 0.7  # of it among the questions for a name
PARAPHRASES = (
    "Name this.",
    "What does the picture show?",
    "What do you see?",
    "Which emoji is this?",
    "What is shown here?",
)
TAG_QUESTIONS = ("Which words go with this?", "Give keywords for the picture.")
SUBGROUP_QUESTION, GROUP_QUESTION = "What kind of thing is this?", "Which group is it from?"
MOST_TAGS = 5

WHITE_SHARE = (
    0.5  # of papers: those of `naming` are white, and so are most drawings that users have
)
WHOLE_SHARE = 0.4  # of drawings fill the picture, as in `naming`
LEAST = 0.45  # of the side of the picture, for the others
UPRIGHT_SHARE, MOST_ANGLE = 0.6, 15  # degrees
COLOUR_SHARE, BLUR_SHARE, GREY_SHARE = 0.5, 0.15, 0.06
COLOURS = frozenset(
    (
        *("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white"),
        *("grey", "gray", "light", "dark"),
    )
)


class EmojiSource:
    """Emoji by number: record `index` is a function of options, seed and `index` alone."""

    def __init__(
        self, drawings: list[EmojiDrawing], *, size: int, families: Shares, split: Split, seed: int
    ) -> None:
        self._drawings, self._size, self._families = drawings, size, families
        self._split, self._key = split, (seed, KIND, int(split != "train"))
        self._rounds = Rounds(len(drawings), self._key)

    @classmethod
    def from_options(cls, options: Mapping[str, Any], *, seed: int) -> "EmojiSource":
        """Reads a recipe's options.

        Raises:
            ValueError: if an option is unknown, missing or does not fit, or a style is neither
                drawn yet nor fetched.
        """
        given = read_options(options, OPTIONS, of="emoji")
        families = Shares(given["families"], FAMILIES, of="emoji")
        drawings = [
            drawing
            for drawing in emoji_drawings(given["styles"], split=given["split"])
            if _families_of(drawing, families)
        ]
        if not drawings:
            raise ValueError(
                f"There is no drawing in split {given['split']} of the styles {given['styles']!r} "
                f"for {', '.join(families.things)}; held_out has those of noto alone."
            )
        return cls(
            drawings,
            size=check_size(given["size"], of="emoji"),
            families=families,
            split=given["split"],
            seed=seed,
        )

    def __len__(self) -> int:
        """Number of records."""
        return self._size

    def __getitem__(self, index: int) -> Record:
        """Record `index`."""
        return self._record(index, _picture)

    def outline(self, index: int) -> Record:
        """Record `index` for measuring, its picture not drawn."""
        return self._record(index, lambda *_: PictureRef(name="", known_size=(PIXELS, PIXELS)))

    def _record(self, index: int, picture: Callable[..., Image.Image | PictureRef]) -> Record:
        drawing, dice = self.drawing(index), Dice(*self._key, index)
        family = self._families.draw(dice.unit(), _families_of(drawing, self._families))
        question, answer = _words(drawing, family, dice)
        return Record(
            id=f"{drawing.style}-{drawing.code}-{index}",
            messages=messages_of([(question, answer)]),
            images=[picture(drawing, self._split, dice)],
            family=family,
            format="chat" if question else "plain",
        )

    def drawing(self, index: int) -> EmojiDrawing:
        """What record `index` shows; every drawing once in each round of all of them."""
        if not 0 <= index < self._size:
            raise IndexError(f"index {index} is outside the {self._size} records of this source")
        return self._drawings[self._rounds[index]]


# --- words ----------------------------------------------------------------------------------------


def _families_of(drawing: EmojiDrawing, families: Shares) -> tuple[str, ...]:
    """What can be said of a drawing; two tags at least are a list of them."""
    lacking = TAGS if len(drawing.tags) < 2 else None
    return tuple(family for family in families.things if family != lacking)


def _words(drawing: EmojiDrawing, family: str, dice: Dice) -> tuple[str, str]:
    """Question (none for a caption) and answer."""
    if family == NAME:
        usual = dice.unit() < QUESTION_SHARE
        return QUESTION if usual else dice.choice(PARAPHRASES), drawing.name
    if family == TAGS:
        return dice.choice(TAG_QUESTIONS), ", ".join(_some_tags(drawing, dice))
    # The groups of OpenMoji's own additions say nothing of what is shown.
    if family == GROUP and (drawing.group.startswith("extras") or dice.unit() < 0.5):
        return SUBGROUP_QUESTION, drawing.subgroup.replace("-", " ")
    if family == GROUP:
        return GROUP_QUESTION, drawing.group.replace("-", " and ")
    form = dice.below(3)
    if form == 1 and drawing.tags:
        return "", f"{drawing.name}: {', '.join(_some_tags(drawing, dice))}"
    if form == 2:
        return "", f"{drawing.name}, {drawing.subgroup.replace('-', ' ')}"
    return "", drawing.name


def _some_tags(drawing: EmojiDrawing, dice: Dice) -> list[str]:
    """So many at most, in their order."""
    chosen = set(dice.shuffled(drawing.tags)[:MOST_TAGS])
    return [tag for tag in drawing.tags if tag in chosen]


# --- pictures -------------------------------------------------------------------------------------


def _picture(drawing: EmojiDrawing, split: Split, dice: Dice) -> Image.Image:
    """The drawing somewhere on its paper, RGB, `PIXELS` on each side."""
    sprite = drawing.open()
    if dice.unit() < COLOUR_SHARE:
        sprite = _recoloured(sprite, dice)
    angle = 0.0 if dice.unit() < UPRIGHT_SHARE else dice.between(-MOST_ANGLE, MOST_ANGLE)
    if angle:
        sprite = sprite.rotate(angle, Image.Resampling.BILINEAR, expand=True)
    whole = dice.unit() < WHOLE_SHARE
    side = PIXELS if whole else round(PIXELS * dice.between(LEAST, 1))
    if sprite.width != side:
        sprite = sprite.resize((side, side), Image.Resampling.BICUBIC)
    picture = _paper(split, dice)
    left, top = (dice.below(PIXELS - side + 1) for _ in range(2))
    picture.paste(sprite, (left, top), sprite)
    if dice.unit() < BLUR_SHARE:
        picture = picture.filter(ImageFilter.GaussianBlur(dice.between(0.5, 1.5)))
    if dice.unit() < GREY_SHARE and not _is_told_by_colour(drawing):
        picture = picture.convert("L").convert("RGB")
    return picture


def _is_told_by_colour(drawing: EmojiDrawing) -> bool:
    return drawing.group == "flags" or bool(COLOURS & set(drawing.name.lower().split()))


def _paper(split: Split, dice: Dice) -> Image.Image:
    """White, of one colour, or of two that run into each other."""
    if dice.unit() < WHITE_SHARE:
        return Image.new("RGB", (PIXELS, PIXELS), "white")
    corners = draw_background(dice, split).corners
    if len(set(corners)) == 1:
        return Image.new("RGB", (PIXELS, PIXELS), corners[0])
    colours = Image.frombytes("RGB", (2, 2), bytes(sum(corners, ())))
    return colours.resize((PIXELS, PIXELS), Image.Resampling.BILINEAR)


def _recoloured(sprite: Image.Image, dice: Dice) -> Image.Image:
    """A little paler or stronger, darker or lighter, warmer or colder; red stays red."""
    colours = ImageEnhance.Color(sprite.convert("RGB")).enhance(dice.between(0.6, 1.4))
    light = dice.between(0.8, 1.15)
    gains = [light * dice.between(0.93, 1.07) for _ in range(3)]
    table = [min(255, round(gain * value)) for gain in gains for value in range(256)]
    changed = colours.point(table)
    changed.putalpha(sprite.getchannel("A"))
    return changed


__all__ = ["FAMILIES", "EmojiSource"]
