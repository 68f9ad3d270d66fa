"""Puts the samples of a task to a model and gives rows back, failures included.

Easy to get wrong: one unreadable picture or one prompt that is too long must not take its whole
batch with it, and must not vanish; the batch is asked again in halves until the culprit is alone,
and that one becomes a row with its reason.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple

from eve_vlm.serve.engine import Messages, user_message

from .answerers import Answerer
from .task import Row, Sample, Task

VERDICTS = 8  # that are asked of a judge at once


class Reply(NamedTuple):
    """An answer, or why there is none."""

    text: str
    failed: str = ""
    facts: dict[str, Any] = {}


def rows_of(
    task: Task,
    samples: Sequence[Sample],
    answerer: Answerer,
    *,
    batch_size: int,
    **settings: Any,
) -> list[Row]:
    """Asks some samples together.

    Args:
        settings: of both of the answerer's calls, such as `max_image_tokens`.
    """
    conversations: list[Messages | str] = [_conversation(task, sample) for sample in samples]
    askable = [n for n, one in enumerate(conversations) if not isinstance(one, str)]
    given = [(samples[n], conversations[n]) for n in askable]
    if task.ranked:
        replies = _in_halves(lambda part: _ranked(answerer, part, batch_size, settings), given)
    else:
        asking = {"max_new_tokens": task.max_new_tokens, **settings}
        replies = _in_halves(lambda part: _said(answerer, part, batch_size, asking), given)
    found: list[Reply] = [Reply("", str(one)) for one in conversations]
    for n, reply in zip(askable, replies, strict=True):
        found[n] = reply
    if not task.needs_judge:
        return [row_of(task, sample, reply) for sample, reply in zip(samples, found, strict=True)]
    # A judge answers over the network: while one verdict is waited for, others can be asked for.
    with ThreadPoolExecutor(VERDICTS) as threads:
        return list(threads.map(partial(row_of, task), samples, found))


def row_of(task: Task, sample: Sample, reply: Reply) -> Row:
    """A reply, marked; what failed is marked as an empty answer is."""
    failed, marks = reply.failed, None
    if not failed:
        try:
            marks = task.mark(sample, reply.text)
        except ValueError as error:  # a judge whose verdict cannot be read
            failed = str(error)
    return Row(
        id=sample.id,
        group=sample.group,
        unit=sample.unit,
        prompt=task.prompt(sample),
        answer=reply.text,
        expected=sample.answers,
        marks=task.mark(sample, "") if marks is None else marks,
        failed=failed,
        facts={**sample.facts, **reply.facts},
    )


def _conversation(task: Task, sample: Sample) -> Messages | str:
    """The question with its pictures open; or why it cannot be asked."""
    try:
        return user_message(task.prompt(sample), list(sample.images()))
    except (ValueError, OSError) as error:  # a picture that is damaged or not there
        return f"Sample {sample.id} cannot be asked: {error}"


Given = tuple[Sample, Any]


def _said(
    answerer: Answerer, given: Sequence[Given], batch_size: int, settings: dict[str, Any]
) -> list[Reply]:
    answers = answerer.answer([one for _, one in given], batch_size=batch_size, **settings)
    return [Reply(answer.text) for answer in answers]


def _ranked(
    answerer: Answerer, given: Sequence[Given], batch_size: int, settings: dict[str, Any]
) -> list[Reply]:
    """The likeliest option of each, by the probability of its whole text."""
    pairs = [(one, option) for sample, one in given for option in sample.options]
    likely = iter(
        answerer.log_likelihood(
            [one for one, _ in pairs],
            [option for _, option in pairs],
            batch_size=batch_size,
            **settings,
        )
    )
    replies = []
    for sample, _ in given:
        totals = [next(likely).total for _ in sample.options]
        best = max(range(len(totals)), key=totals.__getitem__)
        rounded = [round(total, 4) for total in totals]
        replies.append(Reply(sample.options[best], facts={"log_likelihoods": rounded}))
    return replies


def _in_halves(
    ask: Callable[[Sequence[Given]], list[Reply]], given: Sequence[Given]
) -> list[Reply]:
    if not given:
        return []
    try:
        return ask(given)
    except ValueError as error:
        if len(given) == 1:
            return [Reply("", str(error))]
    middle = len(given) // 2
    return _in_halves(ask, given[:middle]) + _in_halves(ask, given[middle:])


__all__ = ["Reply", "row_of", "rows_of"]
