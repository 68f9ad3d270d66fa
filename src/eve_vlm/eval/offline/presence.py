"""The task `presence`: is there a ...?, with POPE's three ways to choose what is not there.

Each picture is asked about things in it and as many that are not (Li et al. 2023, "Evaluating
Object Hallucination in Large Vision-Language Models"): drawn from all others (`random`), the most
frequent in the set (`popular`), those that most often stand with what is in the picture
(`adversarial`).  Easy to get wrong: the three differ only where frequencies and company do, so
scenes are drawn from themes whose things meet often, some themes and things far more than others.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import combinations

import numpy as np

from eve_vlm.data.phrases import turn_about
from eve_vlm.data.splits import Dice
from eve_vlm.eval.choices import yes_no_marks, yes_no_scores
from eve_vlm.eval.offline.composing import Composer, drawn, weighted
from eve_vlm.eval.offline.fixed import FixedTask
from eve_vlm.eval.task import Sample, Sums

SAMPLINGS = ("random", "popular", "adversarial")
# Things that meet, the most frequent first.  In each the first two of a scene can be a pair that
# training never shows together; themes that made more sense to people could not.
THEMES = (
    ("cat", "house", "star", "ball"),
    ("car", "tree", "frog", "umbrella"),
    ("dog", "apple", "cow", "key"),
    ("fish", "clock", "book", "mushroom"),
    ("banana", "heart", "rocket", "crab"),
)
THEME_WEIGHTS = (6.0, 5.0, 4.0, 3.0, 2.0)
THING_WEIGHTS = (4.0, 3.0, 2.0, 1.0)
THIRD, STRANGER = 0.6, 0.4  # share of scenes with a third thing, and of thirds from any theme


class Presence(FixedTask):
    """Is there a ...?"""

    name = "presence"
    version = 1
    title = "say whether a thing is there, in POPE's three samplings"
    metric = "f1"

    def draw(self) -> Sequence[Sample]:
        """As many pictures as the split says; of each, `asked` that are there and are not."""
        composer, seed, asked = Composer(), self.split["seed"], self.split["asked"]
        dices = [Dice(seed, number, 0) for number in range(self.split["pictures"])]
        pictures = [_cast(composer, dice) for dice in dices]
        samples = []
        for number, (names, dice) in enumerate(zip(pictures, dices, strict=True)):
            things = dict(zip(drawn(composer.cells, len(names), dice), names, strict=True))
            scene = composer.compose(things, Dice(seed, number, 1))
            there = drawn(names, asked, dice)
            for sampling, absent in _absent(names, pictures, composer.concepts, dice).items():
                for subject in (*there, *absent[:asked]):
                    turn = turn_about(
                        "presence", scene.placements, subject=subject, canvas=scene.canvas
                    )
                    samples.append(
                        composer.sample(
                            scene,
                            things,
                            id=f"{number:03}-{sampling}-{subject}",
                            question=turn.question,
                            answers=(turn.answer,),
                            group=sampling,
                            unit=f"{number:03}",
                        )
                    )
        return samples

    def mark(self, sample: Sample, answer: str) -> dict[str, float]:
        """POPE's four counts."""
        return yes_no_marks(answer, sample.answers[0])

    def scores(self, sums: Sums) -> dict[str, np.ndarray]:
        """POPE's accuracy, precision, recall, F1 and share of yes, in percent."""
        return yes_no_scores(sums)


TASK = Presence


def _cast(composer: Composer, dice: Dice) -> list[str]:
    """Two things of a theme that never met in training, often a third."""
    theme = weighted(THEMES, THEME_WEIGHTS, dice)
    frequency = dict(zip(theme, THING_WEIGHTS, strict=True))

    def draw(items: Sequence[str]) -> str:
        return weighted(items, [frequency[item] for item in items], dice)

    names = [draw(theme)]
    partners = composer.partners(names[0])
    names.append(draw([one for one in theme if one in partners]))
    if dice.unit() < THIRD:
        stranger = dice.unit() < STRANGER
        others = [one for one in (composer.concepts if stranger else theme) if one not in names]
        names.append(dice.choice(others) if stranger else draw(others))
    return names


def _absent(
    names: Sequence[str], pictures: Sequence[Sequence[str]], concepts: Sequence[str], dice: Dice
) -> Mapping[str, list[str]]:
    """The concepts that are not there, in the order in which each sampling asks for them.

    Equal ones stand in table order.
    """
    absent = [one for one in concepts if one not in names]
    frequency = Counter(one for picture in pictures for one in picture)
    met: Counter[frozenset[str]] = Counter()
    for picture in pictures:
        met.update(map(frozenset, combinations(picture, 2)))
    company = {one: sum(met[frozenset((one, there))] for there in names) for one in absent}
    return {
        "random": dice.shuffled(absent),
        "popular": sorted(absent, key=lambda one: -frequency[one]),
        "adversarial": sorted(absent, key=lambda one: -company[one]),
    }


__all__ = ["SAMPLINGS", "TASK", "Presence"]
