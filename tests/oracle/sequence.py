"""Prompts and conversations to ids and labels, and pictures into the sequence, by plain lists.

One thing a reader would get wrong: the text around a picture is tokenised piece by piece, each
piece as if it began a text, so a space may appear that a single pass would not give.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

MARK = "<image>"
PLACEHOLDER = -200
IGNORED = -100
Tokenize = Callable[[str], list[int]]  # with the start token in front


def image_token_ids(prompt: str, tokenize: Tokenize, start: int) -> list[int]:
    """Ids with one placeholder per picture; the start token is kept once."""
    ids = [start]
    for index, piece in enumerate(prompt.split(MARK)):
        if index:
            ids.append(PLACEHOLDER)
        ids += tokenize(piece)[1:]
    return ids


def turns(sample: dict[str, Any]) -> list[tuple[str, str]]:
    """(speaker, words) with the picture in front of its sentence; a first answer is dropped."""
    found = []
    for turn in sample["conversations"]:
        words = turn["value"]
        if "image" in sample and MARK in words:
            words = (MARK + "\n" + words.replace(MARK, "").strip()).strip()
        found.append((turn["from"], words))
    return found[1:] if found[0][0] == "gpt" else found


def encode_chat(
    sample: dict[str, Any], system: str, tokenize: Tokenize, start: int
) -> tuple[str, list[int], list[int]]:
    """Text, ids and labels of a conversation: every answer is learnt together with its end."""
    text, spans = system + " ", []
    for speaker, words in turns(sample):
        if speaker == "human":
            text += "USER: " + words + " "
            continue
        text += "ASSISTANT:"
        first = len(image_token_ids(text, tokenize, start))
        text += " " + words + "</s>"
        spans.append((first, len(image_token_ids(text, tokenize, start))))
    ids = image_token_ids(text, tokenize, start)
    labels = [IGNORED] * len(ids)
    for first, end in spans:
        labels[first:end] = ids[first:end]
    return text, ids, labels


def encode_caption(
    sample: dict[str, Any], tokenize: Tokenize, start: int
) -> tuple[str, list[int], list[int]]:
    """Text, ids and labels of a picture and its caption; the question is not used."""
    caption = sample["conversations"][1]["value"]
    text = MARK + caption + "\n"
    ids = image_token_ids(text, tokenize, start)
    ignored = len(image_token_ids(MARK, tokenize, start))
    return text, ids, [IGNORED] * ignored + ids[ignored:]


def merge(ids: list[int], table: Tensor, pictures: list[Tensor]) -> Tensor:
    """Embeddings (T, D): each placeholder gives way to its picture's tokens, in order."""
    rows, left = [], list(pictures)
    for token in ids:
        if token == PLACEHOLDER:
            rows += list(left.pop(0))
        else:
            rows.append(table[token])
    return torch.stack(rows)


def merge_labels(ids: list[int], labels: list[int], lengths: list[int]) -> list[int]:
    """Labels of the merged sequence; nothing is learnt at a picture."""
    merged, left = [], list(lengths)
    for token, label in zip(ids, labels, strict=True):
        if token == PLACEHOLDER:
            merged += [IGNORED] * left.pop(0)
        else:
            merged.append(label)
    return merged


def language_loss(logits: list[Tensor], labels: list[list[int]]) -> Tensor:
    """Mean over all learnt next tokens of the batch, not per sample."""
    terms = []
    for scores, wanted in zip(logits, labels, strict=True):
        for position in range(len(wanted) - 1):
            if wanted[position + 1] != IGNORED:
                row = scores[position]
                terms.append(torch.logsumexp(row, dim=0) - row[wanted[position + 1]])
    return sum(terms) / len(terms)
