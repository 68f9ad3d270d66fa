"""What single classes of other models need beyond the library's common calls: one table.

A model that is not listed is asked as the library's own examples do: its chat template, its
processor, padding on the left.  Easy to get wrong: Fuyu's processor puts one picture in front of
the words, and start and answer marks around them, by itself, but only where there is a picture.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch


def _nothing(processor: Any) -> None:
    """A processor that is right as it is."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Care:
    """The peculiarities of one class."""

    chat_template: str | None = None
    """Used where the processor has none."""
    most_pictures: int | None = None
    """Pictures in a conversation at most; None means as many as fit."""
    around_words: tuple[str, str] | None = None
    """Tokens around a prompt without pictures, where the processor puts them around others only."""
    options: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    """Of the processor's call; those that the installed version has not are left out."""
    mend: Callable[[Any], None] = _nothing
    """Puts right what is wrong in the installed version of the processor."""


def mend_fuyu_patches(processor: Any) -> None:
    """Without torchvision the processor of 5.23 gives tensors to a function for arrays, and fails.

    The patches are those of the library's torchvision variant: row by row, each patch by its rows
    and columns with the colours last.
    """
    from transformers.models.fuyu.image_processing_pil_fuyu import FuyuImageProcessorPil

    if isinstance(processor.image_processor, FuyuImageProcessorPil):
        processor.image_processor.patchify_image = _patches


def _patches(image: torch.Tensor, patch_size: Any) -> torch.Tensor:
    """([1,] colours, height, width) to (1, patches, height * width * colours of a patch)."""
    colours, height, width = image.shape[-3:]
    rows, cols = height // patch_size.height, width // patch_size.width
    image = torch.as_tensor(image).reshape(colours, rows, patch_size.height, cols, patch_size.width)
    return image.permute(1, 3, 2, 4, 0).reshape(1, rows * cols, -1)


# The form of adept/fuyu-8b's own page: the words, a line break, and the answer behind a mark.
FUYU_TEMPLATE = """
{%- for message in messages %}
    {%- if message['role'] == 'assistant' and not loop.last %}
        {{- raise_exception('Fuyu answers one question and takes no earlier answers') }}
    {%- endif %}
    {%- if message['role'] == 'assistant' %}{{- ' ' }}{% endif %}
    {%- for part in message['content'] if part['type'] == 'text' %}{{- part['text'] }}{% endfor %}
    {%- if message['role'] != 'assistant' %}{{- '\\n' }}{% endif %}
{%- endfor %}
"""

# By `model_type`.
CARE: Mapping[str, Care] = {
    "fuyu": Care(
        chat_template=FUYU_TEMPLATE,
        most_pictures=1,
        around_words=("<s>", "<0x04>"),
        options={"return_legacy_image_output": False},  # else a name that is going away
        mend=mend_fuyu_patches,
    ),
}

__all__ = ["CARE", "FUYU_TEMPLATE", "Care", "mend_fuyu_patches"]
