"""The forms in which people write records down, each to one `Record`.

    llava      {"id", "image": one name, several or none, "conversations": [{"from", "value"}]}
    messages   {"id", "messages": [{"role", "content": text or parts}], "images": [...]}
    captions   {"id", "image", "caption"}
    text       {"id", "text"}

`columns` in a recipe says what these are called in a file where they are called otherwise.  Easy to
get wrong: in `llava` marks go to the front of their turn, as in the published preprocessing; in
`messages` they stay where they stand.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from eve_vlm.data.picture_folder import PictureFolder
from eve_vlm.data.picture_ref import PictureRef
from eve_vlm.data.records import Record

MARK = "<image>"
PICTURE_ENDINGS = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "ppm", "avif")

FIELDS: dict[str, dict[str, tuple[str, ...]]] = {
    "llava": {
        "id": ("id",),
        "image": ("image", "images"),
        "conversations": ("conversations",),
    },
    "messages": {
        "id": ("id",),
        "image": ("images", "image"),
        "messages": ("messages", "conversations"),
    },
    "captions": {
        "id": ("id",),
        "image": ("image", "images"),
        "caption": ("caption", "text", "txt"),
    },
    "text": {"id": ("id",), "text": ("text", "txt")},
}
"""By form: what a field is called here, and the names under which it is looked for."""
NEEDED = {"llava": "conversations", "messages": "messages", "captions": "caption", "text": "text"}
"""The field that no record of a form can lack."""


class Form(NamedTuple):
    """A form with the names of its fields in a certain data set."""

    kind: str
    """`llava`, `messages`, `captions` or `text`."""
    columns: Mapping[str, str]
    """Our names to theirs."""

    def checked(self) -> "Form":
        """Itself, if its columns are fields of the form.

        Raises:
            ValueError: if one is not.
        """
        unknown = sorted(set(self.columns) - set(FIELDS[self.kind]))
        if unknown:
            raise ValueError(
                f"data.sources.columns names {', '.join(unknown)}, which {self.kind} does not "
                f"have; use {', '.join(FIELDS[self.kind])}."
            )
        return self

    def names(self, field: str) -> tuple[str, ...]:
        """The names under which a field is looked for."""
        return (self.columns[field],) if field in self.columns else FIELDS[self.kind][field]

    def get(self, sample: Mapping[str, Any], field: str) -> Any:
        """The value of a field, None where it is not there."""
        for name in self.names(field):
            if sample.get(name) is not None:
                return sample[name]
        return None

    def record(
        self,
        sample: Any,
        *,
        place: Callable[[], str],
        number: str,
        pictures: PictureFolder,
        source: str,
    ) -> Record:
        """One sample as a record, its pictures not opened yet.

        Args:
            sample: what the file holds.
            place: says where it stands; called only for a message.
            number: its id where it has none.
            pictures: finds its pictures.
            source: name of its data set.

        Raises:
            ValueError: with its place, if it is not of this form.
        """
        try:
            if not isinstance(sample, Mapping):
                raise ValueError(f"it is a {type(sample).__name__}; give an object with fields.")
            id = self.get(sample, "id")
            id = number if id is None else str(id)
            body = self.get(sample, NEEDED[self.kind])
            if body is None:
                names = " or ".join(self.names(NEEDED[self.kind]))
                raise ValueError(f"it lacks {names}; add it, or say its name in columns.")
            images = _listed(self.get(sample, "image")) if "image" in FIELDS[self.kind] else []
            found = [pictures.find(one, called=f"The picture of {id!r}") for one in images]
            record = _MAKERS[self.kind](id, body, found, pictures)
            return dataclasses.replace(record, source=source)
        except ValueError as error:
            raise ValueError(f"Record in {place()}: {error}") from None


def _listed(value: Any) -> list[Any]:
    if value is None or value == "":
        return []
    return list(value) if isinstance(value, list | tuple) else [value]


# --- llava ----------------------------------------------------------------------------------------

ROLES = {"human": "user", "gpt": "assistant", "system": "system"}
CHAT_ROLES = ("system", "user", "assistant")


def _llava(id: str, body: Any, images: list[PictureRef], pictures: PictureFolder) -> Record:
    turns = []
    for turn in _turns(body, "from", "value"):
        role, value = turn
        if role not in ROLES:
            raise ValueError(f"the role {role!r} is unknown; use one of {', '.join(ROLES)}.")
        turns.append((role, value))
    if turns and turns[0][0] == "gpt":
        turns = turns[1:]  # as published
    messages = []
    for role, value in turns:
        content: list[dict] = []
        if images and role == "human":
            marks = value.count(MARK)
            content += [{"type": "image"}] * marks
            if marks:
                value = value.replace(MARK, "").strip()
        if value or not content:
            content.append({"type": "text", "text": value})
        messages.append({"role": ROLES[role], "content": content})
    return Record(id=id, messages=messages, images=images)


def _turns(body: Any, role: str, value: str) -> list[tuple[str, str]]:
    if not isinstance(body, list):
        raise ValueError(f"its conversations are a {type(body).__name__}; give a list of turns.")
    turns = []
    for turn in body:
        if not isinstance(turn, Mapping) or not {role, value} <= set(turn):
            raise ValueError(f"one of its turns lacks {role!r} or {value!r}; give both.")
        for text in (turn[role], turn[value]):
            if not isinstance(text, str):
                raise ValueError(f"it has {text!r} where a text belongs; mend or remove it.")
        turns.append((turn[role], turn[value]))
    return turns


# --- messages -------------------------------------------------------------------------------------


def _messages(id: str, body: Any, images: list[PictureRef], pictures: PictureFolder) -> Record:
    """Pictures come with their part, or in their order from the list beside the messages."""
    if not isinstance(body, list):
        raise ValueError(f"its messages are a {type(body).__name__}; give a list of them.")
    listed, placed, messages = list(images), [], []
    for message in body:
        if not isinstance(message, Mapping) or message.get("role") not in CHAT_ROLES:
            role = message.get("role") if isinstance(message, Mapping) else message
            raise ValueError(f"the role {role!r} is unknown; use one of {', '.join(CHAT_ROLES)}.")
        content: list[dict[str, Any]] = []
        for part in _parts(message.get("content"), marked=bool(images)):
            if "picture" in part:
                placed.append(pictures.find(part["picture"], called=f"A picture of {id!r}"))
            elif part["type"] == "image" and listed:
                placed.append(listed.pop(0))
            content.append({key: part[key] for key in ("type", "text") if key in part})
        messages.append({"role": message["role"], "content": content})
    # Left over: the encoder counts pictures against marks and says what is wrong.
    return Record(id=id, messages=messages, images=[*placed, *listed])


def _parts(content: Any, *, marked: bool) -> list[dict[str, Any]]:
    """Parts of one message; a text may hold `<image>` marks for pictures of the list."""
    if isinstance(content, str):
        content = [{"type": "text", "text": content}]
    if not isinstance(content, list):
        raise ValueError(f"it has {content!r} where a text or a list of parts belongs; mend it.")
    parts: list[dict[str, Any]] = []
    for part in content:
        if isinstance(part, str):
            part = {"type": "text", "text": part}
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind == "text" and isinstance(part.get("text"), str):
            texts = part["text"].split(MARK) if marked else [part["text"]]
            for number, text in enumerate(texts):
                parts += [{"type": "image"}] * (number > 0)
                parts += [{"type": "text", "text": text}] if text or len(texts) == 1 else []
        elif kind in ("image", "image_url"):
            parts.append(_picture_part(part))
        else:
            raise ValueError(
                f"it has the part {str(part)[:80]!r}; a part is a text, an image or an image_url."
            )
    return parts


def _picture_part(part: Mapping[str, Any]) -> dict[str, Any]:
    for name in ("image", "image_url", "url", "path"):
        value = part.get(name)
        if isinstance(value, Mapping) and "url" in value:
            value = value["url"]
        if value is not None:
            return {"type": "image", "picture": value}
    return {"type": "image"}


# --- captions and text ----------------------------------------------------------------------------


def _captions(id: str, body: Any, images: list[PictureRef], pictures: PictureFolder) -> Record:
    if not isinstance(body, str):
        raise ValueError(f"its caption is {str(body)[:80]!r}; give a text.")
    if not images:
        raise ValueError("it has no picture; give one, or use the kind text.")
    content = [{"type": "image"}] * len(images)
    answer = [{"type": "text", "text": body.strip()}]
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
    return Record(id=id, messages=messages, images=images)


def _text(id: str, body: Any, images: list[PictureRef], pictures: PictureFolder) -> Record:
    """Words alone; learnt from the first to the last, in every stage."""
    if not isinstance(body, str):
        raise ValueError(f"its text is {str(body)[:80]!r}; give a text.")
    answer = [{"type": "text", "text": body}]
    messages = [{"role": "assistant", "content": answer}]
    return Record(id=id, messages=messages, images=[], format="plain")


_MAKERS = {"llava": _llava, "messages": _messages, "captions": _captions, "text": _text}

__all__ = ["FIELDS", "NEEDED", "PICTURE_ENDINGS", "Form"]
