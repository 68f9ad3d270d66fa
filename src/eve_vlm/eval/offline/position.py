"""The task `position`: where one thing is in the picture, and where it is from another.

`place` asks for the quarter of the picture, `relation` for left, right, above or below, both in
scenes of two things that training never shows together.  All answers are equally frequent for every
concept.  Easy to get wrong: a relation holds between things of one row or column, so that never two
answers are true.
"""

from collections.abc import Iterator, Sequence

from eve_vlm.data.phrases import PLACES, RELATION, RELATIONS, turn_about
from eve_vlm.data.splits import Dice
from eve_vlm.eval.offline.composing import Composer, means
from eve_vlm.eval.offline.fixed import FixedTask
from eve_vlm.eval.task import Sample

# Which cell is meant by a place, and which two cells (subject, other) stand in a relation.
PLACE_CELLS = dict(zip(PLACES, range(4), strict=True))
RELATION_CELLS = {
    "left of": ((0, 1), (2, 3)),
    "right of": ((1, 0), (3, 2)),
    "above": ((0, 2), (1, 3)),
    "below": ((2, 0), (3, 1)),
}
# What words mean; an answer must mean what the right one does, and nothing else.
DIRECTIONS = {
    **{"left": "left", "right": "right"},
    **dict.fromkeys(("top", "upper", "above"), "up"),
    **dict.fromkeys(("bottom", "lower", "below", "under", "beneath"), "down"),
}


class Position(FixedTask):
    """Where is the ...?"""

    name = "position"
    version = 1
    title = "say where a thing is, in the picture or from another thing"

    def draw(self) -> Sequence[Sample]:
        """Each concept with each answer, as often as the split says."""
        composer, seed, repeats = Composer(), self.split["seed"], self.split["repeats"]
        return [*_places(composer, seed, repeats), *_relations(composer, seed, repeats)]

    def mark(self, sample: Sample, answer: str) -> dict[str, float]:
        """Whether the answer has the right directions and no others."""
        return {"accuracy": means(answer, sample.answers[0], DIRECTIONS)}


TASK = Position


def _places(composer: Composer, seed: int, repeats: int) -> Iterator[Sample]:
    asked = [(c, place) for _ in range(repeats) for c in composer.concepts for place in PLACES]
    for number, (concept, place) in enumerate(asked):
        dice = Dice(seed, 0, number, 0)
        free = [cell for cell in composer.cells if cell != PLACE_CELLS[place]]
        partner = dice.choice(composer.partners(concept))
        things = {PLACE_CELLS[place]: concept, dice.choice(free): partner}
        scene = composer.compose(things, Dice(seed, 0, number, 1))
        turn = turn_about("position", scene.placements, subject=concept, canvas=scene.canvas)
        yield composer.sample(
            scene,
            things,
            id=f"place-{number:03}",
            question=turn.question,
            answers=(turn.answer,),
            group="place",
        )


def _relations(composer: Composer, seed: int, repeats: int) -> Iterator[Sample]:
    asked = [(c, one) for _ in range(repeats) for c in composer.concepts for one in RELATIONS]
    for number, (concept, relation) in enumerate(asked):
        dice = Dice(seed, 1, number, 0)
        partner = dice.choice(composer.partners(concept))
        things = dict(zip(dice.choice(RELATION_CELLS[relation]), (concept, partner), strict=True))
        yield composer.sample(
            composer.compose(things, Dice(seed, 1, number, 1)),
            things,
            id=f"relation-{number:03}",
            question=RELATION.format(x=concept, y=partner),
            answers=(relation,),
            group="relation",
        )


__all__ = ["TASK", "Position"]
