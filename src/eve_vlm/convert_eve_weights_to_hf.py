"""Published EVE v1 checkpoints to this package's form and back, or to another type or shard size.

Loading needs no conversion (`from_pretrained` takes a published checkpoint as it is); this is for
those who want one form on disk.  Weights go from file to file, one shard in memory at a time.  Easy
to get wrong: the way back has no teacher in it, because a model of ours never has one.
"""

import json
import shutil
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from tqdm.auto import tqdm
from transformers import GenerationConfig
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

from .alignment_eve import EveForPreTraining
from .checkpoint_files import WeightReader
from .configuration_eve import EveConfig
from .image_processing_eve import EveImageProcessor
from .loading import find_model, load_config, load_processor
from .modeling_eve import EveForConditionalGeneration
from .output_folder import new_folder
from .published_eve import PREPROCESSOR_FILE, is_published, published_name, rename_weight

SENTENCEPIECE_FILE = "tokenizer.model"


def convert_state_dict(
    published: Mapping[str, torch.Tensor], *, aligner: bool = False
) -> dict[str, torch.Tensor]:
    """Renames published weights without copying; with `aligner`, keeps the aligner's too."""
    converted = {}
    for name, weight in published.items():
        ours = rename_weight(name)
        if ours is not None and (aligner or not ours.startswith("aligner.")):
            converted[ours] = weight
    return converted


@dataclass(frozen=True, kw_only=True, slots=True)
class Conversion:
    """What a conversion did."""

    weights: int
    """Written."""
    parameters: int
    num_bytes: int
    shards: int
    left_behind: dict[str, int]
    """Number of weights by why they were not written."""
    compared: int | None
    """Weights read again and found equal bit by bit; None without a check."""


class _Move(NamedTuple):
    """One weight on its way."""

    source: str
    target: str


def convert(
    name_or_folder: str | Path,
    out: str | Path,
    *,
    to: Literal["ours", "published"] = "ours",
    dtype: torch.dtype | None = None,
    max_shard_size: str = "5GB",
    aligner: bool = False,
    check: bool = False,
) -> Conversion:
    """Writes a checkpoint in another form; every name and shape is compared before.

    Args:
        name_or_folder: a published checkpoint or one of ours.
        out: a new folder; it appears when all is written.
        dtype: type of the written weights; None keeps the stored one.
        max_shard_size: largest weight file, such as `5GB` or `500MB`.
        aligner: keeps the patch aligning layer.
        check: reads everything again, and compares bit by bit.

    Raises:
        ValueError: if names or shapes do not agree, a weight does not survive, the model has no
            place in the published form, or the disk is full.
    """
    source = find_model(name_or_folder)
    config = load_config(source)
    if aligner and config.alignment_config is None:
        raise ValueError(f"{name_or_folder} has no aligner; convert it without.")
    if not aligner:
        config.alignment_config = None
    processor = load_processor(source)
    settings = _flat_config(config, processor.image_processor) if to == "published" else None
    with WeightReader(source) as reader:
        moves, left_behind = _moves(reader, _stored_form(source), aligner=aligner)
        _compare_with_model(source, reader, moves, config)
        if to == "published":
            moves = [_Move(move.source, published_name(move.target)) for move in moves]
        plan = _planned(reader, moves, dtype)
        size = sum(weight.nbytes for weight in plan.values())
        with new_folder(out, needed=size) as folder:
            shards = _write_weights(folder, reader, moves, plan, max_shard_size)
            if settings is None:
                _write_ours(folder, source, config, processor, dtype)
            else:
                _write_published(folder, source, config, settings, processor, dtype)
            compared = _compare_written(folder, reader, moves) if check else None
    return Conversion(
        weights=len(moves),
        parameters=sum(weight.numel() for weight in plan.values()),
        num_bytes=size,
        shards=shards,
        left_behind=left_behind,
        compared=compared,
    )


def _stored_form(folder: Path) -> Literal["ours", "published"]:
    settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return "published" if is_published(settings) else "ours"


def _moves(reader: WeightReader, form: str, *, aligner: bool) -> tuple[list[_Move], dict[str, int]]:
    """What is taken along under our names, and what is not, by reason."""
    moves, left_behind = [], Counter[str]()
    for name in reader.entries:
        ours = rename_weight(name) if form == "published" else name
        if ours is None:
            kind = "computed buffer" if name.endswith("inv_freq") else "teacher's copy"
            left_behind[kind] += 1
        elif ours.startswith("aligner.") and not aligner:
            left_behind["aligner"] += 1
        else:
            moves.append(_Move(name, ours))
    return moves, dict(left_behind)


def _compare_with_model(
    source: Path, reader: WeightReader, moves: list[_Move], config: EveConfig
) -> None:
    """Names and shapes must be those of the model that the configuration describes."""
    kind = EveForConditionalGeneration if config.alignment_config is None else EveForPreTraining
    with torch.device("meta"):
        model = kind(config)
    wanted = {name: tuple(weight.shape) for name, weight in model.state_dict().items()}
    found = {move.target: reader.entries[move.source].shape for move in moves}
    tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
    wrong = [name for name in wanted.keys() - found.keys() if name not in tied]
    wrong += [name for name, shape in found.items() if wanted.get(name) != shape]
    if wrong:
        first = sorted(wrong)[0]
        raise ValueError(
            f"{len(wrong)} weights of {source} are not as its config.json says, such as {first} "
            f"({found.get(first, 'missing')} there, {wanted.get(first, 'none')} expected); it was "
            "changed or put together from two models."
        )


def _planned(
    reader: WeightReader, moves: list[_Move], dtype: torch.dtype | None
) -> dict[str, torch.Tensor]:
    """The weights to write, without memory."""
    plan = {}
    for move in moves:
        entry = reader.entries[move.source]
        kept = dtype if dtype is not None and entry.dtype.is_floating_point else entry.dtype
        plan[move.target] = torch.empty(entry.shape, dtype=kept, device="meta")
    return plan


def _write_weights(
    folder: Path,
    reader: WeightReader,
    moves: list[_Move],
    plan: dict[str, torch.Tensor],
    max_shard_size: str,
) -> int:
    try:
        split = split_torch_state_dict_into_shards(plan, max_shard_size=max_shard_size)
    except ValueError as error:
        raise ValueError(f"--shard-size: {error}; write it such as 5GB or 500MB.") from None
    source_of = {move.target: move.source for move in moves}
    total = sum(weight.nbytes for weight in plan.values())
    with tqdm(total=total, unit="B", unit_scale=True, desc="writing", delay=2) as bar:
        for file, names in split.filename_to_tensors.items():
            shard = {}
            for name in names:
                weight = reader.read(source_of[name]).to(plan[name].dtype)
                shard[name] = weight.clone().contiguous()
                bar.update(weight.nbytes)
            save_file(shard, folder / file, metadata={"format": "pt"})
            del shard
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / SAFE_WEIGHTS_INDEX_NAME).write_text(json.dumps(index, indent=1), encoding="utf-8")
    return len(split.filename_to_tensors)


def _compare_written(folder: Path, reader: WeightReader, moves: list[_Move]) -> int:
    """Reads both sides again; returns the number of weights, which are all equal."""
    with WeightReader(folder) as written:
        if written.entries.keys() != {move.target for move in moves}:
            raise ValueError(f"{folder} does not hold the weights that were written; try again.")
        for move in tqdm(moves, desc="checking", delay=2):
            found = written.read(move.target)
            if not torch.equal(found, reader.read(move.source).to(found.dtype)):
                raise ValueError(
                    f"The weight {move.target} was not written as it was read; check the disk, and "
                    "try again."
                )
    return len(moves)


# --- what lies beside the weights -----------------------------------------------------------------


def _write_ours(
    folder: Path, source: Path, config: EveConfig, processor: Any, dtype: torch.dtype | None
) -> None:
    kind = EveForConditionalGeneration if config.alignment_config is None else EveForPreTraining
    config.architectures = [kind.__name__]
    if dtype is not None:
        config.dtype = config.text_config.dtype = dtype
    config.save_pretrained(folder)
    if _stored_form(source) == "ours" and (source / "generation_config.json").is_file():
        shutil.copy(source / "generation_config.json", folder)
    else:
        _generation_config(config).save_pretrained(folder)
    processor.save_pretrained(folder)
    if (source / SENTENCEPIECE_FILE).is_file():
        shutil.copy(source / SENTENCEPIECE_FILE, folder)  # other programmes ask for it


def _generation_config(config: EveConfig) -> GenerationConfig:
    """Greedy; stops at the decoder's own end."""
    ids = ("bos_token_id", "eos_token_id", "pad_token_id")
    text = config.text_config.to_dict()
    return GenerationConfig(**{name: text.get(name) for name in ids})


def _write_published(
    folder: Path,
    source: Path,
    config: EveConfig,
    settings: dict[str, dict[str, Any]],
    processor: Any,
    dtype: torch.dtype | None,
) -> None:
    flat, preprocessor = settings["config"], settings["preprocessor"]
    if dtype is not None:
        flat["torch_dtype"] = str(dtype).removeprefix("torch.")
    for name, content in (("config.json", flat), (PREPROCESSOR_FILE, preprocessor)):
        (folder / name).write_text(json.dumps(content, indent=2), encoding="utf-8")
    _generation_config(config).save_pretrained(folder)
    processor.tokenizer.save_pretrained(folder)
    if (source / SENTENCEPIECE_FILE).is_file():
        shutil.copy(source / SENTENCEPIECE_FILE, folder)


# What the published programme fixes in its code, and so cannot be told otherwise.
_FIXED = {"num_attention_heads": 8, "num_channels": 3, "layer_norm_eps": 1e-5}


def _flat_config(config: EveConfig, pictures: EveImageProcessor) -> dict[str, dict[str, Any]]:
    """The published form of a configuration and its preprocessor.

    Raises:
        ValueError: if the published programme has no such model.
    """
    text, vision = config.text_config, config.vision_config
    odd = [f"vision_config.{k}" for k, value in _FIXED.items() if vision.to_dict()[k] != value]
    if config.projector_depth != 2:
        odd.append("projector_depth")
    if pictures.max_image_tokens is not None:
        odd.append("max_image_tokens")
    if text.model_type != "llama":
        odd.append(f"{text.model_type} decoder")
    elif text.rope_parameters["rope_type"] != "default":
        odd.append("rope_parameters")
    if odd:
        raise ValueError(
            f"The published form has no place for this model's {', '.join(odd)}; it knows Llama "
            "decoders with the published patch embedding layer only."
        )
    edge, cell = pictures.size["longest_edge"], vision.patch_size * vision.merge_size
    pool = pictures.size_multiple // cell
    preprocessor = {
        "image_size": edge,
        "image_size_clip": edge // pictures.size_multiple * 14,
        "patch_stride": vision.patch_size,
        "patch_stride_clip": 14,
        "conv_stride": vision.merge_size,
        "image_mean": list(pictures.image_mean),
        "image_std": list(pictures.image_std),
    }
    if pool * cell != pictures.size_multiple or vision.patch_size != 14:
        raise ValueError(
            f"The published form has no place for pictures rounded to {pictures.size_multiple} "
            f"pixels in patches of {vision.patch_size}; it knows patches of 14 only."
        )
    drop = {"architectures", "dtype", "model_type", "transformers_version", "rope_parameters"}
    flat = {key: value for key, value in text.to_diff_dict().items() if key not in drop}
    flat |= {key: text.to_dict()[key] for key in _ALWAYS_SAID}
    flat |= {
        "architectures": ["EVELlamaForCausalLM"],
        "model_type": "eve",
        "rope_theta": text.rope_parameters["rope_theta"],
        "rope_scaling": None,
        "torch_dtype": str(config.dtype or torch.float32).removeprefix("torch."),
        "mm_hidden_size": vision.hidden_size,
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_tower": f"openai/eve-patch14-anypixel-{edge}",
        "mm_vision_tower_clip": "openai/clip-vit-large-patch14-336",
        "requires_cliploss": config.alignment_config is not None,
        **_CONSTANT,
    }
    return {"config": flat, "preprocessor": preprocessor}


# Settings that are the same in all published configurations.
_CONSTANT = {
    "image_aspect_ratio": "square",
    "image_grid_pinpoints": None,
    "mm_use_im_patch_token": False,
    "mm_use_im_start_end": False,
    "mm_vision_select_feature": "patch",
    "mm_vision_select_layer": -2,
    "tune_mm_mlp_adapter": False,
    "use_mm_proj": True,
}
_ALWAYS_SAID = (
    *("bos_token_id", "eos_token_id", "pad_token_id", "vocab_size", "hidden_size"),
    *("intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
    *("max_position_embeddings", "rms_norm_eps", "hidden_act", "tie_word_embeddings"),
)

__all__ = ["Conversion", "convert", "convert_state_dict"]
