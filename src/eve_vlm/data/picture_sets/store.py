"""One file a picture set in the cache folder: its pictures made smaller, with their words.

Each picture is kept as WebP with a little loss; without, flat drawings take as many bytes and
photographs five times as many.  Easy to get wrong: transparent pictures are put
on white *before* they are made smaller, since clip art has black under what is transparent.
"""

import io
import warnings
from collections.abc import Callable
from functools import partial
from importlib import import_module
from pathlib import Path

from PIL import Image

from eve_vlm.assets.catalogue import asset_folder, find_asset
from eve_vlm.data.picture_sets.found import Found
from eve_vlm.data.picture_store import Drawn, LeftOut, PictureStore, kept_pictures, webp
from eve_vlm.data.svg_drawing import draw_svg, on_white, svg_renderer

SETS = {
    "openclipart": "openclipart",
    "tuxpaint": "tuxpaint",  # the only one with SVG
    "gimp-help": "gimp_help",
    "gcompris": "gcompris",
}
"""{asset: the module that reads it}."""
VERSION = 1  # of the readers and of what is kept; another one is made anew
LONGEST = 448  # pixels
LEAST = 41  # pixels of the longer side; smaller ones are marks in a text
MOST_PIXELS = 40_000_000  # a few drawings have up to 623 million


def set_store(name: str) -> PictureStore:
    """The pictures of a set; made on all cores where they are not there yet.

    Raises:
        ValueError: if there is no such set, or it is not made yet and its asset or the renderer is
            missing; says what to run.
    """
    if name not in SETS:
        raise ValueError(f"There is no picture set {name!r}; use {', '.join(SETS)}.")
    key = [VERSION, LONGEST, find_asset(name).versions]
    return kept_pictures(f"set-{name}", key, partial(_found, name), _reduced)


def _found(name: str) -> list[Found]:
    folder = asset_folder(name)
    if name == "tuxpaint":
        svg_renderer()  # says here, once, that it is missing
    module = import_module(f"eve_vlm.data.picture_sets.{SETS[name]}")
    find_pictures: Callable[[Path], list[Found]] = module.find_pictures
    return find_pictures(folder)


def _reduced(found: Found) -> Drawn | LeftOut:
    picture = _opened(found)
    if isinstance(picture, LeftOut):
        return picture
    picture.thumbnail((LONGEST, LONGEST), Image.Resampling.LANCZOS)
    return webp(picture, found.facts, lossless=False)


def _opened(found: Found) -> Image.Image | LeftOut:
    """The whole picture on white, RGB."""
    if found.path.endswith(".svg"):
        svg = Path(found.path).read_text(encoding="utf-8", errors="replace")
        try:
            return on_white(draw_svg(svg, width=LONGEST))
        except ValueError:  # what the renderer says of a size that it cannot find out
            return LeftOut("an SVG that the renderer does not read")
    try:
        with (
            warnings.catch_warnings(action="ignore", category=Image.DecompressionBombWarning),
            Image.open(io.BytesIO(found.data) if found.data else found.path) as picture,
        ):
            if picture.width * picture.height > MOST_PIXELS:
                return LeftOut(f"more than {MOST_PIXELS // 1_000_000} megapixels")
            if max(picture.size) < LEAST:
                return LeftOut(f"smaller than {LEAST} pixels")
            return on_white(picture)
    except Image.DecompressionBombError:
        return LeftOut(f"more than {MOST_PIXELS // 1_000_000} megapixels")
    except (OSError, SyntaxError):  # the latter is what Pillow says of a broken PNG
        return LeftOut("cannot be read")


__all__ = ["SETS", "set_store"]
