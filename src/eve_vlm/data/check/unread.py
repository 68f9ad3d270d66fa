"""Why a record could not be read, and what it is called: found in the sample as the file holds it.

Easy to get wrong: the reason must be the one that the source gave, so things are looked at in the
order in which the source looks at them: pictures of the record, roles, pictures inside messages.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from eve_vlm.data.check.problems import MALFORMED, PICTURE_MISSING, UNKNOWN_ROLE, Problem
from eve_vlm.data.picture_ref import PictureRef
from eve_vlm.data.sources.forms import CHAT_ROLES, NEEDED, ROLES
from eve_vlm.data.sources.source import FileSource, JoinedSource, PartSource, Source


def why_unread(source: Source, index: int, error: ValueError) -> Problem:
    """The problem of a record for which a source raised `error`."""
    found = file_of(source, index)
    if found is None:
        return Problem(MALFORMED.name, index, str(index), str(error))
    file, number = found
    id, kind = f"{file.prefix}{number}", MALFORMED
    try:
        sample = file.table[number]
    except ValueError:
        sample = None
    if isinstance(sample, Mapping):
        own = file.form.get(sample, "id")
        id = id if own is None else str(own)
        listed = file.form.get(sample, "image")
        listed = listed if isinstance(listed, list | tuple) else [listed] if listed else []
        if not _found(file, listed):
            kind = PICTURE_MISSING
        elif _unknown_role(file, sample):
            kind = UNKNOWN_ROLE
        elif not _found(file, _inside(file, sample)):
            kind = PICTURE_MISSING
    return Problem(kind.name, index, id, str(error))


def file_of(source: Source, index: int) -> tuple[FileSource, int] | None:
    """The file that record `index` of a source stands in, and its number there."""
    if isinstance(source, FileSource):
        return source, index
    if isinstance(source, PartSource):
        return file_of(source.source, int(source.numbers[index]))
    if isinstance(source, JoinedSource):
        for part in source.sources:
            if index < len(part):
                return file_of(part, index)
            index -= len(part)
    return None


def _found(file: FileSource, pictures: Any) -> bool:
    """Whether names of pictures lead somewhere; what is no name at all is another matter."""
    for picture in pictures:
        if isinstance(picture, PictureRef) or not isinstance(picture, str):
            continue
        try:
            file.pictures.find(picture, called="")
        except ValueError:
            return False
    return True


def _turns(file: FileSource, sample: Mapping[str, Any]) -> list[Any]:
    kind = file.form.kind
    body = file.form.get(sample, NEEDED[kind]) if kind in ("llava", "messages") else None
    return body if isinstance(body, list) else []


def _unknown_role(file: FileSource, sample: Mapping[str, Any]) -> bool:
    """Whether the first turn that cannot be read is one of an unknown role."""
    name, roles = ("from", ROLES) if file.form.kind == "llava" else ("role", CHAT_ROLES)
    for turn in _turns(file, sample):
        if not isinstance(turn, Mapping) or name not in turn:
            return False
        if not isinstance(turn[name], str) or turn[name] not in roles:
            return isinstance(turn[name], str)
    return False


def _inside(file: FileSource, sample: Mapping[str, Any]) -> Iterator[Any]:
    """Pictures that messages bring themselves."""
    for turn in _turns(file, sample):
        content = turn.get("content") if isinstance(turn, Mapping) else None
        for part in content if isinstance(content, list) else ():
            if isinstance(part, Mapping) and part.get("type") in ("image", "image_url"):
                for name in ("image", "image_url", "url", "path"):
                    value = part.get(name)
                    yield value.get("url") if isinstance(value, Mapping) else value


__all__ = ["file_of", "why_unread"]
