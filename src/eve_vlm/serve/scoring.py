"""How likely given texts are as answers: the score behind multiple choice by likelihood.

A text is tokenised where the chat template puts it.  The template renders the conversation with the
answer; what it adds behind the generation prompt, up to the answer's last letter, is the
continuation, so the blank behind "ASSISTANT:" belongs to its first token as it does in training.
Conversations are read once into a cache, also where several continuations follow, and the head sees
nothing but the continuations.

Easy to get wrong: a sum of log-probabilities favours short texts, and whoever compares texts of
different lengths must say whether it is divided by `tokens`.  Sums are of the model's own
probabilities; `greedy` is about what the engine says, which never says an image placeholder.

Legend: `B` rows, `K` longest continuation, `N` tokens of all continuations.
"""

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch

from eve_vlm.language_loss_eve import LOGIT_BYTES
from eve_vlm.patch_embedding_eve import at_least_float32

from .cache_rows import GrowingCache, keep_rows
from .messages import Messages, Prompt
from .running_batch import ALIKE, READ_AT_ONCE, RunningBatch
from .sampling import Sampling

if TYPE_CHECKING:
    from .engine import EveEngine


class LogLikelihood(NamedTuple):
    """How likely one text is as the answer to one conversation."""

    total: float
    """Sum of the natural logarithms of its tokens' probabilities."""
    tokens: int
    """How many tokens it has."""
    greedy: bool
    """Whether the engine would begin its greedy answer with exactly these tokens."""


class Speaker(Protocol):
    """What knows how answers are written: an engine, of an EVE model or of another."""

    @property
    def processor(self) -> Any:
        """With `chat_template`, `image_token` and `image_token_id`."""

    @property
    def tokenizer(self) -> Any:
        """The processor's."""

    def ends(self) -> list[int]:
        """Every id that ends an answer."""


class _Row(NamedTuple):
    """A continuation behind its prompt; rows of one conversation share the prompt."""

    place: int
    prompt: Prompt
    ids: list[int]

    @property
    def length(self) -> int:
        return len(self.prompt) + len(self.ids)


def log_likelihood(
    engine: "EveEngine",
    conversations: Sequence[Messages],
    continuations: Sequence[str],
    *,
    batch_size: int | None = None,
    ends: bool = False,
    max_image_tokens: int | None = None,
) -> list[LogLikelihood]:
    """How likely each text is as the assistant's answer to its conversation.

    Conversations that follow each other and are the same, with the same picture objects, are read
    once.

    Args:
        continuations: one for each conversation; blanks around them do not count.
        batch_size: continuations that are scored together at most.
        ends: counts the token that ends an answer, too.
        max_image_tokens: most tokens for each picture; None leaves it to the model.

    Raises:
        ValueError: if a continuation is empty or holds an image mark, a picture cannot be read, or
            a prompt and its continuation are longer than the model takes.
    """
    if len(conversations) != len(continuations):
        raise ValueError(
            f"There are {len(conversations)} conversations but {len(continuations)} continuations; "
            "give one for each."
        )
    size = batch_size or engine.batch_size
    found: dict[int, LogLikelihood] = {}
    with engine.lock:
        batch = engine.batch(size)
        # As for answers: a few batches at a time, because pictures of all of them need not fit.
        for first in range(0, len(conversations), 4 * size):
            places = range(first, min(first + 4 * size, len(conversations)))
            rows: list[_Row] = []
            for _, same in groupby(places, key=lambda place: _identity(conversations[place])):
                rows += _rows(
                    engine, conversations, continuations, list(same), ends, max_image_tokens
                )
            for group in _groups(rows, size):
                scores = _score(engine, batch, group)
                found |= {row.place: score for row, score in zip(group, scores, strict=True)}
    return [found[place] for place in range(len(conversations))]


def _identity(messages: Messages) -> list[tuple]:
    """Equal for conversations of the same words and the same picture objects."""
    return [
        (message["role"], message["content"])
        if isinstance(message["content"], str)
        else (
            message["role"],
            [
                (part["type"], part.get("text"), id(part.get("image")))
                for part in message["content"]
            ],
        )
        for message in messages
    ]


def _rows(
    engine: "EveEngine",
    conversations: Sequence[Messages],
    continuations: Sequence[str],
    places: list[int],
    ends: bool,
    max_image_tokens: int | None,
) -> list[_Row]:
    """Rows of the places, which have one conversation."""
    messages = conversations[places[0]]
    ids = [continuation_ids(engine, messages, continuations[place], ends=ends) for place in places]
    longest = Sampling(max_new_tokens=max(map(len, ids)), max_image_tokens=max_image_tokens)
    prompt = engine.encode(messages, longest)
    return [_Row(place, prompt, one) for place, one in zip(places, ids, strict=True)]


def continuation_ids(
    engine: Speaker, messages: Messages, text: str, *, ends: bool = False
) -> list[int]:
    """Token ids of a text as the assistant's answer to a conversation.

    The rendered whole is tokenised at once.  Where a token would reach over the end of the
    generation prompt, which generation cannot do either, the text is tokenised alone.

    Raises:
        ValueError: if the text is empty or holds an image mark.
    """
    words = text.strip()
    if not words:
        raise ValueError(
            f"The continuation {text!r} is empty, so nothing can be likely; give a text."
        )
    tokenizer, processor = engine.tokenizer, engine.processor

    def rendered(of: Messages, *, prompted: bool) -> str:
        return tokenizer.apply_chat_template(
            of,
            chat_template=processor.chat_template,
            tokenize=False,
            add_generation_prompt=prompted,
        )

    def tokenised(part: str) -> list[int]:
        return tokenizer(part, add_special_tokens=False)["input_ids"]

    answer = {"role": "assistant", "content": [{"type": "text", "text": words}]}
    before = rendered(messages, prompted=True)
    whole = rendered([*messages, answer], prompted=False)
    added = whole[len(before) :] if whole.startswith(before) else ""
    at = added.find(words)
    # A template that writes something else behind its prompt than an answer has no say.
    piece, tail = (added[: at + len(words)], added[at + len(words) :]) if at >= 0 else (words, "")
    head, joint = tokenised(before), tokenised(before + piece)
    ids = joint[len(head) :] if joint[: len(head)] == head else tokenised(piece)
    if processor.image_token_id in ids:
        raise ValueError(
            f"The continuation {text!r} holds the image mark {processor.image_token}; an answer is "
            "words alone, so take it out."
        )
    if ends:
        own = engine.ends()
        ids.append(next((one for one in tokenised(tail) if one in own), own[0]))
    return ids


def _groups(rows: list[_Row], size: int) -> Iterator[list[_Row]]:
    """Rows that are scored together: of alike lengths, and not more than are read in one go."""
    group: list[_Row] = []
    for row in sorted(rows, key=lambda row: -len(row.prompt)):
        longest = max(one.length for one in [*group, row])
        alike = not group or len(row.prompt) >= ALIKE * len(group[0].prompt)
        if group and (len(group) == size or not alike or longest * (len(group) + 1) > READ_AT_ONCE):
            yield group
            group = []
        group.append(row)
    if group:
        yield group


@torch.inference_mode()
def _score(engine: "EveEngine", batch: RunningBatch, rows: list[_Row]) -> list[LogLikelihood]:
    """Reads the prompts into a cache, and the continuations behind them."""
    device, prompts = engine.model.device, list(dict.fromkeys(row.prompt for row in rows))
    cache = GrowingCache()
    prompt_ids, mask = batch.read_prompts(prompts, cache)
    order = [prompts.index(row.prompt) for row in rows]
    if order != list(range(len(prompts))):
        keep_rows(cache, order)
    lengths = [len(row.ids) for row in rows]
    longest = max(lengths)
    ids = torch.tensor([row.ids + [0] * (longest - len(row.ids)) for row in rows], device=device)
    seen = torch.arange(longest, device=device) < torch.tensor(lengths, device=device)[:, None]
    # The prompt's last token, which is not in the cache, predicts the first one.
    steps = torch.cat([prompt_ids[order, -1:], ids[:, :-1]], dim=1)  # (B, K)
    mask = torch.cat([mask[order, :-1], seen.long()], dim=1)
    hidden = engine.model.model(
        input_ids=steps,
        attention_mask=mask,
        position_ids=(mask.cumsum(-1) - 1).clamp(min=0)[:, -longest:],
        cache=cache,
        use_cache=True,
    ).last_hidden_state
    logprobs, greedy = _of_tokens(engine, hidden[seen], ids[seen])
    return [
        LogLikelihood(float(some.double().sum()), len(some), bool(best.all()))
        for some, best in zip(logprobs.split(lengths), greedy.split(lengths), strict=True)
    ]


def _of_tokens(
    engine: "EveEngine", states: torch.Tensor, targets: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities (N,) of targets behind states (N, D), and whether the engine takes them.

    In chunks, as in the language loss: logits of all would be N times the vocabulary.
    """
    head, never = engine.model.lm_head, engine.never()
    chunk = max(1, LOGIT_BYTES // (4 * head.out_features))
    logprobs, greedy = [], []
    for some, wanted in zip(states.split(chunk), targets.split(chunk), strict=True):
        logits = at_least_float32(head(some))  # (chunk, vocabulary)
        logprobs.append(logits.gather(1, wanted[:, None])[:, 0] - logits.logsumexp(-1))
        logits[:, never] = -torch.inf
        greedy.append(logits.argmax(-1) == wanted)
    return torch.cat(logprobs), torch.cat(greedy)


__all__ = ["LogLikelihood", "Speaker", "continuation_ids", "log_likelihood"]
