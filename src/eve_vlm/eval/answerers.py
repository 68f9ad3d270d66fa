"""Who is asked: a model, the same model without its pictures, or the most frequent answer.

The last two are what a score has to be held against.  A question that words alone answer is no test
of seeing (the blind model), and where one answer is frequent, guessing it is worth points (the
majority).  Easy to get wrong: the majority's answer is taken from the evaluated samples themselves,
so it is the best that a constant can score, not what a model would know before it is asked.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from eve_vlm.serve.engine import Messages
from eve_vlm.serve.scoring import LogLikelihood

from .task import Sample, Task


class HasText(Protocol):
    """An answer."""

    @property
    def text(self) -> str:
        """Its words."""


class Answerer(Protocol):
    """What answers conversations: `EveEngine`, or any other model behind the same two calls."""

    def answer(
        self, conversations: Sequence[Messages], *, batch_size: int | None = None, **settings: Any
    ) -> Sequence[HasText]:
        """One answer for each conversation, in order; `max_new_tokens` is among the settings."""

    def log_likelihood(
        self,
        conversations: Sequence[Messages],
        continuations: Sequence[str],
        *,
        batch_size: int | None = None,
        max_image_tokens: int | None = None,
    ) -> list[LogLikelihood]:
        """How likely each text is as the answer to its conversation."""


class Blind:
    """A model that is shown no pictures."""

    def __init__(self, answerer: Answerer):
        self.answerer = answerer

    def answer(
        self, conversations: Sequence[Messages], *, batch_size: int | None = None, **settings: Any
    ) -> Sequence[HasText]:
        """Answers to the words alone."""
        words = [without_pictures(messages) for messages in conversations]
        return self.answerer.answer(words, batch_size=batch_size, **settings)

    def log_likelihood(
        self,
        conversations: Sequence[Messages],
        continuations: Sequence[str],
        *,
        batch_size: int | None = None,
        max_image_tokens: int | None = None,
    ) -> list[LogLikelihood]:
        """Of continuations of the words alone."""
        words = [without_pictures(messages) for messages in conversations]
        return self.answerer.log_likelihood(
            words, continuations, batch_size=batch_size, max_image_tokens=max_image_tokens
        )


Kind = Literal["model", "blind", "majority"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Subject:
    """Who is evaluated, and the facts that tell one from another."""

    name: str
    """As tables show it."""
    kind: Kind = "model"
    answerer: Answerer | None = None
    """None for the majority, which needs no model."""
    facts: dict[str, Any] = field(default_factory=dict)
    """Class, size, hash, number type, device; plain JSON."""

    @property
    def slug(self) -> str:
        """Its name as a folder."""
        safe = "".join(
            letter if letter.isalnum() or letter in ".-_" else "-" for letter in self.name
        )
        return safe.strip(".-") or "model"


MAJORITY = Subject(name="majority", kind="majority")


def blind(subject: Subject) -> Subject:
    """The same model without pictures."""
    assert subject.answerer is not None, "the majority sees nothing anyway"
    return Subject(
        name=f"{subject.name} (blind)",
        kind="blind",
        answerer=Blind(subject.answerer),
        facts=subject.facts,
    )


def without_pictures(messages: Messages) -> Messages:
    """The same conversation with its picture parts taken out."""
    return [
        message
        if isinstance(message["content"], str)
        else {
            **message,
            "content": [part for part in message["content"] if part["type"] != "image"],
        }
        for message in messages
    ]


def majority_answers(task: Task, samples: Sequence[Sample]) -> list[str]:
    """The most frequent right answer, for every sample; of ranked tasks the most frequent place."""
    if task.ranked:
        places = Counter(sample.options.index(sample.answers[0]) for sample in samples)
        place = places.most_common(1)[0][0]
        return [sample.options[min(place, len(sample.options) - 1)] for sample in samples]
    counts = Counter(sample.answers[0] for sample in samples if sample.answers)
    return [counts.most_common(1)[0][0] if counts else ""] * len(samples)


__all__ = [
    "MAJORITY",
    "Answerer",
    "Blind",
    "Subject",
    "blind",
    "majority_answers",
    "without_pictures",
]
