"""Frozen vision models with one feature per patch: reads, loads and asks them.

The teacher of training and the encoder of a twin (`encoder_twin_eve.py`) both come from here.  Any
Hugging Face vision model that cuts pictures into patches will do (CLIP, SigLIP, DINOv2, ...), and
EfficientNet-Lite0 from its package.  Easy to get wrong: class and register tokens stand before the
patches, and how many there are differs from model to model.
"""

import inspect
from typing import NamedTuple

import torch
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.image_processing_base import ImageProcessingMixin

from eve_vlm.efficientnet_lite import EfficientNetLite0, lite0_config, load_efficientnet_lite0
from eve_vlm.errors import check_loaded, first_line

EFFICIENTNET = "efficientnet-lite0"


class EncoderFacts(NamedTuple):
    """What is known of a vision model before its weights are read."""

    name: str
    layer: int
    """Which hidden state; for EfficientNet -1, -2, -3 are strides 32, 16, 8."""
    config: PreTrainedConfig
    """Its sizes; `patch_size` pixels become one feature of width `hidden_size`."""
    mean: tuple[float, ...]
    """What is taken from the pixels, which lie between 0 and 1."""
    std: tuple[float, ...]
    """What they are then divided by."""


def read_encoder(name: str, layer: int, *, role: str, key: str) -> EncoderFacts:
    """Reads what a vision model looks like.

    Args:
        name: `efficientnet-lite0`, or a Hugging Face vision model, folder or name.
        layer: see `EncoderFacts`.
        role: what it is for, "teacher" say, in errors.
        key: the section of a recipe that names it, in errors.

    Raises:
        ValueError: if it cannot be read, has no patches or no such layer.
    """
    if name == EFFICIENTNET:
        # The weights were trained on (value - 127) / 128 (measured: daisy 0.36 against 0.13).
        mean, std = (127 / 255,) * 3, (128 / 255,) * 3
        return EncoderFacts(name, layer, lite0_config(layer, key=key), mean, std)
    try:
        config = AutoConfig.from_pretrained(name)
        vision = _vision_config(name, config, role)
        settings, _ = ImageProcessingMixin.get_image_processor_dict(name)
    except OSError as error:
        raise _not_loaded(name, error, role, key) from None
    if not -vision.num_hidden_layers - 1 <= layer <= vision.num_hidden_layers:
        raise ValueError(
            f"{key}.layer is {layer} but the {role} {name!r} has "
            f"{vision.num_hidden_layers} layers; give one of them, such as -2."
        )
    return EncoderFacts(
        name, layer, vision, tuple(settings["image_mean"]), tuple(settings["image_std"])
    )


def load_encoder(facts: EncoderFacts, *, role: str, key: str) -> PreTrainedModel:
    """The model in float32, frozen and in eval mode; arguments as `read_encoder` has them.

    Raises:
        ValueError: if its weights cannot be read or are not whole.
    """
    if facts.name == EFFICIENTNET:
        return load_efficientnet_lite0(facts.layer).requires_grad_(False).eval()
    try:
        model, report = AutoModel.from_pretrained(
            facts.name, config=facts.config, dtype=torch.float32, output_loading_info=True
        )
    except OSError as error:
        raise _not_loaded(facts.name, error, role, key) from None
    # Surplus are the words of a model of both; a pooling head may be missing, and is not asked.
    check_loaded(facts.name, report["missing_keys"], (), allowed=(r".*\b(pooler|head)\.",))
    return model.requires_grad_(False).eval()


def patch_features(model: PreTrainedModel, pixels: torch.Tensor, layer: int) -> torch.Tensor:
    """Features of every patch in reading order: (I, 3, h, w) to (I, cells, width).

    Pictures of another size than the model was trained on get its positions stretched to theirs.
    """
    if isinstance(model, EfficientNetLite0):
        return model(pixels).flatten(2).transpose(1, 2)
    patch = model.config.patch_size
    cells = (pixels.shape[2] // patch) * (pixels.shape[3] // patch)
    stretches = "interpolate_pos_encoding" in inspect.signature(type(model).forward).parameters
    stretched = {"interpolate_pos_encoding": True} if stretches else {}  # DINOv2 always does
    states = model(pixels, output_hidden_states=True, **stretched).hidden_states[layer]
    return states[:, states.shape[1] - cells :]


def _not_loaded(name: str, error: OSError, role: str, key: str) -> ValueError:
    return ValueError(
        f"The {role} {name!r} cannot be loaded ({first_line(error)}); give a Hugging Face vision "
        f"model's folder or name, or {EFFICIENTNET!r}, or set {key} to null."
    )


def _vision_config(name: str, config: PreTrainedConfig, role: str) -> PreTrainedConfig:
    """The vision part of a model's configuration, checked to be one that cuts into patches."""
    composite = {"text_config", "vision_config"} <= config.sub_configs.keys()
    vision = config.vision_config if composite else config
    lacking = {"patch_size", "image_size", "num_hidden_layers"} - vision.to_dict().keys()
    if lacking:
        raise ValueError(
            f"The {role} {name!r} is a {config.model_type!r} model without {min(lacking)}; give a "
            f"vision model such as CLIP, SigLIP or DINOv2, or {EFFICIENTNET!r}."
        )
    return vision


__all__ = ["EFFICIENTNET", "EncoderFacts", "load_encoder", "patch_features", "read_encoder"]
