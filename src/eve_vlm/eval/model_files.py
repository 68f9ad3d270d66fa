"""What is read of another model before its weights: where it is, its kind, its processor, its hash.

Each refusal is one sentence that says what to fetch, install or write.  Easy to get wrong: the
library gives a bare tokenizer where a folder has no processor, and a model of words alone loads as
happily as one that sees.
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoProcessor,
    PreTrainedConfig,
    PreTrainedModel,
    ProcessorMixin,
)

from eve_vlm.configuration_eve import EveConfig
from eve_vlm.errors import first_line
from eve_vlm.loading import find_model
from eve_vlm.lora_folder import is_lora
from eve_vlm.published_eve import is_published

from .model_care import Care

CONFIG = "config.json"
SAMPLES = 16  # values of each weight that the hash is made of
COVERED = f"name, shape, type and {SAMPLES} evenly spaced values of every weight, as loaded"


def find_or_say_how(name_or_folder: str | Path) -> Path:
    """The model's folder, downloaded where it is a Hub id.

    Raises:
        ValueError: if there is none, with the command that fetches a Hub id elsewhere.
    """
    try:
        return find_model(name_or_folder)
    except ValueError as error:
        parts = Path(name_or_folder).parts
        if len(parts) != 2 or str(name_or_folder).startswith((".", "/", "~")):
            raise
        raise ValueError(
            f"{str(error).rstrip('.')}, and `hf download {name_or_folder} --local-dir {parts[1]}` "
            "makes such a folder where there is one."
        ) from None


def is_eve(folder: Path) -> bool:
    """Whether the folder is for `EveEngine`: ours, published, LoRA; or empty, which it refuses."""
    file = folder / CONFIG
    if is_lora(folder) or not file.is_file():
        return True
    try:
        settings, _ = EveConfig.get_config_dict(folder)
    except (OSError, ValueError):
        return True  # its loader says what is wrong with the file
    kind = settings.get("model_type", "")
    return kind == EveConfig.model_type or kind == "eve-qwen2" or is_published(settings)


def read_config(folder: Path, name: str | Path) -> PreTrainedConfig:
    """The configuration of a model that takes pictures and words, and is no EVE model.

    Raises:
        ValueError: if it is of another kind, or the library does not know it.
    """
    if is_eve(folder):
        raise ValueError(f"{name} is an EVE model; load it with EveEngine.from_pretrained.")
    try:
        config = AutoConfig.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"The kind of model in {name} is none that the installed transformers knows "
            f"({first_line(error)}); code that comes with a model is not run here, so take one "
            "that the library has a class for."
        ) from None
    if type(config) not in AutoModelForImageTextToText._model_mapping:
        raise ValueError(
            f"{name} holds a model of type {config.model_type!r}, which is not asked with words "
            "and pictures (no image-text-to-text class of transformers); name one that is."
        )
    return config


def read_processor(folder: Path, name: str | Path) -> ProcessorMixin:
    """The processor of a model folder.

    Raises:
        ValueError: if there is none, or it needs a package that is not installed.
    """
    try:
        processor = AutoProcessor.from_pretrained(folder)
    except ImportError as error:
        raise ValueError(
            f"The processor of {name} needs a package that is not installed ({first_line(error)});"
            " install it, torchvision in the version that belongs to the installed torch."
        ) from None
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(
            f"{name} holds no processor that can be read ({first_line(error)}); install "
            "what it names, or copy all files that came with the model."
        ) from None
    if not isinstance(processor, ProcessorMixin):
        raise ValueError(
            f"{name} holds no processor of pictures (no preprocessor_config.json); copy all files "
            "that came with the model."
        )
    return processor


def chat_template_of(processor: ProcessorMixin, care: Care, name: str) -> str:
    """The template that conversations are written with.

    Raises:
        ValueError: if there is none.
    """
    given = processor.chat_template or care.chat_template or processor.tokenizer.chat_template
    template = given.get("default") if isinstance(given, Mapping) else given
    if not template:
        raise ValueError(
            f"{name} has no chat template, so nobody knows how it is asked; write the one of its "
            "Hub page into the folder as chat_template.jinja."
        )
    return template


def facts_of(model: PreTrainedModel) -> dict[str, Any]:
    """What tells one loaded model from another; plain JSON.

    `commit` is that of the Hub repository that the weights were read from (of a LoRA's base);
    `weights_sha256` covers what `COVERED` says: an answer of a second, which differs between two
    training states, number types and quantizations, and may miss a change in a few single values.
    """
    place = Path(model.name_or_path)
    device = model.device
    return {
        "class": type(model).__name__,
        "model_type": model.config.model_type,
        "parameters": model.num_parameters(),
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "commit": place.name if place.parent.name == "snapshots" else None,
        "weights_sha256": weights_sha256(model),
        "weights_sha256_covers": COVERED,
    }


@torch.no_grad()
def weights_sha256(model: torch.nn.Module) -> str:
    """See `COVERED`."""
    digest = hashlib.sha256()
    for name, weight in sorted(model.named_parameters()):
        digest.update(f"{name} {tuple(weight.shape)} {weight.dtype}".encode())
        # torchao's 8-bit type has no slices of its own.
        plain = weight if type(weight.data) is torch.Tensor else weight.dequantize()
        values = plain.flatten()
        some = values[:: max(len(values) // SAMPLES, 1)][:SAMPLES].cpu().contiguous()
        digest.update(some.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


__all__ = [
    "COVERED",
    "chat_template_of",
    "facts_of",
    "find_or_say_how",
    "is_eve",
    "read_config",
    "read_processor",
    "weights_sha256",
]
