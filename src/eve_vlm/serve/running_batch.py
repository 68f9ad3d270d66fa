"""Answers that are made together: rows join and leave between two tokens.

The library's `generate` makes all tokens, over a cache that holds every row but its last token.
One call, a leg, lasts until something has to change: an answer is finished while somebody waits, a
newcomer may join, or half of the rows are done.  Then rows are left out, newcomers' prompts are
read, and the next leg goes on where the last one stopped.  Pictures are seen while a prompt is
read, so `generate` never handles them.

Easy to get wrong: rows are aligned on the right.  With padding on the right shorter prompts get
wrong or empty answers (LLaVA#754), which is why no caller pads by itself.

Legend: `B` rows, `T` columns: the longest prompt and the tokens made so far.
"""

import copy
import threading
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from transformers import (
    DynamicCache,
    GenerationConfig,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)

from eve_vlm.cache_name_eve import CACHE
from eve_vlm.modeling_eve import EveForConditionalGeneration

from .cache_rows import GrowingCache, PrefixStore, add_rows, keep_rows
from .messages import Prompt
from .narrow_products import narrow_products
from .reply import Reply
from .sampling import ChooseTokens
from .static_rows import StaticRows

# Positions, padding included, that are read in one go: more would hold up the rows that wait for
# their next token, and need more memory at once.
READ_AT_ONCE = 16_384
# Prompts are read together whose lengths differ by a fifth at most, as padding is computed too:
# 32 mixed prompts of a 135M model took 38 s instead of 65 s.
ALIKE = 0.8


@dataclass(slots=True)
class Rows:
    """What `generate` goes on from: (B, T) ids and mask, and a cache of T - 1 columns."""

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    cache: DynamicCache
    replies: list[Reply]


class RunningBatch:
    """Answers replies as they come, at most `size` at a time.

    Args:
        never: ids that no answer holds.
        kept: where caches of finished rows go, for the next turn.
        static: makes the tokens of legs over caches of fixed size; None lets them grow.
    """

    def __init__(
        self,
        model: EveForConditionalGeneration,
        *,
        size: int,
        never: Sequence[int] = (),
        kept: PrefixStore | None = None,
        static: StaticRows | None = None,
    ):
        if size < 1:
            raise ValueError(f"batch_size is {size}; give at least 1.")
        self.model, self.size, self.never, self.kept = model, size, never, kept
        self._static = static
        self._waiting: deque[Reply] = deque()
        self._rows: Rows | None = None
        self._lock = threading.Lock()
        # Cleared by who wants the model in between: tokens are made up to the next one only.
        self.may_go_on = threading.Event()
        self.may_go_on.set()

    # --- from any thread ---

    def add(self, replies: Sequence[Reply]) -> None:
        """Lets replies wait for their turn, in order; those that were given up take no place."""
        with self._lock:
            given_up = [reply for reply in self._waiting if reply.cancelled]
            for reply in given_up:
                self._waiting.remove(reply)
            self._waiting.extend(replies)
        for reply in given_up:
            reply.end("cancelled")

    @property
    def waiting(self) -> int:
        """Replies whose prompts were not read yet, and that somebody waits for."""
        with self._lock:
            return sum(not reply.cancelled for reply in self._waiting)

    @property
    def running(self) -> int:
        """Replies that are being made."""
        return 0 if self._rows is None else len(self._rows.replies)

    @property
    def busy(self) -> bool:
        """Whether there is anything to do."""
        return bool(self._waiting) or self._rows is not None

    # --- in the thread that answers ---

    def run(self) -> None:
        """Answers until nobody waits.

        Raises:
            RuntimeError: what torch says when, for instance, memory ends; all replies that were
                being made have failed with it, those that wait still wait.
        """
        while self.busy:
            self.step()

    def fail_all(self, error: BaseException) -> None:
        """Nobody will answer those who wait or are being answered."""
        with self._lock:
            left = [*self._waiting, *(self._rows.replies if self._rows else ())]
            self._waiting.clear()
            self._rows = None
        for reply in left:
            if not reply.finished:
                reply.fail(error)

    @torch.inference_mode()
    def step(self) -> None:
        """One leg: takes in who waits, and makes tokens until something has to change."""
        newcomers = self._admit()
        try:
            if newcomers:
                self._join(newcomers)
            if self._rows is not None:
                with narrow_products(self.model):
                    self._leg(self._rows)
                self._leave(self._rows)
        except BaseException as error:
            for reply in {*newcomers, *(self._rows.replies if self._rows else ())}:
                if not reply.finished:
                    reply.fail(error)
            self._rows = None
            raise

    def _admit(self) -> list[Reply]:
        """Who can join now: as many as there is room for, and as are quickly read."""
        newcomers: list[Reply] = []
        longest = 0
        with self._lock:
            while self._waiting and self.running + len(newcomers) < self.size:
                if self._waiting[0].cancelled:
                    self._waiting.popleft().end("cancelled")
                    continue
                longest = max(longest, len(self._waiting[0].prompt))
                if newcomers and longest * (len(newcomers) + 1) > READ_AT_ONCE:
                    break
                newcomers.append(self._waiting.popleft())
        return newcomers

    def _join(self, newcomers: list[Reply]) -> None:
        """Reads the newcomers' prompts and puts their rows behind those that run."""
        for rows in self._read(newcomers):
            if self._rows is None:
                self._rows = rows
                continue
            length = max(self._rows.input_ids.shape[1], rows.input_ids.shape[1])
            for one in (self._rows, rows):
                one.input_ids = _widened(one.input_ids, length)
                one.attention_mask = _widened(one.attention_mask, length)
            self._rows.input_ids = torch.cat([self._rows.input_ids, rows.input_ids])
            self._rows.attention_mask = torch.cat([self._rows.attention_mask, rows.attention_mask])
            add_rows(self._rows.cache, rows.cache)
            self._rows.replies += rows.replies

    def _read(self, newcomers: list[Reply]) -> list[Rows]:
        """Prompts with a known beginning one by one, others with their like; each prompt once."""
        prompts = list(dict.fromkeys(reply.prompt for reply in newcomers))
        found = {
            prompt: cache
            for prompt in prompts
            if self.kept is not None and (cache := self.kept.find(prompt)) is not None
        }
        fresh = [prompt for prompt in prompts if prompt not in found]
        groups = [([prompt], cache) for prompt, cache in found.items()]
        groups += [(alike, GrowingCache()) for alike in _alike(fresh)]
        read = []
        for group, cache in groups:
            replies = [reply for one in group for reply in newcomers if reply.prompt is one]
            known = cache.get_seq_length()
            for reply in replies:
                reply.cached_tokens = known
            ids, mask = self.read_prompts(group, cache)
            # Several answers to one prompt share what was read.
            order = [group.index(reply.prompt) for reply in replies]
            if order != list(range(len(group))):
                ids, mask = ids[order], mask[order]
                keep_rows(cache, order)
            read.append(Rows(ids, mask, cache, replies))
        return read

    def read_prompts(
        self, prompts: list[Prompt], cache: DynamicCache
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Fills the cache with all but the last token of each prompt; (B, T) ids and mask."""
        known, length = cache.get_seq_length(), max(map(len, prompts))
        device = self.model.device
        ids = torch.stack([_widened(prompt.input_ids, length) for prompt in prompts]).to(device)
        sizes = torch.tensor([[len(prompt)] for prompt in prompts], device=device)
        mask = (torch.arange(length, device=device) >= length - sizes).long()  # (B, T)
        if known == length - 1:
            return ids, mask
        pictures = [prompt.pictures_from(known) for prompt in prompts]
        seen = {
            name: torch.cat([one[name] for one in pictures if one]).to(device)
            for name in ("pixel_values", "image_grid_thw")
            if any(pictures)
        }
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        # Without the head: nobody asks what follows inside a prompt.
        self.model.model(
            input_ids=ids[:, known:-1],
            attention_mask=mask[:, :-1],
            position_ids=positions[:, known:-1],
            cache=cache,
            use_cache=True,
            **seen,
        )
        return ids, mask

    def _leg(self, rows: Rows) -> None:
        """Makes tokens for all rows until `is_over`."""
        choosers = [reply.chooser for reply in rows.replies]
        remaining = max(reply.remaining for reply in rows.replies)
        more: dict[str, Any] = {}
        if self._static is not None and rows.cache.layers:
            # Log-probabilities of a token are gone when the next one's scores are there.
            ahead = not any(chooser.wants_logprobs for chooser in choosers)
            more["custom_generate"] = partial(self._static, ahead=ahead)
        rows.input_ids = self.model.generate(
            input_ids=rows.input_ids,
            attention_mask=rows.attention_mask,
            **{CACHE: rows.cache},
            generation_config=self.settings(max_new_tokens=remaining),
            logits_processor=LogitsProcessorList([ChooseTokens(choosers, self.never)]),
            stopping_criteria=StoppingCriteriaList([_Listener(self, rows.replies)]),
            **more,
        )
        made = rows.input_ids.shape[1] - rows.attention_mask.shape[1]
        seen = torch.ones_like(rows.attention_mask[:, :1]).expand(-1, made)
        rows.attention_mask = torch.cat([rows.attention_mask, seen], dim=1)

    def settings(self, **changes: Any) -> GenerationConfig:
        """The model's own settings, without those that replies decide one by one."""
        settings = copy.deepcopy(self.model.generation_config)
        decided = ("temperature", "top_p", "top_k", "eos_token_id", "suppress_tokens", "max_length")
        settings.update(**dict.fromkeys((*decided, "cache_implementation")))
        settings.update(**{"do_sample": False, "num_beams": 1} | changes)
        return settings

    def is_over(self, replies: Sequence[Reply]) -> bool:
        """Whether a leg ends here: a row can leave or join, or half of the work is in vain."""
        finished = sum(reply.finished for reply in replies)
        if self._waiting and len(replies) - finished < self.size:
            return True
        if not self.may_go_on.is_set():
            return True
        return 2 * finished >= len(replies) > 0 and finished > 0

    def _leave(self, rows: Rows) -> None:
        """Leaves out finished rows and columns that nobody needs."""
        stay = [index for index, reply in enumerate(rows.replies) if not reply.finished]
        if len(stay) < len(rows.replies):
            self._keep(rows)
        if not stay:
            self._rows = None
            return
        if len(stay) == len(rows.replies):
            return
        mask = rows.attention_mask[stay]
        unused = int(mask.argmax(-1).min())  # columns in which all are padded
        rows.attention_mask, rows.input_ids = mask[:, unused:], rows.input_ids[stay, unused:]
        keep_rows(rows.cache, stay, unused=unused)
        rows.replies = [rows.replies[index] for index in stay]

    def _keep(self, rows: Rows) -> None:
        """Keeps caches of finished rows for the next turn."""
        if self.kept is None:
            return
        for index, reply in enumerate(rows.replies):
            if reply.answer is None or reply.answer.finish_reason == "cancelled":
                continue
            first = int(rows.attention_mask[index].argmax())
            length = len(reply.prompt) + len(reply.token_ids)
            # The last column has no cache yet, and behind its end a row holds what nobody wanted.
            length = min(length, rows.cache.get_seq_length() - first)
            ids = rows.input_ids[index, first : first + length].cpu()
            self.kept.keep(reply.prompt, ids, rows.cache, index, first)


def _alike(prompts: list[Prompt]) -> list[list[Prompt]]:
    """Groups of similar length, the longest first."""
    groups: list[list[Prompt]] = []
    for prompt in sorted(prompts, key=len, reverse=True):
        if groups and len(prompt) >= ALIKE * len(groups[-1][0]):
            groups[-1].append(prompt)
        else:
            groups.append([prompt])
    return groups


def _widened(values: torch.Tensor, length: int) -> torch.Tensor:
    """(..., T) padded with zeros on the left to (..., length)."""
    return torch.nn.functional.pad(values, (length - values.shape[-1], 0))


class _Listener(StoppingCriteria):
    """Hands out each new token, and ends the leg when something has to change."""

    def __init__(self, batch: RunningBatch, replies: list[Reply]):
        self.batch, self.replies = batch, replies

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs) -> torch.Tensor:
        for reply, token in zip(self.replies, input_ids[:, -1].tolist(), strict=True):
            if not reply.finished:
                reply.take(token)
        over = self.batch.is_over(self.replies)
        return torch.full((len(self.replies),), over, device=input_ids.device)


__all__ = ["READ_AT_ONCE", "RunningBatch"]
