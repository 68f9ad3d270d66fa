"""What collages are composed of: emoji that can be named in a word or two, in several styles.

Names are OpenMoji's annotations; the style `pictograms` has the demo's forty drawings under their
own short words.  Easy to get wrong: `cat` and `cat face` are two emoji, of which each could pass
for the other, so no scene shows or asks about two things whose names share a word; and pairs of
the demo's concepts that its held-out scenes show stay apart here too.
"""

import re
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

from PIL import Image

from eve_vlm.cache import cache_folder
from eve_vlm.data.emoji_concepts import concept_key
from eve_vlm.data.emoji_styles import STYLES, EmojiDrawing, emoji_drawings
from eve_vlm.data.pictograms import (
    RENDER_SIZE,
    SEEN,
    Pictograms,
    Sprite,
    load_pictograms,
    scaled_size,
)
from eve_vlm.data.splits import is_kept_pair

PICTOGRAMS = "pictograms"
ALL_STYLES = (PICTOGRAMS, *STYLES)
GROUPS = frozenset({"animals-nature", "food-drink", "travel-places", "activities", "objects"})
# A word or two; not already many (`jeans`), and not with an `a` in spite of its first letter.
NAME = re.compile(r"(?!uni|euro|hour|one\b)[a-z]{2,}( [a-z]{2,})?(?:(?<=[a-rt-z])|(?<=ss))")
SEEN_PLACES = {concept_key(code): place for place, code in enumerate(SEEN.values())}


class Thing(NamedTuple):
    """One drawing that a collage can show."""

    name: str
    style: str
    code: str
    """The concept (`concept_key`)."""
    subgroup: str
    """Like things: `animal-mammal`; empty for pictograms."""
    drawing: EmojiDrawing | None
    """None for pictograms."""

    @property
    def key(self) -> str:
        """Names the drawing."""
        return f"{self.style}/{self.code}"


def things_of(styles: Sequence[str]) -> dict[str, tuple[Thing, ...]]:
    """{style: its things}.

    Raises:
        ValueError: if a style is unknown or not there.
    """
    unknown = [style for style in styles if style not in ALL_STYLES]
    if unknown or not styles:
        raise ValueError(
            f"data.sources.options.styles is {list(styles)!r} for collages; use some of "
            f"{', '.join(ALL_STYLES)}."
        )
    found: dict[str, list[Thing]] = {style: [] for style in styles}
    emoji = [style for style in styles if style != PICTOGRAMS]
    for one in emoji_drawings(emoji, split="train") if emoji else []:
        if one.group in GROUPS and NAME.fullmatch(one.name):
            found[one.style].append(Thing(one.name, one.style, one.code, one.subgroup, one))
    if PICTOGRAMS in found:
        found[PICTOGRAMS] = [
            Thing(word, PICTOGRAMS, concept_key(code), "", None) for word, code in SEEN.items()
        ]
    return {style: tuple(things) for style, things in found.items()}


def apart(first: Thing, second: Thing) -> bool:
    """Whether the two can be in one scene or one question: no word in common, no held-out pair."""
    if set(first.name.split()) & set(second.name.split()) or first.code == second.code:
        return False
    places = [SEEN_PLACES.get(thing.code) for thing in (first, second)]
    return None in places or not is_kept_pair(*places)  # type: ignore[arg-type]


class Drawings(Pictograms):
    """Drawings of things by their key, turned and scaled when they are asked for.

    Thousands of drawings in every size would take gigabytes, so only the upright ones are kept.
    """

    def __init__(self, things: Sequence[Thing]) -> None:
        super().__init__({})
        self._things = {thing.key: thing for thing in things}
        shown = any(thing.drawing is None for thing in things)
        self._pictograms = load_pictograms(cache_folder()) if shown else None

    def drawing(self, concept: str) -> Image.Image:
        """The whole upright drawing of a key, as RGBA."""
        thing = self._things[concept]
        if thing.drawing is None:
            assert self._pictograms is not None
            return self._pictograms.drawing(thing.name)
        return _small(thing.drawing)

    def turned(self, concept: str, angle: int) -> Image.Image:
        """The drawing turned against the clock, cropped to what is visible."""
        thing = self._things[concept]
        if thing.drawing is None:
            assert self._pictograms is not None
            return self._pictograms.turned(thing.name, angle)
        return _turned(thing.drawing, angle)

    def sprite(self, concept: str, *, size: int, angle: int) -> Sprite:
        """The turned drawing, its longer visible side `size` pixels long."""
        turned = self.turned(concept, angle)
        scaled = turned.resize(scaled_size(turned, size), Image.Resampling.BICUBIC)
        return Sprite(scaled.convert("RGB"), scaled.getchannel("A"))


@lru_cache(maxsize=4096)  # 36 KB each
def _small(drawing: EmojiDrawing) -> Image.Image:
    return drawing.open().resize((RENDER_SIZE, RENDER_SIZE), Image.Resampling.BOX, reducing_gap=2.0)


@lru_cache(maxsize=64)  # a scene measures what it then draws
def _turned(drawing: EmojiDrawing, angle: int) -> Image.Image:
    turned = _small(drawing).rotate(angle, resample=Image.Resampling.BICUBIC, expand=True)
    # 8 of 255: below it a pixel cannot be seen, and it would make the box too large.
    visible = turned.getchannel("A").point(lambda alpha: 255 * (alpha >= 8))
    return turned.crop(visible.getbbox())


__all__ = ["ALL_STYLES", "PICTOGRAMS", "Drawings", "Thing", "apart", "things_of"]
