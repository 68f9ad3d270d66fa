"""Finds the default model: shipped whole, or as a difference that is put on a decoder, once.

A whole one is an ordinary model folder in the package.  A difference belongs to the decoder in the
asset `smollm2`, which comes from its own package.  Easy to get wrong: what was put together lies in
the cache in a folder that is named by the hashes of both, so that another version of either is put
together anew and an old folder is never taken for it.
"""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from filelock import FileLock
from transformers import GenerationConfig
from transformers.utils import SAFE_WEIGHTS_NAME

from eve_vlm.assets.catalogue import MANIFEST, asset_folder, asset_state
from eve_vlm.cache import cache_folder
from eve_vlm.configuration_eve import EveVisionConfig
from eve_vlm.decoders.initialize import initialize
from eve_vlm.default_model.difference import (
    apply_difference,
    one_thread,
    read_notes,
    sha256_of,
)
from eve_vlm.loading import load_config, load_model, load_processor
from eve_vlm.output_folder import new_folder

NAME = "eve-small"
DECODER = "smollm2"  # the asset
NEW = "new"  # in place of it: a decoder that was made from nothing
SHIPPED = Path(__file__).parent
FACTS = f"{NAME}.json"
WEIGHTS = f"{NAME}.safetensors"  # the difference
WHOLE = NAME  # or the folder of a whole model


def is_shipped(folder: Path | None = None) -> bool:
    """Whether this version of the package (or a folder) has the model, or its own part of it."""
    folder = folder or SHIPPED
    return weights_file(folder).is_file() and (folder / FACTS).is_file()


def is_whole(folder: Path | None = None) -> bool:
    """Whether it is there without a decoder to be fetched."""
    return ((folder or SHIPPED) / WHOLE).is_dir()


def weights_file(folder: Path | None = None) -> Path:
    """The file of its weights, whose SHA-256 the facts name."""
    folder = folder or SHIPPED
    return folder / WHOLE / SAFE_WEIGHTS_NAME if is_whole(folder) else folder / WEIGHTS


def has_decoder() -> bool:
    """Whether the decoder that it is put on was fetched."""
    return asset_state(DECODER) == "present"


def assembled_folder(
    *,
    shipped: Path | None = None,
    decoder: Path | None = None,
    say: Callable[[str], object] = lambda text: None,
) -> Path:
    """The folder of the whole model; a difference is put together at the first call (20 s).

    Args:
        shipped: where the model or the difference is; None is this package.
        decoder: a folder or GGUF file in place of the asset's.
        say: told when it has to be put together.

    Raises:
        ValueError: if the decoder was not fetched or is another one, or a file is damaged.
    """
    shipped = shipped or SHIPPED
    file = weights_file(shipped)
    facts = _facts(shipped)
    if not is_shipped(shipped) or sha256_of(file) != facts["sha256"]:
        raise ValueError(
            f"{file} is damaged or not there: its SHA-256 is not the one that {FACTS} names; "
            "install the package again."
        )
    if is_whole(shipped):
        return shipped / WHOLE
    key, place = _decoder(decoder)
    both = hashlib.sha256(f"{facts['sha256']} {key}".encode()).hexdigest()[:16]
    folder = cache_folder() / "default_model" / both / NAME  # answers are signed with its name
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not folder.is_dir():
            say(f"{NAME}: put together with its decoder, once (about 20 seconds)")
            _assemble(place, file, folder)
    return folder


def _facts(shipped: Path) -> dict[str, Any]:
    try:
        facts: dict[str, Any] = json.loads((shipped / FACTS).read_text(encoding="utf-8"))
        facts["sha256"]
    except (OSError, ValueError, KeyError, TypeError):
        raise ValueError(
            f"{shipped / FACTS} is damaged or not there; install the package again."
        ) from None
    return facts


def _decoder(given: Path | None) -> tuple[str, Path]:
    """What tells the decoder's state, and where it is."""
    if given is not None:
        return str(given.resolve()), given
    try:
        folder = asset_folder(DECODER)
    except ValueError:
        raise ValueError(
            f"{NAME} needs its decoder, which is not here (93 MB); run `eve assets fetch "
            f"{DECODER}`."
        ) from None
    manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    return json.dumps(manifest["files"], sort_keys=True), folder


@one_thread()
def _assemble(decoder: Path, file: Path, folder: Path) -> None:
    settings = json.loads(read_notes(file)["settings"])
    with TemporaryDirectory(dir=folder.parent) as beside, new_folder(folder) as part:
        base = Path(beside) / "base"
        initialize(
            decoder,
            base,
            vision=EveVisionConfig(**settings["vision"]),
            projector_depth=settings["projector_depth"],
            longest_edge=settings["longest_edge"],
            dtype="float32",
        )
        model, processor = load_model(base), load_processor(base)
        apply_difference(model.state_dict(), file)
        model.generation_config = GenerationConfig.from_dict(settings["generation"])
        processor.chat_template = processor.tokenizer.chat_template = settings["template"]
        model.save_pretrained(part)
        processor.save_pretrained(part)


def settings_of(trained: str | Path) -> dict[str, Any]:
    """What has to be said of a trained model beside its weights, so that it can be put together."""
    config, processor = load_config(trained), load_processor(trained)
    generation = GenerationConfig.from_pretrained(str(trained))
    sizes = ("patch_size", "merge_size", "hidden_size", "num_attention_heads")
    vision = config.vision_config.to_dict()
    return {
        "vision": {name: vision[name] for name in sizes},
        "projector_depth": config.projector_depth,
        "longest_edge": processor.image_processor.size["longest_edge"],
        "template": processor.chat_template,
        "generation": generation.to_diff_dict(),
    }


__all__ = [
    "DECODER",
    "FACTS",
    "NAME",
    "NEW",
    "SHIPPED",
    "WEIGHTS",
    "WHOLE",
    "assembled_folder",
    "has_decoder",
    "is_shipped",
    "is_whole",
    "settings_of",
    "weights_file",
]
