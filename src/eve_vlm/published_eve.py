"""The published EVE v1 checkpoints: their weight names, flat configuration, missing preprocessors.

Each published configuration names a preprocessor folder that is not on the Hub; its settings are
built in here, and a file of the folder's own wins.  `RENAMES` is the only place where a published
weight name stands beside ours; it serves both directions.  Easy to get wrong: a published
checkpoint also holds the teacher, twice; both copies stay behind.

Sources: published model cards and file lists (BAAI/EVE-7B-Pretrain-v1.0, EVE-7B-v1.0,
EVE-7B-HD-v1.0), paper section 4.1.
"""

import json
import re
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

from transformers.utils import cached_file

CHECKPOINTS = ("BAAI/EVE-7B-Pretrain-v1.0", "BAAI/EVE-7B-v1.0", "BAAI/EVE-7B-HD-v1.0")

# --- weights --------------------------------------------------------------------------------------

# (published, ours); each stands for all names that begin so.
RENAMES: tuple[tuple[str, str], ...] = (
    ("lm_head.", "lm_head."),
    ("model.embed_tokens.", "model.language_model.embed_tokens."),
    ("model.layers.", "model.language_model.layers."),
    ("model.norm.", "model.language_model.norm."),
    ("model.mm_projector.0.", "model.multi_modal_projector.linear_1."),
    ("model.mm_projector.2.", "model.multi_modal_projector.linear_2."),
    ("model.vision_tower.class_embedding", "model.vision_tower.class_embedding"),
    ("model.vision_tower.split_embedding", "model.vision_tower.row_end_embedding"),
    ("model.vision_tower.patch_embedding.", "model.vision_tower.patch_projection."),
    *(
        (
            f"model.vision_tower.{published}_attention.{part}.",
            f"model.vision_tower.{ours}_attention.{name}.",
        )
        for published, ours in (("local", "merge"), ("global", "class"))
        for part, name in (
            ("q.0", "query_norm"),
            ("q.1", "query"),
            ("kv.0", "key_value_norm"),
            ("kv.1", "key_value"),
            ("proj", "output"),
        )
    ),
    ("model.vision_tower_compressor.input_layer.", "aligner.input."),
    ("model.vision_tower_compressor.output_layer.", "aligner.output."),
    # "#" stands for the tap's number: its norm, its map.
    ("model.vision_tower_compressor.norm_layer.#.0.", "aligner.norms.#."),
    ("model.vision_tower_compressor.norm_layer.#.1.", "aligner.maps.#."),
)
# Names that stay behind: the teacher's two copies, and buffers that older transformers wrote into
# checkpoints and newer ones compute.
DROPPED = (
    r"^model\.vision_clip\.",
    r"^model\.vision_tower_compressor\.clip_layer\.",
    r"\.rotary_emb\.inv_freq$",
    r"\.position_ids$",
)


def _pattern(prefix: str) -> str:
    return "^" + re.escape(prefix).replace(r"\#", "#").replace("#", r"(\d+)")


def _replacement(prefix: str) -> str:
    return prefix.replace("#", r"\1")


# For `from_pretrained(key_mapping=...)`: what to look for, what to put there.
KEY_MAPPING = {_pattern(theirs): _replacement(ours) for theirs, ours in RENAMES}
_BACK = {_pattern(ours): _replacement(theirs) for theirs, ours in RENAMES}


def _renamed(name: str, mapping: Mapping[str, str]) -> str | None:
    """The name behind the longest pattern that fits, or None."""
    fitting = [pattern for pattern in mapping if re.match(pattern, name)]
    if not fitting:
        return None
    longest = max(fitting, key=len)
    return re.sub(longest, mapping[longest], name, count=1)


def rename_weight(published: str) -> str | None:
    """Our name of a published weight; None for a teacher's copy or a computed buffer.

    >>> rename_weight("model.vision_tower.local_attention.kv.1.weight")
    'model.vision_tower.merge_attention.key_value.weight'

    Raises:
        ValueError: if no rule knows the name.
    """
    if any(re.search(pattern, published) for pattern in DROPPED):
        return None
    ours = _renamed(published, KEY_MAPPING)
    if ours is None:
        raise ValueError(
            f"The weight {published!r} is not one that a published EVE v1 checkpoint holds; check "
            "that the file is one."
        )
    return ours


def published_name(ours: str) -> str:
    """The published name of a weight of ours.

    >>> published_name("aligner.maps.3.weight")
    'model.vision_tower_compressor.norm_layer.3.1.weight'

    Raises:
        ValueError: if the published programme has no such weight.
    """
    published = _renamed(ours, _BACK)
    if published is None:
        raise ValueError(
            f"The weight {ours!r} has no place in a published checkpoint; only models of the "
            "published architecture can be written in that form."
        )
    return published


# --- configuration and preprocessor ---------------------------------------------------------------


def _preset(image_size: int) -> dict[str, Any]:
    """Settings of `openai/eve-patch14-anypixel-<image_size>`, which nobody can download.

    The sizes are in the paper (section 4.1), mean and deviation are CLIP's; the published programme
    run with exactly these settings made our golden numbers.
    """
    return {
        "image_size": image_size,
        "image_size_clip": 336,
        "patch_stride": 14,
        "patch_stride_clip": 14,
        "conv_stride": 2,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
    }


PRESETS = {f"eve-patch14-anypixel-{size}": _preset(size) for size in (672, 1344)}
TEACHER_WIDTHS = {"clip-vit-large-patch14-336": 1024}
PREPROCESSOR_FILE = "preprocessor_config.json"
# What `from_pretrained` of every class takes to find a file.
_HUB_ARGUMENTS = (
    "cache_dir",
    "force_download",
    "local_files_only",
    "proxies",
    "revision",
    "subfolder",
    "token",
)


def is_published(config: Mapping[str, Any]) -> bool:
    """Whether a `config.json` is a published, flat one, and not of this package."""
    return "mm_vision_tower" in config and "text_config" not in config


def is_published_preprocessor(settings: Mapping[str, Any]) -> bool:
    """Whether a `preprocessor_config.json` is in the published form."""
    return "patch_stride" in settings and "conv_stride" in settings


def hub_arguments(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Those arguments of a `from_pretrained` that say where and how to look for files."""
    return {
        name: arguments[name] for name in _HUB_ARGUMENTS if arguments.get(name) not in (None, "")
    }


def find_file(name_or_folder: str | PathLike, file: str, **hub: Any) -> Path | None:
    """A file of a folder or a Hub repository; None where it is not there or cannot be reached."""
    found = cached_file(
        str(name_or_folder),
        file,
        _raise_exceptions_for_gated_repo=False,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
        **hub,
    )
    return None if found is None else Path(found)


def read_json_of(name_or_folder: str | PathLike, file: str, **hub: Any) -> dict[str, Any] | None:
    """A JSON file of a folder or a Hub repository; None where it is not there."""
    found = find_file(name_or_folder, file, **hub)
    return None if found is None else json.loads(found.read_text(encoding="utf-8"))


def published_config_of(name_or_folder: str | PathLike, **hub: Any) -> dict[str, Any] | None:
    """The flat configuration of a published checkpoint; None where something else is there."""
    if Path(name_or_folder).is_file():
        return None
    config = read_json_of(name_or_folder, "config.json", **hub)
    return config if config is not None and is_published(config) else None


def find_preprocessor(
    config: Mapping[str, Any], name_or_folder: str | PathLike | None = None, **hub: Any
) -> dict[str, Any]:
    """The published preprocessor settings that belong to a published configuration.

    Looked for in this order: the checkpoint's own file; the folder that the configuration names;
    the built-in preset of that name.

    Raises:
        ValueError: if none of them is there.
    """
    if name_or_folder is not None and Path(name_or_folder).is_file():
        name_or_folder = Path(name_or_folder).parent  # a config.json given by itself
    named = config["mm_vision_tower"]
    beside = Path(name_or_folder or "") / named
    places = [place for place in (name_or_folder, named, beside) if place is not None]
    for place in places:
        # Only the checkpoint itself may be on the Hub: the names in configurations are not.
        if place is not name_or_folder and not Path(place).is_dir():
            continue
        settings = read_json_of(place, PREPROCESSOR_FILE, **hub)
        if settings is not None and is_published_preprocessor(settings):
            return settings
    preset = PRESETS.get(Path(named).name)
    if preset is None:
        raise ValueError(
            f"The configuration names the preprocessor {named!r}, which is neither a folder here "
            f"nor built in ({', '.join(PRESETS)}); put its {PREPROCESSOR_FILE} into the "
            "checkpoint's folder."
        )
    return preset


# Settings of the flat configuration that belong to training or to the picture side, not to the
# decoder; everything else there is the decoder's.
_NOT_OF_DECODER = (
    "architectures",
    "image_aspect_ratio",
    "image_grid_pinpoints",
    "model_type",
    "name_or_path",
    "requires_cliploss",
    "transformers_version",
    "vision_tower_lr",
    "_name_or_path",
)


def nested_config(
    config: Mapping[str, Any],
    preprocessor: Mapping[str, Any],
    *,
    teacher_hidden_size: int | None = None,
) -> dict[str, Any]:
    """A published flat configuration as settings of `EveConfig`.

    Args:
        teacher_hidden_size: adds the aligner's part with this width of the teacher.
    """
    text = {
        name: value
        for name, value in config.items()
        if name not in _NOT_OF_DECODER and not name.startswith(("mm_", "tune_", "use_mm_"))
    }
    dtype = text.pop("torch_dtype", None) or text.pop("dtype", None)
    if text.get("rope_scaling") is None:
        text.pop("rope_scaling", None)
    nested: dict[str, Any] = {
        "text_config": {"model_type": "llama", "dtype": dtype, **text},
        "vision_config": {
            "patch_size": preprocessor["patch_stride"],
            "merge_size": preprocessor["conv_stride"],
            "hidden_size": config["mm_hidden_size"],
        },
        # Behind the last word: the published model has no row for it.
        "image_token_id": config["vocab_size"],
        "dtype": dtype,
        "architectures": ["EveForConditionalGeneration"],
    }
    if teacher_hidden_size is not None:
        nested["alignment_config"] = {
            "teacher_hidden_size": teacher_hidden_size,
            "pool_size": _pool_size(preprocessor),
        }
    return nested


def teacher_width(config: Mapping[str, Any]) -> int | None:
    """Width of the teacher that a published configuration names; None where that is not known."""
    named = str(config.get("mm_vision_tower_clip") or "")
    if Path(named).is_dir():
        settings = json.loads((Path(named) / "config.json").read_text(encoding="utf-8"))
        return settings.get("vision_config", settings).get("hidden_size")
    return TEACHER_WIDTHS.get(Path(named).name)


def _pool_size(preprocessor: Mapping[str, Any]) -> int:
    """Tokens, each way, that share one of the teacher's cells."""
    cell = preprocessor["patch_stride"] * preprocessor["conv_stride"]
    cells = preprocessor["image_size_clip"] // preprocessor["patch_stride_clip"]
    return preprocessor["image_size"] // cell // cells


def image_settings(preprocessor: Mapping[str, Any]) -> dict[str, Any]:
    """Published preprocessor settings as settings of `EveImageProcessor`."""
    scale = preprocessor["image_size"] // preprocessor["image_size_clip"]
    return {
        "size": {"longest_edge": preprocessor["image_size"]},
        "size_multiple": preprocessor["patch_stride_clip"] * scale,
        "patch_size": preprocessor["patch_stride"],
        "merge_size": preprocessor["conv_stride"],
        "image_mean": preprocessor["image_mean"],
        "image_std": preprocessor["image_std"],
    }


__all__ = [
    "CHECKPOINTS",
    "DROPPED",
    "KEY_MAPPING",
    "PRESETS",
    "RENAMES",
    "find_file",
    "find_preprocessor",
    "hub_arguments",
    "image_settings",
    "is_published",
    "is_published_preprocessor",
    "nested_config",
    "published_config_of",
    "published_name",
    "rename_weight",
    "teacher_width",
]
