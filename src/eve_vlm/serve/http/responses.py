"""Answers as the protocol's own objects: whole ones, and chunks of streamed ones.

They are the `openai` package's classes, so that what is sent is what that client reads.  Easy to
get wrong: a stream begins with a chunk that only names the role, and its usage, if asked for, comes
in a chunk without choices just before `[DONE]`.
"""

import json
import math
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from eve_vlm.serve.reply import Answer, Piece
from eve_vlm.serve.sampling import TokenLogprob

LEAST_LOGPROB = -9999.0  # JSON has no infinity; the protocol writes this for "hardly ever"
DONE = "data: [DONE]\n\n"


@dataclass(frozen=True, kw_only=True, slots=True)
class ChatResponse:
    """What all parts of one response share."""

    model: str
    stream: bool = False
    include_usage: bool = False
    token_ids: bool = False
    id: str = field(default_factory=lambda: f"chatcmpl-{uuid.uuid4().hex}")
    created: int = field(default_factory=lambda: int(time.time()))

    def whole(self, answers: Mapping[int, Answer]) -> str:
        """The JSON of finished answers."""
        from openai.types.chat import ChatCompletion, ChatCompletionMessage
        from openai.types.chat.chat_completion import Choice

        choices = [
            Choice(
                index=index,
                finish_reason=_reason(answer),
                message=ChatCompletionMessage(role="assistant", content=answer.text, refusal=None),
                logprobs=self._logprobs(answer.logprobs),
            )
            for index, answer in sorted(answers.items())
        ]
        completion = ChatCompletion(
            id=self.id,
            created=self.created,
            model=self.model,
            object="chat.completion",
            choices=choices,
            usage=_usage(answers),
        )
        return completion.model_dump_json(exclude_unset=True)

    def role(self, index: int) -> str:
        """The event that opens a streamed answer."""
        return self._event(index, {"role": "assistant", "content": ""})

    def piece(self, index: int, piece: Piece) -> str:
        """The events of what came with one token; none if nothing can be shown yet."""
        text = ""
        if piece.text or piece.logprobs:
            logprobs = self._logprobs(piece.logprobs)
            text += self._event(index, {"content": piece.text}, logprobs=logprobs)
        if piece.answer is not None:
            text += self._event(index, {}, finish_reason=_reason(piece.answer))
        return text

    def usage(self, answers: Mapping[int, Answer]) -> str:
        """The event with the usage of all answers, if it was asked for."""
        return self._chunk(choices=[], usage=_usage(answers)) if self.include_usage else ""

    def _logprobs(self, given: Sequence[TokenLogprob] | None) -> Any:
        """The protocol's `logprobs`, which a whole answer and a chunk write alike."""

        def told(token_id: int, text: str, logprob: float) -> dict[str, Any]:
            return {
                "token": f"token_id:{token_id}" if self.token_ids else text,
                # Unknown for a part of a letter, whose text is a replacement.
                "bytes": None if "\N{REPLACEMENT CHARACTER}" in text else list(text.encode()),
                "logprob": logprob if math.isfinite(logprob) else LEAST_LOGPROB,
            }

        if given is None:
            return None
        content = [
            told(one.token_id, one.text, one.logprob)
            | {"top_logprobs": [told(*likely) for likely in one.top]}
            for one in given
        ]
        return {"content": content, "refusal": None}

    def _event(self, index: int, delta: dict[str, Any], **settings: Any) -> str:
        from openai.types.chat.chat_completion_chunk import Choice, ChoiceDelta

        settings = {"finish_reason": None, "logprobs": None} | settings
        return self._chunk(choices=[Choice(index=index, delta=ChoiceDelta(**delta), **settings)])

    def _chunk(self, **settings: Any) -> str:
        from openai.types.chat import ChatCompletionChunk

        if self.include_usage:
            settings.setdefault("usage", None)
        chunk = ChatCompletionChunk(
            id=self.id,
            created=self.created,
            model=self.model,
            object="chat.completion.chunk",
            **settings,
        )
        return f"data: {chunk.model_dump_json(exclude_unset=True)}\n\n"


def error_event(body: dict[str, Any]) -> str:
    """The event of an error inside a stream."""
    return f"data: {json.dumps(body)}\n\n"


def _reason(answer: Answer) -> Any:
    """The reason in the protocol's words; an answer that was given up reached nobody."""
    return "length" if answer.finish_reason == "cancelled" else answer.finish_reason


def _usage(answers: Mapping[int, Answer]) -> Any:
    """All answers' tokens; the prompt, which they share, once."""
    from openai.types import CompletionUsage
    from openai.types.completion_usage import PromptTokensDetails

    first, made = answers[0], sum(len(answer.token_ids) for answer in answers.values())
    # `image_tokens` is not in every version of the client; its classes keep what they do not know.
    details: Any = {"cached_tokens": first.cached_tokens, "image_tokens": first.image_tokens}
    return CompletionUsage(
        prompt_tokens=first.prompt_tokens,
        completion_tokens=made,
        total_tokens=first.prompt_tokens + made,
        prompt_tokens_details=PromptTokensDetails(**details),
    )


__all__ = ["DONE", "ChatResponse", "error_event"]
