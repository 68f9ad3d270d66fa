"""Real pictures with words as a data source of a recipe: captions, names, keywords, categories.

    kind: picture_set
    options: {set: openclipart, size: 10000, families: {name: 2, caption: 1, keywords: 1}}

Every picture of which one of the families can be said comes equally often.  A twentieth of the
pictures is `held_out`, by a hash of what they are called, so that five drawings of one apple are on
one side.  Easy to get wrong: records carry where a picture lies, with its size, and no pixels;
they are read when a record is encoded.
"""

import hashlib
from collections.abc import Mapping
from typing import Any

from eve_vlm.data.picture_sets.store import SETS, set_store
from eve_vlm.data.picture_store import PictureStore
from eve_vlm.data.records import Record, messages_of
from eve_vlm.data.rounds import Rounds
from eve_vlm.data.source_options import REQUIRED, Shares, check_size, check_split, read_options
from eve_vlm.data.splits import Dice

KIND = 0x9C75  # sets its dice apart from those of other kinds with the same seed
FAMILIES = ("caption", "name", "describe", "keywords", "category")
OPTIONS: dict[str, tuple[type, Any]] = {
    "set": (str, REQUIRED),
    "size": (int, REQUIRED),
    "families": (dict, REQUIRED),
    "split": (str, "train"),
}
HELD_OUT = 20  # one picture in so many

QUESTIONS = {
    "name": ("What is this?", "Name this.", "What does the picture show?", "What do you see?"),
    "describe": ("Describe the picture.", "What can be seen here?", "Give the picture a caption."),
    "keywords": ("Which words go with this?", "Give keywords for the picture."),
    "category": ("What kind of thing is this?", "Which category is the picture from?"),
}


class PictureSetSource:
    """Pictures of one set by number: record `index` depends on options, seed and `index` alone.

    Args:
        store: all pictures of the set.
        numbers: those to show.
        size: how many records there are.
        families: what to say, and how often.
        key: non-negative integers; equal keys give equal records.
        name: what the set is called.
    """

    def __init__(
        self,
        store: PictureStore,
        numbers: list[int],
        *,
        size: int,
        families: Shares,
        key: tuple[int, ...],
        name: str,
    ) -> None:
        self.store, self.numbers, self.name = store, numbers, name
        self._size, self._families, self._key = size, families, key
        self._rounds = Rounds(len(numbers), key)

    @classmethod
    def from_options(cls, options: Mapping[str, Any], *, seed: int) -> "PictureSetSource":
        """Reads a recipe's options.

        Raises:
            ValueError: if an option is unknown, missing or does not fit, or the set is neither
                made yet nor fetched.
        """
        given = read_options(options, OPTIONS, of="picture_set")
        size = check_size(given["size"], of="picture_set")
        families = Shares(given["families"], FAMILIES, of="picture_set")
        name, split = given["set"], given["split"]
        check_split(split, of="picture_set")
        store = set_store(name)
        numbers = [
            number
            for number, facts in enumerate(store.facts)
            if is_held_out(name, facts) == (split == "held_out") and _known(facts, families)
        ]
        if not numbers:
            raise ValueError(
                f"No picture of {name} in split {split} has {', '.join(families.things)}; give "
                f"other families of {', '.join(FAMILIES)}."
            )
        key = (seed, KIND, list(SETS).index(name), int(split != "train"))
        return cls(store, numbers, size=size, families=families, key=key, name=name)

    def __len__(self) -> int:
        """Number of records."""
        return self._size

    def __getitem__(self, index: int) -> Record:
        """Record `index`."""
        if not 0 <= index < self._size:
            raise IndexError(f"index {index} is outside the {self._size} records of this source")
        number = self.numbers[self._rounds[index]]
        facts, dice = self.store.facts[number], Dice(*self._key, index)
        family = self._families.draw(dice.unit(), _known(facts, self._families))
        question = dice.choice(QUESTIONS[family]) if family in QUESTIONS else ""
        answer = _answer(facts, family, dice)
        return Record(
            id=f"{self.name}-{facts['id']}-{index}",
            messages=messages_of([(question, answer)]),
            images=[self.store.picture(number)],
            family=family,
            format="chat" if question else "plain",
        )


def is_held_out(name: str, facts: Mapping[str, Any]) -> bool:
    """Whether a picture of a set belongs to the split `held_out`; those called alike go with it."""
    called = facts["name"] or facts["caption"] or facts["id"]
    digest = hashlib.sha256(f"eve-vlm picture set 1 {name} {called}".encode()).digest()
    return int.from_bytes(digest[:4], "big") % HELD_OUT == 0


def _known(facts: Mapping[str, Any], families: Shares) -> tuple[str, ...]:
    """Which of the families can be said of a picture."""
    known = {
        "caption": facts["caption"] or facts["name"],
        "name": facts["name"],
        "describe": facts["caption"],
        "keywords": len(facts["keywords"]) > 1,
        "category": facts["category"],
    }
    return tuple(family for family in families.things if known[family])


def _answer(facts: Mapping[str, Any], family: str, dice: Dice) -> str:
    if family == "describe":
        return str(facts["caption"])
    if family == "keywords":
        return ", ".join(facts["keywords"])
    if family != "caption":
        return str(facts[family])
    captions = [words for words in (facts["caption"], facts["name"]) if words]
    if facts["name"] and facts["keywords"]:
        captions.append(f"{facts['name']}: {', '.join(facts['keywords'])}")
    return str(dice.choice(captions))


__all__ = ["FAMILIES", "PictureSetSource", "is_held_out"]
