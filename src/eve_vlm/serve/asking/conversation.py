"""A conversation with pictures: what was said so far, streamed answers, undo, and a file of it.

It is what a terminal or a page keeps for one person.  Easy to get wrong: a turn is in here only
when something was answered, so a question that was refused, or stopped before its first word,
leaves the conversation as it was and its pictures waiting.
"""

import json
import os
from collections.abc import Generator
from contextlib import closing
from pathlib import Path
from typing import Any

from PIL import Image

from eve_vlm.errors import first_line
from eve_vlm.image_processing_eve import to_rgb
from eve_vlm.output_folder import written_whole
from eve_vlm.pictures import MAX_BYTES, read_picture
from eve_vlm.serve.asking.picture_sources import find_pictures
from eve_vlm.serve.engine import EveEngine, TooLongError
from eve_vlm.serve.fetch import data_uri_of_picture, picture_bytes_of_data_uri
from eve_vlm.serve.messages import Messages, picture_parts, user_message
from eve_vlm.serve.reply import Piece
from eve_vlm.serve.sampling import Sampling


class Conversation:
    """What was said, and what may be said next.

    Args:
        engine: answers; with `keep_tokens` it reads only what is new in each turn.
        system: instructions in front of everything; None leaves them to the model's template.
    """

    def __init__(self, engine: EveEngine, system: str | None = None):
        self.engine, self.system = engine, system
        self.turns: Messages = []  # questions and answers in turn
        self.waiting: list[dict[str, Any]] = []  # picture parts that the next question will have

    @property
    def messages(self) -> Messages:
        """All that was said, as Hugging Face messages with open pictures."""
        if self.system is None:
            return list(self.turns)
        return [{"role": "system", "content": self.system}, *self.turns]

    def add_picture(self, picture: Image.Image, *, name: str = "picture") -> None:
        """Puts a picture into the next question.

        Args:
            name: what it is called; a file's name lets `save` name the file.
        """
        self.waiting.append({"type": "image", "image": to_rgb(picture), "name": name})

    def say(self, text: str, **settings: Any) -> Generator[Piece, None, None]:
        """Asks, with the pictures that wait, and yields the answer piece by piece.

        Leaving the iterator stops the answer; what came until then stays in the conversation.

        Args:
            settings: fields of `Sampling`.

        Raises:
            TooLongError: if conversation and answer are longer than the model takes.
            ValueError: if the question is empty, or its `<image>` marks do not fit the pictures.
        """
        question = user_message(text, [part["image"] for part in self.waiting])
        for part, waiting in zip(picture_parts(question), self.waiting, strict=True):
            part.update(waiting)
        messages, said, whole = [*self.messages, *question], "", False
        with closing(self.engine.stream(messages, **settings)) as pieces:
            try:
                for piece in pieces:
                    said += piece.text
                    if piece.answer is not None:  # before it is seen: nobody need come back
                        whole = True
                        self._append(question, said)
                    yield piece
            except TooLongError as error:
                raise self._too_long(error, Sampling(**settings).max_new_tokens) from None
            finally:
                if said and not whole:
                    self._append(question, said)

    def undo(self) -> str | None:
        """Takes back the picture added last, or the last question, whose pictures then wait again.

        Returns what was taken back, in words; None if there is nothing.
        """
        if self.waiting:
            return f"the picture {self.waiting.pop()['name']}"
        if not self.turns:
            return None
        question, _ = self.turns[-2:]
        del self.turns[-2:]
        self.waiting = picture_parts([question])
        return f'the question "{_words(question)}"'

    def clear(self) -> None:
        """Begins anew, with the same system text."""
        self.turns, self.waiting = [], []
        if self.engine.kept is not None:
            with self.engine.lock:
                self.engine.kept.clear()

    def transcript(self) -> list[str]:
        """What was said, line by line; a question begins with ">"."""
        return [
            f"> {_words(turn)}" if turn["role"] == "user" else _words(turn) for turn in self.turns
        ]

    # --- a file ---

    def save(self, path: Path) -> None:
        """Writes the conversation as JSON; pictures by their files' names, or whole without one.

        Raises:
            ValueError: if it cannot be written, or the file holds something else.
        """
        if path.exists():
            _read(path)
        content = {
            "messages": [_stored(message) for message in self.messages],
            "waiting": [_stored_part(part) for part in self.waiting],
        }
        text = json.dumps(content, ensure_ascii=False, indent=1)
        try:
            with written_whole(path) as part:
                part.write_bytes(text.encode("utf-8", "backslashreplace"))
        except OSError as error:
            raise ValueError(
                f"{path} cannot be written ({error.strerror}); name another file."
            ) from None

    def load(self, path: Path) -> None:
        """Goes on with a saved conversation instead of this one.

        Raises:
            ValueError: if it cannot be read, is none, or a picture is not where it was.
        """
        messages, waiting = _read(path)
        system = None
        if messages and messages[0]["role"] == "system":
            system = _words(messages.pop(0))
        for part in [*picture_parts(messages), *waiting]:
            part["name"], part["image"] = _opened(part, path)
        self.clear()
        self.system, self.turns, self.waiting = system, messages, waiting

    def _append(self, question: Messages, answer: str) -> None:
        self.turns += [
            *question,
            {"role": "assistant", "content": [{"type": "text", "text": answer}]},
        ]
        self.waiting = []

    def _too_long(self, error: TooLongError, answer: int) -> TooLongError:
        """What the engine refused, in terms of a conversation."""
        prompt = error.prompt
        return TooLongError(
            f"The conversation would take {len(prompt)} tokens, {prompt.image_tokens} of them for "
            f"pictures, and the answer up to {answer}, but the model takes "
            f"{self.engine.max_length} in all; take something back, begin anew, or ask for a "
            "shorter answer or smaller pictures.",
            prompt,
        )


def _words(message: dict[str, Any]) -> str:
    """The text of a message, without its pictures."""
    content = message["content"]
    if isinstance(content, str):
        return content
    return "".join(part["text"] for part in content if part["type"] == "text")


def _stored(message: dict[str, Any]) -> dict[str, Any]:
    if isinstance(message["content"], str):
        return message
    return {**message, "content": [_stored_part(part) for part in message["content"]]}


def _stored_part(part: dict[str, Any]) -> dict[str, Any]:
    """A part without open pictures."""
    if part["type"] == "text":
        return part
    name = part["name"]
    # A page of a PDF is the PDF's name, # and a number.
    if os.path.isfile(name) or os.path.isfile(name.rpartition("#")[0]):
        return {"type": "image", "image": os.path.abspath(name)}
    return {"type": "image", "image": data_uri_of_picture(part["image"]), "name": name}


def _read(path: Path) -> tuple[Messages, list[dict[str, Any]]]:
    """Messages and waiting pictures of a saved conversation, checked, not opened."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}); check its name.") from None
    except ValueError as error:
        raise ValueError(
            f"{path} is no saved conversation ({first_line(error)}); name another file."
        ) from None
    messages = content.get("messages") if isinstance(content, dict) else None
    waiting = content.get("waiting", []) if isinstance(content, dict) else None
    if not isinstance(messages, list) or not isinstance(waiting, list):
        raise ValueError(f'{path} is no saved conversation (no "messages"); name another file.')
    roles = [message.get("role") if isinstance(message, dict) else None for message in messages]
    turns = roles[1:] if roles[:1] == ["system"] else roles
    if turns != ["user", "assistant"] * (len(turns) // 2):
        raise ValueError(
            f"{path} does not have questions (user) and answers (assistant) in turn, behind system "
            "words at most; mend its roles."
        )
    for message in messages:
        if isinstance(message.get("content"), str):
            message["content"] = [{"type": "text", "text": message["content"]}]
    good = all(map(_is_message, messages)) and all(_is_part(part, ["image"]) for part in waiting)
    if not good:
        raise ValueError(
            f"{path} has messages that are neither texts nor, in questions, pictures by file name "
            "or data URI; mend them."
        )
    return messages, waiting


def _is_message(message: dict[str, Any]) -> bool:
    kinds = ["text", "image"] if message["role"] == "user" else ["text"]
    content = message.get("content")
    return isinstance(content, list) and all(_is_part(part, kinds) for part in content)


def _is_part(part: Any, kinds: list[str]) -> bool:
    """Whether it is `{"type": "text", "text": ...}`, or the same with another of these kinds."""
    return (
        isinstance(part, dict)
        and part.get("type") in kinds
        and isinstance(part.get(part["type"]), str)
    )


def _opened(part: dict[str, Any], path: Path) -> tuple[str, Image.Image]:
    """Name and picture of a stored part; a relative name counts from the file's folder."""
    stored = part["image"]
    if stored.startswith("data:"):
        name = str(part.get("name", "picture"))
        return name, read_picture(picture_bytes_of_data_uri(stored, max_bytes=MAX_BYTES), name=name)
    found = list(find_pictures([str(path.parent / stored)]))
    if len(found) != 1:
        raise ValueError(f"{path} names {stored}, which is no single picture; mend it.")
    return found[0].name, found[0].open()


__all__ = ["Conversation"]
