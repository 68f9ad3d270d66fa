"""Kinds of records that are made or drawn here and read from no path: which class makes which.

A line of the mixture table names the kind and gives `options`; the class reads them with
`from_options(options, seed=...)` and yields records by number.  `text_only: true`, which all kinds
know, leaves the pictures out, to teach a new decoder what it will have to say.  Easy to get wrong:
classes are imported when asked for, because what they draw with comes with extras.
"""

import dataclasses
from collections.abc import Mapping
from importlib import import_module
from typing import Any

from eve_vlm.data.records import Record
from eve_vlm.data.sources.source import NamedSource, outline_of

MADE = {
    "scenes": ("eve_vlm.data.scene_source", "SceneSource"),
    "emoji": ("eve_vlm.data.emoji_source", "EmojiSource"),
    "collages": ("eve_vlm.data.collage_source", "CollageSource"),
    "rendered": ("eve_vlm.data.rendered.source", "RenderedSource"),
    "picture_set": ("eve_vlm.data.picture_sets.source", "PictureSetSource"),
}

TEXT_ONLY = "text_only"


def made_source(kind: str, options: Mapping[str, Any], *, seed: int, name: str) -> NamedSource:
    """The source of one line of the mixture table whose kind is in `MADE`.

    Raises:
        ValueError: if the options do not fit, or what the pictures are made of is not there.
    """
    module, cls = MADE[kind]
    own = {name: value for name, value in options.items() if name != TEXT_ONLY}
    records = getattr(import_module(module), cls).from_options(own, seed=seed)
    text_only = options.get(TEXT_ONLY, False)
    if not isinstance(text_only, bool):
        raise ValueError(
            f"data.sources.options.{TEXT_ONLY} must be true or false, but it is {text_only!r}."
        )
    if text_only:
        records = TextOnly(records)
    return NamedSource(records, name=name, settings=[kind, dict(options), seed])


class TextOnly:
    """Records without their pictures, which are not drawn where that can be avoided."""

    def __init__(self, records: Any):
        self.records = records

    def __len__(self) -> int:
        """Number of records."""
        return len(self.records)

    def __getitem__(self, index: int) -> Record:
        """Record `index`; a caption keeps no question."""
        record = outline_of(self.records, index)
        messages = [
            {**message, "content": [part for part in message["content"] if part["type"] != "image"]}
            for message in record.messages
        ]
        return dataclasses.replace(
            record,
            id=f"{record.id}-text",
            messages=[message for message in messages if message["content"]],
            images=[],
        )


__all__ = ["MADE", "TextOnly", "made_source"]
