"""Kinds of records that are made or drawn here and read from no path: which class makes which.

A line of the mixture table names the kind and gives `options`; the class reads them with
`from_options(options, seed=...)` and yields records by number.  Easy to get wrong: classes are
imported when asked for, because what they draw with comes with extras.
"""

from collections.abc import Mapping
from importlib import import_module
from typing import Any

from eve_vlm.data.sources.source import NamedSource

MADE = {
    "scenes": ("eve_vlm.data.scene_source", "SceneSource"),
    "emoji": ("eve_vlm.data.emoji_source", "EmojiSource"),
    "collages": ("eve_vlm.data.collage_source", "CollageSource"),
    "rendered": ("eve_vlm.data.rendered.source", "RenderedSource"),
    "picture_set": ("eve_vlm.data.picture_sets.source", "PictureSetSource"),
}


def made_source(kind: str, options: Mapping[str, Any], *, seed: int, name: str) -> NamedSource:
    """The source of one line of the mixture table whose kind is in `MADE`.

    Raises:
        ValueError: if the options do not fit, or what the pictures are made of is not there.
    """
    module, cls = MADE[kind]
    records = getattr(import_module(module), cls).from_options(dict(options), seed=seed)
    return NamedSource(records, name=name, settings=[kind, dict(options), seed])


__all__ = ["MADE", "made_source"]
