"""Emoji in Noto's style with the names and tags of OpenMoji, from the fetched assets.

Noto comes as one file with the inside of 3,800 SVG files; a drawing is rendered when it is first
asked for and kept as a PNG file in the cache folder.  Easy to get wrong: neither drawings nor tags
may enter this repository (licences, see docs/assets.md), so a task knows code points only and finds
the rest here.
"""

import hashlib
from functools import partial
from typing import NamedTuple

from PIL import Image

from eve_vlm.assets.catalogue import find_asset
from eve_vlm.cache import cache_folder
from eve_vlm.data.emoji_concepts import concept_key
from eve_vlm.data.emoji_styles import NOTO, PIXELS, IconSet, OpenMoji
from eve_vlm.data.pictograms import SEEN, UNSEEN
from eve_vlm.data.rendered.kept_picture import kept_png
from eve_vlm.data.svg_drawing import draw_svg, on_white, svg_renderer
from eve_vlm.eval.task import MissingDataError

OUR_WORDS = {concept_key(code): word for word, code in (SEEN | UNSEEN).items()}


class Words(NamedTuple):
    """What a concept is called."""

    names: tuple[str, ...]
    """The usual one (OpenMoji's annotation) first; all of them mean this concept alone."""
    tags: tuple[str, ...]
    """Words that go with it and with others too: `animal`, `face`."""


class EmojiPictures:
    """The drawings and words that are on this machine."""

    def __init__(self) -> None:
        """Find both assets and the renderer; reads no drawing yet.

        Raises:
            MissingDataError: if one is missing; says what to run.
        """
        try:
            self._noto, self._openmoji = IconSet(NOTO), OpenMoji()
        except ValueError as error:
            raise MissingDataError(
                f"{error} The task needs Noto's drawings and OpenMoji's names: "
                "`eve assets fetch noto openmoji`."
            ) from None
        try:
            svg_renderer()
        except ValueError as error:
            raise MissingDataError(str(error)) from None
        version = repr((find_asset(NOTO).versions, PIXELS))
        self._cache = cache_folder() / f"noto-{hashlib.sha256(version.encode()).hexdigest()[:12]}"

    def picture(self, concept: str) -> Image.Image:
        """The drawing on white, RGB, `PIXELS` on each side."""
        return kept_png(self._cache / f"{concept}.png", partial(self._render, concept))

    def body(self, concept: str) -> str:
        """The inside of the drawing's SVG."""
        return self._noto.body(concept)

    def words(self, concept: str) -> Words:
        """Names and tags of a concept.

        Names are OpenMoji's annotation; Noto's name and its older ones unless they are the
        annotation of another concept; and the word of the demo's pictograms where it has one.
        """
        annotation, noto = self._openmoji.entries[concept]["annotation"], self._noto.names[concept]
        older = [name for name, one in self._noto.aliases.items() if one["parent"] == noto]
        names = [name.replace("-", " ") for name in (noto, *sorted(older))]
        names = [annotation, *(name for name in names if name not in self._openmoji.annotations)]
        names += [OUR_WORDS[concept]] if concept in OUR_WORDS else []
        return Words(tuple(dict.fromkeys(names)), self._openmoji.tags(concept))

    def _render(self, concept: str) -> Image.Image:
        return on_white(draw_svg(self._noto.svg(concept), width=PIXELS, height=PIXELS))


__all__ = ["PIXELS", "EmojiPictures", "Words"]
