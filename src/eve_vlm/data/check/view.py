"""A record as training sees it, in pieces: what is learnt, what is masked, where pictures stand.

The pieces come from the ids and labels of the encoder itself, so the view cannot disagree with the
training.  Easy to get wrong: tokens are decoded together from the beginning, because a tokenizer
that marks words by a blank in front drops it at the beginning of whatever it decodes.
"""

import os
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from jinja2 import TemplateError

from eve_vlm.data.check.looking import Look, look_at
from eve_vlm.data.check.record import unlimited
from eve_vlm.data.encode import IGNORED, Encoder
from eve_vlm.data.records import Record, parts_of
from eve_vlm.image_processing_eve import num_image_tokens

LEARNT, MASKED, PICTURE, PLAIN = "\x1b[32m", "\x1b[2m", "\x1b[36m", "\x1b[0m"


class Segment(NamedTuple):
    """Neighbouring tokens that are all learnt or all masked, or one picture."""

    text: str
    """What they say."""
    learnt: bool
    """Whether they have labels."""
    tokens: int
    """How many they are; 0 where it is not known."""
    picture: int | None = None
    """Number of the picture, from 0."""


def view_of(record: Record, encoder: Encoder | None) -> list[Segment]:
    """The pieces of a record; by its messages where no encoder can render them."""
    looks = [look_at(image, fast=True) for image in record.images]
    if encoder is None:
        return _by_messages(record, looks)
    try:
        ids, labels = encoder.encode_text(record.messages, format=record.format)
    except (ValueError, TemplateError):
        return _by_messages(record, looks)
    counts = _picture_tokens(encoder, ids, looks)
    image, tokenizer = encoder.processor.image_token_id, encoder.processor.tokenizer
    segments: list[Segment] = []
    start, text, seen = 0, "", 0
    for end in range(1, len(ids) + 1):
        learnt = labels[start] != IGNORED
        ends = end == len(ids) or (labels[end] != IGNORED) != learnt
        if not ends and image not in (ids[start], ids[end]):
            continue
        whole = tokenizer.decode(
            ids[:end], skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        if ids[start] == image:
            tokens = counts[seen] if seen < len(counts) else 0
            segments.append(_picture(seen, looks, tokens))
            seen += 1
        else:
            segments.append(Segment(whole[len(text) :], learnt, end - start))
        start, text = end, whole
    return segments


def _picture_tokens(encoder: Encoder, ids: list[int], looks: Sequence[Look]) -> list[int]:
    """Tokens of each picture, none where they do not fit the marks or cannot be read."""
    sizes = [look.size for look in looks]
    if not all(width for width, _ in sizes):
        return []
    for one in (encoder, unlimited(encoder)):  # too long for the first, it is shown all the same
        try:
            return [num_image_tokens(grid.rows, grid.cols) for grid in one.layout(ids, sizes).grids]
        except ValueError:
            continue
    return []


def _picture(number: int, looks: Sequence[Look], tokens: int) -> Segment:
    size = looks[number].size if number < len(looks) else None
    what = "is not there" if size is None else "cannot be read" if not size[0] else ""
    facts = [f"{tokens} tokens"] * (tokens > 0)
    if size is not None and not what:
        facts.append(f"{size[0]} x {size[1]}")
    said = f" {what}" if what else f": {', '.join(facts)}"
    return Segment(f"picture {number + 1}{said}", False, tokens, number)


def _by_messages(record: Record, looks: Sequence[Look]) -> list[Segment]:
    """Roles and texts; answers are what would be learnt, their end token left aside."""
    segments, seen = [], 0
    for message in record.messages:
        segments.append(Segment(f"{message['role']}: ", False, 0))
        for part in parts_of(message):
            if part["type"] == "image":
                segments.append(_picture(seen, looks, 0))
                seen += 1
            else:
                segments.append(Segment(part["text"], message["role"] == "assistant", 0))
        segments.append(Segment("\n", False, 0))
    return segments


def printed(segments: Sequence[Segment], *, colours: bool) -> str:
    """The pieces for a terminal: learnt in green, masked in grey; without colours `{+learnt+}`."""
    pieces = []
    for one in segments:
        text = harmless(one.text)
        if one.picture is not None:
            pieces.append(f"{PICTURE}[{text}]{PLAIN}" if colours else f"[{text}]")
        elif one.learnt:
            pieces.append(f"{LEARNT}{text}{PLAIN}" if colours else f"{{+{text}+}}")
        else:
            pieces.append(f"{MASKED}{text}{PLAIN}" if colours else text)
    return "".join(pieces).rstrip("\n")


def harmless(text: str) -> str:
    """Text of strangers without the codes that would steer a terminal; they are spelled out."""
    return "".join(one if one.isprintable() or one in "\n\t" else repr(one)[1:-1] for one in text)


def wants_colours(environment: Mapping[str, str] = os.environ, *, terminal: bool) -> bool:
    """Whether to write colours: to a terminal, unless NO_COLOR (no-color.org) is set."""
    return terminal and not environment.get("NO_COLOR")


__all__ = ["Segment", "harmless", "printed", "view_of", "wants_colours"]
