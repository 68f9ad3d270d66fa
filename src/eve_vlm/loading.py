"""Loads and checks model folders: every load says which weights were missing or surplus, or fails.

Easy to get wrong: the library fills missing weights with random numbers and drops surplus ones with
a warning at most; here both are errors that list them, save for those a caller allows by name.
"""

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import AutoConfig
from transformers.utils import logging as transformers_logging

from .alignment_eve import EveForPreTraining
from .configuration_eve import EveConfig
from .modeling_eve import EveForConditionalGeneration
from .processing_eve import EveProcessor

SHOWN = 6  # names listed in a message before "and n more"


def check_loaded(
    folder: str | Path,
    missing: Iterable[str],
    surplus: Iterable[str],
    *,
    allowed: Iterable[str] = (),
) -> None:
    """Compares what a load reported with the names that `allowed` (regular expressions) excuses.

    Raises:
        ValueError: with the names.
    """
    excused = [re.compile(pattern) for pattern in allowed]
    for kind, names in (("lacks", missing), ("has surplus", surplus)):
        bad = sorted(name for name in names if not any(pattern.match(name) for pattern in excused))
        if bad:
            raise ValueError(
                f"The checkpoint {folder} {kind} {len(bad)} weights "
                f"({_listed(bad)}); it belongs to "
                "another model or was saved in part, so save it again with save_pretrained."
            )


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
            f"({_listed(names)}); it was changed or put together from two models, so save it again."
        )


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def first_line(error: Exception) -> str:
    """The library's messages run over several lines; the first says what happened."""
    return str(error).strip().splitlines()[0].rstrip(".")


def require_model_folder(folder: str | Path) -> Path:
    """The folder, checked to hold a saved EVE model.

    Raises:
        ValueError: if it is not there or holds something else.
    """
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise ValueError(
            f"{folder} holds no model (no config.json); name a folder that training or "
            "save_pretrained wrote."
        )
    try:
        config = AutoConfig.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{folder}/config.json cannot be read ({first_line(error)}); copy or save the model "
            "again."
        ) from None
    if not isinstance(config, EveConfig):
        raise ValueError(
            f"{folder} holds a model of type {config.model_type!r}, not an EVE model; name "
            "another folder."
        )
    return folder


def load_model(
    folder: str | Path,
    *,
    config: EveConfig | None = None,
    dtype: torch.dtype | None = None,
    attn_implementation: str = "sdpa",
    new: Iterable[str] = (),
) -> EveForConditionalGeneration:
    """Loads a saved model; with `config.alignment_config`, the training class with the aligner.

    Args:
        folder: what `save_pretrained` wrote.
        config: settings to use instead of the folder's own.
        dtype: type of the weights; None keeps the saved one.
        new: regular expressions of weights that may be missing and start fresh.
    """
    folder = require_model_folder(folder)
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
            )
    except (OSError, SafetensorError) as error:
        raise ValueError(
            f"The weights in {folder} cannot be read ({first_line(error)}); copy or save them "
            "again."
        ) from None
    _check_shapes(folder, report["mismatched_keys"])
    check_loaded(folder, report["missing_keys"], report["unexpected_keys"], allowed=new)
    return model


def load_processor(
    folder: str | Path, *, longest_edge: int | None = None, size_multiple: int | None = None
) -> EveProcessor:
    """Loads a saved processor, with other picture sizes where given."""
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


__all__ = ["check_loaded", "first_line", "load_model", "load_processor", "require_model_folder"]
