"""The task `naming`: what is this, asked about emoji in a style that training may not have shown.

Of half of the concepts no Noto drawing may be trained on (`data/emoji_concepts.py`), though other
styles may: naming those is knowing the meaning in an unseen drawing.  `accuracy` and `tag` are
scores of that half; the other half stands beside it as a group.  Easy to get wrong: tags are no
names (`face` goes with a hundred concepts), so `tag` says how often the answer is at least about
the right thing, and a model that always says `face` already gets some of it.
"""

import re
from collections.abc import Sequence
from functools import partial

import numpy as np
from PIL import Image

from eve_vlm.data.emoji_concepts import held_out_concepts, shared_concepts
from eve_vlm.eval.metrics import exact_match
from eve_vlm.eval.offline.emoji_pictures import EmojiPictures
from eve_vlm.eval.offline.fixed import FixedTask
from eve_vlm.eval.task import COUNT, Sample, Sums, ratio

QUESTION = "What is this?"
HELD_OUT, OPEN = "held out", "open"
SCORES = ("accuracy", "tag")
_LEAD_IN = re.compile(
    r"^\s*(?:(?:this|that|it) is|it'?s|(?:(?:the|this) )?(?:picture|image|emoji|icon) shows)\s+"
    r"(?:an? (?:picture|image|drawing|emoji|icon) of\s+)?",
    re.IGNORECASE,
)


class Naming(FixedTask):
    """Emoji in Noto's style."""

    name = "naming"
    version = 1
    title = "name an emoji in an unseen style"

    def draw(self) -> Sequence[Sample]:
        """The first concepts of each half, so many as the split says; some are left out.

        Left out are concepts whose drawing is also that of another one.
        """
        emoji, halves = EmojiPictures(), shared_concepts()
        left_out = set(self.split["left_out"])
        samples = []
        for group in (HELD_OUT, OPEN):
            chosen = [concept for concept in halves[group] if concept not in left_out]
            for concept in chosen[: self.split[group]]:
                words = emoji.words(concept)
                samples.append(
                    Sample(
                        id=concept,
                        question=QUESTION,
                        images=partial(_pictures, emoji, concept),
                        answers=words.names,
                        group=group,
                        facts={"tags": list(words.tags)},
                    )
                )
        return samples

    def mark(self, sample: Sample, answer: str) -> dict[str, float]:
        """Whether the answer is a name; or a name or a tag."""
        said = _LEAD_IN.sub("", answer)
        marks = {
            "accuracy": exact_match(said, sample.answers),
            "tag": exact_match(said, [*sample.answers, *sample.facts["tags"]]),
        }
        held_out = float(sample.group == HELD_OUT)
        parts = {f"held_out_{name}": held_out * mark for name, mark in marks.items()}
        return {**marks, "held_out": held_out, **parts}

    def scores(self, sums: Sums) -> dict[str, np.ndarray]:
        """Percent of the held-out half; of the open half where there is no other."""
        held_out = np.asarray(sums["held_out"])
        return {
            name: 100
            * np.where(
                held_out > 0,
                ratio(sums[f"held_out_{name}"], held_out),
                ratio(sums[name], sums[COUNT]),
            )
            for name in SCORES
        }


TASK = Naming


def _pictures(emoji: EmojiPictures, concept: str) -> list[Image.Image]:
    return [emoji.picture(concept)]


__all__ = ["TASK", "Naming", "held_out_concepts"]
