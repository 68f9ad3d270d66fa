"""Requests of lmms-eval answered by our engine: answers, talks of several rounds, ranked options.

A request that fails (a picture that cannot be read, a question that is too long) is answered with
nothing, which every task marks as wrong, named with its task and number, and counted in the
harness's results; a setting that cannot be honoured stops the run.

Easy to get wrong: where a task ranks options the harness takes the *least* of what `loglikelihood`
returns, so that is a loss, contrary to its documentation.
"""

import logging
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from itertools import count, groupby
from typing import Any, NamedTuple, TypeVar

import torch
from accelerate import Accelerator
from tqdm.auto import tqdm

from eve_vlm.serve.engine import (
    Answer,
    EveEngine,
    LogLikelihood,
    Messages,
    Sampling,
    TooLongError,
)

from .lmms_requests import (
    Settings,
    UnsupportedError,
    check_arguments,
    conversation_of,
    settings_of,
    turn_of,
)

T = TypeVar("T")
logger = logging.getLogger(__name__)
AHEAD = 4  # batches whose pictures are open at once
LISTED = 20  # failures that a summary names


class Failure(NamedTuple):
    """A request without an answer, which scores as an empty one."""

    task: str
    doc_id: int
    reason: str


class Asked(NamedTuple):
    """One question of a task."""

    task: str
    doc_id: int
    settings: Mapping[str, Any]
    """The task's `gen_kwargs`."""
    messages: Callable[[], Messages]
    """Opens the pictures."""


class LmmsRequests:
    """Answers the harness's requests; `EveLmms` and `EveLmmsSimple` add its base class.

    Args:
        pretrained: folder or Hub id.
        device: None means a GPU where there is one; of several processes each takes its own.
        dtype: a number type; auto is float32 on a CPU and the stored type elsewhere.
        batch_size: requests that are answered together.
        max_image_tokens: most tokens for each picture.
        quantize: `int8` or `nf4`.
        max_frames: pictures that a video is shown as.
        max_new_tokens: longest answer where the task does not say it.

    Raises:
        ValueError: for an argument that is not known or not possible.
    """

    is_simple: bool
    task_dict: dict[str, Any]

    def __init__(
        self,
        pretrained: str = "",
        *,
        device: str | None = None,
        dtype: str = "auto",
        batch_size: int | str = 1,
        max_image_tokens: int | None = None,
        quantize: str | None = None,
        attn_implementation: str = "sdpa",
        max_frames: int = 8,
        max_new_tokens: int = 128,
        **unknown: Any,
    ):
        super().__init__()
        check_arguments(pretrained, dtype, str(batch_size), unknown)
        self.accelerator = Accelerator()
        self._rank = self.accelerator.process_index
        self._world_size = self.accelerator.num_processes
        if self._world_size > 1:
            device = str(self.accelerator.device)
        self.engine = EveEngine.from_pretrained(
            pretrained,
            device=device,
            dtype=None if dtype == "auto" else getattr(torch, dtype),
            attn_implementation=attn_implementation,
            quantize=quantize,
            batch_size=int(batch_size),
        )
        self.max_frames, self.max_image_tokens = max_frames, max_image_tokens
        self.max_new_tokens = max_new_tokens
        self.failures: list[Failure] = []
        self.shortened = 0  # answers that had less room than the task allows

    @property
    def device(self) -> torch.device:
        """Where this process computes."""
        return self.engine.model.device

    def clean(self) -> None:
        """Gives the memory back; the harness asks for it before it loads a judge."""
        del self.engine
        super().clean()  # type: ignore[misc]

    # --- what the harness calls ---

    def generate_until(self, requests: Sequence[Any]) -> list[Any]:
        """Answers, in order."""
        started, failed = time.perf_counter(), len(self.failures)
        answers = self._answer([self._asked(request.args) for request in requests])
        self._report(started, failed, len(requests), answers)
        return [_result(answer) for answer in answers]

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[list[str]]:
        """The texts of all rounds of each request; the task says what is asked next."""
        started, failed = time.perf_counter(), len(self.failures)
        texts: list[list[str]] = []
        answers: list[Answer | None] = []
        for part in _parts(requests, AHEAD * self.engine.batch_size):
            talks = {place: self._rounds(request.args) for place, request in enumerate(part)}
            asked = {place: next(talk) for place, talk in talks.items()}
            said: dict[int, list[str]] = {}
            while asked:
                now = self._answer(list(asked.values()))
                answers += now
                for place, answer in zip(list(asked), now, strict=True):
                    try:
                        asked[place] = talks[place].send(answer.text if answer else "")
                    except StopIteration as over:
                        said[place] = over.value
                        del asked[place]
            texts += [said[place] for place in talks]
        self._report(started, failed, len(requests), answers)
        return texts

    def loglikelihood(self, requests: Sequence[Any]) -> list[Any]:
        """(loss, whether it would be the greedy answer) of each continuation, in order."""
        started, failed = time.perf_counter(), len(self.failures)
        if any(len(request.args) != 6 for request in requests):
            raise ValueError(
                "This task compares options with how likely they are without a question "
                "(acc_mutual_info), for which lmms-eval needs log-probabilities where it otherwise "
                "takes losses; choose another metric."
            )
        # Options of one question stand behind each other.
        questions = [
            list(options)
            for _, options in groupby(requests, key=lambda one: (*one.args[3:], one.args[0]))
        ]
        pairs = []
        with self._bar(len(requests)) as bar:
            for part in _parts(questions, self.engine.batch_size):
                scores = self._rank_options([[one.args for one in options] for options in part])
                pairs += [(-one.total, one.greedy) for one in scores]
                bar.update(len(pairs) - bar.n)
        self._report(started, failed, len(requests), [])
        return [_wrapped(pair) for pair in pairs]

    # --- questions ---

    def _asked(self, arguments: Sequence[Any]) -> Asked:
        """What a request asks: `simple` tasks give words and pictures apart."""
        if self.is_simple:
            words, settings, see, doc_id, task, split = arguments
            messages = partial(self._seen, words, see, task, split, doc_id)
        else:
            _, ask, settings, doc_id, task, split = arguments
            messages = partial(self._told, ask, task, split, doc_id)
        return Asked(task, doc_id, settings, messages)

    def _seen(self, words: str, see: Callable, task: str, split: str, doc_id: int) -> Messages:
        visuals = see(self.task_dict[task][split][doc_id])
        return conversation_of(turn_of(visuals, words), max_frames=self.max_frames)

    def _told(self, ask: Callable, task: str, split: str, doc_id: int) -> Messages:
        messages = ask(self.task_dict[task][split][doc_id])
        return conversation_of(messages, max_frames=self.max_frames)

    def _rounds(self, arguments: Sequence[Any]) -> Generator[Asked, str, list[str]]:
        """Asks round after round; takes the answers; returns what the task makes of them."""
        if self.is_simple:
            words, settings, see, ask, doc_id, task, split = arguments
            first = self._asked((words, settings, see, doc_id, task, split))
        else:
            _, ask, settings, doc_id, task, split = arguments
            first = self._asked(arguments)
        said, known = [(yield first)], None
        for number in count(1):
            asked = first
            try:
                following = ask(
                    self.task_dict[task][split][doc_id],
                    round_idx=number,
                    previous_output=list(said),
                    previous_round_info=known,
                )
            except (ValueError, OSError) as error:  # its pictures
                self._failed(first, error)
                return said
            if not isinstance(following, tuple):  # a task that knows one round
                return said
            *content, over, outputs, known = following
            if over:
                return said if outputs is None else [one or "" for one in outputs]
            messages = turn_of(*content) if self.is_simple else content[0]
            asked = first._replace(
                messages=partial(conversation_of, messages, max_frames=self.max_frames)
            )
            said.append((yield asked))
        raise AssertionError("a task decides when it is over")

    # --- answers ---

    def _answer(self, asked: list[Asked]) -> list[Answer | None]:
        """Answers in order, together with others of the same settings; None where one failed."""
        alike: dict[str, list[int]] = {}
        for place, one in enumerate(asked):
            alike.setdefault(f"{one.task} {sorted(one.settings.items())}", []).append(place)
        answers: dict[int, Answer | None] = {}
        with self._bar(len(asked)) as bar:
            for places in alike.values():
                settings = self._settings(asked[places[0]])
                for part in _parts(places, AHEAD * self.engine.batch_size):
                    made = self._together([asked[place] for place in part], settings)
                    answers |= zip(part, made, strict=True)
                    bar.update(len(part))
        return [answers[place] for place in range(len(asked))]

    def _settings(self, asked: Asked) -> Settings:
        try:
            return settings_of(
                asked.settings,
                max_new_tokens=self.max_new_tokens,
                max_image_tokens=self.max_image_tokens,
            )
        except ValueError as error:
            raise ValueError(f"Task {asked.task}: {error}") from None

    def _together(self, asked: list[Asked], settings: Settings) -> list[Answer | None]:
        engine, beams = self.engine, settings.num_beams
        if beams > 1:
            return [
                self._within(
                    one,
                    settings.sampling,
                    lambda messages, sampling: engine.answer(
                        [messages], num_beams=beams, **asdict(sampling)
                    )[0],
                )
                for one in asked
            ]
        replies = [
            self._within(
                one,
                settings.sampling,
                lambda messages, sampling: engine.replies(messages, sampling)[0],
            )
            for one in asked
        ]
        batch = engine.batch(engine.batch_size)
        waiting = [reply for reply in replies if reply is not None]
        batch.add(sorted(waiting, key=lambda reply: -len(reply.prompt)))  # alike ones together
        with engine.lock:
            batch.run()
        return [None if reply is None else reply.answer for reply in replies]

    def _within(
        self, asked: Asked, sampling: Sampling, make: Callable[[Messages, Sampling], T]
    ) -> T | None:
        """What is made of a question, with as much room as the model has; None if it fails."""
        if sampling.temperature and sampling.seed is None:
            # The harness's own seed decides, and every repeat draws another answer.
            sampling = replace(sampling, seed=int(torch.randint(2**62, ())))
        try:
            messages = asked.messages()
            try:
                return make(messages, sampling)
            except TooLongError as error:
                room = self.engine.max_length - len(error.prompt)
                if room < 1:
                    raise
                self.shortened += 1
                return make(messages, replace(sampling, max_new_tokens=room))
        except UnsupportedError:
            raise
        except (ValueError, OSError) as error:
            self._failed(asked, error)
            return None

    def _rank_options(self, questions: list[list[Sequence[Any]]]) -> list[LogLikelihood]:
        """Scores of all options; where one question fails, it fails alone."""
        rows: list[tuple[Messages, str]] = []
        asked: list[Asked] = []
        try:
            for options in questions:
                words, _, see, doc_id, task, split = options[0]
                asked.append(self._asked((words, {}, see, doc_id, task, split)))
                messages = asked[-1].messages()
                for _, text, *_ in options:
                    doc = self.task_dict[task][split][doc_id] if callable(text) else None
                    rows.append((messages, text(doc) if callable(text) else text))
            conversations, continuations = zip(*rows, strict=True)
            return self.engine.log_likelihood(
                conversations, continuations, max_image_tokens=self.max_image_tokens
            )
        except UnsupportedError:
            raise
        except (ValueError, OSError) as error:
            if len(questions) > 1:
                return [score for one in questions for score in self._rank_options([one])]
            self._failed(asked[0], error)
            # The harness has no word for it and takes the first option.
            return [LogLikelihood(-torch.inf, 0, False)] * len(questions[0])

    # --- what is said of it ---

    def _bar(self, total: int) -> tqdm:
        return tqdm(total=total, disable=self._rank != 0, desc="eve")

    def _failed(self, asked: Asked, error: Exception) -> None:
        reason = " ".join(str(error).split()) or type(error).__name__
        self.failures.append(Failure(asked.task, asked.doc_id, reason))
        logger.warning("%s, doc %s has no answer: %s", asked.task, asked.doc_id, reason)

    def _report(
        self, started: float, before: int, requests: int, answers: Sequence[Answer | None]
    ) -> None:
        """Speed and counts, which the harness puts into its results as `throughput`."""
        from lmms_eval.models.model_utils.gen_metrics import log_metrics

        failed, seconds = self.failures[before:], time.perf_counter() - started
        tokens = sum(len(answer.token_ids) for answer in answers if answer is not None)
        log_metrics(
            total_elapsed_time=seconds,
            total_gen_tokens=tokens,
            avg_speed=tokens / seconds,
            additional_metrics={"failed_requests": len(failed), "shortened": self.shortened},
        )
        if failed:
            names = ", ".join(f"{one.task} {one.doc_id}" for one in failed[:LISTED])
            logger.warning(
                "%d of %d requests have no answer and score as empty ones: %s%s.",
                len(failed),
                requests,
                names,
                ", ..." if len(failed) > LISTED else "",
            )


def _parts(given: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    return (given[first : first + size] for first in range(0, len(given), size))


def _wrapped(pair: tuple[float, bool]) -> Any:
    """A pair as it reaches a task: 0.7.3 makes words of one that is given as it is."""
    from lmms_eval.api.instance import GenerationResult

    return GenerationResult(text=pair)


def _result(answer: Answer | None) -> Any:
    """An answer in the harness's form, which does not cache empty ones."""
    from lmms_eval.api.instance import GenerationResult, TokenCounts

    if answer is None:
        return GenerationResult(text="")
    counts = TokenCounts(input_tokens=answer.prompt_tokens, output_tokens=len(answer.token_ids))
    return GenerationResult(text=answer.text, token_counts=counts)


__all__ = ["Asked", "Failure", "LmmsRequests"]
