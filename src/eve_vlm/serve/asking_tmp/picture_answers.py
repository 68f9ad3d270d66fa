"""One question to each of very many pictures, of which only a few are open at a time.

Pictures are read here while a `Worker` answers those before them, and each result is handed out as
soon as it is there, so results come in nearly, not exactly, the order of the pictures.  Easy to get
wrong: a picture that cannot be read is a result too, and the others go on.
"""

import queue
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

from PIL import Image

from eve_vlm.errors import first_line

from .engine import EveEngine
from .messages import Messages, user_message
from .picture_sources import PictureSource
from .reply import Answer, Piece, Reply
from .sampling import Sampling
from .worker import Worker

BATCHES_AHEAD = 2  # batches of pictures that are open: one is answered, one waits


@dataclass(frozen=True, kw_only=True, slots=True)
class Question:
    """A question, and how it is to be answered."""

    text: str
    system: str | None = None
    sampling: Sampling = field(default_factory=Sampling)
    n: int = 1
    num_beams: int = 1

    def messages(self, pictures: Sequence[Image.Image | str | Path]) -> Messages:
        """The conversation that asks it about these pictures.

        Raises:
            ValueError: see `user_message`.
        """
        system = [] if self.system is None else [{"role": "system", "content": self.system}]
        return [*system, *user_message(self.text, pictures)]

    def answers(self, engine: EveEngine, pictures: Sequence[Image.Image]) -> list[Answer]:
        """As many answers as asked for, about these pictures together.

        Raises:
            ValueError: see `EveEngine.answer`.
        """
        return engine.answer(
            [self.messages(pictures)],
            n=self.n,
            num_beams=self.num_beams,
            **asdict(self.sampling),
        )


@dataclass(kw_only=True, slots=True)
class PictureAnswers:
    """What came of one picture: n answers, or a sentence that says why there are none."""

    number: int
    """Its place among the pictures, from 0."""
    name: str
    answers: list[Answer] = field(default_factory=list)
    error: str | None = None


def answer_each(
    engine: EveEngine, question: Question, sources: Iterable[PictureSource]
) -> Generator[PictureAnswers, None, None]:
    """Asks the question about each picture separately, and yields what is finished.

    Leaving the iterator ends what is being answered.

    Raises:
        ValueError: if n and num_beams do not fit, or answering broke, for instance because memory
            ended.
    """
    # Refuses what fits no picture, before one is opened.
    engine.answer([], n=question.n, num_beams=question.num_beams, **asdict(question.sampling))
    if question.num_beams == 1:
        yield from _answer_together(engine, question, sources)
        return
    # Beams of several prompts end at different times, so they are searched one by one anyway.
    for number, source in enumerate(sources):
        result = PictureAnswers(number=number, name=source.name)
        try:
            result.answers = question.answers(engine, [source.open()])
        except ValueError as error:
            result.error = str(error)
        yield result


def _answer_together(
    engine: EveEngine, question: Question, sources: Iterable[PictureSource]
) -> Iterator[PictureAnswers]:
    came: queue.SimpleQueue[int | BaseException] = queue.SimpleQueue()  # numbers of pictures
    running: dict[int, tuple[str, list[Reply]]] = {}
    n, most = question.n, BATCHES_AHEAD * engine.batch_size

    def finished(number: int) -> Iterator[PictureAnswers]:
        name, replies = running.get(number, ("", []))  # each of n answers tells
        answers = [reply.answer for reply in replies if reply.answer is not None]
        if len(answers) == n:
            del running[number]
            yield PictureAnswers(number=number, name=name, answers=answers)

    with Worker(engine, queue_size=n * most) as worker:
        for number, source in enumerate(sources):
            listener = partial(_tell, came, number)
            try:
                replies = engine.replies(
                    question.messages([source.open()]),
                    question.sampling,
                    n,
                    on_piece=[listener] * n,
                    on_error=came.put,
                )
            except ValueError as error:
                yield PictureAnswers(number=number, name=source.name, error=str(error))
                continue
            running[number] = source.name, replies
            worker.enqueue(replies)
            while len(running) >= most or not came.empty():
                yield from finished(_next(came))
        while running:
            yield from finished(_next(came))


def in_order(
    results: Generator[PictureAnswers, None, None],
) -> Generator[PictureAnswers, None, None]:
    """The same results in the order of the pictures; one that is early is held back."""
    held: dict[int, PictureAnswers] = {}
    number = 0
    with closing(results):
        for result in results:
            held[result.number] = result
            while number in held:
                yield held.pop(number)
                number += 1


def _tell(came: queue.SimpleQueue, number: int, piece: Piece) -> None:
    """In the worker's thread: one more answer to this question is whole."""
    if piece.answer is not None:
        came.put(number)


def _next(came: queue.SimpleQueue) -> int:
    number = came.get()
    if isinstance(number, Exception):
        raise ValueError(
            f"Answering broke ({first_line(number)}); if memory ended, a smaller batch takes less."
        ) from number
    if isinstance(number, BaseException):
        raise number
    return number


__all__ = ["BATCHES_AHEAD", "PictureAnswers", "Question", "answer_each", "in_order"]
