"""One training or test example: messages and the pictures that they point at.

Every source (files, synthetic scenes, text) yields this one type, so that encoding and collating
know nothing of where an example came from. Easy to get wrong: the n-th `{"type": "image"}` part
over *all* messages stands for `images[n]`; the counts must agree.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from PIL import Image

from eve_vlm.data.picture_ref import PictureRef


@dataclass(frozen=True, kw_only=True, slots=True)
class Record:
    """Messages in Hugging Face form with their pictures."""

    id: str
    """Names the example in logs and error messages."""
    messages: list[dict[str, Any]]
    """`{"role": ..., "content": [{"type": "image"} | {"type": "text", "text": ...}, ...]}`."""
    images: Sequence[Image.Image | Path | PictureRef]
    """One per image part, in order: an open picture, the path of a file, or where it is to be
    found."""
    source: str = ""
    """Name of the data set that it comes from; losses are logged by it."""
    family: str = ""
    """The kind of question (`name`, `count`, ...) under which its answer is scored."""
    format: Literal["plain", "chat"] | None = None
    """How it is rendered for training (see `Encoder`); None leaves that to the stage."""


def parts_of(message: dict[str, Any]) -> list[dict[str, Any]]:
    """The parts of a message, whose content may also be a plain text."""
    content = message["content"]
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def text_of(message: dict[str, Any]) -> str:
    """All that a message says, without its pictures."""
    return "".join(part["text"] for part in parts_of(message) if part["type"] == "text")


def messages_of(turns: Iterable[tuple[str, str]], *, image: bool = True) -> list[dict[str, Any]]:
    """Hugging Face messages of questions with their answers; a picture stands before the first.

    >>> [message["role"] for message in messages_of([("", "a cat")], image=False)]
    ['assistant']

    Args:
        turns: (question, answer); the question of a caption is empty.
        image: whether there is a picture; a caption without one has no user message.
    """
    messages: list[dict[str, Any]] = []
    for number, (question, answer) in enumerate(turns):
        asked: list[dict[str, str]] = [{"type": "image"}] if image and number == 0 else []
        if question:
            asked.append({"type": "text", "text": question})
        if asked:
            messages.append({"role": "user", "content": asked})
        told = [{"type": "text", "text": answer}]
        messages.append({"role": "assistant", "content": told})
    return messages


__all__ = ["Record", "messages_of", "parts_of", "text_of"]
