"""Pictures that cost more to draw than to read are kept as PNG files in the cache folder.

A chart takes 65 ms of one core, a page 8 to 11, a kept picture of either 1.5 to 2.5.  Easy to get
wrong: the name of the file is a digest of all that the picture depends on, also of who draws it;
and two processes may draw one picture at once, so a file appears whole or not at all.
"""

import hashlib
from collections.abc import Callable
from pathlib import Path

import PIL
from PIL import Image

from eve_vlm.cache import cache_folder
from eve_vlm.output_folder import written_whole

FOLDER = "rendered"


def kept_picture(draw: Callable[[], Image.Image], *depends_on: object) -> Image.Image:
    """The RGB picture that `draw` makes, from the cache folder if it was drawn before.

    Args:
        draw: a pure function of `depends_on`.
        depends_on: things whose `repr` says all; the version of Pillow is always among them.
    """
    digest = hashlib.sha256(repr((PIL.__version__, depends_on)).encode()).hexdigest()[:24]
    return kept_png(cache_folder() / FOLDER / digest[:2] / f"{digest}.png", draw)


def kept_png(file: Path, draw: Callable[[], Image.Image]) -> Image.Image:
    """The RGB picture in a PNG file, which `draw` makes where it is not there or damaged."""
    try:
        with Image.open(file) as kept:
            return kept.convert("RGB")
    except (OSError, SyntaxError):  # not drawn yet, or damaged: nothing in a cache is lost
        pass
    picture = draw()
    file.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(file) as part:
        picture.save(part, format="PNG", compress_level=1)  # twice as fast, a tenth larger
    return picture


__all__ = ["FOLDER", "kept_picture", "kept_png"]
