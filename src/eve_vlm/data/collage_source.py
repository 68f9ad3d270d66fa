"""Collages as a data source of a recipe: emoji in a grid, with questions and captions.

    kind: collages
    options: {size: 9000, families: {presence: 2, count: 1}, styles: [twemoji], turns: 4}

Scenes are drawn as those of `scenes.py`, from the bins of training, in grids from 1 x 1 to 4 x 4,
and asked in the same words, so hundreds of concepts in four styles learn what the demo's forty do.
Easy to get wrong: what comes in even shares (yes and no, the numbers, the relations) is the first
question of a record; later ones about the same picture follow from what is in it.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from PIL import Image

from eve_vlm.data.collage_things import ALL_STYLES, PICTOGRAMS, Drawings, Thing, apart, things_of
from eve_vlm.data.phrases import (
    QUESTIONS,
    RELATION,
    RELATIONS,
    SEE,
    Box,
    Placement,
    Turn,
    is_clear_place,
    place_of,
    turn_about,
)
from eve_vlm.data.picture_ref import PictureRef
from eve_vlm.data.records import Record, messages_of
from eve_vlm.data.scenes import ANSWER_STEP, FAMILY_STEP, Scene, SceneDataset, SceneSettings
from eve_vlm.data.source_options import REQUIRED, Shares, check_size, read_options
from eve_vlm.data.splits import Dice, draw_background

COLLAGE_KEY = 66  # tells these dice from those of other generators with the same seed
FAMILIES = (
    *("presence", "count", "position", "corner", "relation"),
    *("see_list", "see_place", "caption_list", "caption_place", "caption_relation"),
)
OPTIONS: dict[str, tuple[type, Any]] = {
    "size": (int, REQUIRED),
    "families": (dict, REQUIRED),
    "styles": (list, list(ALL_STYLES)),
    "turns": (int, 1),
}
FOLLOW_UPS = ("presence", "position", "corner", "count")
SAMPLINGS = ("random", "popular", "adversarial")
"""How what is not there is drawn: of all, of the frequent, of those like what is there."""

GRIDS = tuple((rows, cols) for rows in range(1, 5) for cols in range(1, 5))
EVEN = tuple(grid for grid in GRIDS if not grid[0] % 2 and not grid[1] % 2)  # quarters are clear
CROWDED = tuple(grid for grid in GRIDS if min(grid) >= 3)
CELLS = (56, 56, 70, 84)  # pixels
MOST, MOST_PLACES = 6, 4  # things of a scene; of one whose places are all said
TOTALS = (7, 8, 9)  # things of a scene in which one kind is counted
MIXED_SHARE = 0.3  # of scenes of emoji have several styles
POPULAR, POPULAR_SHARE = 40, 0.25  # so many things of a style come that much more often


class Collage(NamedTuple):
    """A scene with its grid and what stands in each cell."""

    scene: Scene
    grid: tuple[int, int]
    cells: dict[int, Thing]


class CollageSource:
    """Records by number, each a function of options, seed and number alone."""

    def __init__(
        self,
        things: Mapping[str, Sequence[Thing]],
        *,
        size: int,
        families: Shares,
        turns: int,
        seed: int,
    ) -> None:
        self._things = {style: tuple(some) for style, some in things.items()}
        self._size, self._families, self._num_turns, self._seed = size, families, turns, seed
        self._starts = [Dice(seed, COLLAGE_KEY).unit() for _ in range(2)]
        self._starts[1] = (self._starts[1] + 0.5) % 1.0
        self._painter = _Painter([one for some in self._things.values() for one in some])

    @classmethod
    def from_options(cls, options: Mapping[str, Any], *, seed: int) -> "CollageSource":
        """Reads a recipe's options.

        Raises:
            ValueError: if an option is unknown, missing or does not fit, or a style is not there.
        """
        given = read_options(options, OPTIONS, of="collages")
        if given["turns"] < 1:
            raise ValueError(
                f"data.sources.options.turns is {given['turns']} for collages; give at least 1."
            )
        return cls(
            things_of(given["styles"]),
            size=check_size(given["size"], of="collages"),
            families=Shares(given["families"], FAMILIES, of="collages"),
            turns=given["turns"],
            seed=seed,
        )

    def __len__(self) -> int:
        """Number of records."""
        return self._size

    def __getitem__(self, index: int) -> Record:
        """Record `index`."""
        return self._record(index, self._painter.render)

    def outline(self, index: int) -> Record:
        """Record `index` for measuring, its picture not drawn."""
        return self._record(index, lambda scene: PictureRef(name="", known_size=scene.canvas[::-1]))

    def _record(self, index: int, picture: Callable[[Scene], Image.Image | PictureRef]) -> Record:
        scene = self.collage(index).scene
        return Record(
            id=f"collage-{self._seed}-{index}",
            messages=messages_of(scene.turns),
            images=[picture(scene)],
            family=scene.family,
            format="plain" if scene.family.startswith("caption") else "chat",
        )

    def collage(self, index: int) -> Collage:
        """What record `index` shows and says, not drawn."""
        if not 0 <= index < self._size:
            raise IndexError(f"index {index} is outside the {self._size} records of this source")
        dice = Dice(self._seed, COLLAGE_KEY, index)
        family = self._families.draw((self._starts[0] + index * FAMILY_STEP) % 1.0)
        stratum = (self._starts[1] + index * ANSWER_STEP) % 1.0
        cast = _Cast(self._things, dice)
        grid, cells, subject = _LAYOUTS.get(family, _any_layout)(family, stratum, cast, dice)
        cell = dice.choice(CELLS)
        canvas = (grid[0] * cell, grid[1] * cell)
        placements = self._painter.placed(cells, grid, cell, dice)
        named = tuple(
            placement._replace(concept=cells[place].name)
            for place, placement in zip(sorted(cells), placements, strict=True)
        )
        asking = _Asking(named, cells, canvas, cast, dice)
        asked = dict([asking.first(family, subject, stratum)])
        single = family.startswith("caption")
        for _ in range(0 if single else self._num_turns - 1):
            for about, turn in asking.follow_up():
                asked.setdefault(about, turn)  # not twice the same in other words
        scene = Scene(
            family,
            canvas,
            draw_background(dice, "train"),
            placements,
            tuple(asked.values()),
        )
        return Collage(scene, grid, cells)


class _Painter(SceneDataset):
    """Draws things into cells, in turns, sizes and places of training."""

    def __init__(self, things: Sequence[Thing]) -> None:
        settings = SceneSettings(size_range=(0.7, 1.0))
        super().__init__(
            Drawings(things), split="train", families={"presence": 1.0}, size=1, settings=settings
        )

    def placed(
        self, cells: Mapping[int, Thing], grid: tuple[int, int], side: int, dice: Dice
    ) -> tuple[Placement, ...]:
        """Each thing in its cell, in reading order; a placement is called by the drawing's key."""
        placements = []
        for place in sorted(cells):
            top, left = (side * part for part in divmod(place, grid[1]))
            box = Box(left, top, left + side, top + side)
            placements.append(self._object(cells[place].key, cell=box, is_word=False, dice=dice))
        return tuple(placements)


class _Cast:
    """Draws the things of one scene: of one style, or of several."""

    def __init__(self, things: Mapping[str, Sequence[Thing]], dice: Dice) -> None:
        self._things, self._dice = things, dice
        style = dice.choice(tuple(things))
        emoji = tuple(one for one in things if one != PICTOGRAMS)
        mixed = style != PICTOGRAMS and len(emoji) > 1 and dice.unit() < MIXED_SHARE
        self._styles = emoji if mixed else (style,)

    def things(self, number: int) -> list[Thing]:
        """So many different things that may be together."""
        chosen: list[Thing] = []
        while len(chosen) < number:
            one = self._one()
            if all(apart(one, other) for other in chosen):
                chosen.append(one)
        return chosen

    def absent(self, there: Sequence[Thing]) -> Thing:
        """Something that is not there and shares no word with what is."""
        sampling = self._dice.choice(SAMPLINGS)
        near = {thing.subgroup for thing in there}
        for attempt in range(200):
            one = self._one(popular=sampling == "popular")
            if sampling == "adversarial" and attempt < 100 and one.subgroup not in near:
                continue
            words = set(one.name.split())
            if not any(words & set(other.name.split()) for other in there):
                return one
        raise AssertionError("two hundred draws share a word with what is there")

    def _one(self, *, popular: bool | None = None) -> Thing:
        some = self._things[self._dice.choice(self._styles)]
        often = self._dice.unit() < POPULAR_SHARE if popular is None else popular
        return self._dice.choice(some[:: max(1, len(some) // POPULAR)] if often else some)


# --- layouts: the grid, what stands in which cell, and what is asked about ------------------------

Layout = tuple[tuple[int, int], dict[int, Thing], Thing]


def _any_layout(family: str, stratum: float, cast: _Cast, dice: Dice) -> Layout:
    grid = dice.choice(GRIDS)
    return _spread(grid, cast.things(1 + dice.below(min(MOST, grid[0] * grid[1]))), dice)


def _few_layout(family: str, stratum: float, cast: _Cast, dice: Dice) -> Layout:
    """Few things in clear quarters."""
    grid = dice.choice(EVEN)
    return _spread(grid, cast.things(1 + dice.below(MOST_PLACES)), dice)


def _list_layout(family: str, stratum: float, cast: _Cast, dice: Dice) -> Layout:
    """Some of each kind."""
    grid = dice.choice(GRIDS)
    number = 1 + dice.below(min(MOST, grid[0] * grid[1]))
    kinds = cast.things(1 + dice.below(min(3, number)))
    return _spread(grid, kinds + [dice.choice(kinds) for _ in range(number - len(kinds))], dice)


def _count_layout(family: str, stratum: float, cast: _Cast, dice: Dice) -> Layout:
    """So many of one kind among others, and how many there are in all says nothing of it."""
    number, total = 1 + int(stratum * MOST), dice.choice(TOTALS)
    subject, *kinds = cast.things(3 + dice.below(2))
    # In turn, so that no kind comes more often than there are words for numbers.
    others = [kinds[place % len(kinds)] for place in range(total - number)]
    grid, cells, _ = _spread(dice.choice(CROWDED), [subject] * number + others, dice)
    return grid, cells, subject


def _relation_layout(family: str, stratum: float, cast: _Cast, dice: Dice) -> Layout:
    """Two things in one row or column; the first is to the left, right, above or below."""
    relation = RELATIONS[int(stratum * len(RELATIONS))]
    across = relation in ("left of", "right of")
    grid = dice.until(GRIDS, lambda grid: grid[1 if across else 0] > 1)
    line = dice.below(grid[0] if across else grid[1])
    first, second = sorted(dice.shuffled(range(grid[1 if across else 0]))[:2])
    places = [line * grid[1] + one if across else one * grid[1] + line for one in (first, second)]
    subject, other = cast.things(2)
    if relation in ("right of", "below"):
        places.reverse()
    return grid, dict(zip(places, (subject, other), strict=True)), subject


def _spread(grid: tuple[int, int], things: Sequence[Thing], dice: Dice) -> Layout:
    places = dice.shuffled(range(grid[0] * grid[1]))[: len(things)]
    return grid, dict(zip(places, dice.shuffled(things), strict=True)), dice.choice(things)


_LAYOUTS: dict[str, Callable[[str, float, _Cast, Dice], Layout]] = {
    "count": _count_layout,
    "relation": _relation_layout,
    "caption_relation": _relation_layout,
    "see_list": _list_layout,
    "caption_list": _list_layout,
    **dict.fromkeys(("position", "corner", "see_place", "caption_place"), _few_layout),
}


# --- questions ------------------------------------------------------------------------------------


About = tuple[str, str]  # the family of a question, and the name that it is about


class _Asking(NamedTuple):
    """What can be said of placed things."""

    placements: tuple[Placement, ...]
    """Called by their names."""
    cells: dict[int, Thing]
    canvas: tuple[int, int]
    cast: _Cast
    dice: Dice

    def first(self, family: str, subject: Thing, stratum: float) -> tuple[About, Turn]:
        """The first turn of a record, and what it is about."""
        if family == "relation":
            (other,) = (thing for thing in self.cells.values() if thing is not subject)
            answer = RELATIONS[int(stratum * len(RELATIONS))]
            question = RELATION.format(x=subject.name, y=other.name)
            return (family, subject.name), Turn(question, answer)
        if family.startswith("see_"):
            caption = self._told(family.replace("see", "caption"), subject.name)
            return (family, ""), Turn(SEE, caption.answer)
        if family == "presence" and stratum >= 0.5:
            subject = self.cast.absent(list(self.cells.values()))
        if family == "corner" and subject.name not in self._alone():
            family = "position"  # several in its quarter
        return (family, subject.name), self._told(family, subject.name)

    def follow_up(self) -> list[tuple[About, Turn]]:
        """One more turn; none if what was drawn cannot be asked here."""
        dice, there = self.dice, list(self.cells.values())
        family = dice.choice(FOLLOW_UPS)
        names = [thing.name for thing in there]
        if family in ("position", "corner"):
            names = self._alone() if family == "corner" else self._clear()
        elif family == "presence" and dice.below(2):
            names = [self.cast.absent(there).name]
        if not names:
            return []
        name = dice.choice(names)
        return [((family, name), self._told(family, name))]

    def _told(self, family: str, subject: str) -> Turn:
        phrasing = self.dice.below(len(QUESTIONS[family])) if family in QUESTIONS else 0
        return turn_about(
            family, self.placements, subject=subject, canvas=self.canvas, phrasing=phrasing
        )

    def _clear(self) -> list[str]:
        """Names that stand once, in a clear quarter."""
        names = [placement.concept for placement in self.placements]
        return [
            placement.concept
            for placement in self.placements
            if names.count(placement.concept) == 1 and is_clear_place(placement.box, self.canvas)
        ]

    def _alone(self) -> list[str]:
        """Those of `_clear` that are alone in their quarter; none if some stand between two."""
        if not all(is_clear_place(one.box, self.canvas) for one in self.placements):
            return []
        quarters = [place_of(one.box, self.canvas) for one in self.placements]
        clear = self._clear()
        return [
            one.concept
            for one, quarter in zip(self.placements, quarters, strict=True)
            if quarters.count(quarter) == 1 and one.concept in clear
        ]


__all__ = ["FAMILIES", "Collage", "CollageSource"]
