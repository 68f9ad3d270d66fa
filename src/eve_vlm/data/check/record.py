"""Checks one record: text, marks, pictures, and what it takes of a row.

What is wrong is asked of the same `Encoder` that training uses, step by step, so that every step
that fails is a kind of its own.  Easy to get wrong: one record can have several problems, but each
kind once; further pictures with the same problem are counted in its message.
"""

import json
import sys
from collections.abc import Sequence
from typing import NamedTuple

from jinja2 import TemplateError

from eve_vlm.data.check.looking import Look, digest_of, look_at
from eve_vlm.data.check.problems import (
    EMPTY_ANSWER,
    MARKS,
    NO_ANSWER,
    NOT_RENDERED,
    SHRUNK,
    TOO_LONG,
    TOO_MANY_PATCHES,
    Problem,
)
from eve_vlm.data.encode import IGNORED, Encoder
from eve_vlm.data.packing import Size
from eve_vlm.data.records import Record, parts_of, text_of

MARK = "<image>"
UNKNOWN = -1  # the length of a record whose pictures or text cannot be read


class Facts(NamedTuple):
    """What is found out about one record."""

    length: int
    """Tokens with pictures in place, or letters of text without a tokenizer; -1 if not known."""
    patches: int
    """Patches of all its pictures; 0 without a processor."""
    learnt: int
    """Tokens with a label, or letters of the answers."""
    edge: int
    """The longer side that its pictures are made smaller to, 0 where they are not."""
    sizes: list[tuple[int, int]]
    """Width and height of the pictures that can be read."""
    text: bytes
    """Digest of roles, texts and places of pictures."""
    content: bytes
    """Digest of text and pictures; empty if a picture cannot be read."""
    problems: list[tuple[str, str]]
    """Kind and message."""


class RecordChecker:
    """Checks records; goes to worker processes as it is.

    Args:
        encoder: counts tokens; None counts letters.
        fast: reads headers of pictures alone.
    """

    def __init__(self, encoder: Encoder | None, *, fast: bool):
        self.encoder, self.fast = encoder, fast
        self.unlimited = None if encoder is None else unlimited(encoder)

    def __call__(self, record: Record) -> Facts:
        """All that can be said about a record."""
        problems: dict[str, str] = {}
        looks = [look_at(image, fast=self.fast) for image in record.images]
        _pictures(looks, problems)
        answers = [text_of(one) for one in record.messages if one["role"] == "assistant"]
        if not answers:
            problems[NO_ANSWER.name] = "It has no assistant message."
        elif not all(answer.strip() for answer in answers):
            empty = sum(not answer.strip() for answer in answers)
            problems[EMPTY_ANSWER.name] = f"{empty} of its {len(answers)} answers are empty."
        if self.encoder is None:
            length, learnt = _letters(record), sum(map(len, answers))
            _count_marks(_marks_in(record), len(looks), problems)
            measured = Facts(length, 0, learnt, 0, [], b"", b"", [])
        else:
            measured = self._measured(record, looks, problems)
        text = digest_of(json.dumps([[m["role"], parts_of(m)] for m in record.messages]).encode())
        whole = all(look.digest for look in looks)
        return measured._replace(
            sizes=[look.size for look in looks if look.digest],
            text=text,
            content=digest_of(text, *(look.digest for look in looks)) if whole else b"",
            problems=list(problems.items()),
        )

    def _measured(self, record: Record, looks: Sequence[Look], problems: dict[str, str]) -> Facts:
        """Tokens, patches and labels, as training would count them."""
        assert self.encoder is not None and self.unlimited is not None
        nothing = Facts(UNKNOWN, 0, 0, 0, [], b"", b"", [])
        if NO_ANSWER.name in problems or EMPTY_ANSWER.name in problems:
            _count_marks(_marks_in(record), len(looks), problems)
            return nothing
        try:
            ids, labels = self.encoder.encode_text(record.messages, format=record.format)
        except (ValueError, TemplateError) as error:
            problems[NOT_RENDERED.name] = f"Its conversation cannot be rendered: {error}"
            return nothing
        marks = ids.count(self.encoder.processor.image_token_id)
        _count_marks(marks, len(looks), problems)
        if MARKS.name in problems or not all(look.digest for look in looks):
            return nothing
        sizes = [look.size for look in looks]
        size, edge = self.unlimited.layout(ids, sizes).size, 0
        if not self._fits(size):
            size, edge = self._squeezed(ids, sizes, size, problems)
        learnt = sum(label != IGNORED for label in labels)
        return nothing._replace(length=size.tokens, patches=size.patches, learnt=learnt, edge=edge)

    def _fits(self, size: Size) -> bool:
        assert self.encoder is not None
        few = self.encoder.max_patches is None or size.patches <= self.encoder.max_patches
        return few and size.tokens <= self.encoder.max_length

    def _squeezed(
        self,
        ids: list[int],
        sizes: list[tuple[int, int]],
        full: Size,
        problems: dict[str, str],
    ) -> tuple[Size, int]:
        """What the encoder makes of a record that does not fit: smaller pictures, or nothing."""
        assert self.encoder is not None
        try:
            layout = self.encoder.layout(ids, sizes)
        except ValueError as error:
            kind = TOO_LONG if full.tokens > self.encoder.max_length else TOO_MANY_PATCHES
            message = str(error)
            problems[kind.name] = message[:1].upper() + message[1:]
            return full, 0
        problems[SHRUNK.name] = (
            f"Its pictures are made {layout.longest_edge} pixels long, which takes "
            f"{layout.size.tokens} tokens instead of {full.tokens}."
        )
        return layout.size, layout.longest_edge


def unlimited(encoder: Encoder) -> Encoder:
    """The same encoder for records of any length, so that a needed length can be said."""
    return Encoder(encoder.processor, format=encoder.format, max_length=sys.maxsize)


def named(facts: Facts, index: int, id: str) -> list[Problem]:
    """The problems of a record with its number and id."""
    return [Problem(kind, index, id, message) for kind, message in facts.problems]


def _pictures(looks: Sequence[Look], problems: dict[str, str]) -> None:
    for kind in dict.fromkeys(look.kind for look in looks if look.kind):
        messages = [look.message for look in looks if look.kind == kind]
        others = len(messages) - 1
        problems[kind] = messages[0] + (f" So are {others} more of it." if others else "")


def _letters(record: Record) -> int:
    return sum(len(text_of(message)) for message in record.messages)


def _marks_in(record: Record) -> int:
    """Marks as the text shows them: parts, and marks that stand in a text and count as well."""
    parts = [part for message in record.messages for part in parts_of(message)]
    return sum(part["type"] == "image" or part["text"].count(MARK) for part in parts)


def _count_marks(marks: int, pictures: int, problems: dict[str, str]) -> None:
    if marks != pictures:
        problems[MARKS.name] = (
            f"Its text has {marks} {MARK} marks but {pictures} pictures; give one mark for each."
        )


__all__ = ["UNKNOWN", "Facts", "RecordChecker", "named", "unlimited"]
