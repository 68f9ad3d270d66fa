"""Answers of the model that trains to a few fixed records, every so many steps.

The same records each time, drawn by the seed, so that one sees the model learn: from what the
recipe holds out where it does (the other side of a slice such as `[:95%]`, held-out scenes), else
from its own data.  This is the one place where training asks the engine, so an answer here is the
answer that `eve ask` would give.

Easy to get wrong: training must not notice.  Modes of all modules and every random state are put
back, nothing keeps a gradient, and only the first process asks; with weights in shards it could not
ask alone, so nobody does.
"""

import copy
import json
import logging
import random
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
import torch
from torch import nn
from transformers import DynamicCache, TrainerCallback, TrainingArguments

from eve_vlm.data.picture_ref import open_image
from eve_vlm.data.records import Record, parts_of, text_of
from eve_vlm.data.sources.made import MADE
from eve_vlm.image_processing_eve import to_rgb
from eve_vlm.json_lines import append_lines
from eve_vlm.modeling_eve import EveForConditionalGeneration
from eve_vlm.processing_eve import EveProcessor
from eve_vlm.serve.engine import EveEngine, Messages
from eve_vlm.train.run_log import cut_lines
from eve_vlm.train.sections import SamplesSection, SourceSection

logger = logging.getLogger(__name__)

SAMPLES_FILE = "samples.jsonl"
PICTURES_FOLDER = "samples"
SHOWN_PIXELS = 224  # of the copies that the report shows
TRIES = 8  # times as many records are looked at until enough can be used
# A stage of captions has no chat: the picture, and the caption follows (`Encoder`).
PLAIN = (
    "{{ bos_token }}{% for message in messages %}{% for part in message['content'] %}"
    "{{ image_mark if part['type'] == 'image' else part['text'] }}{% endfor %}{% endfor %}"
)
SLICE = re.compile(r"(?P<name>[^\[]*)\[(?P<first>[^:]*):(?P<last>[^:]*)\]")

Format = Literal["plain", "chat"]


class Records(Protocol):
    """Records by number."""

    def __len__(self) -> int:
        """How many."""

    def __getitem__(self, index: int) -> Record:
        """Record `index`."""


class Question(NamedTuple):
    """One record as a question."""

    source: str
    """Name of its data set; ids of two may be the same."""
    id: str
    question: str
    wanted: str
    format: Format
    messages: Messages
    """With open pictures, up to the answer."""
    pictures: list[str]
    """Copies for the report, relative to the folder of the run."""


class SampleAnswers(TrainerCallback):
    """Asks and writes `samples.jsonl`: step, source, id, question, answer, wanted, pictures.

    Args:
        section: how often, how many, how long.
        records: where questions are drawn from.
        processor: of the model that trains.
        folder: of the run.
        format: how the stage renders records.
        seed: draws the records.
        sharded: weights are spread over processes, so no process can answer.
    """

    def __init__(
        self,
        section: SamplesSection,
        records: Records,
        processor: EveProcessor,
        folder: Path,
        *,
        format: Format,
        seed: int = 0,
        sharded: bool = False,
    ):
        self.section, self.records, self.processor = section, records, processor
        self.folder, self.format, self.seed, self.sharded = folder, format, seed, sharded
        self.questions: list[Question] = []
        self.show: Callable[[dict[str, str]], None] | None = None
        """Gets the answers as one text; trackers are told through it."""

    def on_train_begin(
        self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any
    ) -> None:
        """Draws the records, and takes answers out that a resumed run will give again."""
        if not state.is_world_process_zero:
            return
        if self.sharded:
            logger.warning(
                "No sample answers: weights are spread over processes, and one process cannot "
                "answer alone; take samples out of the recipe, or use devices.strategy ddp."
            )
            return
        cut_lines(self.folder / SAMPLES_FILE, behind=state.global_step)
        with undisturbed():
            self.questions = list(self._draw())
        if len(self.questions) < self.section.number:
            logger.warning(
                "%d of %d records for sample answers could be used.",
                len(self.questions),
                self.section.number,
            )

    def on_step_end(
        self,
        args: TrainingArguments,
        state: Any,
        control: Any,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        """Asks at every so many-th step, and at the last."""
        last = state.global_step == state.max_steps
        due = last or state.global_step % self.section.every == 0
        if model is None or not self.questions or not due:
            return
        answers = self._ask(model)
        entries = [
            {
                "step": state.global_step,
                "source": one.source,
                "id": one.id,
                "question": one.question,
                "answer": answer,
                "wanted": one.wanted,
                "pictures": one.pictures,
            }
            for one, answer in zip(self.questions, answers, strict=True)
        ]
        append_lines(self.folder / SAMPLES_FILE, entries)
        if self.show is not None:
            self.show({"samples": as_table(entries)})

    def _ask(self, model: nn.Module) -> list[str]:
        """Greedy answers of the model inside whatever wraps it (DDP, adapters)."""
        inner = model_inside(model)
        with undisturbed(model):
            chat = [n for n, one in enumerate(self.questions) if one.format == "chat"]
            engine = EveEngine(inner, self.processor)
            messages = [self.questions[number].messages for number in chat]
            length = self.section.max_new_tokens
            answers = dict(zip(chat, engine.generate(messages, max_new_tokens=length), strict=True))
            plain = EveEngine(inner, plain_processor(self.processor))
            for number, one in enumerate(self.questions):
                if one.format == "plain":
                    answers[number] = caption(plain, one.messages, max_new_tokens=length)
        return [answers[number] for number in range(len(self.questions))]

    def _draw(self) -> Iterator[Question]:
        """Records in the order of the seed, as many as can be used and are wanted."""
        generator = torch.Generator().manual_seed(self.seed)
        order = torch.randperm(len(self.records), generator=generator)
        wanted = self.section.number
        seen: set[tuple[str, str]] = set()  # an epoch may hold a record several times
        used = 0
        for index in order[: TRIES * wanted].tolist():
            if used == wanted:
                return
            try:
                record = self.records[index]
                if (record.source, record.id) in seen:
                    continue
                seen.add((record.source, record.id))
                one = self._question(record, used)
            except ValueError as error:
                logger.warning("not used for sample answers: %s", error)
                continue
            used += 1
            yield one

    def _question(self, record: Record, number: int) -> Question:
        """A record up to its first answer.

        Raises:
            ValueError: if it cannot be asked.
        """
        roles = [message["role"] for message in record.messages]
        if "assistant" not in roles:
            raise ValueError(f"Record {record.id!r} has no answer.")
        first, format = roles.index("assistant"), record.format or self.format
        count = sum(
            part["type"] == "image"
            for message in record.messages[:first]
            for part in parts_of(message)
        )
        images = iter([to_rgb(open_image(image)) for image in record.images[:count]])
        messages = [
            {
                "role": message["role"],
                "content": [
                    {"type": "image", "image": next(images)} if part["type"] == "image" else part
                    for part in parts_of(message)
                    # Captions follow their picture: the words of the user are not shown to it.
                    if part["type"] == "image" or format == "chat" or not count
                ],
            }
            for message in record.messages[:first]
        ]
        names: list[str] = []
        for message in messages:
            for part in parts_of(message):
                if part["type"] == "image":
                    names.append(self._keep_picture(part["image"], number, len(names)))
        question = " ".join(text_of(message).strip() for message in record.messages[:first])
        wanted = text_of(record.messages[first]).strip()
        return Question(record.source, record.id, question.strip(), wanted, format, messages, names)

    def _keep_picture(self, picture: Any, number: int, place: int) -> str:
        name = f"{PICTURES_FOLDER}/{number}_{place}.png"
        (self.folder / PICTURES_FOLDER).mkdir(parents=True, exist_ok=True)
        small = picture.copy()
        small.thumbnail((SHOWN_PIXELS, SHOWN_PIXELS))
        small.save(self.folder / name)
        return name


def plain_processor(processor: EveProcessor) -> EveProcessor:
    """A copy with the template of captions."""
    plain = copy.copy(processor)
    plain.chat_template = PLAIN.replace("image_mark", json.dumps(processor.image_token))
    return plain


@torch.no_grad()
def caption(engine: EveEngine, messages: Messages, *, max_new_tokens: int) -> str:
    """What follows pictures up to the end of the line, greedily.

    By plain forward passes: `generate` takes the last token of a prompt for a word, and here it is
    a picture's.
    """
    model, prompt = engine.model, engine.encode(messages)
    made: list[int] = []
    ids, never, ends = prompt.input_ids.unsqueeze(0), engine.never(), engine.ends()
    seen = prompt.pictures_from(0)
    cache, text = DynamicCache(), ""
    while len(made) < max_new_tokens and "\n" not in text:
        inputs = {name: one.to(model.device) for name, one in {"input_ids": ids, **seen}.items()}
        output = model(**inputs, cache=cache, use_cache=True, logits_to_keep=1)
        scores = output.logits[0, -1]
        scores[never] = -torch.inf
        token = int(scores.argmax())
        if token in ends:
            break
        made.append(token)
        text = engine.tokenizer.decode(made, skip_special_tokens=True)
        ids, seen = torch.tensor([[token]]), {}
    return text.split("\n")[0].strip()


def model_inside(model: nn.Module) -> EveForConditionalGeneration:
    """The model inside whatever wraps it (DDP, adapters)."""
    return next(
        module for module in model.modules() if isinstance(module, EveForConditionalGeneration)
    )


@contextmanager
def undisturbed(model: nn.Module | None = None) -> Iterator[None]:
    """Puts the modes of all modules and all random states back at the end."""
    modes = [] if model is None else [(module, module.training) for module in model.modules()]
    python, arrays = random.getstate(), np.random.get_state()
    devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        for module, training in modes:
            module.training = training
        random.setstate(python)
        np.random.set_state(arrays)


def held_out(sources: Sequence[SourceSection]) -> list[SourceSection]:
    """What a recipe's sources leave out: the other side of a slice, held-out scenes; often nothing.

    >>> from eve_vlm.train.sections import SourceSection
    >>> cut = SourceSection(kind="llava", path="data.json", split="[:95%]", repeat=2.0)
    >>> [(source.split, source.repeat) for source in held_out([cut])]
    [('[95%:]', 1.0)]
    """
    left = []
    for source in sources:
        if source.kind in MADE and source.options.get("split", "train") == "train":
            left.append(replace(source, options={**source.options, "split": "held_out"}))
        elif found := SLICE.fullmatch(source.split or ""):
            name, first, last = found["name"], found["first"], found["last"]
            if bool(first) != bool(last):  # the other side of one cut
                split = f"{name}[{last}:]" if last else f"{name}[:{first}]"
                left.append(replace(source, split=split))
    return [replace(source, repeat=1.0, weight=None) for source in left]


def as_table(entries: Sequence[dict[str, Any]]) -> str:
    """Answers as a Markdown table, which trackers show."""
    rows = [[entry["id"], entry["question"], entry["answer"], entry["wanted"]] for entry in entries]
    lines = [["record", "question", "answer", "wanted"], ["---"] * 4, *rows]
    return "\n".join(
        "| " + " | ".join(re.sub(r"\s+", " ", cell).replace("|", "\\|") for cell in line) + " |"
        for line in lines
    )


__all__ = [
    "SAMPLES_FILE",
    "Records",
    "SampleAnswers",
    "as_table",
    "caption",
    "held_out",
    "model_inside",
    "plain_processor",
    "undisturbed",
]
