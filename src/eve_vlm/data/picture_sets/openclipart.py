"""Openclipart 0.18: drawings as PNG, with title, keywords and description in the SVG beside them.

Easy to get wrong: a title that many drawings share is the name of a collection ("Map Symbols"), not
of what is drawn, and a whole author's titles are Italian; such drawings keep their folder and
keywords as all that is known.
"""

import html
import json
import re
from collections import Counter
from pathlib import Path

from eve_vlm.data.picture_sets.found import Found, tidied

# Icon themes, 1,378 computed stars, playing cards of one title, patterns, what nobody sorted.
LEFT_OUT = (
    *("computer/icons/", "shapes/stars/", "recreation/games/cards/", "special/", "unsorted/"),
    "signs_and_symbols/led/",
)
MOST_SHARED = 5  # drawings of one title; more are a collection
MOST_KEYWORDS = 6
NO_NAMES = re.compile(
    r"\btheme\b|icon ?set|\bicons?\b|clipart|flat icon|gramastar|submission|\d{3}|^\W*$",
    re.IGNORECASE,
)
NO_WORDS = re.compile(
    r"@|https?:|HASH\(|0x[0-9a-f]{5}|archit|clipart|united.nations|^(hash|unsorted)$", re.I
)
FOREIGN = ("archite", "_archi", "rollandin")  # in file names and keywords of the Italian titles
_WORK = re.compile(r"<cc:Work.*?</cc:Work>", re.DOTALL)
_COUNTRY = re.compile(r"^signs_and_symbols/flags/(?!semaphore|misc)")


def find_pictures(folder: Path) -> list[Found]:
    """The drawings that are worth showing, by name."""
    second_names = set(json.loads((folder / "manifest.json").read_text("utf-8"))["links"])
    drawings = []
    for path in sorted((folder / "png").rglob("*.png")):
        place = path.relative_to(folder / "png").as_posix()
        if f"png/{place}" not in second_names and not place.startswith(LEFT_OUT):
            drawings.append((place, path, _metadata(folder / "svg" / place)))
    shared = Counter(title for _, _, (title, _, _) in drawings)
    return [
        Found(
            id=place,
            path=str(path),
            name=_name(place, title, keywords) if shared[title] <= MOST_SHARED else "",
            caption=_described(description, title),
            keywords=_kept(keywords),
            category=_category(place),
        )
        for place, path, (title, description, keywords) in drawings
    ]


def _metadata(png_place: Path) -> tuple[str, str, list[str]]:
    """Title, description and keywords; empty ones where there are none."""
    path = png_place.with_suffix(".svg")
    if not path.is_file():
        return "", "", []
    work = _WORK.search(path.read_text(encoding="utf-8", errors="replace"))
    if work is None:
        return "", "", []

    def values(tag: str) -> list[str]:
        found = re.findall(rf"<{tag}>(.*?)</{tag}>", work[0], re.DOTALL)
        return [tidied(html.unescape(value)) for value in found]

    title, description = ((values(f"dc:{tag}") or [""])[0] for tag in ("title", "description"))
    return title, description, values("rdf:li")


def _name(place: str, title: str, keywords: list[str]) -> str:
    """What a title calls the drawing, in small letters except for flags."""
    title = re.sub(r"\s*\(B and W\)|_bw\b", "", title)
    foreign = any(mark in text for mark in FOREIGN for text in (place, *keywords))
    if foreign or NO_NAMES.search(title) or NO_WORDS.search(title):
        return ""
    title = tidied(re.sub(r"[_-]?\d{1,2}$", "", title.replace("_", " ")))
    if _COUNTRY.match(place):
        return f"flag: {title if title[:1].isupper() else title.title()}"  # as OpenMoji says it
    return title.lower()


def _described(description: str, title: str) -> str:
    long_enough = 3 <= len(description.split()) <= 40
    if not long_enough or NO_WORDS.search(description) or description.lower() == title.lower():
        return ""
    return description


def _kept(keywords: list[str]) -> tuple[str, ...]:
    words = (tidied(word.replace("_", " ")).lower() for word in keywords)
    kept = [word for word in words if 1 < len(word) < 25 and not NO_WORDS.search(word)]
    return tuple(dict.fromkeys(kept))[:MOST_KEYWORDS]


def _category(place: str) -> str:
    """The folders, two at most: `animals, birds`."""
    return ", ".join(part.replace("_", " ") for part in place.split("/")[:-1][:2])


__all__ = ["find_pictures"]
