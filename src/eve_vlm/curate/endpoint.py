"""Captions from an OpenAI-compatible server: many questions at once, and patience with faults.

A question is tried again when the server is busy, away, or answers nonsense, each time after twice
the pause.  When its tries are used up, somebody is at fault: a question without a picture is asked,
and if that is answered the picture failed, else the server did.  Easy to get wrong: a server that
is away must never count as pictures that cannot be captioned, or an hour's outage empties the set.
"""

import base64
import io
import json
import os
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Any, NamedTuple

from PIL import Image

from eve_vlm.curate.places import Row, open_bytes, read_bytes
from eve_vlm.curate.recipe import CurateRecipe, RecaptionSection
from eve_vlm.errors import first_line

LONGEST_PAUSE = 60.0  # seconds
QUALITY = 92
PROBE = "Answer with one word: are you there?"
WEB = {"jpg": "jpeg", "png": "png", "gif": "gif", "webp": "webp"}  # what servers take as it is


class Captioned(NamedTuple):
    """What became of one question."""

    id: str
    """The row."""
    caption: str | None
    """Its caption; None if the picture failed."""
    finish: str | None
    """Why the answer ended: `stop`, or `length` where it was cut."""
    error: str | None
    """Why the picture failed."""


class EndpointAway(ValueError):
    """The server does not answer, or answers nobody."""


class _Again(Exception):
    """A try that failed and may succeed later."""

    def __init__(self, reason: str, pause: float | None = None):
        super().__init__(reason)
        self.pause = pause


class _Unfit(Exception):
    """A question that the server refuses."""


class Endpoint:
    """A server that writes captions.

    Args:
        recipe: with a section `recaption`.
        workers: how many processes ask at once, over which the limit of requests is divided.
    """

    def __init__(self, recipe: CurateRecipe, *, workers: int = 1):
        from openai import OpenAI

        assert recipe.recaption is not None, "the stage is left out without its section"
        self.recipe, self.section = recipe, recipe.recaption
        self.counts: Counter[str] = Counter()
        key = os.environ.get(self.section.key_variable) or "none"
        self._client = OpenAI(
            base_url=self.section.endpoint,
            api_key=key,
            timeout=self.section.timeout,
            max_retries=0,  # tries are ours, so that they are counted and paced
        )
        limit = self.section.requests_per_minute
        self._pacer = Pacer(0.0 if limit is None else 60.0 * workers / limit)
        self._lock = threading.Lock()

    def captions(self, rows: Sequence[Row]) -> Iterator[Captioned]:
        """Asks about every row and gives each answer as soon as it is there, in any order.

        Raises:
            EndpointAway: if the server is at fault; answers that came by then were given.
        """
        fault: EndpointAway | None = None
        waiting = iter(rows)
        with ThreadPoolExecutor(self.section.parallel) as pool:
            open_questions: set[Future[Captioned]] = set()
            while True:
                while fault is None and len(open_questions) < self.section.parallel:
                    row = next(waiting, None)
                    if row is None:
                        break
                    open_questions.add(pool.submit(self._caption, row))
                if not open_questions:
                    break
                done, open_questions = wait(open_questions, return_when=FIRST_COMPLETED)
                for one in done:
                    try:
                        yield one.result()
                    except EndpointAway as error:
                        fault = fault or error
                        self._pacer.stop()  # nobody tries again
        if fault is not None:
            raise fault

    def _caption(self, row: Row) -> Captioned:
        try:
            picture = picture_url(row, self.recipe)
        except ValueError as error:
            return Captioned(row["id"], None, None, str(error))
        content = [
            {"type": "image_url", "image_url": {"url": picture}},
            {"type": "text", "text": self.section.prompt},
        ]
        try:
            caption, finish = self._tried(content)
        except _Unfit as error:
            return Captioned(row["id"], None, None, str(error))
        return Captioned(row["id"], caption, finish, None)

    def _tried(self, content: Any) -> tuple[str, str]:
        """An answer, after as many tries as the recipe allows.

        Raises:
            _Unfit: if this question fails but the server answers others.
            EndpointAway: if the server is at fault.
        """
        pause, reason = self.section.first_pause, ""
        for attempt in range(self.section.tries):
            try:
                return self._ask(content)
            except _Unfit as error:
                reason = str(error)
                break
            except _Again as error:
                reason = str(error)
                if self._pacer.stopped:
                    raise EndpointAway(reason) from None
                if attempt + 1 < self.section.tries:
                    self._pacer.sleep(min(error.pause or pause, LONGEST_PAUSE))
                    pause = 2 * pause
        try:
            self._ask(PROBE, settings={"max_tokens": 8})
        except (_Again, _Unfit) as error:
            raise EndpointAway(
                f"The endpoint {self.section.endpoint} fails ({reason}; then, asked without a "
                f"picture: {error}); captions that it gave are kept, so run the same command again "
                "when it answers."
            ) from None
        raise _Unfit(reason)

    def _ask(self, content: Any, *, settings: dict[str, Any] | None = None) -> tuple[str, str]:
        """One request: the caption and why it ended."""
        import openai

        self._pacer.wait()
        messages: list[Any] = [{"role": "user", "content": content}]
        if self.section.system is not None:
            messages.insert(0, {"role": "system", "content": self.section.system})
        sampling = self.section.sampling if settings is None else settings
        self._count(requests=1)
        try:
            raw = self._client.chat.completions.with_raw_response.create(
                model=self.section.model, messages=messages, **sampling
            )
            answer = _read_answer(raw.http_response.text)
        except (
            openai.AuthenticationError,
            openai.PermissionDeniedError,
            openai.NotFoundError,
        ) as error:
            self._count(failed_requests=1)
            raise EndpointAway(
                f"The endpoint {self.section.endpoint} refuses ({_said(error)}); check recaption."
                f"model, and that the variable {self.section.key_variable} holds its key."
            ) from None
        except (openai.BadRequestError, openai.UnprocessableEntityError) as error:
            self._count(failed_requests=1)
            raise _Unfit(_said(error)) from None
        except openai.APIStatusError as error:  # 408, 409, 413, 429 and 5xx
            self._count(failed_requests=1)
            if error.status_code == 413:
                raise _Unfit(_said(error)) from None
            raise _Again(_said(error), _retry_after(error)) from None
        except openai.OpenAIError as error:  # no connection, no answer in time
            self._count(failed_requests=1)
            raise _Again(_said(error)) from None
        except _Again:
            self._count(failed_requests=1)
            raise
        self._count(prompt_tokens=answer.prompt_tokens, caption_tokens=answer.caption_tokens)
        return answer.text, answer.finish

    def _count(self, **numbers: int) -> None:
        with self._lock:
            self.counts.update(numbers)


class Pacer:
    """Lets threads go on one by one, `interval` seconds apart; 0 lets all go at once."""

    def __init__(self, interval: float):
        self.interval = interval
        self._next, self._lock, self._stopped = 0.0, threading.Lock(), threading.Event()

    def wait(self) -> None:
        """Until it is this thread's turn."""
        if not self.interval:
            return
        with self._lock:
            turn = max(self._next, time.monotonic())
            self._next = turn + self.interval
        self.sleep(turn - time.monotonic())

    def sleep(self, seconds: float) -> None:
        """A pause that `stop` ends."""
        self._stopped.wait(max(seconds, 0.0))

    def stop(self) -> None:
        """Ends all pauses, and those to come."""
        self._stopped.set()

    @property
    def stopped(self) -> bool:
        """Whether `stop` was called."""
        return self._stopped.is_set()


class _Answer(NamedTuple):
    text: str
    finish: str
    prompt_tokens: int
    caption_tokens: int


def _read_answer(body: str) -> _Answer:
    """What a server answered, looked at piece by piece: proxies send pages, servers send nulls.

    Raises:
        _Again: if it is no caption.
    """
    try:
        data = json.loads(body)
        choice = data["choices"][0]
        text, finish = choice["message"]["content"], choice.get("finish_reason") or "stop"
        usage = data.get("usage") or {}
        tokens = [int(usage.get(name) or 0) for name in ("prompt_tokens", "completion_tokens")]
    except (ValueError, LookupError, TypeError, AttributeError):
        raise _Again(f"it answered {body[:80]!r}, which is no chat completion") from None
    if not isinstance(text, str) or not text.strip():
        raise _Again("it answered without a word")
    if finish == "content_filter":
        raise _Unfit("its content filter stopped the answer")
    return _Answer(text.strip(), str(finish), *tokens)


def picture_url(row: Row, recipe: CurateRecipe) -> str:
    """A row's picture as a data URL, made smaller where the recipe says so.

    Raises:
        ValueError: if it cannot be read any more.
    """
    assert recipe.recaption is not None, "the stage is left out without its section"
    longest, data, kind = recipe.recaption.longest_edge, read_bytes(row), row["format"]
    size = max(row["width"], row["height"])
    if row["redrawn"] or kind not in WEB or (longest is not None and size > longest):
        picture = open_bytes(data, row, recipe.decode).picture
        if longest is not None:
            picture.thumbnail((longest, longest), Image.Resampling.LANCZOS)
        stream = io.BytesIO()
        picture.save(stream, "JPEG", quality=QUALITY)
        data, kind = stream.getvalue(), "jpg"
    return f"data:image/{WEB[kind]};base64,{base64.b64encode(data).decode('ascii')}"


def _said(error: Exception) -> str:
    return first_line(error)[:200]


def _retry_after(error: Any) -> float | None:
    """Seconds that the server asks to wait, where it says so in a number."""
    value = error.response.headers.get("retry-after", "")
    return float(value) if value.replace(".", "", 1).isdigit() else None


def settings_of(section: RecaptionSection) -> dict[str, Any]:
    """What captions depend on: not where the server is, nor how patient or parallel the asking."""
    names = ("model", "prompt", "system", "sampling", "longest_edge")
    return {name: getattr(section, name) for name in names}


__all__ = ["Captioned", "Endpoint", "EndpointAway", "Pacer", "picture_url", "settings_of"]
