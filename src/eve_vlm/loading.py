"""Loads and checks models by folder or Hub id, ours and the published EVE v1 checkpoints alike.

Every load says which weights were missing or surplus, or fails.  Easy to get wrong: the library
fills missing weights with random numbers and drops surplus ones with a warning at most; here both
are errors that list them, save for those a caller allows by name and those that a class lists in
`_keys_to_ignore_on_load_unexpected` (the teacher's copies of a published checkpoint, an aligner).
A LoRA folder is loaded as the model that it makes of its base.
"""

import json
import re
import socket
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit
from urllib.request import getproxies

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.constants import ENDPOINT, HF_HUB_CACHE, HF_HUB_OFFLINE
from safetensors import SafetensorError
from transformers import AutoConfig
from transformers.utils import logging as transformers_logging

from .alignment_eve import EveForPreTraining
from .checkpoint_files import list_weights
from .configuration_eve import EveConfig
from .errors import check_loaded, first_line, listed
from .export.merge_lora import merge_lora
from .lora_folder import attach_adapter, check_base, find_base, has_aligner, is_lora, read_weights
from .modeling_eve import EveForConditionalGeneration
from .output_folder import require_room
from .processing_eve import EveProcessor
from .published_eve import is_published
from .quantization import check_quantized, is_quantized, quantization_config

SMALL_FILES = ["*.json", "*.jinja", "tokenizer.model", "*.txt"]
PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json")


class Loaded(NamedTuple):
    """A model and the processor that goes with it."""

    model: EveForConditionalGeneration
    processor: EveProcessor


def load(
    name_or_folder: str | Path,
    *,
    dtype: torch.dtype | None = None,
    device: str | None = None,
    attn_implementation: str = "sdpa",
    aligner: bool = False,
    quantize: str | None = None,
) -> Loaded:
    """Loads a model with its processor, by folder or by Hub id.

    >>> load("BAAI/EVE-7B-HD-v1.0").model  # doctest: +SKIP

    Args:
        dtype: type of the weights; None means float32 on a CPU (where bfloat16 products are 25 to
            70 times slower, measured) and the stored type elsewhere.
        device: None means a GPU where there is one.
        aligner: loads the training class with the patch aligning layer.
        quantize: `int8` or `nf4` for decoder weights in 8 or 4 bits; None keeps them.

    Raises:
        ValueError: in one sentence, for whatever is wrong with the name or the files.
    """
    folder = find_model(name_or_folder)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if dtype is None and torch.device(device).type == "cpu":
        dtype = torch.float32
    config = load_config(folder) if aligner else None
    if config is not None and config.alignment_config is None:
        raise ValueError(
            f"{name_or_folder} has no aligner; load it without, or take a checkpoint of training."
        )
    model = load_model(
        folder,
        config=config,
        dtype=dtype,
        attn_implementation=attn_implementation,
        quantize=quantize,
        device=device,
    )
    return Loaded(model.to(device).eval(), load_processor(folder))


def find_model(name_or_folder: str | Path) -> Path:
    """A folder as it is; or a Hub id's files, downloaded into the library's cache.

    Raises:
        ValueError: if there is no such folder, and the Hub does not know it or cannot be reached.
    """
    folder = Path(name_or_folder).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists() or not _may_be_hub_id(str(name_or_folder)):
        raise ValueError(f"{name_or_folder} is no folder; name a model's folder or its Hub id.")
    name, offline = str(name_or_folder), not _hub_answers()
    found = _download(name, SMALL_FILES, offline=offline)
    kind = "*.bin" if list(found.glob("pytorch_model.bin*")) else "*.safetensors"
    return _download(name, [*SMALL_FILES, kind], offline=offline)


def _download(name: str, patterns: list[str], *, offline: bool) -> Path:
    """The files of a Hub id that fit the patterns; with `offline` from the cache alone."""
    try:
        if not offline:
            require_room(HF_HUB_CACHE, _bytes_to_download(name, patterns))
        return Path(snapshot_download(name, allow_patterns=patterns, local_files_only=offline))
    except OSError as error:
        said = "no network, and not in its cache" if offline else first_line(error)
        raise ValueError(
            f"{name} is no folder here and could not be read from the Hub ({said}); "
            "check the spelling and the network; folders work without one."
        ) from None


def _hub_answers() -> bool:
    """Whether the Hub can be reached; its own library tries for half a minute (28 s seen)."""
    if HF_HUB_OFFLINE:
        return False
    if getproxies():
        return True  # only the proxy knows
    address = urlsplit(ENDPOINT)
    try:
        socket.create_connection((address.hostname, address.port or 443), timeout=3).close()
    except OSError:
        return False
    return True


def _bytes_to_download(name: str, patterns: list[str]) -> int:
    plan = snapshot_download(name, allow_patterns=patterns, dry_run=True)
    return sum(file.file_size or 0 for file in plan if file.will_download)


def _may_be_hub_id(name: str) -> bool:
    """`owner/name` or `name`, as opposed to a path."""
    return re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) is not None and not name.startswith(".")


def load_config(name_or_folder: str | Path) -> EveConfig:
    """The configuration of a model folder, a Hub id or a `config.json`, ours or published.

    Raises:
        ValueError: if there is none, or it is of another kind of model.
    """
    place = Path(name_or_folder).expanduser()
    if is_lora(place) and not (place / "config.json").is_file():
        return load_config(find_base(place))  # PEFT's own folders have no configuration
    if not place.exists():
        if not _may_be_hub_id(str(name_or_folder)):
            raise ValueError(f"{name_or_folder} is not there; name a folder, a file or a Hub id.")
        place = _download(str(name_or_folder), SMALL_FILES, offline=not _hub_answers())
    file = place if place.is_file() else _config_file(place)
    settings = _read_settings(file)
    if settings.get("model_type") == "eve-qwen2":
        raise ValueError(
            f"{name_or_folder} is an EVE v2 model, another architecture; EVE v1 checkpoints can be "
            "loaded."
        )
    if is_published(settings):
        return EveConfig.from_pretrained(place)
    try:
        config = AutoConfig.from_pretrained(place)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"The configuration {file} cannot be used ({first_line(error)}); copy or save the "
            "model again."
        ) from None
    if not isinstance(config, EveConfig):
        raise ValueError(
            f"{name_or_folder} holds a model of type {config.model_type!r}, not an EVE model; name "
            "another folder, or make one of it with `eve init`."
        )
    return config


def _config_file(folder: Path) -> Path:
    file = folder / "config.json"
    if not file.is_file():
        raise ValueError(
            f"{folder} holds no model (no config.json); name a folder that training or "
            "save_pretrained wrote."
        )
    return file


def _read_settings(file: Path) -> dict[str, Any]:
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
        if isinstance(settings, dict):
            return settings
        said = "it is no table of settings"
    except ValueError as error:
        said = first_line(error)
    raise ValueError(f"{file} cannot be read ({said}); copy or save it again.")


@contextmanager
def _own_words() -> Iterator[None]:
    """Silences the library's table of missing and surplus weights: here they are errors."""
    before = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(before)


def _check_shapes(folder: Path, mismatched: Iterable[tuple]) -> None:
    names = sorted(name for name, *_ in mismatched)
    if names:
        raise ValueError(
            f"{len(names)} weights in {folder} have another shape than its config.json says "
            f"({listed(names)}); it was changed or put together from two models, so save it again."
        )


def require_model_folder(folder: str | Path) -> Path:
    """The folder, checked to hold an EVE model.

    Raises:
        ValueError: if it is not there or holds something else.
    """
    folder = Path(folder)
    if not is_lora(folder):
        _config_file(folder)  # here a name that is no folder is not looked up on the Hub
    load_config(folder)
    return folder


def load_model(
    folder: str | Path,
    *,
    config: EveConfig | None = None,
    dtype: torch.dtype | None = None,
    attn_implementation: str = "sdpa",
    new: Iterable[str] = (),
    quantize: str | None = None,
    device: str = "cpu",
) -> EveForConditionalGeneration:
    """Loads a folder; with `config.alignment_config`, the training class with the aligner.

    Args:
        folder: what `save_pretrained` wrote, or a published checkpoint; or a LoRA folder, whose
            adapters are merged into its base, or stand beside the weights of a quantized one.
        config: settings to use instead of the folder's own.
        dtype: type of the weights; None keeps the saved one.
        new: regular expressions of weights that may be missing and start fresh.
        quantize: see `load`.
        device: where weights are quantized, one by one, and stay; otherwise they stay on the CPU.
    """
    folder = require_model_folder(folder)
    if is_lora(folder):
        return load_with_lora(
            find_model(find_base(folder)),
            folder,
            config=config,
            dtype=dtype,
            attn_implementation=attn_implementation,
            new=new,
            quantize=quantize,
            device=device,
        )[0]
    list_weights(folder)  # every file is whole, and none wants to run code
    changes = {} if quantize is None else _quantized(folder, quantize, dtype, device)
    training = config is not None and config.alignment_config is not None
    cls = EveForPreTraining if training else EveForConditionalGeneration
    try:
        with _own_words():
            model, report = cls.from_pretrained(
                folder,
                config=config,
                dtype=dtype or "auto",
                attn_implementation=attn_implementation,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # they are reported below, in our words
                **changes,
            )
    except ImportError as error:
        if "quantization_config" not in load_config(folder).to_dict():
            raise  # an attention kernel, say, that the caller asked for
        raise ValueError(
            f"{folder} holds quantized weights, whose package is not installed "
            f'({first_line(error)}); run: pip install "eve-vlm[quantize]".'
        ) from None
    except (OSError, SafetensorError) as error:
        raise ValueError(
            f"The weights in {folder} cannot be read ({first_line(error)}); copy or save them "
            "again."
        ) from None
    _check_shapes(folder, report["mismatched_keys"])
    check_loaded(folder, report["missing_keys"], report["unexpected_keys"], allowed=new)
    if quantize is not None:
        check_quantized(model, quantize)
    return model


def load_with_lora(
    base: str | Path,
    folder: str | Path,
    *,
    any_base: bool = False,
    config: EveConfig | None = None,
    new: Iterable[str] = (),
    **settings: Any,
) -> tuple[EveForConditionalGeneration, list[str]]:
    """The model that a LoRA folder makes of its base; further arguments as `load_model` has them.

    Returns:
        The model, merged unless the base's weights are quantized, and sentences about what the
        folder brought.

    Raises:
        ValueError: if the base is another model (and not `any_base`), or any weight is missing or
            left over.
    """
    remark = None if any_base else check_base(folder, base)
    if has_aligner(read_weights(folder)):
        new = [*new, r"aligner\."]  # the base may have none
    model = load_model(base, config=config, new=new, **settings)
    if any(is_quantized(weight) for weight in model.parameters()):
        attach_adapter(model, folder, base=base)
        return model, ["The adapters stand beside the quantized weights."]
    merged, notes = merge_lora(model, folder, base=base, any_base=True, progress=False)
    return merged, [*notes, remark] if remark else notes


def _quantized(folder: Path, kind: str, dtype: torch.dtype | None, device: str) -> dict[str, Any]:
    """What `from_pretrained` takes so that weights are quantized where they will stay."""
    config = load_config(folder)
    if "quantization_config" in config.to_dict():
        raise ValueError(f"{folder} holds quantized weights already; load it without quantize.")
    return {
        "quantization_config": quantization_config(kind, dtype or config.dtype),
        "device_map": {"": device},
    }


def load_processor(
    folder: str | Path, *, longest_edge: int | None = None, size_multiple: int | None = None
) -> EveProcessor:
    """Loads a saved processor, with other picture sizes where given."""
    if is_lora(folder) and not any((Path(folder) / name).is_file() for name in PROCESSOR_FILES):
        folder = find_model(find_base(folder))  # PEFT's own folders have none
    try:
        processor = EveProcessor.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{folder} holds no processor that can be read ({first_line(error)}); save one there "
            "with processor.save_pretrained."
        ) from None
    pictures = processor.image_processor
    if longest_edge is not None:
        pictures.size = {"longest_edge": longest_edge}
    if size_multiple is not None:
        pictures.size_multiple = size_multiple
    pictures.grid_of(1, 1)  # refuses sizes that do not fit each other
    return processor


__all__ = [
    "Loaded",
    "find_model",
    "load",
    "load_config",
    "load_model",
    "load_processor",
    "load_with_lora",
    "require_model_folder",
]
