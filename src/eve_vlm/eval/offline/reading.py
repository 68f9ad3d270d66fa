"""The task `reading`: what does it say, asked about one written word or number.

Words that training scenes show (`seen`), words that they never show (`unseen`), numbers, of which
those with more than one digit are held out, and long words, all in sizes, turns and colours
that training left out.  Easy to get wrong: where the writing stands follows from how Pillow draws
letters, which differs a little between its builds, so the split's digest holds the texts alone.
"""

from collections.abc import Iterator, Sequence
from functools import partial

from PIL import Image

from eve_vlm.data.phrases import QUESTIONS, SEEN_WORDS, UNSEEN_WORDS
from eve_vlm.data.rendered.vocabulary import VOCABULARY
from eve_vlm.data.rendered.written_words import WrittenWords, numbers
from eve_vlm.eval.metrics import anls, exact_match
from eve_vlm.eval.offline.fixed import FixedTask
from eve_vlm.eval.task import Sample

SHORT, WIDE = (56, 56), (56, 168)  # (height, width); a letter of a long word has 11 pixels or more
MOST_DIGITS = 4


class Reading(FixedTask):
    """Written words and numbers."""

    name = "reading"
    version = 1
    title = "read a written word or number"

    def draw(self) -> Sequence[Sample]:
        """As many of each group as the split says, all words of a group in equal shares."""
        return [
            Sample(
                id=f"{group}-{name}-{index}",
                question=QUESTIONS["word"][0],
                images=partial(_pictures, words, index),
                answers=(words.scene(index).turns[0].answer,),
                group=group,
            )
            for group, name, words in self._groups()
            for index in range(len(words))
        ]

    def mark(self, sample: Sample, answer: str) -> dict[str, float]:
        """Whether it is the word, and how much of it."""
        return {
            "accuracy": exact_match(answer, sample.answers),
            "anls": anls(answer, sample.answers),
        }

    def _groups(self) -> Iterator[tuple[str, str, WrittenWords]]:
        """Group, name of the pictures, pictures."""
        split, seed = self.split, int(self.split["seed"])
        seen = WrittenWords(SEEN_WORDS, split="held_out", size=split["seen"], seed=seed)
        yield "seen", "word", seen
        unseen = WrittenWords(UNSEEN_WORDS, split="unseen", size=split["unseen"], seed=seed)
        yield "unseen", "word", unseen
        for digits in range(1, MOST_DIGITS + 1):
            chosen = numbers(digits, split="held_out")
            size = split["number"] // MOST_DIGITS
            pictures = WrittenWords(chosen, split="held_out", size=size, seed=seed + digits)
            yield "number", f"{digits}", pictures
        long = VOCABULARY["held_out"].long_words
        pictures = WrittenWords(
            long, split="held_out", size=split["long"], seed=seed, canvases=(WIDE,)
        )
        yield "long", "word", pictures


TASK = Reading


def _pictures(words: WrittenWords, index: int) -> list[Image.Image]:
    return [words.render(words.scene(index))]


__all__ = ["TASK", "Reading"]
