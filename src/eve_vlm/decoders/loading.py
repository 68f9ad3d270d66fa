"""Loads the language model that a new EVE model is made from: Hub id, folder or GGUF file.

Whatever cannot become an EVE model is refused before its weights are read: encoders,
encoder-decoders, models that have pictures or sound already, decoders that need more than embedded
words.  Easy to get wrong: the library fills weights that a checkpoint lacks with random numbers;
here that is an error.
"""

import inspect
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    MODEL_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GgufConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from eve_vlm.cache_name_eve import CACHE
from eve_vlm.checkpoint_files import list_weights
from eve_vlm.configuration_eve import EveConfig
from eve_vlm.errors import first_line
from eve_vlm.loading import find_model

# What the decoder is called with (`EveModel.forward`).
NEEDED = ("inputs_embeds", "attention_mask", "position_ids", CACHE)
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "tekken.json")
ROLES = ("bos", "eos", "unk", "pad")
TAKE = "take a decoder-only language model such as Llama, Qwen 3 or SmolLM"
UNREADABLE = (OSError, ValueError, RuntimeError, ImportError, KeyError, SafetensorError)


class DecoderPlace(NamedTuple):
    """Where a decoder lies."""

    folder: Path
    gguf: str | None
    """Name of the GGUF file in the folder that is meant; None for an ordinary folder."""

    @property
    def arguments(self) -> dict[str, Any]:
        """For the library's `from_pretrained`; code in a folder is never run."""
        return {"trust_remote_code": False} | ({"gguf_file": self.gguf} if self.gguf else {})


class LoadedDecoder(NamedTuple):
    """A language model and its own tokenizer."""

    model: PreTrainedModel
    surplus: tuple[str, ...]
    """Weights in the files that the library's class has no place for."""


def find_decoder(name: str | Path) -> DecoderPlace:
    """The folder of a decoder: a folder, a GGUF file, or a Hub id, which is downloaded.

    Raises:
        ValueError: if there is none, or the folder holds none.
    """
    path = Path(name).expanduser()
    if path.suffix.lower() == ".gguf":
        if not path.is_file():
            raise ValueError(f"There is no file {name}; name a GGUF file, a folder or a Hub id.")
        return _gguf(path)
    folder = find_model(name)
    if (folder / "config.json").is_file():
        return DecoderPlace(folder, None)
    files = sorted(folder.glob("*.gguf"))
    if len(files) == 1:
        return _gguf(files[0])
    if files:
        names = ", ".join(file.name for file in files)
        raise ValueError(f"{name} holds {len(files)} GGUF files ({names}); name one of them.")
    raise ValueError(
        f"{name} holds no decoder (neither config.json nor a GGUF file); name another folder."
    )


def _gguf(file: Path) -> DecoderPlace:
    return DecoderPlace(file.parent, file.name)


def read_decoder_config(name: str | Path) -> PreTrainedConfig:
    """The configuration of a decoder, checked to be one that can get a patch embedding.

    Raises:
        ValueError: if there is none, or it is of a model that cannot.
    """
    place = find_decoder(name)
    try:
        config = AutoConfig.from_pretrained(place.folder, **place.arguments)
    except UNREADABLE as error:
        raise ValueError(_unreadable("settings", name, error)) from None
    _check_kind(config, name)
    return config


def _unreadable(what: str, name: str | Path, error: Exception) -> str:
    if "trust_remote_code" in str(error):
        return (
            f"{name} brings code of its own, which is not run; {TAKE}, which the library itself "
            "knows."
        )
    return f"The {what} of {name} cannot be read ({first_line(error)}); copy or download it again."


def _check_kind(config: PreTrainedConfig, name: str | Path) -> None:
    """Refuses what is no bare decoder, by its configuration alone."""
    kind, settings = config.model_type, config.to_dict()
    other = [
        key
        for key, value in settings.items()
        if key.endswith("_config")
        and isinstance(value, dict)
        and any(sense in key for sense in ("vision", "audio", "image", "video", "speech"))
    ]
    problem = None
    if isinstance(config, EveConfig):
        raise ValueError(
            f"{name} is an EVE model already; train it with model.init_from, or name a language "
            "model."
        )
    if config.is_encoder_decoder:
        problem = f"an encoder-decoder ({kind})"
    elif other or type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        problem = f"multimodal already ({kind})"
    elif type(config) in MODEL_FOR_MASKED_LM_MAPPING:
        problem = f"an encoder ({kind}), which reads a text from both sides"
    elif type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING or type(config) not in MODEL_MAPPING:
        problem = f"a {kind} model, which is no language model"
    if problem is not None:
        raise ValueError(f"{name} is {problem}; {TAKE}.")
    if settings.get("quantization_config"):
        method = dict(settings["quantization_config"]).get("quant_method", "unknown method")
        raise ValueError(
            f"{name} is quantised ({method}), and cannot be trained so; take the original weights."
        )
    _check_inputs(config, name)
    EveConfig(text_config=config)  # refuses decoders that change their logits behind the head


def _check_inputs(config: PreTrainedConfig, name: str | Path) -> None:
    """Refuses decoders that cannot be run, or not alone, from embedded words."""
    cls = MODEL_MAPPING[type(config)]
    arguments = inspect.signature(cls.forward).parameters
    lacking = [argument for argument in NEEDED if argument not in arguments]
    if lacking:
        raise ValueError(
            f"{name} is a {config.model_type} model, whose decoder takes no {lacking[0]}; {TAKE}."
        )
    if config.to_dict().get("hidden_size_per_layer_input"):
        raise ValueError(
            f"{name} is a {config.model_type} model, which looks up every word again in every "
            f"layer, and pictures have no such words; {TAKE}."
        )


def load_decoder(
    name: str | Path,
    *,
    config: PreTrainedConfig | None = None,
    dtype: torch.dtype | None = None,
    attn_implementation: str | None = None,
) -> LoadedDecoder:
    """Loads a decoder with its head; the weights of a GGUF file are unpacked.

    Args:
        config: what `read_decoder_config` said, if it was asked already (seconds for GGUF).
        dtype: None keeps the stored type; a GGUF file's is float32.

    Raises:
        ValueError: see `read_decoder_config`; or if weights are missing, cut off or corrupt.
    """
    config = read_decoder_config(name) if config is None else config
    place = find_decoder(name)
    arguments = dict(place.arguments)
    if place.gguf is None:
        list_weights(place.folder)  # every file is whole, and none wants to run code
    else:
        # Without it the weights stay in packed blocks, which neither learn nor save.
        arguments["quantization_config"] = GgufConfig(dequantize=True)
    if attn_implementation is not None:
        arguments["attn_implementation"] = attn_implementation
    before = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()  # its table of weights: here it is an error
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            place.folder,
            config=config,
            dtype=dtype or (torch.float32 if place.gguf else "auto"),
            output_loading_info=True,
            **arguments,
        )
    except UNREADABLE as error:
        raise ValueError(_unreadable("weights", name, error)) from None
    finally:
        transformers_logging.set_verbosity(before)
    missing = sorted(report["missing_keys"])
    if missing:
        raise ValueError(
            f"{name} lacks {len(missing)} weights of a {model.config.model_type} decoder "
            f"({missing[0]}, ...); it was saved in part, so copy or download it again."
        )
    _check_head(model, name)
    return LoadedDecoder(model.eval(), tuple(sorted(report["unexpected_keys"])))


def _check_head(model: PreTrainedModel, name: str | Path) -> None:
    """Refuses heads that are more than a matrix, and words of another width than the layers."""
    head, width = model.get_output_embeddings(), model.config.hidden_size
    if type(head) is not torch.nn.Linear or head.bias is not None:
        raise ValueError(
            f"{name} has a language head with a bias or of a kind of its own, which an EVE model "
            f"has no place for; {TAKE}."
        )
    words = model.get_input_embeddings().weight.shape[1]
    if words != width or head.in_features != width:
        raise ValueError(
            f"{name} embeds words {words} wide in layers {width} wide; {TAKE}, where both agree."
        )


def load_decoder_tokenizer(
    name: str | Path, *, config: PreTrainedConfig | None = None
) -> PreTrainedTokenizerBase:
    """The tokenizer of a decoder.

    Args:
        config: what `read_decoder_config` said, if it was asked already.

    Raises:
        ValueError: if there is none, or it cannot say where in a text its tokens lie.
    """
    place = find_decoder(name)
    if place.gguf is None and not any((place.folder / file).is_file() for file in TOKENIZER_FILES):
        raise ValueError(
            f"{name} holds no tokenizer (none of {', '.join(TOKENIZER_FILES)}); copy the decoder's "
            "own there."
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(place.folder, **place.arguments)
    except UNREADABLE as error:
        raise ValueError(_unreadable("tokenizer", name, error)) from None
    if not tokenizer.is_fast:
        raise ValueError(
            f"The tokenizer of {name} does not say where in a text its tokens lie, which labels "
            "need; add a tokenizer.json to it."
        )
    if place.gguf is not None:
        # transformers 5.17 takes <|im_start|> for SmolLM2's end token; the file's ids are right.
        settings = (read_decoder_config(name) if config is None else config).to_dict()
        for role in ROLES:
            id = settings.get(f"{role}_token_id")
            if isinstance(id, int):
                setattr(tokenizer, f"{role}_token", tokenizer.convert_ids_to_tokens(id))
    return tokenizer


__all__ = [
    "DecoderPlace",
    "LoadedDecoder",
    "find_decoder",
    "load_decoder",
    "load_decoder_tokenizer",
    "read_decoder_config",
]
