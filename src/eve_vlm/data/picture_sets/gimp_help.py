"""The figures of the handbook of GIMP: screenshots, photographs and what filters make of them.

A figure's title is the `alt` of its pictures; a picture may have a caption beside.  Easy to get
wrong: one picture ("Original image") stands in many figures, so it is taken where it comes first.
"""

import re
from html.parser import HTMLParser
from pathlib import Path

from eve_vlm.data.picture_sets.found import Found, tidied

# What the pictures of a folder are, where they all are one thing.
KINDS = {
    "images/dialogs": "screenshot of a dialog",
    "images/preferences": "screenshot of a dialog",
    "images/filters/examples": "example of a filter",
}
_NUMBER = re.compile(r"^(?:Figure|Example)\s+[\w.]+\.\s*")


def find_pictures(folder: Path) -> list[Found]:
    """Every figure once, in the order of the pages."""
    found: dict[str, Found] = {}
    for page in sorted((folder / "html").glob("*.html")):
        figures = _Figures()
        figures.feed(page.read_text(encoding="utf-8", errors="replace"))
        for source, title, caption in figures.found:
            path = folder / "html" / source
            words = ": ".join(filter(None, [_NUMBER.sub("", tidied(title)), tidied(caption)]))
            # One word ("Result") says nothing outside of its page.
            if " " in words and source not in found and path.is_file():
                found[source] = Found(
                    id=source, path=str(path), caption=words, category=_kind(source)
                )
    return list(found.values())


def _kind(source: str) -> str:
    return next((kind for folder, kind in KINDS.items() if source.startswith(folder + "/")), "")


class _Figures(HTMLParser):
    """(source, title, caption) of every picture in a `mediaobject`."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, str, str]] = []
        self._open: list[str] = []  # classes of the open divs

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        if tag == "div":
            self._open.append(values.get("class", ""))
        elif tag == "img" and "mediaobject" in self._open:
            self.found.append((values.get("src", ""), values.get("alt", ""), ""))

    def handle_endtag(self, tag: str) -> None:
        if tag == "div" and self._open:
            self._open.pop()

    def handle_data(self, data: str) -> None:
        if "caption" in self._open and self.found:
            source, title, caption = self.found[-1]
            self.found[-1] = (source, title, caption + data)


__all__ = ["find_pictures"]
