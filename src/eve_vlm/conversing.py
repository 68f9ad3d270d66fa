"""Conversations without a picture, answered by a decoder itself: what `eve data converse` writes.

Trained on beside pictures they keep the decoder's language as it was.  Prompts are those of
`data/talk_prompts.py`; answers are sampled in large batches of alike length, each batch from a seed
of its own, so that a run that was stopped goes on to the very same file.  Easy to get wrong: an
answer that reached the limit has no end, and training would teach to stop in the middle of a
sentence; it is cut behind its last whole sentence, or left out and counted.
"""

import json
import os
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from eve_vlm.assets.catalogue import asset_folder, assets
from eve_vlm.data.talk_prompts import talk_prompts
from eve_vlm.decoders.joining import end_ids, pad_with_something
from eve_vlm.decoders.loading import load_decoder, load_decoder_tokenizer
from eve_vlm.json_lines import append_lines
from eve_vlm.output_folder import written_whole

SENTENCE_END = re.compile(r"(?<=[^\W\d_])[.!?][\"')\]]*(?=\s|$)")  # not the dot of `1.`
SHORTEST = 2  # letters of an answer
ON_GPU, ON_CPU = 1024, 32  # prompts that are answered together unless told otherwise


@dataclass(frozen=True, kw_only=True, slots=True)
class ConverseSettings:
    """All that conversations depend on, beside the decoder."""

    number: int = 8000
    """Of prompts; a few answers may be left out."""
    split: Literal["train", "held_out"] = "train"
    """Topics that are talked about; those of `held_out` are for measuring."""
    seed: int = 0
    """Draws prompts and answers."""
    max_new_tokens: int = 192
    """Longest answer."""
    temperature: float = 1.0
    """0 takes the likeliest token each time.  Only at 1, drawn from all tokens, does training on
    answers ask the decoder for no change at all; below it learns to be surer than it was."""
    top_k: int = 0
    """Draws from so many of the likeliest tokens; 0: from all."""
    batch_size: int = ON_CPU
    """Prompts that are answered together."""


class Conversed(NamedTuple):
    """What was written."""

    written: int
    """Conversations in the file."""
    cut: int
    """How many of them end behind their last whole sentence, for they reached the limit."""
    left_out: int
    """Prompts whose answer had no letters, or no whole sentence before the limit."""


class Speaker(NamedTuple):
    """A decoder that is ready to answer."""

    decoder: PreTrainedModel
    """On its device, in the type in which it computes."""
    tokenizer: PreTrainedTokenizerBase
    """Its own."""
    batch_size: int
    """Prompts that it answers together unless told otherwise."""


class _State(NamedTuple):
    batches: int
    size: int
    """Bytes of the file behind the last whole batch."""
    written: int
    cut: int
    left_out: int


def load_speaker(
    name: str | Path, *, device: str | None = None, dtype: torch.dtype | None = None
) -> Speaker:
    """Loads a decoder to talk to.

    Args:
        name: an asset, or a folder, GGUF file or Hub id.
        device: None takes the GPU where there is one.
        dtype: None takes bfloat16 on a GPU, else float32.

    Raises:
        ValueError: if it is not there or cannot be read.
    """
    place = device or ("cuda" if torch.cuda.is_available() else "cpu")
    gpu = place.startswith("cuda")
    folder = asset_folder(str(name)) if name in assets() else name
    tokenizer = load_decoder_tokenizer(folder)
    kind = dtype or (torch.bfloat16 if gpu else torch.float32)
    decoder = load_decoder(folder, dtype=kind).model.to(place)
    return Speaker(decoder, tokenizer, ON_GPU if gpu else ON_CPU)


def converse(
    decoder: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    file: str | Path,
    settings: ConverseSettings,
    *,
    name: str,
    progress: Callable[[int], object] = lambda prompts: None,
) -> Conversed:
    """Answers prompts with a decoder, as JSON Lines of the kind `messages`; goes on where it was.

    Beside the file stands `FILE.made.json`: what made it, and how far it is.

    Args:
        decoder: a language model on its device, in the type in which it is to compute.
        tokenizer: its own, with a chat template.
        file: what is written.
        settings: what is asked and how answers are drawn.
        name: of the decoder, for the note and messages.
        progress: told how many prompts more are answered.

    Raises:
        ValueError: if the tokenizer has no chat template, the settings cannot be, or the file was
            made in another way.
    """
    file = Path(file)
    _check(settings, tokenizer, name)
    made = _what_makes(decoder, settings, name)
    prompts = talk_prompts(settings.number, split=settings.split, seed=settings.seed)
    pad_with_something(tokenizer)
    encoded = _encoded(prompts, tokenizer)
    # The longest first: what does not fit into memory shows at once.
    order = sorted(range(len(prompts)), key=lambda place: (-len(encoded[place]), place))
    batches = [
        order[first : first + settings.batch_size]
        for first in range(0, len(order), settings.batch_size)
    ]
    state = _resumed(file, made)
    progress(min(state.batches * settings.batch_size, len(prompts)))
    for number in range(state.batches, len(batches)):
        places = batches[number]
        answers = _answers(
            decoder, tokenizer, [encoded[place] for place in places], settings, batch=number
        )
        entries, cut = [], 0
        for place, (text, ended) in zip(places, answers, strict=True):
            kept = _whole(text, ended=ended)
            if len(kept) >= SHORTEST:
                entries.append(_entry(place, settings, prompts[place], kept))
                cut += not ended
        append_lines(file, entries)
        state = _State(
            number + 1,
            file.stat().st_size,
            state.written + len(entries),
            state.cut + cut,
            state.left_out + len(places) - len(entries),
        )
        _note(file, made, state)
        progress(len(places))
    return Conversed(state.written, state.cut, state.left_out)


def _check(settings: ConverseSettings, tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    if not tokenizer.chat_template:
        raise ValueError(
            f"The tokenizer of {name} has no chat template, so it cannot be talked to; take a "
            "decoder that was trained on conversations."
        )
    least = {"max_new_tokens": 1, "batch_size": 1, "top_k": 0, "temperature": 0}
    for field, low in least.items():
        if getattr(settings, field) < low:
            raise ValueError(f"{field} is {getattr(settings, field)}; give at least {low}.")


def _what_makes(decoder: PreTrainedModel, settings: ConverseSettings, name: str) -> dict[str, Any]:
    return {
        "decoder": name,
        "dtype": str(decoder.dtype).removeprefix("torch."),
        "device": decoder.device.type,
        "torch": torch.__version__,
        "transformers": version("transformers"),
        **asdict(settings),
    }


def _encoded(prompts: list[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    texts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
        )
        for prompt in prompts
    ]
    ids: list[list[int]] = tokenizer(texts, add_special_tokens=False)["input_ids"]
    return ids


@torch.inference_mode()
def _answers(
    decoder: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[list[int]],
    settings: ConverseSettings,
    *,
    batch: int,
) -> list[tuple[str, bool]]:
    """The answer to each prompt, and whether it came to an end."""
    longest = max(map(len, prompts))
    pad = int(tokenizer.pad_token_id)
    rows = [[pad] * (longest - len(ids)) + ids for ids in prompts]
    seen = [[0] * (longest - len(ids)) + [1] * len(ids) for ids in prompts]
    ends = list(dict.fromkeys([*end_ids(decoder.generation_config), int(tokenizer.eos_token_id)]))
    drawn: dict[str, Any] = {"do_sample": False, "temperature": None, "top_k": None}
    if settings.temperature:
        drawn = {
            "do_sample": True,
            "temperature": settings.temperature,
            "top_k": settings.top_k,
        }
    devices = [decoder.device] if decoder.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(settings.seed * 1_000_003 + batch)
        said = decoder.generate(
            torch.tensor(rows, device=decoder.device),
            attention_mask=torch.tensor(seen, device=decoder.device),
            max_new_tokens=settings.max_new_tokens,
            eos_token_id=ends,
            pad_token_id=pad,
            top_p=None,
            **drawn,
        )
    answers = []
    for ids in said[:, longest:].tolist():
        end = next((place for place, one in enumerate(ids) if one in ends), len(ids))
        answers.append((tokenizer.decode(ids[:end], skip_special_tokens=True), end < len(ids)))
    return answers


def _whole(text: str, *, ended: bool) -> str:
    """An answer without blanks around it; one that did not end, up to its last whole sentence."""
    if not ended:
        text = text[: max((found.end() for found in SENTENCE_END.finditer(text)), default=0)]
    return text.strip()


def _entry(place: int, settings: ConverseSettings, prompt: str, answer: str) -> dict[str, Any]:
    return {
        "id": f"talk-{settings.split}-{settings.seed}-{place}",
        "messages": [
            {"role": "user", "content": prompt},
            {"role": "assistant", "content": answer},
        ],
    }


# --- how far it is --------------------------------------------------------------------------------


def _note_file(file: Path) -> Path:
    return file.with_name(f"{file.name}.made.json")


def _note(file: Path, made: dict[str, Any], state: _State) -> None:
    with written_whole(_note_file(file)) as part:
        text = json.dumps({"made": made, "state": state._asdict()}, indent=1, ensure_ascii=False)
        part.write_text(text + "\n", encoding="utf-8")


def _resumed(file: Path, made: dict[str, Any]) -> _State:
    """How far an earlier run came; what it left behind its last whole batch is cut off."""
    note = _note_file(file)
    if note.is_file():
        found = json.loads(note.read_text(encoding="utf-8"))
        other = [key for key in made if found["made"].get(key) != made[key]]
        if other:
            raise ValueError(
                f"{file} was begun with another {', '.join(other)} "
                f"({found['made'].get(other[0])!r}, now {made[other[0]]!r}); name another file, "
                f"or remove it and {note.name}."
            )
        state = _State(**found["state"])
        if not file.is_file() or file.stat().st_size < state.size:
            raise ValueError(f"{file} is shorter than {note.name} says; remove both.")
        os.truncate(file, state.size)
        return state
    if file.exists():
        raise ValueError(f"{file} is there, without {note.name}; name another file or remove it.")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.touch()
    _note(file, made, state := _State(0, 0, 0, 0, 0))
    return state


__all__ = [
    "ON_CPU",
    "ON_GPU",
    "ConverseSettings",
    "Conversed",
    "Speaker",
    "converse",
    "load_speaker",
]
