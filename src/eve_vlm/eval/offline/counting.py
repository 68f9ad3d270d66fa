"""The task `counting`: how many of one concept stand among others, one to five.

Every concept is counted equally often with each number, and the number of all things is drawn apart
from it, so neither the question nor a look at how full the picture is tells anything.  Easy to get
wrong: things of one concept differ in size and turn, as all things of a scene do.
"""

from collections.abc import Sequence

from eve_vlm.data.phrases import NUMBERS, turn_about
from eve_vlm.data.splits import Dice
from eve_vlm.eval.offline.composing import Composer, drawn, means
from eve_vlm.eval.offline.fixed import FixedTask
from eve_vlm.eval.task import Sample

GRID = (3, 3)
MOST = 5
TOTALS = (6, 7)  # things of a scene; at least one is a distractor
DIGITS = {str(number): str(number) for number in range(11)}


class Counting(FixedTask):
    """How many ...?"""

    name = "counting"
    version = 1
    title = "count one kind of thing among others, 1 to 5"

    def draw(self) -> Sequence[Sample]:
        """Each concept with each number, as often as the split says."""
        composer, seed = Composer(GRID), self.split["seed"]
        asked = [
            (concept, number)
            for _ in range(self.split["repeats"])
            for concept in composer.concepts
            for number in range(1, MOST + 1)
        ]
        samples = []
        for place, (concept, number) in enumerate(asked):
            dice = Dice(seed, place, 0)
            kinds = drawn([c for c in composer.concepts if c != concept], 2 + dice.below(2), dice)
            others = [dice.choice(kinds) for _ in range(dice.choice(TOTALS) - number)]
            names = dice.shuffled([concept] * number + others)
            things = dict(zip(drawn(composer.cells, len(names), dice), names, strict=True))
            scene = composer.compose(things, Dice(seed, place, 1))
            turn = turn_about("count", scene.placements, subject=concept, canvas=scene.canvas)
            samples.append(
                composer.sample(
                    scene,
                    things,
                    id=f"{place:03}",
                    question=turn.question,
                    answers=(turn.answer,),
                    group=NUMBERS[number - 1],
                )
            )
        return samples

    def mark(self, sample: Sample, answer: str) -> dict[str, float]:
        """Whether the only number in the answer, as a word or in digits, is the right one."""
        return {"accuracy": means(answer, sample.answers[0], DIGITS)}


TASK = Counting

__all__ = ["TASK", "Counting"]
