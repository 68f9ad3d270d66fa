"""What a reader of a picture set hands on: one picture, not opened yet, and the words for it.

Easy to get wrong: empty words mean that nobody knows, and then the question is not asked; a reader
never fills in what the set does not say.
"""

import re
from dataclasses import dataclass, field
from typing import Any

_SPACES = re.compile(r"\s+")
_ARTICLE = re.compile(r"^(?:an?|the|some)\s+", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True, slots=True)
class Found:
    """One picture of a set."""

    id: str
    """Its place in the set, always the same."""
    path: str = ""
    """The picture or SVG file; empty where `data` has it."""
    data: bytes = field(default=b"", repr=False)
    """The picture file, where it lies in another file."""
    name: str = ""
    """What it shows, in a few words."""
    caption: str = ""
    """What it shows, in a sentence or a title."""
    keywords: tuple[str, ...] = ()
    """Words that go with it."""
    category: str = ""
    """The kind of thing that it is one of."""

    @property
    def facts(self) -> dict[str, Any]:
        """What is stored beside the pixels."""
        return {
            "id": self.id,
            "name": self.name,
            "caption": self.caption,
            "keywords": list(self.keywords),
            "category": self.category,
        }


def tidied(text: str) -> str:
    """One line, single spaces, nothing around it."""
    return _SPACES.sub(" ", text).strip()


def name_in(caption: str) -> str:
    """The name that a caption of a few words is: without article and full stop; else empty.

    >>> name_in("A wooden clothes hanger.")
    'wooden clothes hanger'
    >>> name_in("The red light means you must stop now.")
    ''
    """
    if not _ARTICLE.match(caption) or len(caption.split()) > 5:
        return ""
    if set(caption.rstrip(".")) & set(".,!?;:()"):
        return ""
    return _ARTICLE.sub("", caption.rstrip("."))


__all__ = ["Found", "name_in", "tidied"]
