"""Which emoji may be drawn in Noto's style in training: the two halves of the concepts.

The task `naming` shows Noto drawings of concepts whose Noto drawings training never showed, while
the same concepts in other styles are free: same meaning, unseen drawing.  `emoji_concepts.json`
divides the 1,594 concepts that all four styles draw (OpenMoji 17.0, Noto, Twemoji, Fluent), by a
hash.  Easy to get wrong: a man running, a woman running and a person running to the right are
nearly one drawing, in five skin tones each; so the hash is of what they have in common, and
training asks `is_held_out`, which knows all of them, not just the 1,594.
"""

import hashlib
import json
from importlib.resources import files

SKIN_TONES = frozenset({"1F3FB", "1F3FC", "1F3FD", "1F3FE", "1F3FF"})
PEOPLE = frozenset({"1F468", "1F469", "1F9D1"})  # man, woman, person
# Joiner, two forms of a symbol, female and male sign, arrow to the right.
MODIFIERS = frozenset({"200D", "FE0E", "FE0F", "2640", "2642", "27A1"}) | SKIN_TONES


def concept_key(code_points: str) -> str:
    """A concept's name here: code points in capitals without presentation marks.

    >>> concept_key("2764-fe0f")
    '2764'
    """
    parts = code_points.upper().replace(" ", "-").split("-")
    return "-".join(part for part in parts if part not in ("FE0E", "FE0F"))


def drawing_family(code_points: str) -> str:
    """What is left of an emoji without skin tone, gender and direction.

    >>> drawing_family("1F3C3-1F3FD-200D-2640-FE0F")
    '1F3C3'
    >>> drawing_family("1F469-200D-1F680") == drawing_family("1F9D1-200D-1F680")
    True
    """
    parts = concept_key(code_points).split("-")
    kept = [part for part in parts if part not in MODIFIERS] or parts
    things = [part for part in kept if part not in PEOPLE]
    # A man alone is a man; in "man, rocket" the rocket tells what is drawn.
    return "-".join(things or kept)


def is_held_out(code_points: str) -> bool:
    """Whether no drawing of this emoji in Noto's style may be trained on."""
    name = f"eve-vlm emoji concepts 1 {drawing_family(code_points)}"
    return hashlib.sha256(name.encode()).digest()[0] % 2 == 0


def shared_concepts() -> dict[str, tuple[str, ...]]:
    """Keys of the concepts in all four styles, `held out` and `open`, each in its fixed order."""
    path = files("eve_vlm.data") / "emoji_concepts.json"
    halves = json.loads(path.read_text(encoding="utf-8"))
    return {name: tuple(keys) for name, keys in halves.items()}


def held_out_concepts() -> frozenset[str]:
    """Keys (`concept_key`) of the held-out half of the shared concepts."""
    return frozenset(shared_concepts()["held out"])


__all__ = [
    "concept_key",
    "drawing_family",
    "held_out_concepts",
    "is_held_out",
    "shared_concepts",
]
