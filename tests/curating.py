"""What the tests of curation share: folders of pictures with known faults, and recipes for them.

One thing a reader would get wrong: the pictures are made of smooth random waves, because noise has
no perceptual hash that survives resizing, and flat colours are dropped as blank.
"""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("pyarrow", reason="needs the extra curate")

from eve_vlm.curate.recipe import (
    CaptionsSection,
    CurateRecipe,
    FilterSection,
    SourceSection,
    WriteSection,
)
from eve_vlm.curate.tasks import Layout, Task

SENTENCE = "A picture of smooth waves in several colours, number {}."


def waves(seed: int, width: int = 160, height: int = 120) -> Image.Image:
    """A picture like no other: eight random waves in each colour."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0 : 1 : height * 1j, 0 : 1 : width * 1j]
    colours = []
    for _ in range(3):
        layer = sum(
            rng.normal()
            * np.sin(2 * np.pi * (rng.uniform(-4, 4) * x + rng.uniform(-4, 4) * y + rng.uniform()))
            for _ in range(8)
        )
        colours.append(128 + 40 * layer)
    return Image.fromarray(np.clip(np.stack(colours, -1), 0, 255).astype(np.uint8))


def folder_of(folder: Path, count: int, *, first: int = 0) -> list[str]:
    """Writes `count` pictures with a caption beside each, in folders of 50; their ids."""
    ids = []
    for number in range(first, first + count):
        place = folder / f"{number // 50:03d}"
        place.mkdir(parents=True, exist_ok=True)
        waves(number).save(place / f"{number:05d}.png", compress_level=1)
        (place / f"{number:05d}.txt").write_text(SENTENCE.format(number), encoding="utf-8")
        ids.append(f"{place.name}/{number:05d}.png")
    return ids


def recipe(source: Path | str, output: Path, **changes: Any) -> CurateRecipe:
    """A recipe for a folder of pictures with captions beside them."""
    settings: dict[str, Any] = {
        "name": "test",
        "output_dir": str(output),
        "block": 10,
        "sources": [
            SourceSection(
                name="waves",
                kind="folder",
                path=str(source),
                licence="CC0-1.0",
                columns={"text": "txt"},
            )
        ],
        "filter": FilterSection(shorter_side_above=64),
        "captions": CaptionsSection(languages=None),
        "write": WriteSection(pictures=25),
    }
    return CurateRecipe(**(settings | changes))


def task(
    of: CurateRecipe, *, unit: str = "b0", blocks: tuple[str, ...] = ("b0",), rows: int = 1
) -> Task:
    """What a step is given."""
    layout = Layout(blocks=blocks, rows=rows)
    return Task(recipe=of, folder=Path(of.output_dir), layout=layout, unit=unit)


def with_section(of: CurateRecipe, name: str, **changes: Any) -> CurateRecipe:
    """A recipe with keys of one section changed."""
    return dataclasses.replace(of, **{name: dataclasses.replace(getattr(of, name), **changes)})
