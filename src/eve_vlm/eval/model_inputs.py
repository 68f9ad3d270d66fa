"""Conversations as what another model's `generate` takes: one padded batch.

The chat template writes the words, the library's processor adds pictures and padding.  Easy to get
wrong: where the template writes the start token the tokenizer must not write it again, and a
processor takes a batch in which all conversations have pictures, or none has.
"""

import inspect
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any

import torch
from transformers import BatchFeature, PreTrainedModel, ProcessorMixin

from eve_vlm.errors import first_line
from eve_vlm.serve.messages import Messages, Prompt, picture_parts, pictures_of, rendered

from .model_care import CARE, Care
from .model_files import chat_template_of


class ModelInputs:
    """Makes the inputs of one model.

    Args:
        processor: gets the chat template of `CARE` where it has none, and padding on the left.
        pad: what to pad with where the tokenizer does not say.

    Raises:
        ValueError: if there is no chat template.
    """

    def __init__(self, model: PreTrainedModel, processor: ProcessorMixin, *, pad: int):
        self._model, self._processor, self._words = model, processor, processor.tokenizer
        self._care = CARE.get(model.config.model_type, Care())
        self._care.mend(processor)
        known = inspect.signature(type(processor).__call__).parameters
        self._options = {name: value for name, value in self._care.options.items() if name in known}
        self._taken = set(inspect.signature(model.forward).parameters)
        name = model.name_or_path or type(model).__name__
        self._template = chat_template_of(processor, self._care, name)
        processor.chat_template = self._template
        settings = model.config.to_dict()
        self._placeholder = settings.get("image_token_id", settings.get("image_token_index"))
        self._words.padding_side = "left"
        if self._words.pad_token_id is None:
            self._words.pad_token_id = pad

    def encode(self, conversations: Sequence[Messages], max_new_tokens: int) -> BatchFeature:
        """What `generate` takes; `input_ids` and `attention_mask` are (B, T).

        Raises:
            ValueError: if a picture cannot be read, or the model does not take a conversation.
        """
        pictures = [pictures_of(messages) for messages in conversations]
        count, most = max(map(len, pictures)), self._care.most_pictures
        if most is not None and count > most:
            raise ValueError(
                f"The conversation has {count} pictures, but {type(self._model).__name__} takes "
                f"{most}; ask about fewer."
            )
        given = [in_parts(messages) for messages in conversations]
        self._check_marks(given)
        texts = [rendered(messages, self._words, self._template) for messages in given]
        inputs = self._encoded(texts, pictures)
        length = inputs["input_ids"].shape[1]
        limit = self._model.config.get_text_config().to_dict().get("max_position_embeddings")
        if limit is not None and length + max_new_tokens > limit:
            raise ValueError(
                f"The prompt takes {length} tokens and the answer up to {max_new_tokens}, but "
                f"the model takes {limit} in all; shorten the question or give fewer pictures."
            )
        return inputs.to(self._model.device, dtype=self._model.dtype)

    def prompt(self, ids: torch.Tensor) -> Prompt:
        """One unpadded prompt, for its lengths; runs of the placeholder are its pictures."""
        spans, at = [], 0
        for token, run in groupby(ids.tolist()):
            length = len(list(run))
            if token == self._placeholder:
                spans.append((at, at + length))
            at += length
        return Prompt(ids.cpu(), None, None, tuple(spans))

    def _check_marks(self, conversations: Sequence[Messages]) -> None:
        """An image mark among the words would be taken for a picture; 5.17 breaks off at it."""
        if self._placeholder is None:
            return
        mark = self._words.convert_ids_to_tokens(self._placeholder)
        parts = [part for messages in conversations for one in messages for part in one["content"]]
        if any(mark in part["text"] for part in parts if part["type"] == "text"):
            raise ValueError(
                f"A text of the conversation holds {mark}, which stands for a picture in this "
                "model; take it out."
            )

    def _encoded(self, texts: list[str], pictures: list[list[Any]]) -> BatchFeature:
        if not any(pictures) and self._care.around_words is not None:
            return self._words_alone(texts, *self._care.around_words)
        start = self._words.bos_token
        begun = start is not None and texts[0].startswith(start)
        try:
            inputs = self._processor(
                text=texts,
                images=pictures if any(pictures) else None,
                padding=True,
                add_special_tokens=not begun,
                return_tensors="pt",
                **self._options,
            )
        except ValueError as error:
            raise ValueError(
                f"{type(self._processor).__name__} does not take this conversation "
                f"({first_line(error)}); change its words or its pictures."
            ) from None
        if "token_type_ids" not in self._taken:  # plain tokenizers make them for everybody
            inputs.pop("token_type_ids", None)
        return inputs

    def _words_alone(self, texts: list[str], before: str, behind: str) -> BatchFeature:
        first, last = self._words.convert_tokens_to_ids([before, behind])
        rows = [
            [first, *self._words(text, add_special_tokens=False)["input_ids"], last]
            for text in texts
        ]
        return BatchFeature(self._words.pad({"input_ids": rows}, return_tensors="pt").data)


def together(conversations: Sequence[Messages], size: int) -> Iterator[list[int]]:
    """Places of conversations that one call of a processor takes: all with pictures, or none."""
    for pictures in (True, False):
        places = [n for n, one in enumerate(conversations) if bool(picture_parts(one)) is pictures]
        for first in range(0, len(places), size):
            yield places[first : first + size]


def in_parts(messages: Messages) -> Messages:
    """Contents as lists: many templates of other models leave out, or spell out, plain texts."""
    return [
        {**message, "content": [{"type": "text", "text": message["content"]}]}
        if isinstance(message["content"], str)
        else message
        for message in messages
    ]


__all__ = ["ModelInputs", "in_parts", "together"]
