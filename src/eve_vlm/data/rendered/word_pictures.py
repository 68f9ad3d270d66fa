"""Pictures of one written word, number, name or meaningless string, for training to read.

A model that has read a hundred words knows a hundred words; so most of what is written here is
drawn from thousands: an English dictionary, all numbers, and strings of letters that mean nothing
and can only be spelt.  Easy to get wrong: what `eval/offline/reading.py` asks must not be among it,
neither as a word nor as a number, so every list is cleared of held-out words at the end.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import cache

import numpy as np

from eve_vlm.data.phrases import SEEN_WORDS, UNSEEN_WORDS
from eve_vlm.data.records import Record
from eve_vlm.data.rendered.english import english_words
from eve_vlm.data.rendered.vocabulary import VOCABULARY, PageSplit
from eve_vlm.data.rendered.written_words import WrittenWords, numbers
from eve_vlm.data.scenes import FAMILY_STEP
from eve_vlm.data.splits import Dice

WORD_KEY = 63  # tells these dice from those of other generators with the same seed
GROUPS = {"short": 5.0, "long": 7.0, "number": 4.0, "letters": 3.0, "phrase": 2.0}
"""What is written, and how often unless an option says otherwise."""
MORE_GROUPS = ("character",)
"""What is written where an option asks for it: one letter or digit, to begin with."""
FAMILIES = ("word", "caption_word")
SHORT = 6  # letters; more are too small on a square
NUM_STRINGS = 8_000  # of each length class of `letters`
MOST_DIGITS = 4
OURS = 10
ALPHABET = "abcdefghijklmnopqrstuvwxyz"
# (height, width).  Those of the reading task more often, its long words have 11 pixels a letter.
SQUARE = ((56, 56), (56, 56), (56, 84), (84, 84), (112, 112))
WIDE = ((56, 168), (56, 168), (56, 140), (84, 168), (112, 224))

Part = tuple[tuple[str, ...], tuple[tuple[int, int], ...]]


class WordPictures:
    """Records of one written thing each; groups and families come in the shares of their weights.

    Args:
        size: number of records.
        groups: weights of `GROUPS` and `MORE_GROUPS`.
        families: weights of `FAMILIES`: asked in one of two ways, or captioned `the word ...`.
        dictionary: an asset with English words, for `short` and `long`.
    """

    def __init__(
        self,
        *,
        split: PageSplit,
        size: int,
        seed: int,
        groups: Mapping[str, float],
        families: Mapping[str, float],
        dictionary: str | None = None,
    ) -> None:
        self.split, self._size, self._seed = split, size, seed
        self._parts: list[WrittenWords] = []
        weights: list[float] = []
        for group, weight in groups.items():
            parts = _MAKERS[group](split, seed, dictionary)
            for words, canvases in parts:
                for family, share in families.items():
                    self._parts.append(
                        WrittenWords(
                            words,
                            split=split,
                            size=size,
                            seed=seed,
                            canvases=canvases,
                            family=family,
                            num_phrasings=2,
                            size_range=(0.5, 1.0) if split == "train" else (0.8, 1.0),
                        )
                    )
                    weights.append(weight * share / len(parts))
        self._bounds = np.cumsum(weights) / sum(weights)

    def __len__(self) -> int:
        """Number of records."""
        return self._size

    def __getitem__(self, index: int) -> Record:
        """Record `index`."""
        return self.part(index)[index]

    def outline(self, index: int) -> Record:
        """Record `index` for measuring, its picture not drawn."""
        return self.part(index).outline(index)

    def text(self, index: int) -> str:
        """What is written in record `index`; draws nothing."""
        return self.part(index).word(index)

    def part(self, index: int) -> WrittenWords:
        """The pictures of which record `index` is one, under the same number."""
        point = (Dice(self._seed, WORD_KEY).unit() + index * FAMILY_STEP) % 1.0
        return self._parts[int(np.searchsorted(self._bounds[:-1], point, side="right"))]


@cache
def kept_words() -> frozenset[str]:
    """Lower-case words that training never writes alone.

    All of the held-out vocabulary but for what training's own lists have too: `yesterday` is in a
    sentence of both.  What the task `reading` asks is kept in any case.
    """
    shared = _all_words("train") | set(SEEN_WORDS)
    asked = {*UNSEEN_WORDS, *VOCABULARY["held_out"].long_words}
    return frozenset((_all_words("held_out") - shared) | asked)


def _all_words(split: PageSplit) -> set[str]:
    vocabulary = VOCABULARY[split]
    lists = [field for field in vocabulary if isinstance(field, tuple)]
    texts = [text for items in lists for text in items if isinstance(text, str)]
    texts += [text for items in vocabulary.categories.values() for text in items]
    return {word.strip(".,").lower() for text in texts for word in text.split()}


def _cleared(words: Sequence[str], split: PageSplit) -> tuple[str, ...]:
    """Without repeats, and in training without what is held out."""
    kept = kept_words() if split == "train" else frozenset()
    return tuple(word for word in dict.fromkeys(words) if word.lower() not in kept)


def _known(split: PageSplit, dictionary: str | None) -> tuple[str, ...]:
    """Words of both lengths; only training has a dictionary."""
    if split == "held_out":
        return (*UNSEEN_WORDS, *VOCABULARY[split].long_words)
    ours = _cleared((*SEEN_WORDS, *VOCABULARY[split].long_words), split)
    more = _cleared(english_words(dictionary), split) if dictionary else ()
    # Ten times as often as one of twenty thousand, or some would never come.
    return (*ours * OURS, *more)


def _short(split: PageSplit, seed: int, dictionary: str | None) -> list[Part]:
    words = _known(split, dictionary)
    return [(tuple(word for word in words if len(word) <= SHORT), SQUARE)]


def _long(split: PageSplit, seed: int, dictionary: str | None) -> list[Part]:
    words = _known(split, dictionary)
    return [(tuple(word for word in words if len(word) > SHORT), WIDE)]


def _numbers(split: PageSplit, seed: int, dictionary: str | None) -> list[Part]:
    """Numbers of each length equally often, though there are few of one digit."""
    return [(numbers(digits, split=split), SQUARE) for digits in range(1, MOST_DIGITS + 1)]


def _letters(split: PageSplit, seed: int, dictionary: str | None) -> list[Part]:
    """Half any letters, half the beginning of one word with the end of another."""
    dice = Dice(seed, WORD_KEY, 1 + (split == "held_out"))
    words = VOCABULARY[split].long_words
    short, long = [], []
    for _ in range(NUM_STRINGS // 2):
        short.append("".join(dice.choice(ALPHABET) for _ in range(2 + dice.below(SHORT - 1))))
        long.append("".join(dice.choice(ALPHABET) for _ in range(SHORT + 1 + dice.below(5))))
        first, second = dice.choice(words), dice.choice(words)
        short.append(first[: 1 + dice.below(3)] + second[-1 - dice.below(3) :])
        cut = 2 + dice.below(4)
        long.append(first[:-cut] + second[cut + 1 - len(second) :])
    long = [text for text in long if len(text) > SHORT]
    return [(_cleared(short, split), SQUARE), (_cleared(long, split), WIDE)]


def _characters(split: PageSplit, seed: int, dictionary: str | None) -> list[Part]:
    """Letters of both cases and digits, in both splits: a reader must have seen them all."""
    return [((*ALPHABET, *ALPHABET.upper(), *numbers(1, split=split)), SQUARE)]


def _phrases(split: PageSplit, seed: int, dictionary: str | None) -> list[Part]:
    """Names, goods and places as documents write them, with capitals and blanks."""
    of = VOCABULARY[split]
    lists = (of.first_names, of.last_names, of.towns, of.goods, of.departments, of.venues)
    texts = [text for items in lists for text in items]
    texts += [f"{first} {last}" for first in of.first_names for last in of.last_names]
    return [(_cleared(texts, split), WIDE)]


_MAKERS: dict[str, Callable[[PageSplit, int, str | None], list[Part]]] = {
    "short": _short,
    "long": _long,
    "number": _numbers,
    "letters": _letters,
    "phrase": _phrases,
    "character": _characters,
}

__all__ = ["FAMILIES", "GROUPS", "MORE_GROUPS", "WordPictures", "kept_words"]
