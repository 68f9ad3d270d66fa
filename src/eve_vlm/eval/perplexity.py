"""Whether a model still talks as its decoder did: perplexity of texts without a picture.

The same answers are scored by the model and by the one that it came from, by the same code
(`serve/scoring.py`), and the ratio comes with an interval over conversations.  The texts are
two dozen answers in plain English that were written for this file, or conversations of the kind
`messages`, as `eve data converse --split held_out` makes them.  Easy to get wrong: perplexities of
two models compare only where their tokenizers are the same, because they are for each token.
"""

import json
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import NamedTuple

import numpy as np

from eve_vlm.eval.statistics import Interval, interval
from eve_vlm.serve.engine import EveEngine
from eve_vlm.serve.messages import Messages


class Talk(NamedTuple):
    """A conversation without a picture, and the answer that is scored."""

    messages: Messages
    answer: str


class TextPerplexity(NamedTuple):
    """What the model and the one beside it make of the same texts."""

    model: Interval
    """Perplexity of a token."""
    base: Interval
    """The same of the other model."""
    worse: Interval
    """Percent by which the model's perplexity is above the other's; below 0 it is better."""
    tokens: int
    """Tokens that were scored, the one that ends an answer among them."""


def plain_english() -> list[Talk]:
    """The texts of the package."""
    path = files("eve_vlm.eval") / "plain_english.json"
    pairs = json.loads(path.read_text(encoding="utf-8"))
    return [Talk([{"role": "user", "content": asked}], answer) for asked, answer in pairs]


def read_talks(file: Path) -> list[Talk]:
    """The last answers of a file of the kind `messages`, each behind what was said before.

    Raises:
        ValueError: if a line is no conversation of plain text that ends with an answer, or there is
            none.
    """
    talks = []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            messages = json.loads(line)["messages"]
            said = [(one["role"], one["content"]) for one in messages]
        except (json.JSONDecodeError, KeyError, TypeError):
            said = []
        words = all(isinstance(content, str) for _, content in said)
        if len(said) < 2 or not words or said[-1][0] != "assistant":
            raise ValueError(
                f"{file}, line {number}: it has no messages of plain text that end with an "
                "answer; mend or remove it."
            )
        talks.append(Talk(messages[:-1], said[-1][1]))
    if not talks:
        raise ValueError(f"{file} holds no conversations; write some with `eve data converse`.")
    return talks


def text_perplexity(
    model: EveEngine, base: EveEngine, talks: Sequence[Talk], *, batch_size: int | None = None
) -> TextPerplexity:
    """Perplexity of the answers for a model, beside the model that it was before.

    Args:
        model: what was trained.
        base: with the decoder as it was, such as a folder that `eve init` made.
        talks: what is scored.
        batch_size: texts that are scored together at most.

    Raises:
        ValueError: if the two cut the texts into other tokens, or a text cannot be scored.
    """
    prompts, answers = [talk.messages for talk in talks], [talk.answer for talk in talks]
    scored = [
        one.log_likelihood(prompts, answers, batch_size=batch_size, ends=True)
        for one in (model, base)
    ]
    units = []
    for ours, theirs in zip(*scored, strict=True):
        if ours.tokens != theirs.tokens:
            raise ValueError(
                f"The model cuts an answer into {ours.tokens} tokens and the other model into "
                f"{theirs.tokens}, so their perplexities do not compare; give models of one "
                "tokenizer."
            )
        units.append({"model": -ours.total, "base": -theirs.total, "tokens": float(ours.tokens)})
    found = interval(units, _scores)
    tokens = int(sum(unit["tokens"] for unit in units))
    return TextPerplexity(found["model"], found["base"], found["worse"], tokens)


def _scores(sums: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    model, base = (np.exp(sums[name] / sums["tokens"]) for name in ("model", "base"))
    return {"model": model, "base": base, "worse": 100 * (model / base - 1)}


__all__ = ["Talk", "TextPerplexity", "plain_english", "read_talks", "text_perplexity"]
