"""Any image-text-to-text model of transformers, asked as EVE is: the baselines of an evaluation.

The library's own classes read, pad and generate; what single classes need besides is a table in
`model_care.py`.  Texts are scored by generating them: each token is forced, and the probability
that it had is noted, so positions, caches and pictures are those of answers for every class.

Easy to get wrong: prompts are padded on the left, and where the chat template writes the start
token the tokenizer must not write it again.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from tqdm.auto import tqdm
from transformers import (
    AutoModelForImageTextToText,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    ProcessorMixin,
    StoppingCriteria,
    StoppingCriteriaList,
)

from eve_vlm.checkpoint_files import list_weights
from eve_vlm.errors import check_loaded, first_line
from eve_vlm.serve.engine import WORTH_A_BAR, EveEngine, end_ids
from eve_vlm.serve.messages import Messages
from eve_vlm.serve.reply import Answer, Reply
from eve_vlm.serve.sampling import ChooseTokens, Sampling
from eve_vlm.serve.scoring import LogLikelihood, continuation_ids

from .model_files import (
    facts_of,
    find_or_say_how,
    is_eve,
    read_config,
    read_processor,
)
from .model_inputs import ModelInputs, in_parts, together

BATCH_SIZE = 8


class TransformersEngine:
    """A loaded model of another kind that answers.

    Args:
        model: an image-text-to-text model; it is put into eval mode.
        processor: its processor, with a chat template unless `CARE` has one.
        batch_size: answers that are made together at most.

    Raises:
        ValueError: if there is no chat template.
    """

    def __init__(
        self, model: PreTrainedModel, processor: ProcessorMixin, *, batch_size: int = BATCH_SIZE
    ):
        self.model, self.processor, self.batch_size = model.eval(), processor, batch_size
        self._inputs = ModelInputs(model, processor, pad=(self.ends() or [0])[0])

    @classmethod
    def from_pretrained(
        cls,
        name_or_folder: str | Path,
        *,
        device: str | None = None,
        dtype: torch.dtype | None = None,
        attn_implementation: str = "sdpa",
        batch_size: int = BATCH_SIZE,
    ) -> "TransformersEngine":
        """Loads a folder or Hub id onto `device` (a GPU where there is one, else the CPU).

        Args:
            dtype: type of the weights; None means float32 on a CPU and the stored type elsewhere.

        Raises:
            ValueError: in one sentence, for whatever is wrong with the name or the files.
        """
        folder = find_or_say_how(name_or_folder)
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        if dtype is None and torch.device(device).type == "cpu":
            dtype = torch.float32
        config = read_config(folder, name_or_folder)
        processor = read_processor(folder, name_or_folder)
        list_weights(folder)  # every file is whole, and none wants to run code
        try:
            model, report = AutoModelForImageTextToText.from_pretrained(
                folder,
                config=config,
                dtype=dtype or "auto",
                attn_implementation=attn_implementation,
                device_map={"": device},
                output_loading_info=True,
            )
        except (OSError, RuntimeError, ValueError, SafetensorError) as error:
            raise ValueError(
                f"The model {name_or_folder} cannot be loaded ({first_line(error)}); copy it "
                "again, or choose another device, number type or attention."
            ) from None
        # Missing ones would be random numbers.  Published folders often hold some that the
        # library has no use for any more, which its own table shows.
        check_loaded(folder, report["missing_keys"], ())
        return cls(model, processor, batch_size=batch_size)

    # --- asking ---

    def answer(
        self,
        conversations: Sequence[Messages],
        *,
        batch_size: int | None = None,
        progress: bool = False,
        **settings: Any,
    ) -> list[Answer]:
        """Answers conversations together, each as it would be answered alone.

        Args:
            conversations: as `EveEngine.answer` has them.
            progress: shows a bar when it takes longer than a few batches.
            settings: fields of `Sampling`, except `max_image_tokens`.

        Raises:
            ValueError: if a picture cannot be read, a conversation is none that the model takes,
                or a setting is out of range.
        """
        sampling = Sampling(**settings)
        _refuse_picture_budget(sampling.max_image_tokens)
        size = self._size(batch_size)
        found: dict[int, Answer] = {}
        few = not progress or len(conversations) < WORTH_A_BAR * size
        with tqdm(total=len(conversations), desc="answers", unit="answer", disable=few) as bar:
            for places in together(conversations, size):
                answers = self._answer([conversations[place] for place in places], sampling)
                found |= dict(zip(places, answers, strict=True))
                bar.update(len(places))
        return [found[place] for place in range(len(conversations))]

    def log_likelihood(
        self,
        conversations: Sequence[Messages],
        continuations: Sequence[str],
        *,
        batch_size: int | None = None,
        max_image_tokens: int | None = None,
    ) -> list[LogLikelihood]:
        """How likely each text is as the answer to its conversation; see `serve/scoring.py`.

        Raises:
            ValueError: see `answer`; or if a continuation is empty or holds a token that ends
                answers.
        """
        _refuse_picture_budget(max_image_tokens)
        if len(conversations) != len(continuations):
            raise ValueError(
                f"There are {len(conversations)} conversations but {len(continuations)} "
                "continuations; give one for each."
            )
        found: dict[int, LogLikelihood] = {}
        for places in together(conversations, self._size(batch_size)):
            scores = self._score(
                [conversations[place] for place in places],
                [self._continuation(conversations[one], continuations[one]) for one in places],
            )
            found |= dict(zip(places, scores, strict=True))
        return [found[place] for place in range(len(conversations))]

    @property
    def tokenizer(self) -> Any:
        """The processor's."""
        return self.processor.tokenizer

    def ends(self) -> list[int]:
        """Every id that ends an answer: the model's (often several) and the tokenizer's."""
        return end_ids(self.model, self.tokenizer)

    # --- one batch ---

    @torch.inference_mode()
    def _answer(self, conversations: list[Messages], sampling: Sampling) -> list[Answer]:
        inputs = self._inputs.encode(conversations, sampling.max_new_tokens)
        replies = [
            Reply(
                self._inputs.prompt(ids[seen.bool()]),
                sampling,
                self.tokenizer,
                device=self.model.device,
                ends=self.ends(),
            )
            for ids, seen in zip(inputs["input_ids"], inputs["attention_mask"], strict=True)
        ]
        self.model.generate(
            **inputs,
            generation_config=self._settings(sampling.max_new_tokens),
            logits_processor=LogitsProcessorList(
                [ChooseTokens([reply.chooser for reply in replies], never=())]
            ),
            stopping_criteria=StoppingCriteriaList([_Listener(replies)]),
        )
        for reply in replies:
            if not reply.finished:  # what the model's own settings end answers at
                reply.end("stop")
        return [reply.answer for reply in replies if reply.answer is not None]

    @torch.inference_mode()
    def _score(self, conversations: list[Messages], ids: list[list[int]]) -> list[LogLikelihood]:
        longest = max(map(len, ids))
        inputs = self._inputs.encode(conversations, longest)
        wanted = torch.tensor(
            [row + row[-1:] * (longest - len(row)) for row in ids], device=self.model.device
        )
        forced = _Force(wanted)
        steps = self.model.generate(
            **inputs,
            # Logits as the model gives them, before any processor.
            generation_config=self._settings(
                longest, output_logits=True, return_dict_in_generate=True
            ),
            logits_processor=LogitsProcessorList([forced]),
        ).logits
        logprobs = torch.stack(
            [
                step.float().log_softmax(-1).gather(1, wanted[:, at, None])[:, 0]
                for at, step in enumerate(steps)
            ],
            dim=1,
        )  # (B, longest)
        likeliest = torch.stack(forced.likeliest, dim=1) == wanted
        return [
            LogLikelihood(
                float(some[: len(row)].double().sum()), len(row), bool(best[: len(row)].all())
            )
            for some, best, row in zip(logprobs, likeliest, ids, strict=True)
        ]

    def _settings(self, max_new_tokens: int, **more: bool) -> GenerationConfig:
        """The likeliest token unless a row's chooser says otherwise; else the model's own."""
        return GenerationConfig(
            max_new_tokens=max_new_tokens,
            do_sample=False,
            num_beams=1,
            temperature=1.0,
            top_p=1.0,
            top_k=50,
            pad_token_id=self.tokenizer.pad_token_id,
            **more,
        )

    def _continuation(self, messages: Messages, text: str) -> list[int]:
        ids = continuation_ids(self, in_parts(messages), text)
        if set(ids) & set(self.ends()):
            raise ValueError(
                f"The continuation {text!r} holds a token that ends answers; take it out."
            )
        return ids

    def _size(self, batch_size: int | None) -> int:
        size = self.batch_size if batch_size is None else batch_size
        if size < 1:
            raise ValueError(f"batch_size is {size}; give at least 1.")
        return size


class _Listener(StoppingCriteria):
    """Hands out each new token; a row is done when its reply is."""

    def __init__(self, replies: list[Reply]):
        self.replies = replies

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs) -> torch.Tensor:
        for reply, token in zip(self.replies, input_ids[:, -1].tolist(), strict=True):
            if not reply.finished:
                reply.take(token)
        return torch.tensor([reply.finished for reply in self.replies], device=input_ids.device)


class _Force(LogitsProcessor):
    """Makes every row say what is wanted, and notes what it would have said instead.

    Args:
        wanted: (B, steps) token ids.
    """

    def __init__(self, wanted: torch.Tensor):
        self.wanted = wanted
        self.likeliest: list[torch.Tensor] = []  # (B,) of each step

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        step = self.wanted[:, len(self.likeliest), None]
        self.likeliest.append(scores.argmax(-1))
        # Not in place: `scores` are also the logits that are given back.
        return cast(torch.FloatTensor, torch.full_like(scores, -torch.inf).scatter(1, step, 0.0))


def _refuse_picture_budget(max_image_tokens: int | None) -> None:
    if max_image_tokens is not None:
        raise ValueError(
            f"max_image_tokens is {max_image_tokens}, which only EVE models take; leave it out."
        )


# --- models of every kind -------------------------------------------------------------------------


def open_answerer(
    name_or_folder: str | Path,
    *,
    device: str | None = None,
    dtype: torch.dtype | None = None,
    attn_implementation: str = "sdpa",
    batch_size: int = BATCH_SIZE,
    quantize: str | None = None,
    static_cache: bool = False,
    compile_steps: bool = False,
) -> EveEngine | TransformersEngine:
    """Loads whatever can answer: EVE models, published, LoRA and run folders, and all others.

    Args:
        static_cache, compile_steps: see `EveEngine`.

    Raises:
        ValueError: in one sentence, for whatever is wrong with the name, the files or the settings.
    """
    folder = find_or_say_how(name_or_folder)
    settings: dict[str, Any] = {
        "device": device,
        "dtype": dtype,
        "attn_implementation": attn_implementation,
        "batch_size": batch_size,
    }
    if is_eve(folder):
        return EveEngine.from_pretrained(
            folder,
            quantize=quantize,
            static_cache=static_cache,
            compile_steps=compile_steps,
            **settings,
        )
    if static_cache or compile_steps:
        raise ValueError(
            f"{name_or_folder} is no EVE model, and only those answer over a cache of fixed size "
            "here; leave out static_cache and compile_steps."
        )
    if quantize is not None:
        raise ValueError(
            f"{name_or_folder} is no EVE model, and only those are quantized here; leave out "
            "quantize."
        )
    return TransformersEngine.from_pretrained(folder, **settings)


def model_facts(engine: EveEngine | TransformersEngine) -> dict[str, Any]:
    """Class, size, number type, device, Hub commit and hash of a loaded model; plain JSON."""
    return facts_of(engine.model)


__all__ = ["TransformersEngine", "model_facts", "open_answerer"]
