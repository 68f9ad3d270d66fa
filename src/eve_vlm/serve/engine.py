"""The engine: conversations with pictures in, answers out.  The only caller of `model.generate`.

Easy to get wrong: a batch of prompts is padded on the left; with padding on the right shorter
prompts get wrong or empty answers (LLaVA#754), which is why no caller pads by itself.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image

from eve_vlm.image_processing_eve import num_image_tokens, to_rgb
from eve_vlm.loading import load
from eve_vlm.modeling_eve import EveForConditionalGeneration
from eve_vlm.pictures import open_picture
from eve_vlm.processing_eve import EveProcessor


class EveEngine:
    """A loaded model that answers.

    Args:
        model: any `EveForConditionalGeneration`; it is put into eval mode.
        processor: its processor, with a chat template.
    """

    def __init__(self, model: EveForConditionalGeneration, processor: EveProcessor):
        self.model, self.processor = model.eval(), processor

    @classmethod
    def from_pretrained(
        cls, name_or_folder: str | Path, *, device: str | None = None
    ) -> "EveEngine":
        """Loads a folder or Hub id onto `device` (a GPU where there is one, else the CPU)."""
        return cls(*load(name_or_folder, device=device))

    def ask(
        self,
        question: str,
        images: Sequence[Image.Image | str | Path] = (),
        *,
        max_new_tokens: int = 128,
    ) -> str:
        """Answers one question about some pictures, or about none.

        `<image>` marks in the question say where the pictures go; without marks they go in front.

        Raises:
            ValueError: if the question is empty, or marks and pictures differ in number.
        """
        return self.generate([user_message(question, images)], max_new_tokens=max_new_tokens)[0]

    def generate(
        self,
        conversations: Sequence[list[dict]],
        *,
        max_new_tokens: int = 128,
        batch_size: int = 32,
    ) -> list[str]:
        """Answers conversations greedily, in batches.

        Args:
            conversations: Hugging Face messages; picture parts are `{"type": "image", "image":
                picture}` with an open picture or a file name.

        Returns:
            One answer per conversation, without special tokens or outer blanks.

        Raises:
            ValueError: if a picture cannot be read, or a prompt is longer than the model takes.
        """
        answers: list[str] = []
        for first in range(0, len(conversations), batch_size):
            answers += self._generate_batch(
                conversations[first : first + batch_size], max_new_tokens
            )
        return answers

    @torch.inference_mode()
    def _generate_batch(
        self, conversations: Sequence[list[dict]], max_new_tokens: int
    ) -> list[str]:
        images = [
            _open(part["image"]) for messages in conversations for part in _picture_parts(messages)
        ]
        texts = [
            self.processor.tokenizer.apply_chat_template(
                messages,
                chat_template=self.processor.chat_template,
                tokenize=False,
                add_generation_prompt=True,
            )
            for messages in conversations
        ]
        inputs = self.processor(
            text=texts,
            images=images or None,
            add_special_tokens=False,  # the chat template writes them
            padding=True,
            padding_side="left",
            return_tensors="pt",
        )
        self._check_length(conversations, inputs, max_new_tokens)
        names = ("input_ids", "attention_mask", "pixel_values", "image_grid_thw")
        given = {name: inputs[name].to(self.model.device) for name in names if name in inputs}
        output = self.model.generate(
            **given,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            pad_token_id=self.processor.tokenizer.pad_token_id,
            eos_token_id=self._ends(),
            suppress_tokens=self._never(),
        )
        new = output[:, given["input_ids"].shape[1] :]
        return [text.strip() for text in self.processor.batch_decode(new, skip_special_tokens=True)]

    def _ends(self) -> list[int] | None:
        """Every id that ends an answer: the decoder's (often several) and the tokenizer's."""
        ends = self.model.generation_config.eos_token_id
        given = [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
        own = self.processor.tokenizer.eos_token_id
        return list(dict.fromkeys([*given, *([] if own is None else [own])])) or None

    def _never(self) -> list[int]:
        """Ids that no answer holds: the image placeholder, and what the decoder leaves out."""
        ids = self.model.generation_config.suppress_tokens or []
        return list(dict.fromkeys([*ids, self.processor.image_token_id]))

    def _check_length(
        self, conversations: Sequence[list[dict]], inputs: dict, max_new_tokens: int
    ) -> None:
        limit = self.model.config.text_config.max_position_embeddings
        mask = inputs["attention_mask"].sum(1)
        longest = int(mask.max())
        if longest + max_new_tokens <= limit:
            return
        row = int(mask.argmax())
        in_pictures = int((inputs["input_ids"][row] == self.processor.image_token_id).sum())
        room = limit - max_new_tokens - (longest - in_pictures)
        images = [_open(part["image"]) for part in _picture_parts(conversations[row])]
        raise ValueError(
            f"The prompt takes {longest} tokens, {in_pictures} of them for pictures, and the "
            "answer up to "
            f"{max_new_tokens}, but the model takes {limit} in all; "
            f"{self._fitting_size(images, room)}."
        )

    def _fitting_size(self, images: list[Image.Image], room: int) -> str:
        """Advice: the largest longest_edge at which all pictures fit into `room` tokens."""
        processor = self.processor.image_processor
        unit = processor.size_multiple
        for edge in range(processor.size["longest_edge"] - unit, 0, -unit):
            grids = [
                processor.grid_of(image.height, image.width, longest_edge=edge) for image in images
            ]
            tokens = sum(num_image_tokens(grid.rows, grid.cols) for grid in grids)
            if tokens <= room:
                return (
                    f"with pictures of longest_edge {edge} (set processor.image_processor.size) "
                    "it would fit"
                )
        return "shorten the question or give fewer pictures"


def user_message(question: str, images: Sequence[Image.Image | str | Path]) -> list[dict]:
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


def _picture_parts(messages: list[dict]) -> list[dict]:
    return [
        part
        for message in messages
        if not isinstance(message["content"], str)
        for part in message["content"]
        if part["type"] == "image"
    ]


def _open(image: Image.Image | str | Path) -> Image.Image:
    return to_rgb(image) if isinstance(image, Image.Image) else open_picture(image)


__all__ = ["EveEngine", "user_message"]
