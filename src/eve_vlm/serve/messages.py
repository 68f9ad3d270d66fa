"""Conversations as messages, and a conversation as what the model takes: one unpadded prompt.

Messages are Hugging Face's: a role, and text or parts of text and pictures.  Easy to get wrong: a
budget for one request must not enlarge pictures that the model sees smaller anyway, nor undo a
budget that the model was trained with; `pictures_within` keeps both.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch
from jinja2 import TemplateError
from PIL import Image

from eve_vlm.errors import first_line
from eve_vlm.image_processing_eve import EveImageProcessor, num_image_tokens, to_rgb
from eve_vlm.pictures import open_picture
from eve_vlm.processing_eve import EveProcessor

Messages = list[dict[str, Any]]


@dataclass(frozen=True, eq=False)
class Prompt:
    """One conversation as the model takes it.

    input_ids: (T,) int64, one image placeholder per picture token, nothing padded.
    pixel_values: (P, 3 * p * p) float32, the patches of its pictures in order; None without any.
    image_grid_thw: (pictures, 3) int64; None without any.
    spans: (first, behind the last) position of each picture's placeholders.
    """

    input_ids: torch.Tensor
    pixel_values: torch.Tensor | None
    image_grid_thw: torch.Tensor | None
    spans: tuple[tuple[int, int], ...]

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def image_tokens(self) -> int:
        """Positions that pictures take."""
        return sum(behind - first for first, behind in self.spans)

    @cached_property
    def digests(self) -> tuple[bytes, ...]:
        """What tells one picture from another, whose placeholders are all alike."""
        if self.pixel_values is None or self.image_grid_thw is None:
            return ()
        patches = self.pixel_values.split(self.image_grid_thw.prod(-1).tolist())
        grids = self.image_grid_thw.tolist()
        return tuple(
            blake2b(bytes(str(grid), "ascii") + part.numpy().tobytes()).digest()
            for grid, part in zip(grids, patches, strict=True)
        )

    def pictures_from(self, position: int) -> dict[str, torch.Tensor]:
        """Model inputs of the pictures that begin at `position` or behind it."""
        if self.pixel_values is None or self.image_grid_thw is None:
            return {}
        seen = sum(first < position for first, _ in self.spans)
        if seen == len(self.spans):
            return {}
        rows = int(self.image_grid_thw[:seen].prod(-1).sum())
        return {
            "pixel_values": self.pixel_values[rows:],
            "image_grid_thw": self.image_grid_thw[seen:],
        }


def user_message(question: str, images: Sequence[Image.Image | str | Path]) -> Messages:
    """One user turn: pictures at the question's `<image>` marks, or in front of it.

    Raises:
        ValueError: if the question is empty, or marks and pictures differ in number.
    """
    pieces = question.split("<image>")
    if not "".join(pieces).strip():
        raise ValueError('The question is empty; ask something, such as "What is in the picture?".')
    if len(pieces) == 1:
        parts = [{"type": "image", "image": image} for image in images]
        return [{"role": "user", "content": [*parts, {"type": "text", "text": question.strip()}]}]
    if len(pieces) - 1 != len(images):
        raise ValueError(
            f"The question has {len(pieces) - 1} <image> marks but {len(images)} pictures were "
            "given; give one mark "
            "for each picture, or no marks at all."
        )
    content: list[dict] = []
    for piece, image in zip(pieces, [*images, None], strict=True):
        if piece.strip():
            content.append({"type": "text", "text": piece.strip() if not content else piece})
        if image is not None:
            content.append({"type": "image", "image": image})
    return [{"role": "user", "content": content}]


def picture_parts(messages: Messages) -> list[dict[str, Any]]:
    """The parts of all messages that are pictures, in order."""
    return [
        part
        for message in messages
        if not isinstance(message["content"], str)
        for part in message["content"]
        if part["type"] == "image"
    ]


def pictures_of(messages: Messages) -> list[Image.Image]:
    """The pictures of a conversation in order, opened, upright and in RGB.

    Raises:
        ValueError: if one cannot be read.
    """
    given = [part["image"] for part in picture_parts(messages)]
    return [to_rgb(one) if isinstance(one, Image.Image) else open_picture(one) for one in given]


def encode(
    messages: Messages,
    processor: EveProcessor,
    *,
    max_image_tokens: int | None = None,
    pictures: Sequence[Image.Image] | None = None,
) -> Prompt:
    """A conversation as a prompt that waits for the assistant's next words.

    Args:
        max_image_tokens: most tokens for each picture of this request; None leaves it to the model.
        pictures: the conversation's pictures if they are open already.

    Raises:
        ValueError: if a picture cannot be read, the budget is below the smallest picture, or the
            model's chat template refuses a message or leaves it out.
    """
    images = pictures_of(messages) if pictures is None else list(pictures)
    text = rendered(messages, processor.tokenizer, processor.chat_template)
    inputs = processor(
        text=[text],
        images=images or None,
        add_special_tokens=False,  # the chat template writes them
        return_tensors="pt",
        **(pictures_within(processor.image_processor, max_image_tokens) if images else {}),
    )
    ids, grids = inputs["input_ids"][0], inputs.get("image_grid_thw")
    return Prompt(ids, inputs.get("pixel_values"), grids, _spans(ids, grids, processor))


def rendered(messages: Messages, tokenizer: Any, chat_template: str | None) -> str:
    """A conversation as text that waits for the assistant's next words, with nothing left out.

    Raises:
        ValueError: if the chat template refuses a message or leaves it out, or a text is none.
    """
    try:
        text = tokenizer.apply_chat_template(
            messages,
            chat_template=chat_template,
            tokenize=False,
            add_generation_prompt=True,
        )
    except TemplateError as error:  # of some, that system words are not supported
        raise ValueError(
            f"The model's chat template does not take this conversation ({first_line(error)}); "
            "leave out system words, or change the order of its messages."
        ) from None
    if not text.isascii() and any("\ud800" <= letter <= "\udfff" for letter in text):
        raise ValueError(
            "The conversation has letters that are none in Unicode (lone surrogates, as bytes that "
            "are not UTF-8 become); mend its text."
        )
    _check_nothing_left_out(messages, text)
    return text


def _check_nothing_left_out(messages: Messages, text: str) -> None:
    """Some chat templates leave out what they do not know, such as a second system message."""
    for index, message in enumerate(messages):
        content = message["content"]
        parts = [{"text": content}] if isinstance(content, str) else content
        said = [part["text"].strip() for part in parts if "text" in part]
        # Earlier answers may be shortened: some templates drop what a model thought.
        if message["role"] != "assistant" and not all(words in text for words in said):
            raise ValueError(
                f"The model's chat template leaves out message {index}, of the role "
                f"{message['role']}; put its words into another message."
            )


def _spans(
    ids: torch.Tensor, grids: torch.Tensor | None, processor: EveProcessor
) -> tuple[tuple[int, int], ...]:
    """Where each picture's placeholders are; two pictures may stand side by side."""
    if grids is None:
        return ()
    places = (ids == processor.image_token_id).nonzero().flatten().tolist()
    merge, spans, used = processor.image_processor.merge_size, [], 0
    for _, rows, cols in grids.tolist():
        count = num_image_tokens(rows // merge, cols // merge)
        spans.append((places[used], places[used] + count))
        used += count
    return tuple(spans)


def pictures_within(pictures: EveImageProcessor, max_image_tokens: int | None) -> dict[str, int]:
    """Settings under which every picture is as the model would see it, or smaller to fit.

    Least and most alike mean "as large as `longest_edge` and the budget allow" (`eve_grid`), which
    is what a model without budgets of its own does.
    """
    if max_image_tokens is None:
        return {}
    own_least, own_most = pictures.min_image_tokens, pictures.max_image_tokens
    most = max_image_tokens if own_most is None else min(max_image_tokens, own_most)
    if own_least is None and own_most is None:
        return {"min_image_tokens": most, "max_image_tokens": most}
    settings = {"max_image_tokens": most}
    return settings if own_least is None else settings | {"min_image_tokens": min(own_least, most)}


def processor_within(
    pictures: EveImageProcessor, max_image_tokens: int | None
) -> EveImageProcessor:
    """A copy of the image processor under the budget of one request."""
    within = copy.copy(pictures)
    for name, value in pictures_within(pictures, max_image_tokens).items():
        setattr(within, name, value)
    return within


__all__ = [
    "Messages",
    "Prompt",
    "encode",
    "picture_parts",
    "pictures_of",
    "pictures_within",
    "processor_within",
    "rendered",
    "user_message",
]
