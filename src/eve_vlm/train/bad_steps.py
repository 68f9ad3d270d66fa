"""The folder that a bad step leaves: its micro-batches, whose records they were, what was seen.

`bad_steps/step-N-rank-R/` below the output folder holds `batch.safetensors` with every tensor of
every micro-batch of that process, and `records.json`: ids, data sets, losses, gradient norms,
learning rates and the text, cut into what is masked and what is learnt.  Easy to get wrong: numbers
that are none are written as words ("nan"), because JSON has no such numbers.
"""

import json
import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from eve_vlm.data.encode import IGNORED
from eve_vlm.output_folder import new_folder

FOLDER, BATCH_FILE, RECORDS_FILE = "bad_steps", "batch.safetensors", "records.json"
REPEATED = 4  # as many equal tokens are written as one with their number, as a picture's are


@dataclass(frozen=True, kw_only=True, slots=True)
class BadStep:
    """A step that was written to disk."""

    batches: list[dict[str, torch.Tensor]]
    """The tensors of every micro-batch, as the model got them; the teacher's view is with them."""
    records: dict[str, Any]
    """What `records.json` says."""


def step_folder(output_dir: Path, step: int, rank: int) -> Path:
    """Where a process puts a bad step."""
    return output_dir / FOLDER / f"step-{step}-rank-{rank}"


def write_bad_step(
    folder: Path,
    batches: Sequence[dict[str, Any]],
    about: dict[str, Any],
    *,
    losses: Sequence[float],
    decode: Callable[[list[int]], str] | None = None,
) -> None:
    """Writes micro-batches as the collator made them; a folder of the same step is replaced.

    Args:
        folder: see `step_folder`.
        batches: tensors, and the lists `record_ids` and `source_names` where they are there.
        about: what is known of the step as a whole.
        losses: of each micro-batch, as far as they were computed.
        decode: makes text of token ids; without it only the tensors say what was read.
    """
    tensors = {
        f"{number}.{name}": value.detach().cpu().contiguous().clone()
        for number, batch in enumerate(batches)
        for name, value in batch.items()
        if isinstance(value, torch.Tensor)
    }
    micro_batches = [
        {
            "record_ids": batch.get("record_ids", []),
            "source_names": batch.get("source_names", []),
            "loss": losses[number] if number < len(losses) else None,
            "labels": int((batch["labels"] != IGNORED).sum()),
            "text": _texts(batch, decode) if decode else [],
        }
        for number, batch in enumerate(batches)
    ]
    shutil.rmtree(folder, ignore_errors=True)
    with new_folder(folder) as beside:
        save_file(tensors, beside / BATCH_FILE)
        text = json.dumps(
            _in_words({**about, "micro_batches": micro_batches}),
            indent=1,
            ensure_ascii=False,
            allow_nan=False,
        )
        (beside / RECORDS_FILE).write_text(text + "\n", encoding="utf-8")


def load_bad_step(folder: str | Path) -> BadStep:
    """The tensors and records of a bad step, to run it again.

    Raises:
        ValueError: if the folder holds none.

    Example:
        step = load_bad_step("runs/mine/bad_steps/step-812-rank-0")
        batch = step.batches[0]
        model(**{name: batch[name] for name in batch if not name.startswith("teacher_")})["loss"]
    """
    folder = Path(folder)
    for name in (BATCH_FILE, RECORDS_FILE):
        if not (folder / name).is_file():
            raise ValueError(
                f"{folder} holds no {name}, so it is not a bad step; name a folder such as "
                f"RUN/{FOLDER}/step-N-rank-R."
            )
    records = json.loads((folder / RECORDS_FILE).read_text(encoding="utf-8"))
    batches: list[dict[str, torch.Tensor]] = [{} for _ in records["micro_batches"]]
    for name, value in load_file(folder / BATCH_FILE).items():
        number, _, key = name.partition(".")
        batches[int(number)][key] = value
    return BadStep(batches=batches, records=records)


def _texts(batch: dict[str, Any], decode: Callable[[list[int]], str]) -> list[list[list[str]]]:
    """For each row its pieces, as ["masked", text] and ["learnt", text] in turn."""
    rows = []
    for ids, labels in zip(batch["input_ids"].tolist(), batch["labels"].tolist(), strict=True):
        pairs = zip(ids, labels, strict=True)
        pieces = []
        for masked, piece in groupby(pairs, key=lambda pair: pair[1] == IGNORED):
            text = _text([token for token, _ in piece], decode)
            pieces.append(["masked" if masked else "learnt", text])
        rows.append(pieces)
    return rows


def _text(ids: list[int], decode: Callable[[list[int]], str]) -> str:
    """Text of tokens, in which many equal ones are written once: `<image>*21`."""
    texts, pending = [], []
    for token, run in groupby(ids):
        number = len(list(run))
        if number < REPEATED:
            pending += [token] * number
            continue
        texts += [decode(pending), f"{decode([token])}*{number}"]
        pending = []
    return "".join([*texts, decode(pending)])


def _in_words(value: Any) -> Any:
    """The same with words for numbers that JSON lacks."""
    if isinstance(value, dict):
        return {key: _in_words(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_in_words(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


__all__ = ["BadStep", "load_bad_step", "step_folder", "write_bad_step"]
