"""Scenes of pictograms and written words with questions: the pictures of `eve quickstart`.

Scene `index` of a split and seed is always the same, whatever was made before it. What `held_out`
shows was kept out of training on purpose (`splits.py`): sizes, turns, positions and background
hues, and in scenes of several concepts a pair that never met. `unseen` is like `held_out`, with
concepts and words that training never shows. Easy to get wrong: a canvas is (height, width), as
grids are (rows, cols), while boxes are (left, top, right, bottom) as in Pillow.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Literal, NamedTuple, get_args

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from eve_vlm.data.phrases import (
    ABSENT_ANSWERS,
    CAPTION_FAMILIES,
    SEEN_WORDS,
    UNSEEN_WORDS,
    Box,
    Placement,
    Turn,
    is_clear_place,
    turn_about,
)
from eve_vlm.data.pictograms import SEEN, UNSEEN, Pictograms, scaled_size
from eve_vlm.data.picture_ref import PictureRef
from eve_vlm.data.records import Record, messages_of
from eve_vlm.data.scene_settings import (
    PLACE_FAMILIES,
    SINGLE_FAMILIES,
    WORD_FAMILIES,
    SceneSettings,
    canvases_of,
    check_settings,
    grids_of,
)
from eve_vlm.data.splits import (
    MAX_WORD_ANGLE,
    POSITION_STEP,
    SIZE_STEP,
    Background,
    Dice,
    Split,
    draw_angle,
    draw_background,
    draw_ink,
    is_kept_pair,
    position_parity,
    size_rest,
)

# Steps of a two-dimensional Kronecker sequence (powers of 1 / 1.3247...): families and answers
# come in even shares in any window of indices, and independently of each other.
FAMILY_STEP, ANSWER_STEP = 0.7548776662466927, 0.5698402909980532


class Scene(NamedTuple):
    """All about one picture and what is said of it: enough to draw it and to check every answer."""

    family: str
    canvas: tuple[int, int]
    background: Background
    placements: tuple[Placement, ...]
    turns: tuple[Turn, ...]


class Majority(NamedTuple):
    """The most frequent answer of a family: what the best guess without looking scores."""

    answer: str
    share: float
    total: int


class SceneDataset:
    """A map-style data set of records; `scene(index)` is the layout behind a record."""

    def __init__(
        self,
        pictograms: Pictograms,
        *,
        split: Split,
        families: Mapping[str, float],
        size: int,
        seed: int = 0,
        settings: SceneSettings | None = None,
    ) -> None:
        """Take weights by family (positive numbers of any sum) and the number of records."""
        self.settings = settings or SceneSettings()
        check_settings(self.settings, split=split, families=families, size=size, seed=seed)
        self.split, self.seed = split, seed
        self._pictograms, self._size = pictograms, size
        self._families = tuple(families)
        self._bounds = np.cumsum(list(families.values())) / sum(families.values())
        self._key = (seed, get_args(Split).index(split))
        self._starts = np.random.default_rng(np.random.SeedSequence(self._key)).random(2).tolist()
        unseen = split == "unseen"
        self.concepts = tuple(UNSEEN) if unseen else tuple(SEEN)[: self.settings.num_concepts]
        self.words = (UNSEEN_WORDS if unseen else SEEN_WORDS)[: self.settings.num_words]
        self._index = {concept: index for index, concept in enumerate(self.concepts)}

    def __len__(self) -> int:
        """The number of records."""
        return self._size

    def __iter__(self) -> Iterator[Record]:
        """All records in order."""
        return (self[index] for index in range(len(self)))

    def __getitem__(self, index: int) -> Record:
        """Draw scene `index` and ask about it."""
        return self._record(index, self.render)

    def _record(self, index: int, picture: Callable[[Scene], Image.Image | PictureRef]) -> Record:
        scene = self.scene(index)
        return Record(
            id=f"{self.split}-{self.seed}-{index}",
            messages=messages_of(scene.turns),
            images=[picture(scene)],
            family=scene.family,
            format=_format(scene.family),
        )

    def outline(self, index: int) -> Record:
        """Record `index` for measuring, its picture not drawn."""
        return self._record(index, lambda scene: _undrawn(scene.canvas))

    def described(self, index: int, *, cell: int) -> Record:
        """Scene `index` with a description in words in place of its picture.

        The description has one word for each cell of `cell` pixels and a line break after each
        row: laid out as the tokens of the picture are. A decoder that learns to answer from it
        knows what to do with a picture as soon as cells look like words to it.
        """
        scene = self.scene(index)
        messages = messages_of(scene.turns, image=False)
        text = {"type": "text", "text": description(scene, cell=cell)}
        if messages[0]["role"] == "user":
            messages[0]["content"].insert(0, text)
        else:
            messages.insert(0, {"role": "user", "content": [text]})
        return Record(
            id=f"{self.split}-{self.seed}-{index}-described",
            messages=messages,
            images=[],
            family=scene.family,
            format=_format(scene.family),
        )

    def scene(self, index: int) -> Scene:
        """The layout and the texts of record `index`, not drawn."""
        if not 0 <= index < self._size:
            raise IndexError(f"index {index} is outside the {self._size} scenes of this data set")
        dice = Dice(*self._key, index)
        point = (self._starts[0] + index * FAMILY_STEP) % 1.0
        family = self._families[int(np.searchsorted(self._bounds[:-1], point, side="right"))]
        stratum = (self._starts[1] + index * ANSWER_STEP) % 1.0
        canvas = dice.choice(canvases_of(family, self.settings))
        concepts, subject = self._cast(family, stratum, dice)
        placements = self._place(family, concepts, canvas, dice)
        turns = self._turns(family, placements, subject, canvas, dice)
        return Scene(family, canvas, draw_background(dice, self.split), placements, turns)

    def render(self, scene: Scene) -> Image.Image:
        """Draw a scene as an RGB picture."""
        height, width = scene.canvas
        corners = scene.background.corners
        if len(set(corners)) == 1:
            picture = Image.new("RGB", (width, height), corners[0])
        else:
            colours = Image.frombytes("RGB", (2, 2), bytes(sum(corners, ())))
            picture = colours.resize((width, height), Image.Resampling.BILINEAR)
        for concept, box, size, angle, ink in scene.placements:
            if ink is None:
                sprite = self._pictograms.sprite(concept, size=size, angle=angle)
                picture.paste(sprite.picture, box, sprite.mask)
            else:
                picture.paste(ink, box, _scaled_writing(concept, angle, size))
        return picture

    def _cast(self, family: str, stratum: float, dice: Dice) -> tuple[list[str], str]:
        """The things to place, in reading order, and the one that is asked about.

        `stratum` in [0, 1) picks what must come in even shares: the answer or the thing named.
        """
        settings = self.settings
        if family in SINGLE_FAMILIES:
            names = self.words if family in WORD_FAMILIES else self.concepts
            name = names[int(stratum * len(names))]
            return [name], name
        if family == "count":
            number = 1 + int(stratum * settings.max_count)
            if settings.distractor_kinds:
                return self._crowd(number, dice)
            chosen = self._draw_concepts(1 + dice.below(settings.max_objects - number + 1), dice)
            return dice.shuffled(chosen[:1] * number + chosen[1:]), chosen[0]
        number = settings.min_objects + dice.below(settings.max_objects - settings.min_objects + 1)
        if family == "caption_list":
            chosen = self._draw_concepts(1 + dice.below(number), dice)
            more = [dice.choice(chosen) for _ in range(number - len(chosen))]
            return dice.shuffled(chosen + more), chosen[0]
        chosen = self._draw_concepts(2 if family == "caption_relation" else number, dice)
        subject = dice.choice(chosen)
        if family == "presence" and stratum >= 0.5:
            subject = self._absent(chosen, dice)
        return dice.shuffled(chosen), subject

    def _crowd(self, number: int, dice: Dice) -> tuple[list[str], str]:
        """So many of one concept among others, which come in numbers as well; and the concept."""
        settings = self.settings
        total = settings.min_objects + dice.below(settings.max_objects - settings.min_objects + 1)
        subject, *kinds = self._draw_concepts(2 + dice.below(settings.distractor_kinds), dice)
        others = [dice.choice(kinds) for _ in range(total - number)]
        return dice.shuffled([subject] * number + others), subject

    def _draw_concepts(self, number: int, dice: Dice) -> list[str]:
        """Different concepts: no kept pair among them in training, one first in held-out."""
        chosen: list[str] = []
        while len(chosen) < number:
            concept = dice.choice(self.concepts)
            kept = [is_kept_pair(self._index[concept], self._index[other]) for other in chosen]
            if concept in chosen or (self.split == "train" and any(kept)):
                continue
            if self.split == "held_out" and len(chosen) == 1 and not kept[0]:
                continue
            chosen.append(concept)
        return chosen

    def _place(
        self, family: str, concepts: list[str], canvas: tuple[int, int], dice: Dice
    ) -> tuple[Placement, ...]:
        """Put each thing into a cell of its own, so that boxes never overlap."""
        rows, cols = dice.choice(grids_of(family, self.settings, len(concepts)))
        cells = list(range(rows * cols))
        if family == "caption_relation":  # two cells of one row or column: no slanting neighbours
            row, col, down = dice.below(rows), dice.below(cols), cols == 1
            down = down or (rows > 1 and dice.below(2) == 1)
            cells = cells[col::cols] if down else cells[row * cols : (row + 1) * cols]
        chosen = sorted(dice.shuffled(cells)[: len(concepts)])
        height, width = canvas[0] // rows, canvas[1] // cols
        return tuple(
            self._object(
                concept,
                cell=Box(
                    left := cell % cols * width,
                    top := cell // cols * height,
                    left + width,
                    top + height,
                ),
                is_word=family in WORD_FAMILIES,
                dice=dice,
            )
            for concept, cell in zip(concepts, chosen, strict=True)
        )

    def _object(self, concept: str, *, cell: Box, is_word: bool, dice: Dice) -> Placement:
        """Draw turn, size and position inside the cell from the bins of the split."""
        limits = self.settings.word_size_range if is_word else self.settings.size_range
        angle = draw_angle(dice, self.split, limit=MAX_WORD_ANGLE if is_word else 90)
        shape = _writing(concept, angle) if is_word else self._pictograms.turned(concept, angle)
        # A free strip wider than one step each way always holds chessboard squares of both colours.
        room = (cell.width - POSITION_STEP - 2, cell.height - POSITION_STEP - 2)
        largest = max(shape.size) * min(room[0] / shape.width, room[1] / shape.height)
        rest = size_rest(self.split)
        steps = int((dice.between(*limits) * largest - rest) / SIZE_STEP + 0.5)
        steps = max(1, min(steps, int((largest - rest) / SIZE_STEP)))
        size = steps * SIZE_STEP + rest
        width, height = scaled_size(shape, size)
        while True:
            left = cell.left + _offset(cell.width, width, dice)
            top = cell.top + _offset(cell.height, height, dice)
            box = Box(left, top, left + width, top + height)
            if position_parity(box.middle) == (self.split != "train"):
                break
        ink = draw_ink(dice, self.split) if is_word else None
        return Placement(concept, box, size, angle, ink)

    def _absent(self, concepts: Sequence[str], dice: Dice) -> str:
        return dice.until(self.concepts, lambda concept: concept not in concepts)

    def _turns(
        self,
        family: str,
        placements: tuple[Placement, ...],
        subject: str,
        canvas: tuple[int, int],
        dice: Dice,
    ) -> tuple[Turn, ...]:
        """The turn of the family, then `num_turns - 1` different ones of `follow_ups`."""
        asked = [(family, subject)]
        concepts = [placement.concept for placement in placements]
        placed = [
            placement.concept
            for placement in placements
            if concepts.count(placement.concept) == 1 and is_clear_place(placement.box, canvas)
        ]
        single = family in SINGLE_FAMILIES or family in CAPTION_FAMILIES
        follow_ups = [
            one for one in self.settings.follow_ups if placed or one not in PLACE_FAMILIES
        ]
        for _ in range(0 if single or not follow_ups else self.settings.num_turns - 1):
            follow_up = dice.choice(follow_ups)
            about = dice.choice(placed if follow_up in PLACE_FAMILIES else concepts)
            if follow_up == "presence" and dice.below(2):
                about = self._absent(concepts, dice)
            asked.append((follow_up, about))
        share = self.settings.absent
        if share:  # no dice are thrown without it, so that scenes stay what they were
            asked = [
                (kind, self._absent(concepts, dice))
                if kind in ABSENT_ANSWERS and dice.unit() < share
                else (kind, about)
                for kind, about in asked
            ]
        return tuple(
            turn_about(
                kind,
                placements,
                subject=about,
                canvas=canvas,
                phrasing=dice.below(self.settings.num_phrasings),
            )
            for kind, about in dict.fromkeys(asked)
        )


def majority_answers(scenes: Iterable[Scene]) -> dict[str, Majority]:
    """The most frequent first answer by family, counted on the scenes themselves."""
    answers: dict[str, Counter[str]] = {}
    for scene in scenes:
        answers.setdefault(scene.family, Counter())[scene.turns[0].answer] += 1
    result = {}
    for family, counter in answers.items():
        answer, number = counter.most_common(1)[0]
        result[family] = Majority(answer, number / counter.total(), counter.total())
    return result


def description(scene: Scene, *, cell: int) -> str:
    """The word of the thing that covers most of each cell, `.` where nothing covers a quarter."""
    height, width = scene.canvas
    lines = []
    for top in range(0, height, cell):
        words = []
        for left in range(0, width, cell):
            best, covered = ".", cell * cell / 4
            for placement in scene.placements:
                box = placement.box
                across = min(box.right, left + cell) - max(box.left, left)
                down = min(box.bottom, top + cell) - max(box.top, top)
                if across > 0 and down > 0 and across * down >= covered:
                    best, covered = placement.concept, across * down
            words.append(best)
        lines.append(" ".join(words) + "\n ")
    return "".join(lines)


def _undrawn(canvas: tuple[int, int]) -> PictureRef:
    return PictureRef(name="", known_size=(canvas[1], canvas[0]))


def _format(family: str) -> Literal["plain", "chat"]:
    """Captions are rendered as captions in every stage, questions as questions."""
    return "plain" if family in CAPTION_FAMILIES else "chat"


def _offset(room: int, length: int, dice: Dice) -> int:
    """Where a box of `length` begins in a cell: inside it, its middle in the cell's middle half.

    So in a 2 x 2 grid a middle is an eighth of the canvas or more from the lines between places.
    """
    low = max(0, -(-room // 4) - length // 2)
    high = min(room - length, 3 * room // 4 - length // 2)
    return low + dice.below(high - low + 1)


@lru_cache(maxsize=1024)
def _writing(word: str, angle: int) -> Image.Image:
    """A written word as a mask, turned and cropped, in Pillow's own font at 64 pixels."""
    font = ImageFont.load_default(64)
    mask = Image.new("L", (64 * (len(word) + 1), 128))
    ImageDraw.Draw(mask).text((32, 16), word, fill=255, font=font)
    turned = mask.rotate(angle, resample=Image.Resampling.BICUBIC, expand=True)
    return turned.crop(turned.getbbox())


@lru_cache(maxsize=4096)
def _scaled_writing(word: str, angle: int, size: int) -> Image.Image:
    shape = _writing(word, angle)
    return shape.resize(scaled_size(shape, size), Image.Resampling.BICUBIC)


__all__ = ["Majority", "Scene", "SceneDataset", "SceneSettings", "majority_answers"]
