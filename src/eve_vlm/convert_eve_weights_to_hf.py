"""Published EVE v1 checkpoints to this package's names: weights, configuration, tokenizer.

`RENAMES` is the only place where a published weight name stands beside ours.  Easy to get wrong: a
published checkpoint also holds the teacher, twice; both copies are dropped.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerFast

from .configuration_eve import EveAlignmentConfig, EveConfig, EveVisionConfig
from .image_processing_eve import EveImageProcessor
from .processing_eve import VICUNA_CHAT_TEMPLATE

# (published, ours); the longest published prefix that fits wins, and a name that none fits is an
# error.
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
)
ALIGNER_TAPS = (
    "model.vision_tower_compressor.norm_layer."  # then "<tap>.0." its norm, "<tap>.1." its map
)
TEACHER_COPIES = ("model.vision_clip.", "model.vision_tower_compressor.clip_layer.")
# Buffers that older transformers wrote into checkpoints and newer ones compute.
COMPUTED = (".rotary_emb.inv_freq", ".position_ids")


def rename_weight(published: str) -> str | None:
    """Our name of a published weight; None for a teacher's copy or a computed buffer.

    >>> rename_weight("model.vision_tower.local_attention.kv.1.weight")
    'model.vision_tower.merge_attention.key_value.weight'

    Raises:
        ValueError: if no rule knows the name.
    """
    if published.startswith(TEACHER_COPIES) or published.endswith(COMPUTED):
        return None
    if published.startswith(ALIGNER_TAPS):
        tap, part, leaf = published.removeprefix(ALIGNER_TAPS).split(".")
        return f"aligner.{ {'0': 'norms', '1': 'maps'}[part] }.{tap}.{leaf}"
    rules = [rule for rule in RENAMES if published.startswith(rule[0])]
    if not rules:
        raise ValueError(
            f"The weight {published!r} is not one that a published EVE v1 checkpoint holds; check "
            "that the file is one."
        )
    prefix, ours = max(rules, key=lambda rule: len(rule[0]))
    return ours + published.removeprefix(prefix)


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


# Settings of the flat published configuration that belong to training or to the picture side, not
# to the decoder; everything else there is the decoder's.
_NOT_OF_DECODER = (
    "architectures",
    "image_aspect_ratio",
    "image_grid_pinpoints",
    "model_type",
    "requires_cliploss",
    "transformers_version",
    "vision_tower_lr",
    "_name_or_path",
)


def config_from_published(
    config: Mapping, preprocessor: Mapping, *, teacher_hidden_size: int | None = None
) -> EveConfig:
    """Nests a published flat configuration; `teacher_hidden_size` adds the aligner's part."""
    text = {
        name: value
        for name, value in config.items()
        if name not in _NOT_OF_DECODER and not name.startswith(("mm_", "tune_", "use_mm_"))
    }
    if "torch_dtype" in text:
        text["dtype"] = text.pop("torch_dtype")
    if text.get("rope_scaling") is None:
        text.pop("rope_scaling", None)
    alignment = None
    if teacher_hidden_size is not None:
        alignment = EveAlignmentConfig(
            teacher_hidden_size=teacher_hidden_size, pool_size=_pool_size(preprocessor)
        )
    return EveConfig(
        text_config={"model_type": "llama", **text},
        vision_config=EveVisionConfig(
            patch_size=preprocessor["patch_stride"],
            merge_size=preprocessor["conv_stride"],
            hidden_size=config["mm_hidden_size"],
        ),
        alignment_config=alignment,
        image_token_id=config["vocab_size"],
    )


def _pool_size(preprocessor: Mapping) -> int:
    tokens = (
        preprocessor["image_size"] // preprocessor["patch_stride"] // preprocessor["conv_stride"]
    )
    return tokens // (preprocessor["image_size_clip"] // preprocessor["patch_stride_clip"])


def image_processor_from_published(preprocessor: Mapping) -> EveImageProcessor:
    """The image processor that a published `preprocessor_config.json` describes."""
    scale = preprocessor["image_size"] // preprocessor["image_size_clip"]
    return EveImageProcessor(
        size={"longest_edge": preprocessor["image_size"]},
        size_multiple=preprocessor["patch_stride_clip"] * scale,
        patch_size=preprocessor["patch_stride"],
        merge_size=preprocessor["conv_stride"],
        image_mean=preprocessor["image_mean"],
        image_std=preprocessor["image_std"],
    )


def tokenizer_from_published(folder: str | Path) -> PreTrainedTokenizerFast:
    """The tokenizer of a published checkpoint with `<image>` added behind its vocabulary.

    Read from `tokenizer.json` by the plain fast class: `AutoTokenizer` of transformers 5.23 gives
    other ids for pieces that begin with a blank (seen).
    """
    file = Path(folder) / "tokenizer.json"
    if not file.is_file():
        raise ValueError(f"{file} is missing; convert the tokenizer to the fast format first.")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(file),
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<unk>",
        extra_special_tokens={"image_token": "<image>"},
        chat_template=VICUNA_CHAT_TEMPLATE,
        padding_side="right",
    )
    return tokenizer


__all__ = [
    "config_from_published",
    "convert_state_dict",
    "image_processor_from_published",
    "rename_weight",
    "tokenizer_from_published",
]
