"""The engine: conversations with pictures in, answers out.  Every way of asking goes through it.

One answer, many, streamed ones and those of a server are all rows of a `RunningBatch`, so they are
the same answers.  Easy to get wrong: `model.generate` is called by `running_batch.py` and, for
beams, by `beams.py`, and by nobody else.
"""

import queue
import threading
from collections.abc import Callable, Generator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from eve_vlm.image_processing_eve import num_image_tokens
from eve_vlm.loading import load
from eve_vlm.modeling_eve import EveForConditionalGeneration
from eve_vlm.processing_eve import EveProcessor

from .beams import answer_with_beams
from .cache_rows import PrefixStore
from .messages import Messages, Prompt, encode, picture_parts, pictures_of, user_message
from .reply import Answer, Piece, Reply
from .running_batch import RunningBatch
from .sampling import Sampling, TokenLogprob
from .scoring import LogLikelihood, log_likelihood
from .static_rows import StaticRows

WORTH_A_BAR = 2  # rounds of a whole batch; below, nobody waits long enough for a progress bar


class TooLongError(ValueError):
    """A prompt and its answer are longer than the model takes."""

    def __init__(self, message: str, prompt: Prompt):
        super().__init__(message)
        self.prompt = prompt


class EveEngine:
    """A loaded model that answers.

    Args:
        model: any `EveForConditionalGeneration`; it is put into eval mode.
        processor: its processor, with a chat template.
        batch_size: answers that are made together at most.
        keep_tokens: positions of earlier prompts and answers whose caches are kept, so that the
            next turn of a conversation reads only what is new; 0 keeps none, None as many as the
            model takes.
        static_cache: makes tokens over a cache of fixed size; on a GPU a step is then recorded once
            and played again (`static_rows.py`), and weights of one input are laid behind each
            other; on a CPU it gains nothing.
        compile_steps: compiles the decoder's layers for it, which takes seconds on a GPU and most
            of a minute on a CPU, once for each number of rows.
    """

    def __init__(
        self,
        model: EveForConditionalGeneration,
        processor: EveProcessor,
        *,
        batch_size: int = 32,
        keep_tokens: int | None = 0,
        static_cache: bool = False,
        compile_steps: bool = False,
    ):
        self.model, self.processor, self.batch_size = model.eval(), processor, batch_size
        if compile_steps and not static_cache:
            raise ValueError("compile_steps is for a cache of fixed size; give static_cache=True.")
        settings: dict[str, Any] | None = {} if compile_steps else None
        self.static = StaticRows(model, compiled=settings) if static_cache else None
        kept = self.max_length if keep_tokens is None else keep_tokens
        self.kept = PrefixStore(kept) if kept else None
        # One thread at a time uses the model and the kept caches.
        self.lock = threading.RLock()

    @classmethod
    def from_pretrained(
        cls,
        name_or_folder: str | Path,
        *,
        device: str | None = None,
        dtype: torch.dtype | None = None,
        attn_implementation: str = "sdpa",
        quantize: str | None = None,
        **settings: Any,
    ) -> "EveEngine":
        """Loads a folder or Hub id onto `device` (a GPU where there is one, else the CPU).

        Args:
            quantize: `int8` or `nf4` for decoder weights in 8 or 4 bits.
            settings: of the engine.
        """
        loaded = load(
            name_or_folder,
            device=device,
            dtype=dtype,
            attn_implementation=attn_implementation,
            quantize=quantize,
        )
        return cls(*loaded, **settings)

    # --- asking ---

    def ask(
        self,
        question: str,
        images: Sequence[Image.Image | str | Path] = (),
        **settings: Any,
    ) -> str:
        """Answers one question about some pictures, or about none.

        `<image>` marks in the question say where the pictures go; without marks they go in front.

        Args:
            settings: fields of `Sampling`.

        Raises:
            ValueError: if the question is empty, or marks and pictures differ in number.
        """
        return self.generate([user_message(question, images)], **settings)[0]

    def generate(
        self,
        conversations: Sequence[Messages],
        *,
        batch_size: int | None = None,
        **settings: Any,
    ) -> list[str]:
        """The texts of `answer`, one for each conversation."""
        answers = self.answer(conversations, batch_size=batch_size, **settings)
        return [answer.text for answer in answers]

    def answer(
        self,
        conversations: Sequence[Messages],
        *,
        n: int = 1,
        num_beams: int = 1,
        batch_size: int | None = None,
        progress: bool = False,
        **settings: Any,
    ) -> list[Answer]:
        """Answers conversations together, each as it would be answered alone.

        Args:
            conversations: Hugging Face messages; picture parts are `{"type": "image", "image":
                picture}` with an open picture or a file name.
            n: answers to each conversation, behind each other; drawn ones take seeds seed, seed +
                1, ...
            num_beams: width of a beam search; with n, the n best of them.
            progress: shows a bar when it takes longer than a few batches.
            settings: fields of `Sampling`.

        Raises:
            ValueError: if a picture cannot be read, a prompt is longer than the model takes, or a
                setting is out of range.
        """
        sampling, size = Sampling(**settings), batch_size or self.batch_size
        if n < 1:
            raise ValueError(f"n is {n}; ask for at least one answer.")
        if num_beams > 1:
            prompts = [self.encode(one, sampling) for one in conversations]
            with self.lock:
                return answer_with_beams(self, prompts, sampling, n=n, num_beams=num_beams)
        replies: list[Reply] = []
        bar = tqdm(
            total=n * len(conversations),
            desc="answers",
            unit="answer",
            disable=not progress or len(conversations) < WORTH_A_BAR * size,
        )
        with bar, self.lock:
            batch = self.batch(size)
            # Prompts are made a few batches at a time: pictures of all of them need not fit.
            for first in range(0, len(conversations), 4 * size):
                chunk = [
                    self.replies(messages, sampling, n, on_piece=[partial(_tick, bar)] * n)
                    for messages in conversations[first : first + 4 * size]
                ]
                # Alike lengths together waste the least padding.
                for group in sorted(chunk, key=lambda group: -len(group[0].prompt)):
                    batch.add(group)
                batch.run()
                replies += [reply for group in chunk for reply in group]
        return [reply.answer for reply in replies if reply.answer is not None]

    def log_likelihood(
        self, conversations: Sequence[Messages], continuations: Sequence[str], **settings: Any
    ) -> list[LogLikelihood]:
        """How likely each text is as the answer to its conversation; see `scoring.py`."""
        return log_likelihood(self, conversations, continuations, **settings)

    def stream(self, messages: Messages, **settings: Any) -> Generator[Piece, None, None]:
        """Answers one conversation, piece by piece; the last piece holds the whole answer.

        The texts of all pieces together are the answer's text.  Leaving the iterator ends the
        answer.
        """
        pieces: queue.SimpleQueue[Piece | BaseException] = queue.SimpleQueue()
        [reply] = self.replies(
            messages, Sampling(**settings), on_piece=[pieces.put], on_error=pieces.put
        )
        thread = threading.Thread(target=self._answer_alone, args=(reply,), daemon=True)
        thread.start()
        try:
            while True:
                piece = pieces.get()
                if isinstance(piece, BaseException):
                    raise piece
                yield piece
                if piece.answer is not None:
                    return
        finally:
            reply.cancel()
            thread.join()

    def _answer_alone(self, reply: Reply) -> None:
        """In a thread of its own; what goes wrong reaches the listener of the reply."""
        with self.lock:
            batch = self.batch(1)
            batch.add([reply])
            try:
                batch.run()
            except RuntimeError:
                assert reply.error is not None

    # --- parts that a server is built of ---

    def replies(
        self,
        messages: Messages,
        sampling: Sampling,
        n: int = 1,
        *,
        on_piece: Sequence[Callable[[Piece], None] | None] | None = None,
        on_error: Callable[[BaseException], None] | None = None,
    ) -> list[Reply]:
        """Answers to one conversation that wait to be made and share what is read.

        Args:
            on_piece: a listener for each of them.

        Raises:
            ValueError: see `answer`.
        """
        prompt = self.encode(messages, sampling)
        listeners = [None] * n if on_piece is None else on_piece
        return [
            Reply(
                prompt,
                _nth(sampling, index),
                self.tokenizer,
                device=self.model.device,
                ends=self.ends(),
                on_piece=listener,
                on_error=on_error,
            )
            for index, listener in zip(range(n), listeners, strict=True)
        ]

    def batch(self, size: int) -> RunningBatch:
        """A batch without rows that answers as this engine does."""
        return RunningBatch(
            self.model, size=size, never=self.never(), kept=self.kept, static=self.static
        )

    def encode(self, messages: Messages, sampling: Sampling | None = None) -> Prompt:
        """A conversation as the model takes it, checked to leave room for the answer.

        Raises:
            TooLongError: if prompt and answer are longer than the model takes.
            ValueError: if a picture cannot be read.
        """
        sampling = sampling or Sampling(max_new_tokens=1)
        pictures = pictures_of(messages)
        prompt = encode(
            messages,
            self.processor,
            max_image_tokens=sampling.max_image_tokens,
            pictures=pictures,
        )
        self._check_length(prompt, pictures, sampling.max_new_tokens)
        return prompt

    @property
    def tokenizer(self) -> Any:
        """The processor's."""
        return self.processor.tokenizer

    def ends(self) -> list[int]:
        """Every id that ends an answer: the decoder's (often several) and the tokenizer's."""
        return end_ids(self.model, self.tokenizer)

    def never(self) -> list[int]:
        """Ids that no answer holds: the image placeholder, and what the decoder leaves out.

        The placeholder of a published checkpoint lies behind the vocabulary and needs no ban.
        """
        ids = [
            *(self.model.generation_config.suppress_tokens or []),
            self.processor.image_token_id,
        ]
        vocabulary = self.model.config.text_config.vocab_size
        return list(dict.fromkeys(one for one in ids if one < vocabulary))

    @property
    def max_length(self) -> int:
        """Positions that the model takes, prompt and answer together."""
        return self.model.config.text_config.max_position_embeddings

    def _check_length(
        self, prompt: Prompt, pictures: Sequence[Image.Image], max_new_tokens: int
    ) -> None:
        limit, length = self.max_length, len(prompt)
        if length + max_new_tokens <= limit:
            return
        room = limit - max_new_tokens - (length - prompt.image_tokens)
        raise TooLongError(
            f"The prompt takes {length} tokens, {prompt.image_tokens} of them for pictures, and "
            f"the answer up to {max_new_tokens}, but the model takes {limit} in all; "
            f"{self._fitting_size(pictures, room)}.",
            prompt,
        )

    def _fitting_size(self, pictures: Sequence[Image.Image], room: int) -> str:
        """Advice: the largest longest_edge at which all pictures fit into `room` tokens."""
        processor = self.processor.image_processor
        unit = processor.size_multiple
        for edge in range(processor.size["longest_edge"] - unit, 0, -unit):
            grids = [
                processor.grid_of(image.height, image.width, longest_edge=edge)
                for image in pictures
            ]
            tokens = [num_image_tokens(grid.rows, grid.cols) for grid in grids]
            if sum(tokens) <= room:
                return (
                    f"with pictures of longest_edge {edge} (set processor.image_processor.size) "
                    "it would fit"
                )
        return "shorten the question or give fewer pictures"


def end_ids(model: PreTrainedModel, tokenizer: Any) -> list[int]:
    """Every id that ends an answer: the model's (often several) and the tokenizer's."""
    ends = model.generation_config.eos_token_id
    given = [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
    own = tokenizer.eos_token_id
    return list(dict.fromkeys([*given, *([] if own is None else [own])]))


def _nth(sampling: Sampling, index: int) -> Sampling:
    """The settings of one of several answers: another seed each."""
    if sampling.seed is None or index == 0:
        return sampling
    return replace(sampling, seed=sampling.seed + index)


def _tick(bar: tqdm, piece: Piece) -> None:
    if piece.answer is not None:
        bar.update()


__all__ = [
    "Answer",
    "EveEngine",
    "LogLikelihood",
    "Piece",
    "Sampling",
    "TokenLogprob",
    "TooLongError",
    "end_ids",
    "picture_parts",
    "user_message",
]
