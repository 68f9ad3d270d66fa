"""Pictures of GCompris, a collection of games for children: words, animals, monuments, paintings.

They lie in Qt resource files, which hold a tree of names and, for each file, its bytes as they are
or packed with zlib; the words stand in QML programmes beside them.  Easy to get wrong: all numbers
of a resource file are big-endian, and a packed file has its true length in four bytes in front.
"""

import json
import re
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

from eve_vlm.data.picture_sets.found import Found, tidied

PACKED, FOLDER, ZSTD = 1, 2, 4  # flags of a node
ROW = 22  # bytes of a node since version 2, which has the time of change
ROOT = "/gcompris/src/activities/"
GUIDES = {
    "explore_farm_animals": "animal",
    "explore_world_animals": "animal",
    "explore_monuments": "monument",
}
_TEXT = r'"{}"\s*:\s*qsTr\("((?:[^"\\]|\\.)*)"\)'
_TITLE, _WORDS = re.compile(_TEXT.format("title")), re.compile(_TEXT.format("text"))
_PICTURE = re.compile(r'"image2?"\s*:\s*"qrc:([^"]+\.webp)"')
_PAINTING = re.compile(r'instruction\s*:\s*qsTr\("((?:[^"\\]|\\.)*)"\)')
_BACKGROUND = re.compile(r'"pixmapfile"\s*:\s*"([^"]+_background\.webp)"')


def find_pictures(folder: Path) -> list[Found]:
    """Pictures with a word, a description or a title."""
    found = [*_words(read_resources(folder / "lang.rcc"))]
    for activity, kind in GUIDES.items():
        found += _described(read_resources(folder / f"{activity}.rcc"), kind)
    return [*found, *_titled(read_resources(folder / "details.rcc"))]


def read_resources(path: Path) -> dict[str, bytes]:
    """{name: content} of a Qt resource file.

    Raises:
        ValueError: if it is none, or packed in a way that is not read here.
    """
    content = path.read_bytes()
    magic, version, tree, data, names = struct.unpack_from(">4siiii", content)
    if magic != b"qres" or version < 2:
        raise ValueError(
            f"{path} is no Qt resource file of version 2 or later; run `eve assets fetch gcompris`."
        )
    found: dict[str, bytes] = {}

    def walk(node: int, place: str) -> None:
        at = tree + node * ROW
        name_at, flags = struct.unpack_from(">IH", content, at)
        if node:
            length = struct.unpack_from(">H", content, names + name_at)[0]
            begin = names + name_at + 6  # length, and a hash of the name
            place += "/" + content[begin : begin + 2 * length].decode("utf-16-be")
        if flags & FOLDER:
            children, first = struct.unpack_from(">II", content, at + 6)
            for child in range(first, first + children):
                walk(child, place)
            return
        begin = data + struct.unpack_from(">I", content, at + 10)[0]
        length = struct.unpack_from(">I", content, begin)[0]
        found[place] = _unpacked(content[begin + 4 : begin + 4 + length], flags, f"{path}{place}")

    walk(0, "")
    return found


def _unpacked(data: bytes, flags: int, place: str) -> bytes:
    if flags & ZSTD:
        raise ValueError(f"{place} is packed with zstd; fetch the asset in the version asked for.")
    return zlib.decompress(data[4:]) if flags & PACKED else data


def _words(files: dict[str, bytes]) -> Iterator[Found]:
    """Pictures that are called as in the list of words."""
    folder = f"{ROOT}lang/resource/"
    words = json.loads(files[f"{folder}content-en.json"])
    for place, data in sorted(files.items()):
        if place.startswith(f"{folder}words_sample/") and place.endswith(".webp"):
            stem = Path(place).stem
            word = tidied(words.get(f"{stem}.ogg", stem.replace("_", " ")))
            yield Found(id=place.removeprefix(ROOT), data=data, name=word, caption=word)


def _described(files: dict[str, bytes], kind: str) -> Iterator[Found]:
    """Pictures of a guide: name and description stand in one block in front of the picture."""
    for place in sorted(name for name in files if re.search(r"/board/.*\.qml$", name)):
        for block in files[place].decode("utf-8").split("{")[2:]:
            title, text, picture = (p.search(block) for p in (_TITLE, _WORDS, _PICTURE))
            if title is None or text is None or picture is None or picture[1] not in files:
                continue
            name, first = _said(title[1]), _said(text[1]).partition(". ")[0].rstrip(".!")
            yield Found(
                id=picture[1].removeprefix(ROOT),
                data=files[picture[1]],
                name=name if kind == "monument" else name.lower(),
                caption=f"{name}. {first}.",
                category=kind,
            )


def _titled(files: dict[str, bytes]) -> Iterator[Found]:
    """Photographs and paintings with a title."""
    folder = f"{ROOT}details/resource/"
    for place in sorted(name for name in files if name.startswith(f"{folder}board/")):
        text = files[place].decode("utf-8")
        title, picture = _PAINTING.search(text), _BACKGROUND.search(text)
        if title and picture and folder + picture[1] in files:
            data = files[folder + picture[1]]
            yield Found(id=f"details/{picture[1]}", data=data, caption=_said(title[1]))


def _said(text: str) -> str:
    """A text of QML, whose strings are those of JSON."""
    return tidied(json.loads(f'"{text}"'))


__all__ = ["find_pictures", "read_resources"]
