"""Emoji in Noto's style with the names and tags of OpenMoji, from the fetched assets.

Noto comes as one file with the inside of 3,800 SVG files; a drawing is rendered when it is first
asked for and kept as a PNG file in the cache folder.  Easy to get wrong: neither drawings nor tags
may enter this repository (licences, see docs/assets.md), so a task knows code points only and finds
the rest here.
"""

import hashlib
import io
import json
import os
import tempfile
from collections.abc import Mapping
from functools import cached_property
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from PIL import Image

from eve_vlm.assets.catalogue import asset_folder, find_asset
from eve_vlm.cache import cache_folder
from eve_vlm.data.emoji_concepts import concept_key
from eve_vlm.data.pictograms import SEEN, UNSEEN
from eve_vlm.eval.task import MissingDataError

PIXELS = 224
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
            self._noto, self._openmoji = asset_folder("noto"), asset_folder("openmoji")
        except ValueError as error:
            raise MissingDataError(
                f"{error} The task needs Noto's drawings and OpenMoji's names: "
                "`eve assets fetch noto openmoji`."
            ) from None
        self._resvg = _renderer()
        version = repr((find_asset("noto").versions, PIXELS))
        self._cache = cache_folder() / f"noto-{hashlib.sha256(version.encode()).hexdigest()[:12]}"

    def picture(self, concept: str) -> Image.Image:
        """The drawing on white, RGB, `PIXELS` on each side."""
        path = self._cache / f"{concept}.png"
        try:
            with Image.open(path) as picture:
                return picture.convert("RGB")
        except OSError:  # not rendered yet, or damaged: nothing in a cache is lost
            return self._render(concept, path)

    def body(self, concept: str) -> str:
        """The inside of the drawing's SVG."""
        icons, aliases = self._icons["icons"], self._icons.get("aliases", {})
        name = self._names[concept]
        while name not in icons:
            name = aliases[name]["parent"]
        return str(icons[name]["body"])

    def words(self, concept: str) -> Words:
        """Names and tags of a concept.

        Names are OpenMoji's annotation; Noto's name and its older ones unless they are the
        annotation of another concept; and the word of the demo's pictograms where it has one.
        """
        entry, noto = self._entries[concept], self._names[concept]
        older = [name for name, one in self._aliases.items() if one["parent"] == noto]
        annotation = entry["annotation"]
        names = [name.replace("-", " ") for name in (noto, *sorted(older))]
        names = [annotation, *(name for name in names if name not in self._annotations)]
        names += [OUR_WORDS[concept]] if concept in OUR_WORDS else []
        tags = f"{entry['tags']},{entry['openmoji_tags']}".split(",")
        return Words(
            tuple(dict.fromkeys(names)),
            tuple(dict.fromkeys(tag.strip() for tag in tags if tag.strip())),
        )

    # --- inside -----------------------------------------------------------------------------------

    @cached_property
    def _entries(self) -> dict[str, Mapping[str, Any]]:
        entries = json.loads((self._openmoji / "openmoji.json").read_text(encoding="utf-8"))
        return {concept_key(entry["hexcode"]): entry for entry in entries}

    @cached_property
    def _annotations(self) -> frozenset[str]:
        return frozenset(entry["annotation"].lower() for entry in self._entries.values())

    @cached_property
    def _names(self) -> dict[str, str]:
        """{concept: Noto's name of it}."""
        names = json.loads((self._noto / "chars.json").read_text(encoding="utf-8"))
        return {concept_key(code): name for code, name in names.items()}

    @cached_property
    def _icons(self) -> dict[str, Any]:
        icons: dict[str, Any] = json.loads((self._noto / "icons.json").read_text(encoding="utf-8"))
        return icons

    @cached_property
    def _aliases(self) -> dict[str, dict[str, str]]:
        aliases: dict[str, dict[str, str]] = self._icons.get("aliases", {})
        return aliases

    def _render(self, concept: str, path: Path) -> Image.Image:
        width, height = self._icons["width"], self._icons["height"]
        png = self._resvg.svg_to_bytes(
            svg_string=f'<svg xmlns="http://www.w3.org/2000/svg" '
            f'xmlns:xlink="http://www.w3.org/1999/xlink" viewBox="0 0 {width} {height}">'
            f"{self.body(concept)}</svg>",
            width=PIXELS,
            height=PIXELS,
            skip_system_fonts=True,
        )
        with Image.open(io.BytesIO(png)) as rendered:
            drawing = rendered.convert("RGBA")
        picture = Image.new("RGB", drawing.size, "white")
        picture.paste(drawing, mask=drawing.getchannel("A"))
        _write(path, picture)
        return picture


def _renderer() -> ModuleType:
    try:
        return import_module("resvg_py")
    except ImportError:
        raise MissingDataError(
            "Emoji are drawn by the Python package resvg-py, which is not installed; run "
            "`pip install 'eve-vlm[demo]'`."
        ) from None


def _write(path: Path, picture: Image.Image) -> None:
    """To a file of our own, then rename: another process sees the whole file or none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".part")
    try:
        with os.fdopen(handle, "wb") as stream:
            picture.save(stream, format="PNG")
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


__all__ = ["PIXELS", "EmojiPictures", "Words"]
