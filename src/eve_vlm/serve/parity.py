"""The same questions by every way of asking, and how far the answers are from each other.

The yardstick is none of our paths: the tokens are those of the library's own pipeline, as in a
notebook, and the log-probabilities those of one plain forward pass without cache or padding.  Easy
to get wrong: behind the first token that differs two answers are about different texts, so only
tokens up to there are compared.
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from PIL import Image, ImageDraw

from .engine import EveEngine, user_message
from .fetch import data_uri_of_picture
from .messages import Messages, pictures_of
from .reply import Answer

# Largest difference of a log-probability that is rounding, by the type of the weights; measured on
# tiny and SmolLM2-sized models it is below 2e-5 in float32.
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.25, torch.float16: 0.05}


@dataclass(frozen=True, slots=True)
class Told:
    """What one path says to one question."""

    token_ids: list[int]
    logprobs: list[float]
    prompt_tokens: int


@dataclass(frozen=True, slots=True)
class Yardstick:
    """What the library says, and how likely a plain forward pass holds every token there."""

    token_ids: list[int]
    rows: torch.Tensor  # (answer tokens, vocabulary) log-probabilities
    prompt_tokens: int


@dataclass(frozen=True, slots=True)
class Difference:
    """The first token in which an answer differs.

    gap: how much likelier the yardstick's token is than the other one; near 0 it was a tie that
        rounding decided.
    """

    question: int
    position: int
    gap: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """One path against the yardstick.

    worst: largest difference of a log-probability, over tokens that both say.
    """

    path: str
    questions: int
    equal_answers: int
    tokens: int
    equal_tokens: int
    worst: float
    first: Difference | None
    other_prompts: int
    seconds: float

    def agrees(self, tolerance: float) -> bool:
        """Whether every token is equal and log-probabilities differ by rounding only."""
        same = self.equal_answers == self.questions and not self.other_prompts
        return same and self.worst <= tolerance


def usual_questions(engine: EveEngine) -> list[Messages]:
    """Text alone, wide, tall, small and two pictures, and a picture in a second turn."""
    edge = engine.processor.image_processor.size["longest_edge"]
    wide, tall = _drawn(edge, edge // 2, 0), _drawn(edge // 3, edge, 1)
    square, small = _drawn(edge, edge, 2), _drawn(max(edge // 8, 1), max(edge // 10, 1), 3)
    later: Messages = user_message("What is in the picture?", [wide])
    later += [{"role": "assistant", "content": [{"type": "text", "text": "Some shapes."}]}]
    later += user_message("And in this one? Name the colours.", [tall])
    return [
        user_message("Say a sentence about the sea.", []),
        user_message("What is in the picture?", [wide]),
        user_message("Describe the picture.", [tall]),
        user_message("How many shapes are there, and of which colours?", [square]),
        user_message("What is this?", [small]),
        user_message("How do <image> and <image> differ?", [square, tall]),
        later,
    ]


def _drawn(width: int, height: int, number: int) -> Image.Image:
    """A picture of three shapes, the same on every machine."""
    picture = Image.new("RGB", (width, height), ("white", "khaki", "lightblue", "grey")[number])
    draw = ImageDraw.Draw(picture)
    for index, colour in enumerate(("crimson", "navy", "seagreen")):
        left, top = width * (1 + 2 * index) // 8, height * (1 + 2 * ((index + number) % 3)) // 8
        box = (left, top, left + max(width // 6, 1), top + max(height // 6, 1))
        (draw.ellipse if (index + number) % 2 else draw.rectangle)(box, fill=colour)
    return picture


def yardsticks(
    engine: EveEngine, questions: Sequence[Messages], *, max_new_tokens: int
) -> list[Yardstick]:
    """Greedy answers of the library's pipeline, and their likelihood by a plain forward pass."""
    from transformers import pipeline

    notebook: Any = pipeline("image-text-to-text", model=engine.model, processor=engine.processor)
    measured = []
    for messages in questions:
        prompt = engine.encode(messages)
        with engine.lock:
            [said] = notebook(
                text=_with_open_pictures(messages),
                return_tensors=True,
                generate_kwargs={"max_new_tokens": max_new_tokens, "do_sample": False},
            )
        ids = said["generated_token_ids"].cpu()
        measured.append(_measured(engine, prompt.pictures_from(0), ids, len(prompt)))
    return measured


def _with_open_pictures(messages: Messages) -> Messages:
    """The messages as the pipeline takes them, every content a list of parts."""
    pictures = iter(pictures_of(messages))

    def parts(content: Any) -> list[dict[str, Any]]:
        if isinstance(content, str):
            return [{"type": "text", "text": content}]
        return [
            {"type": "image", "image": next(pictures)} if part["type"] == "image" else part
            for part in content
        ]

    return [message | {"content": parts(message["content"])} for message in messages]


@torch.inference_mode()
def _measured(
    engine: EveEngine, pictures: dict[str, torch.Tensor], ids: torch.Tensor, prompt_tokens: int
) -> Yardstick:
    """The likelihood of all tokens behind the prompt, in one pass over the whole text."""
    device, answer = engine.model.device, ids[prompt_tokens:]
    output = engine.model(
        input_ids=ids[None].to(device),
        logits_to_keep=len(answer) + 1,
        use_cache=False,
        **{name: value.to(device) for name, value in pictures.items()},
    )
    rows = output.logits[0, :-1].float().log_softmax(-1).cpu()  # (answer tokens, vocabulary)
    return Yardstick(answer.tolist(), rows, prompt_tokens)


# --- our own paths --------------------------------------------------------------------------------


def told(answer: Answer) -> Told:
    """An answer as it is compared."""
    logprobs = [one.logprob for one in answer.logprobs or ()]
    return Told(answer.token_ids, logprobs, answer.prompt_tokens)


def _single(engine: EveEngine, questions: Sequence[Messages], settings: dict) -> list[Told]:
    return [told(engine.answer([one], **settings)[0]) for one in questions]


def _batch(engine: EveEngine, questions: Sequence[Messages], settings: dict) -> list[Told]:
    return [told(one) for one in engine.answer(questions, batch_size=len(questions), **settings)]


def _joining(engine: EveEngine, questions: Sequence[Messages], settings: dict) -> list[Told]:
    """Two at a time: whoever waits takes the place of whoever is finished, between two tokens."""
    return [told(one) for one in engine.answer(questions, batch_size=2, **settings)]


def _stream(engine: EveEngine, questions: Sequence[Messages], settings: dict) -> list[Told]:
    answers = []
    for one in questions:
        pieces = list(engine.stream(one, **settings))
        made = [token for piece in pieces for token in piece.token_ids]
        logprobs = [one.logprob for piece in pieces for one in piece.logprobs or ()]
        assert pieces[-1].answer is not None
        answers.append(Told(made, logprobs, pieces[-1].answer.prompt_tokens))
    return answers


def _chat(engine: EveEngine, questions: Sequence[Messages], settings: dict) -> list[Told]:
    """Asked twice by an engine that remembers: the second time all but a token is remembered."""
    remembering = EveEngine(engine.model, engine.processor, keep_tokens=4 * engine.max_length)
    answers = []
    for one in questions:
        remembering.answer([one], max_new_tokens=1)
        answers.append(told(remembering.answer([one], **settings)[0]))
    return answers


Path = Callable[[EveEngine, Sequence[Messages], dict], list[Told]]
OUR_PATHS: dict[str, Path] = {
    "single": _single,
    "batch": _batch,
    "joining": _joining,
    "stream": _stream,
    "chat": _chat,
}


# --- servers --------------------------------------------------------------------------------------


def asked_of_server(
    url: str,
    questions: Sequence[Messages],
    *,
    never: Sequence[int],
    key: str = "",
    together: bool,
    max_new_tokens: int,
) -> list[Told]:
    """Answers of any server that speaks the OpenAI protocol and can name token ids, as vLLM does.

    Args:
        url: up to and with `/v1`.
        never: ids that no answer holds, which vLLM has to be told.
        together: asks all at once, instead of one behind the other.

    Raises:
        ValueError: if the server cannot be reached, refuses, or names no token ids.
    """
    import openai

    client = openai.OpenAI(base_url=url, api_key=key or "none", max_retries=0, timeout=600)

    def ask(messages: Messages) -> Told:
        completion = client.chat.completions.create(
            model=model,
            messages=[_as_protocol(message) for message in messages],  # type: ignore[misc]
            max_tokens=max_new_tokens,
            temperature=0,
            logprobs=True,
            extra_body={"return_tokens_as_token_ids": True},
            logit_bias=bias,
        )
        logprobs = completion.choices[0].logprobs
        content = (logprobs.content if logprobs else None) or []
        ids = [one.token.removeprefix("token_id:") for one in content]
        if not all(one.isdecimal() for one in ids) or completion.usage is None:
            raise ValueError(
                f"{url} names no token ids (return_tokens_as_token_ids), so its answers cannot be "
                "compared; ask a server of eve or of vLLM."
            )
        values = [one.logprob for one in content]
        return Told([int(one) for one in ids], values, completion.usage.prompt_tokens)

    try:
        served = client.models.list().data[0]
        model = served.id
        bias = dict.fromkeys(map(str, never), -100) if served.owned_by == "vllm" else openai.omit
        with ThreadPoolExecutor(len(questions) if together else 1) as threads:
            return list(threads.map(ask, questions))
    except openai.OpenAIError as error:
        raise ValueError(f"{url} cannot be asked ({error}); check that it runs.") from None


def _as_protocol(message: dict[str, Any]) -> dict[str, Any]:
    """A message in the OpenAI protocol, its pictures as PNG in data URIs: without loss."""

    def part(one: dict[str, Any]) -> dict[str, Any]:
        if one["type"] != "image":
            return one
        [picture] = pictures_of([{"role": "user", "content": [one]}])
        return {"type": "image_url", "image_url": {"url": data_uri_of_picture(picture)}}

    content = message["content"]
    return message | {"content": content if isinstance(content, str) else list(map(part, content))}


# --- the comparison -------------------------------------------------------------------------------


def compare(
    path: str, sticks: Sequence[Yardstick], answers: Sequence[Told], seconds: float
) -> Comparison:
    """How far a path is from the yardstick."""
    worst, first, equal_tokens, equal_answers = 0.0, None, 0, 0
    for question, (stick, answer) in enumerate(zip(sticks, answers, strict=True)):
        same = _common(stick.token_ids, answer.token_ids)
        equal_tokens += same
        equal_answers += stick.token_ids == answer.token_ids
        for row, token, value in zip(
            stick.rows[:same], answer.token_ids, answer.logprobs, strict=False
        ):
            worst = max(worst, abs(float(row[token]) - value))
        if first is None and stick.token_ids != answer.token_ids:
            first = Difference(question, same, _gap(stick, answer, same))
    return Comparison(
        path=path,
        questions=len(sticks),
        equal_answers=equal_answers,
        tokens=sum(
            max(len(a.token_ids), len(b.token_ids)) for a, b in zip(sticks, answers, strict=True)
        ),
        equal_tokens=equal_tokens,
        worst=worst,
        first=first,
        other_prompts=sum(
            a.prompt_tokens != b.prompt_tokens for a, b in zip(sticks, answers, strict=True)
        ),
        seconds=seconds,
    )


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """Tokens at the beginning that are equal."""
    pairs = zip(one, other, strict=False)
    differ = (index for index, (a, b) in enumerate(pairs) if a != b)
    return next(differ, min(len(one), len(other)))


def _gap(stick: Yardstick, answer: Told, position: int) -> float:
    """How much likelier the yardstick's token is; without end where one answer just goes on."""
    if position >= min(len(stick.token_ids), len(answer.token_ids)):
        return math.inf
    row = stick.rows[position]
    return float(row[stick.token_ids[position]] - row[answer.token_ids[position]])


def every_path(
    engine: EveEngine,
    questions: Sequence[Messages],
    sticks: Sequence[Yardstick],
    *,
    max_new_tokens: int,
    servers: Mapping[str, AbstractContextManager[str]] | None = None,
    key: str = "",
) -> Iterator[Comparison]:
    """Compares our paths in this process, then every server twice, one by one.

    Args:
        servers: by name, contexts that give an address up to and with `/v1`.
        key: what the servers ask for.

    Raises:
        ValueError: see `asked_of_server`.
    """
    settings = {"max_new_tokens": max_new_tokens, "logprobs": 0}
    for name, path in OUR_PATHS.items():
        yield _compared(name, sticks, partial(path, engine, questions, settings))
    for name, server in (servers or {}).items():
        with server as url:
            for title, together in ((name, False), (f"{name}, all at once", True)):
                ask = partial(
                    asked_of_server,
                    *(url, questions),
                    never=engine.never(),
                    key=key,
                    together=together,
                    max_new_tokens=max_new_tokens,
                )
                yield _compared(title, sticks, ask)


def _compared(name: str, sticks: Sequence[Yardstick], ask: Callable[[], list[Told]]) -> Comparison:
    start = time.perf_counter()
    answers = ask()
    return compare(name, sticks, answers, time.perf_counter() - start)


__all__ = [
    "OUR_PATHS",
    "TOLERANCE",
    "Comparison",
    "Difference",
    "Told",
    "Yardstick",
    "asked_of_server",
    "compare",
    "every_path",
    "told",
    "usual_questions",
    "yardsticks",
]
