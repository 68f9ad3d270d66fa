"""Opens picture files from people; whatever is wrong with one is said in a sentence.

Easy to get wrong: Pillow opens lazily, so a truncated file fails only when its pixels are read, and
a tiny file can announce billions of pixels; both are settled here, once.
"""

from pathlib import Path

from PIL import Image, UnidentifiedImageError

from .image_processing_eve import to_rgb

# 16384 x 16384; Pillow's own bomb limit is of the same order and differs between versions.
MAX_PIXELS = 2**28


def open_picture(path: str | Path) -> Image.Image:
    """Reads one picture file upright and in RGB (the first frame of an animation).

    Raises:
        ValueError: if there is no such file, or it is no picture, truncated, empty or too large.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path} is not a file; check the name of the picture.")
    limit, Image.MAX_IMAGE_PIXELS = (
        Image.MAX_IMAGE_PIXELS,
        None,
    )  # our own limit follows, with our own words
    try:
        with Image.open(path) as image:
            width, height = image.size
            if width * height > MAX_PIXELS:
                raise ValueError(
                    f"{path} has {width} x {height} pixels, more than {MAX_PIXELS:,} in all; make "
                    "it smaller first."
                )
            if width * height == 0:
                raise ValueError(
                    f"{path} has {width} x {height} pixels, so there is nothing to look at."
                )
            image.load()
            return to_rgb(image)
    except UnidentifiedImageError:
        raise ValueError(
            f"{path} is not a picture that Pillow can read; give a PNG, JPEG, WebP, GIF, BMP or "
            "TIFF file."
        ) from None
    except (OSError, SyntaxError, EOFError) as error:
        raise ValueError(f"{path} is damaged or cut short ({error}); get the file again.") from None
    finally:
        Image.MAX_IMAGE_PIXELS = limit


__all__ = ["MAX_PIXELS", "open_picture"]
