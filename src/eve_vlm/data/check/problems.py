"""What can be wrong with a record: each kind with its name, its title and whether it is an error.

An error is what training would refuse; a warning trains, but somebody should look.  Easy to get
wrong: `title` is what the quarantine list and the table count by, so it holds no id and no number.
"""

from typing import NamedTuple


class Kind(NamedTuple):
    """One thing that can be wrong."""

    name: str
    """As `--error` takes it."""
    title: str
    """As people read it, the same for every record."""
    error: bool = True
    """Whether training would refuse the record."""


MALFORMED = Kind("malformed", "the record cannot be read")
UNKNOWN_ROLE = Kind("unknown-role", "a role is unknown")
PICTURE_MISSING = Kind("picture-missing", "a picture is missing")
PICTURE_DAMAGED = Kind("picture-damaged", "a picture is damaged or no picture")
MARKS = Kind("marks", "marks and pictures differ in number")
NO_ANSWER = Kind("no-answer", "there is no answer")
EMPTY_ANSWER = Kind("empty-answer", "an answer is empty")
NOT_RENDERED = Kind("not-rendered", "the conversation does not fit the format or template")
TOO_LONG = Kind("too-long", "longer than max_length")
TOO_MANY_PATCHES = Kind("too-many-patches", "more patches than a packed row takes")
SHRUNK = Kind("shrunk", "pictures are made smaller to fit max_length", error=False)
SAME_RECORD = Kind("same-record", "same pictures and text as an earlier record", error=False)
SAME_TEXT = Kind("same-text", "same text as an earlier record, other pictures", error=False)
SAME_ID = Kind("same-id", "same id as an earlier record of the data set", error=False)
TINY_PICTURE = Kind("tiny-picture", "a picture of a few pixels", error=False)
EXTREME_SHAPE = Kind(
    "extreme-shape", "a picture much longer than wide, or wider than long", error=False
)

KINDS = {
    kind.name: kind
    for kind in (
        *(MALFORMED, UNKNOWN_ROLE, PICTURE_MISSING, PICTURE_DAMAGED, MARKS, NO_ANSWER),
        *(EMPTY_ANSWER, NOT_RENDERED, TOO_LONG, TOO_MANY_PATCHES),
        *(SHRUNK, SAME_RECORD, SAME_TEXT, SAME_ID, TINY_PICTURE, EXTREME_SHAPE),
    )
}
"""All of them by name, errors first, in the order in which they are shown."""


class Problem(NamedTuple):
    """One thing that is wrong with one record."""

    kind: str
    """Name of the kind."""
    number: int
    """Number of the record in its data set, after split and cap."""
    id: str
    """Id of the record; its number where it has none or cannot be read."""
    message: str
    """What exactly is wrong."""


__all__ = [
    "EMPTY_ANSWER",
    "EXTREME_SHAPE",
    "KINDS",
    "MALFORMED",
    "MARKS",
    "NOT_RENDERED",
    "NO_ANSWER",
    "PICTURE_DAMAGED",
    "PICTURE_MISSING",
    "SAME_ID",
    "SAME_RECORD",
    "SAME_TEXT",
    "SHRUNK",
    "TINY_PICTURE",
    "TOO_LONG",
    "TOO_MANY_PATCHES",
    "UNKNOWN_ROLE",
    "Kind",
    "Problem",
]
