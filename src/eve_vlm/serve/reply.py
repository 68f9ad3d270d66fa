"""One answer in the making: takes tokens one by one, knows when it ends, tells a listener.

It is what a running batch has one of in every row.  Easy to get wrong: `cancel` comes from another
thread and only leaves a mark, which the batch sees at its next token.
"""

import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Literal

import torch
from transformers import PreTrainedTokenizerBase

from .answer_text import AnswerText
from .messages import Prompt
from .sampling import Chooser, Sampling, TokenLogprob

FinishReason = Literal["stop", "length", "cancelled"]


@dataclass(kw_only=True, slots=True)
class Answer:
    """A finished answer and what it took.

    text: without special tokens or outer blanks, up to the first stop text.
    token_ids: everything that was made, with the end id if there is one.
    finish_reason: "stop" for an end id or a stop text, "length" at max_new_tokens.
    logprobs: one for each of `token_ids`, if asked for.
    prompt_tokens, image_tokens, cached_tokens: positions of the prompt, those of its pictures, and
        those that came from an earlier prompt's cache.
    seconds_to_first, seconds: from the asking to the first and the last token.
    """

    text: str
    token_ids: list[int]
    finish_reason: FinishReason
    logprobs: list[TokenLogprob] | None
    prompt_tokens: int
    image_tokens: int
    cached_tokens: int
    seconds_to_first: float
    seconds: float

    @property
    def tokens_per_second(self) -> float | None:
        """Speed behind the first token; None for an answer too short to tell."""
        made, after = len(self.token_ids), self.seconds - self.seconds_to_first
        return (made - 1) / after if made > 1 and after > 0 else None


@dataclass(kw_only=True, slots=True)
class Piece:
    """What came with one token; `answer` is set on the last piece only."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] | None = None
    answer: Answer | None = None


class Reply:
    """A prompt, how to answer it, and the answer so far.

    Args:
        ends: ids that end an answer.
        on_piece: called with every piece, in the thread that answers; it must be quick.
        on_error: called instead of a last piece when answering broke.
    """

    def __init__(
        self,
        prompt: Prompt,
        sampling: Sampling,
        tokenizer: PreTrainedTokenizerBase,
        *,
        device: torch.device,
        ends: Collection[int] = (),
        on_piece: Callable[[Piece], None] | None = None,
        on_error: Callable[[BaseException], None] | None = None,
    ):
        self.prompt, self.sampling = prompt, sampling
        self.chooser = Chooser(sampling, device)
        self.answer: Answer | None = None
        self.error: BaseException | None = None
        self.token_ids: list[int] = []
        self.cached_tokens = 0
        self._tokenizer, self._ends = tokenizer, frozenset(ends)
        self._on_piece, self._on_error = on_piece, on_error
        self._text = AnswerText(tokenizer, sampling.stop)
        self._logprobs: list[TokenLogprob] = []
        self._asked, self._first = time.perf_counter(), 0.0
        self._cancelled = False

    def cancel(self) -> None:
        """Ends the answer at the next token; may be called from any thread, also twice."""
        self._cancelled = True

    @property
    def cancelled(self) -> bool:
        """Whether nobody waits for it any more."""
        return self._cancelled

    @property
    def finished(self) -> bool:
        """Whether no token follows."""
        return self.answer is not None or self.error is not None

    @property
    def remaining(self) -> int:
        """Tokens that may still follow."""
        return 0 if self.finished else self.sampling.max_new_tokens - len(self.token_ids)

    def take(self, token_id: int) -> None:
        """The next token of the answer."""
        if self._cancelled:
            self.end("cancelled")
            return
        self._first = self._first or time.perf_counter()
        self.token_ids.append(token_id)
        at_end = token_id in self._ends
        piece = Piece(token_ids=[token_id], text="" if at_end else self._text.push(token_id))
        if self.chooser.wants_logprobs:
            piece.logprobs = [self._logprob(token_id)]
            self._logprobs += piece.logprobs
        if at_end or self._text.stopped:
            self.end("stop", piece)
        elif self.remaining == 0:
            self.end("length", piece)
        elif self._on_piece is not None:
            self._on_piece(piece)

    def end(self, reason: FinishReason, last: Piece | None = None) -> None:
        """Finishes the answer and tells the listener."""
        piece = Piece() if last is None else last
        piece.text += self._text.finish()
        now = time.perf_counter()
        self.answer = piece.answer = Answer(
            text=self._text.text,
            token_ids=self.token_ids,
            finish_reason=reason,
            logprobs=self._logprobs if self.chooser.wants_logprobs else None,
            prompt_tokens=len(self.prompt),
            image_tokens=self.prompt.image_tokens,
            cached_tokens=self.cached_tokens,
            seconds_to_first=(self._first or now) - self._asked,
            seconds=now - self._asked,
        )
        if self._on_piece is not None:
            self._on_piece(piece)

    def fail(self, error: BaseException) -> None:
        """Answering broke; the listener is told why."""
        self.error = error
        if self._on_error is not None:
            self._on_error(error)

    def _logprob(self, token_id: int) -> TokenLogprob:
        """What the chooser noted of the step that made this token."""
        noted = self.chooser.logprobs
        assert noted is not None  # the chooser ran, because this row wants them
        self.chooser.logprobs = None
        count = self.sampling.logprobs or 0
        best = noted.topk(count) if count else None
        top = [] if best is None else zip(best.indices.tolist(), best.values.tolist(), strict=True)
        named = tuple((index, self._tokenizer.decode([index]), value) for index, value in top)
        return TokenLogprob(
            token_id, self._tokenizer.decode([token_id]), float(noted[token_id]), named
        )


__all__ = ["Answer", "FinishReason", "Piece", "Reply"]
