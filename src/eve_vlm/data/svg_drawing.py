"""SVG to pixels by resvg-py, the renderer of the extra `demo`.

One function for whatever is drawn from SVG files: emoji of four styles, stamps.  Easy to get wrong:
the result has an alpha channel and stands on nothing; what shows it chooses the paper.
"""

import io
from importlib import import_module
from types import ModuleType

from PIL import Image


def svg_renderer() -> ModuleType:
    """The package that renders.

    Raises:
        ValueError: if it is not installed; says what to run.
    """
    try:
        return import_module("resvg_py")
    except ImportError:
        raise ValueError(
            "Drawings are rendered by the Python package resvg-py, which is not installed; run "
            "`pip install 'eve-vlm[demo]'`."
        ) from None


def draw_svg(svg: str, *, width: int | None = None, height: int | None = None) -> Image.Image:
    """An SVG document as RGBA; given one side, the other follows from its shape.

    Raises:
        ValueError: if it is no SVG that the renderer reads, or the renderer is not installed.
    """
    png = svg_renderer().svg_to_bytes(
        svg_string=svg, width=width, height=height, skip_system_fonts=True
    )
    with Image.open(io.BytesIO(png)) as picture:
        return picture.convert("RGBA")


def on_white(picture: Image.Image) -> Image.Image:
    """A picture as RGB, white where it is transparent."""
    if not picture.has_transparency_data:
        return picture.convert("RGB")
    drawing = picture.convert("RGBA")
    paper = Image.new("RGB", drawing.size, "white")
    paper.paste(drawing, mask=drawing.getchannel("A"))
    return paper


__all__ = ["draw_svg", "on_white", "svg_renderer"]
