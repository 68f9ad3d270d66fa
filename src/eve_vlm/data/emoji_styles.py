"""Emoji of four styles with the names, tags and groups of OpenMoji, from the fetched assets.

Noto, Twemoji and Fluent come in Iconify's form: one file with the inside of thousands of SVG files.
Each style is drawn once into a store of its own (`picture_store.py`).  Easy to get wrong: a style's
own names do not agree with the others' (`cat-face`, `cat`); a concept is its code points, and what
it is called is OpenMoji's annotation whatever the style.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import cached_property, partial
from typing import Any, NamedTuple

from PIL import Image

from eve_vlm.assets.catalogue import asset_folder, find_asset
from eve_vlm.data.emoji_concepts import SKIN_TONES, concept_key, is_held_out
from eve_vlm.data.picture_store import Drawn, LeftOut, PictureStore, kept_pictures, webp
from eve_vlm.data.source_options import check_split
from eve_vlm.data.svg_drawing import draw_svg, svg_renderer

OPENMOJI, NOTO = "openmoji", "noto"
STYLES = (OPENMOJI, NOTO, "twemoji", "fluent-emoji-flat")
"""Names of the assets; each is a style."""
PIXELS = 224  # sides of a drawing; those of the task `naming`
VERSION = 1  # of the facts and drawings below; another one is drawn anew


class OpenMoji:
    """OpenMoji's drawings, and its words, which name the emoji of every style.

    Raises:
        ValueError: if the asset is not there; says what to run.
    """

    def __init__(self) -> None:
        self._folder = asset_folder(OPENMOJI)

    @cached_property
    def entries(self) -> dict[str, Mapping[str, Any]]:
        """{concept: annotation, tags, group and more}, in the order of OpenMoji."""
        entries = json.loads((self._folder / "openmoji.json").read_text(encoding="utf-8"))
        return {concept_key(entry["hexcode"]): entry for entry in entries}

    @cached_property
    def annotations(self) -> frozenset[str]:
        """All names, in small letters."""
        return frozenset(entry["annotation"].lower() for entry in self.entries.values())

    def tags(self, concept: str) -> tuple[str, ...]:
        """Words that go with a concept, and with others too; each once."""
        entry = self.entries[concept]
        tags = f"{entry['tags']},{entry['openmoji_tags']}".split(",")
        return tuple(dict.fromkeys(tag.strip() for tag in tags if tag.strip()))

    def has(self, concept: str) -> bool:
        """Whether it is drawn."""
        return concept in self.entries

    def svg(self, concept: str) -> str:
        """The drawing."""
        path = self._folder / "svg" / f"{self.entries[concept]['hexcode']}.svg"
        return path.read_text(encoding="utf-8")


class IconSet:
    """A style in Iconify's form.

    Args:
        name: the asset.

    Raises:
        ValueError: if the asset is not there; says what to run.
    """

    def __init__(self, name: str) -> None:
        self._folder = asset_folder(name)

    @cached_property
    def names(self) -> dict[str, str]:
        """{concept: the style's own name of it}."""
        names = json.loads((self._folder / "chars.json").read_text(encoding="utf-8"))
        return {concept_key(code): name for code, name in names.items()}

    @cached_property
    def aliases(self) -> dict[str, dict[str, str]]:
        """{older name: {"parent": name}}."""
        aliases: dict[str, dict[str, str]] = self._content.get("aliases", {})
        return aliases

    def has(self, concept: str) -> bool:
        """Whether it is drawn."""
        return concept in self.names

    def body(self, concept: str) -> str:
        """The inside of a drawing's SVG."""
        return str(self._icon(concept)["body"])

    def svg(self, concept: str) -> str:
        """The drawing."""
        icon = self._icon(concept)
        width, height = (icon.get(side, self._content[side]) for side in ("width", "height"))
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" '
            f'xmlns:xlink="http://www.w3.org/1999/xlink" viewBox="0 0 {width} {height}">'
            f"{icon['body']}</svg>"
        )

    def _icon(self, concept: str) -> Mapping[str, Any]:
        icons, name = self._content["icons"], self.names[concept]
        while name not in icons:
            name = self.aliases[name]["parent"]
        icon: Mapping[str, Any] = icons[name]
        return icon

    @cached_property
    def _content(self) -> dict[str, Any]:
        content: dict[str, Any] = json.loads(
            (self._folder / "icons.json").read_text(encoding="utf-8")
        )
        return content


class EmojiDrawing(NamedTuple):
    """One emoji in one style, not opened yet."""

    style: str
    """One of `STYLES`."""
    code: str
    """The concept: its code points (`concept_key`)."""
    name: str
    """What it is called: OpenMoji's annotation."""
    tags: tuple[str, ...]
    """Words that go with it, and with others too."""
    group: str
    """Unicode's group: `animals-nature`."""
    subgroup: str
    """A part of the group: `animal-mammal`."""
    store: PictureStore
    """Where it is kept."""
    number: int
    """Its place there."""

    def open(self) -> Image.Image:
        """The drawing, RGBA, `PIXELS` on each side."""
        return self.store.drawing(self.number)


def emoji_drawings(styles: Sequence[str], *, split: str) -> list[EmojiDrawing]:
    """The drawings of a split, without skin tones, by style and in the order of OpenMoji.

    `train` leaves out every Noto drawing that `is_held_out` knows, and those that look the same as
    one of them; `held_out` has just the former.

    Raises:
        ValueError: if a style or split is unknown, or a style is neither drawn yet nor fetched.
    """
    check_split(split, of="emoji")
    return [
        EmojiDrawing(
            style=style,
            code=facts["code"],
            name=facts["name"],
            tags=tuple(facts["tags"]),
            group=facts["group"],
            subgroup=facts["subgroup"],
            store=store,
            number=number,
        )
        for style in styles
        for store in [style_store(style)]
        for number, facts in _of_split(style, store.facts, split)
    ]


def style_store(style: str) -> PictureStore:
    """All drawings of a style, without skin tones; drawn on all cores where they are not yet.

    Raises:
        ValueError: if there is no such style, or it is not drawn yet and an asset or the renderer
            is missing; says what to run.
    """
    if style not in STYLES:
        raise ValueError(f"There is no emoji style {style!r}; use {', '.join(STYLES)}.")
    versions = [find_asset(name).versions for name in (OPENMOJI, style)]
    return kept_pictures(
        f"emoji-{style}",
        [VERSION, PIXELS, versions],
        partial(_jobs, style),
        _draw,
    )


def _of_split(
    style: str, facts: Sequence[Mapping[str, Any]], split: str
) -> list[tuple[int, Mapping[str, Any]]]:
    closed = [style == NOTO and is_held_out(one["code"]) for one in facts]
    if split == "held_out":
        return [(n, one) for n, one in enumerate(facts) if closed[n]]
    # Two concepts can share a drawing; it is held out if one of them is.
    hidden = {one["drawing"] for n, one in enumerate(facts) if closed[n]}
    return [(n, one) for n, one in enumerate(facts) if one["drawing"] not in hidden]


def _jobs(style: str) -> list[tuple[dict[str, Any], str]]:
    """Facts and SVG of every drawing."""
    svg_renderer()  # says here, once, that it is missing
    words = OpenMoji()
    drawings = words if style == OPENMOJI else IconSet(style)
    jobs = []
    for concept, entry in words.entries.items():
        if SKIN_TONES & set(concept.split("-")) or not drawings.has(concept):
            continue
        svg = drawings.svg(concept)
        facts = {
            "code": concept,
            "name": entry["annotation"],
            "tags": words.tags(concept),
            "group": entry["group"],
            "subgroup": entry["subgroups"],
            "drawing": hashlib.sha256(svg.encode()).hexdigest()[:16],
        }
        jobs.append((facts, svg))
    return jobs


def _draw(job: tuple[dict[str, Any], str]) -> Drawn | LeftOut:
    facts, svg = job
    # Flat colours: without loss they take fewer bytes than with it, 2 to 6 kB.
    return webp(_squared(draw_svg(svg, width=PIXELS)), facts, lossless=True)


def _squared(drawing: Image.Image) -> Image.Image:
    """In the middle of a square that is not coloured; a few of Twemoji's are lower than wide."""
    if drawing.size == (PIXELS, PIXELS):
        return drawing
    drawing.thumbnail((PIXELS, PIXELS), Image.Resampling.BICUBIC)
    square = Image.new("RGBA", (PIXELS, PIXELS))
    square.paste(drawing, ((PIXELS - drawing.width) // 2, (PIXELS - drawing.height) // 2))
    return square


__all__ = [
    "NOTO",
    "OPENMOJI",
    "PIXELS",
    "STYLES",
    "EmojiDrawing",
    "IconSet",
    "OpenMoji",
    "emoji_drawings",
    "style_store",
]
