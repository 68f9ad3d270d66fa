"""The task `caption_match`: which of four captions fits, by the likelihood that a model gives them.

The four differ in one thing: the number, the concept or the place (the group says which).  The same
four are put to four pictures, and each is right once.  Easy to get wrong: if wrong captions were
made by changing the right one, the right one would be the one most like the others, and words alone
would find it; here nothing in the words can be better than chance, which is exactly 25 %.
"""

from collections.abc import Sequence
from typing import NamedTuple

from eve_vlm.data.phrases import PLACES, SEE, counted, with_article
from eve_vlm.data.splits import Dice
from eve_vlm.eval.offline.composing import Composer, drawn
from eve_vlm.eval.offline.fixed import FixedTask
from eve_vlm.eval.task import Sample

GROUPS = ("count", "concept", "place")


class CaptionMatch(FixedTask):
    """Which caption is likeliest?"""

    name = "caption_match"
    version = 1
    title = "choose the caption that fits, of four that differ in one thing"
    ranked = True

    def draw(self) -> Sequence[Sample]:
        """As many sets of captions of each group as the split says, four pictures each."""
        composer, seed = Composer(), self.split["seed"]
        samples = []
        for number in range(self.split["sets"]):
            for kind, group in enumerate(GROUPS):
                choice = _choice(composer, group, number, Dice(seed, kind, number, 0))
                for right, things in enumerate(choice.pictures):
                    scene = composer.compose(things, Dice(seed, kind, number, 1 + right))
                    samples.append(
                        composer.sample(
                            scene,
                            things,
                            id=f"{group}-{number:02}-{right}",
                            question=SEE,
                            answers=(choice.captions[right],),
                            options=choice.captions,
                            group=group,
                            unit=f"{group}-{number:02}",
                        )
                    )
        return samples

    def mark(self, sample: Sample, answer: str) -> dict[str, float]:
        """Whether the likeliest option is the right one."""
        return {"accuracy": float(answer == sample.answers[0])}


TASK = CaptionMatch


class _Choice(NamedTuple):
    """Four captions, and for each the picture in which it is right: `{cell: concept}`."""

    captions: tuple[str, ...]
    pictures: tuple[dict[int, str], ...]


def _choice(composer: Composer, group: str, number: int, dice: Dice) -> _Choice:
    concept = composer.concepts[number % len(composer.concepts)]
    partners = composer.partners(concept)
    if group == "count":
        numbers = range(1, len(composer.cells) + 1)
        return _Choice(
            tuple(counted(concept, one) for one in numbers),
            tuple(dict.fromkeys(drawn(composer.cells, one, dice), concept) for one in numbers),
        )
    if group == "place":
        return _Choice(
            tuple(f"{with_article(concept)} {place}" for place in PLACES),
            tuple({cell: concept, _other(cell, dice): dice.choice(partners)} for cell in range(4)),
        )
    # Two and two that training never shows together; a second thing is one of the wrong captions.
    first = [concept, dice.until(composer.partners(partners[0]), lambda one: one != concept)]
    second = drawn([one for one in partners if one not in first], 2, dice)
    cell = dice.below(4)
    things = dice.shuffled([*first, *second])
    return _Choice(
        tuple(f"{with_article(one)} {PLACES[cell]}" for one in things),
        tuple(
            {cell: one, _other(cell, dice): dice.choice(second if one in first else first)}
            for one in things
        ),
    )


def _other(cell: int, dice: Dice) -> int:
    return dice.until(range(4), lambda one: one != cell)


__all__ = ["GROUPS", "TASK", "CaptionMatch"]
