"""Pictures of one written word or number: the word scenes of `scenes.py` with other words.

Sizes, turns, positions, inks and backgrounds come from the bins of the split there.  Easy to get
wrong: a number is held out by the sum of its digits, and one of a single digit never is, since a
reader must have seen all ten; held-out pictures of those are new in style alone.
"""

from collections.abc import Sequence

from eve_vlm.data.pictograms import Pictograms
from eve_vlm.data.rendered.vocabulary import PageSplit
from eve_vlm.data.scenes import ANSWER_STEP, SceneDataset, SceneSettings
from eve_vlm.data.splits import Split

NUMBER_MODULUS = 5  # a fifth of the numbers is kept for held-out


class WrittenWords(SceneDataset):
    """Records of written words, each with "What does it say?"; equal shares of all words."""

    def __init__(
        self,
        words: Sequence[str],
        *,
        split: Split,
        size: int,
        seed: int = 0,
        canvases: tuple[tuple[int, int], ...] = ((56, 56),),
        family: str = "word",
        num_phrasings: int = 1,
        size_range: tuple[float, float] = (0.8, 1.0),
    ) -> None:
        """Take the words and the (height, width) of pictures, of which one is drawn for each.

        Args:
            words: what is written.
            split: whose sizes, turns, positions, inks and backgrounds are used.
            size: number of records.
            seed: of all draws.
            canvases: (height, width) of pictures.
            family: `word`, or `caption_word` for captions.
            num_phrasings: 1 or 2 ways to ask.
            size_range: size of the writing as a share of the largest that fits.
        """
        super().__init__(
            Pictograms({}),
            split=split,
            families={family: 1.0},
            size=size,
            seed=seed,
            settings=SceneSettings(
                word_canvases=canvases, num_phrasings=num_phrasings, word_size_range=size_range
            ),
        )
        self.words = tuple(words)

    def word(self, index: int) -> str:
        """What record `index` says; without measuring it, 200 times as fast as its scene."""
        stratum = (self._starts[1] + index * ANSWER_STEP) % 1.0
        return self.words[int(stratum * len(self.words))]


def is_kept_number(number: int) -> bool:
    """Whether training never shows this number.

    >>> [number for number in range(100) if is_kept_number(number)][:4]
    [14, 19, 23, 28]
    """
    return number > 9 and sum(map(int, str(number))) % NUMBER_MODULUS == 0


def numbers(digits: int, *, split: PageSplit) -> tuple[str, ...]:
    """All numbers of so many digits that a split may show; those of one digit are in both."""
    low = 10 ** (digits - 1) if digits > 1 else 0
    kept = split == "held_out" and digits > 1
    return tuple(str(n) for n in range(low, 10**digits) if is_kept_number(n) == kept)


__all__ = ["WrittenWords", "is_kept_number", "numbers"]
