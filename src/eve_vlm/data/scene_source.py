"""Scenes as a data source of a recipe: its `options`, checked, to a `SceneDataset`.

    kind: scenes
    options: {split: train, size: 20000, families: {name: 1, count: 2}, settings: {max_count: 3}}

To teach a new decoder what a picture's tokens are for, `described: 28` puts a description in the
place of the picture, one word for each cell of 28 pixels.  `asked: true` makes captions answers: to
"What do you see?", and those of a relation to the question for it.

`square` makes every picture a square one, as encoders of a fixed size want it, for comparisons:
`pad` puts grey around it, `squeeze` stretches its shorter side.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from PIL import Image

from eve_vlm.cache import cache_folder
from eve_vlm.data.phrases import RELATION, SEES, relation_of
from eve_vlm.data.pictograms import load_pictograms
from eve_vlm.data.picture_ref import PictureRef
from eve_vlm.data.records import Record, messages_of, text_of
from eve_vlm.data.scene_settings import SceneSettings
from eve_vlm.data.scenes import SceneDataset

OPTIONS = ("split", "size", "families", "settings", "asked", "described", "square")
SQUARES = (None, "pad", "squeeze")
GREY = (122, 116, 104)  # the mean colour of CLIP's pictures, which becomes zeros


class SceneSource:
    """Scenes by index, drawn or described."""

    def __init__(
        self,
        scenes: SceneDataset,
        *,
        asked: bool = False,
        described: int | None = None,
        square: str | None = None,
    ):
        self.scenes, self.asked, self.described = scenes, asked, described
        self.square = square

    @classmethod
    def from_options(cls, options: Mapping[str, Any], *, seed: int) -> "SceneSource":
        """Reads a recipe's options.

        Raises:
            ValueError: if an option is unknown, missing or does not fit.
        """
        unknown = sorted(set(options) - set(OPTIONS))
        if unknown:
            raise ValueError(
                f"data.sources.options has {', '.join(unknown)}, which scenes do not know; "
                f"use {', '.join(OPTIONS)}."
            )
        for name, kind, default in (
            ("size", int, None),
            ("families", dict, None),
            ("asked", bool, False),
        ):
            if not isinstance(options.get(name, default), kind):
                raise ValueError(
                    f"data.sources.options.{name} must be given as {kind.__name__} for scenes, "
                    f"but it is {options.get(name, default)!r}."
                )
        if options.get("asked") and options.get("described") is not None:
            raise ValueError(
                "data.sources.options.asked is for pictures, but described puts words in their "
                "place; leave one of the two out."
            )
        if options.get("square") not in SQUARES:
            raise ValueError(
                f"data.sources.options.square is {options['square']!r}; use pad, squeeze or null."
            )
        scenes = SceneDataset(
            load_pictograms(cache_folder()),
            split=options.get("split", "train"),
            families=options["families"],
            size=options["size"],
            seed=seed,
            settings=_settings(options.get("settings", {})),
        )
        return cls(
            scenes,
            asked=options.get("asked", False),
            described=options.get("described"),
            square=options.get("square"),
        )

    def __len__(self) -> int:
        """Number of scenes."""
        return len(self.scenes)

    def __getitem__(self, index: int) -> Record:
        """Scene `index`."""
        if self.described is not None:
            return self.scenes.described(index, cell=self.described)
        record = self._asked(index, self.scenes[index])
        if self.square is None:
            return record
        picture = record.images[0]
        assert isinstance(picture, Image.Image), "scenes are drawn, not read"
        return dataclasses.replace(record, images=[squared(picture, pad=self.square == "pad")])

    def outline(self, index: int) -> Record:
        """Scene `index` for measuring: a picture is not drawn."""
        if self.described is not None:
            return self[index]  # has no picture
        record = self._asked(index, self.scenes.outline(index))
        if self.square is None:
            return record
        undrawn = record.images[0]
        assert isinstance(undrawn, PictureRef) and undrawn.known_size, "it only knows its size"
        side = max(undrawn.known_size)
        undrawn = PictureRef(name="", known_size=(side, side))
        return dataclasses.replace(record, images=[undrawn])

    def _asked(self, index: int, record: Record) -> Record:
        """A caption as an answer, where that is the option."""
        if not self.asked or record.format != "plain":
            return record
        see = SEES[index % self.scenes.settings.num_phrasings]
        turn = (see, text_of(record.messages[-1]))
        if record.family == "caption_relation":
            # They stand in reading order, so every other one is asked about the other way round.
            first, second = self.scenes.scene(index).placements[:: -1 if index % 2 else 1]
            question = RELATION.format(x=first.concept, y=second.concept)
            turn = (question, relation_of(first.box, second.box))
        return dataclasses.replace(record, messages=messages_of([turn]), format="chat")


def squared(picture: Image.Image, *, pad: bool) -> Image.Image:
    """A picture with equal sides, those of its longer one: padded with grey, or stretched."""
    side = max(picture.size)
    if not pad:
        return picture.resize((side, side), Image.Resampling.BICUBIC)
    canvas = Image.new("RGB", (side, side), GREY)
    canvas.paste(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
    return canvas


def _settings(given: Mapping[str, Any]) -> SceneSettings:
    known = {field.name for field in dataclasses.fields(SceneSettings)}
    unknown = sorted(set(given) - known)
    if unknown:
        raise ValueError(
            f"data.sources.options.settings has {', '.join(unknown)}, which scenes do not know; "
            f"use {', '.join(sorted(known))}."
        )
    return SceneSettings(**{name: _as_tuple(value) for name, value in given.items()})


def _as_tuple(value: Any) -> Any:
    """YAML lists as the tuples that settings are made of."""
    return tuple(_as_tuple(item) for item in value) if isinstance(value, list) else value


__all__ = ["SceneSource", "squared"]
