"""The stamps of Tux Paint: photographs, drawings and signs, each with a caption.

`X.txt` belongs to `X.png`, or to `X.svg` where there is no PNG; its first line is English.  Easy to
get wrong: `X_mirror.png` is the same stamp for another button, with no caption of its own.
"""

from pathlib import Path

from eve_vlm.data.picture_sets.found import Found, name_in, tidied


def find_pictures(folder: Path) -> list[Found]:
    """Every stamp that has a picture and a caption, by name."""
    found = []
    for text in sorted(folder.rglob("*.txt")):
        pictures = [text.with_suffix(ending) for ending in (".png", ".svg")]
        picture = next((path for path in pictures if path.is_file()), None)
        lines = text.read_text(encoding="utf-8", errors="replace").splitlines()
        caption = tidied(lines[0]) if lines else ""
        if picture is None or not caption:
            continue  # two of 952 captions have no picture
        place = picture.relative_to(folder)
        found.append(
            Found(
                id=place.as_posix(),
                path=str(picture),
                name=name_in(caption),
                caption=caption,
                category=", ".join(part.replace("_", " ") for part in place.parts[:-1][:2]),
            )
        )
    return found


__all__ = ["find_pictures"]
