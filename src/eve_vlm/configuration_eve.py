"""Configuration of EVE: the decoder's own, the patch embedding's sizes, the aligner's sizes.

Everything that decides a weight's shape is here, and nothing else: the teacher is not (it belongs
to training), nor are picture sizes (they belong to the image processor).  Building one touches no
file. The defaults are the published 7B sizes (paper section 4.1).
"""

from os import PathLike
from typing import Any

from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig

from .published_eve import find_preprocessor, is_published, nested_config, teacher_width


class EveVisionConfig(PreTrainedConfig):
    """Sizes of the patch embedding layer.

    A picture is cut into patches of `patch_size` pixels; every `merge_size` x `merge_size` cell of
    patches becomes one token of width `hidden_size`, which the projector takes to the decoder's
    width.  `merge_attention` and `class_attention` switch its two attentions off, for comparisons
    (paper, table 4): a cell is then the mean of its patches, the class token a learned constant.
    """

    model_type = "eve_vision"
    base_config_key = "vision_config"

    patch_size: int = 14
    merge_size: int = 2
    num_channels: int = 3
    hidden_size: int = 1024
    num_attention_heads: int = 8
    merge_attention: bool = True
    class_attention: bool = True
    layer_norm_eps: float = 1e-5
    initializer_range: float = 0.02

    def __post_init__(self, **kwargs):
        for name in (
            "patch_size",
            "merge_size",
            "num_channels",
            "hidden_size",
            "num_attention_heads",
        ):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"vision_config.{name} is {getattr(self, name)}; it must be at least 1."
                )
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"vision_config.hidden_size ({self.hidden_size}) is not a multiple of "
                "num_attention_heads "
                f"({self.num_attention_heads}); choose a width that the heads divide."
            )
        super().__post_init__(**kwargs)


class EveAlignmentConfig(PreTrainedConfig):
    """Sizes of the patch aligning layer, which exists in training only (paper section 3.1).

    The aligner reads decoder layers L, L - tap_every, ... at the picture positions; only the last
    one where `tap_every` is None.  `pool_size` is how many tokens, each way, share one cell of the
    teacher: 1 at 672 pixels, 2 at 1344.
    """

    model_type = "eve_alignment"
    base_config_key = "alignment_config"

    teacher_hidden_size: int = 1024
    tap_every: int | None = 4
    num_attention_heads: int = 8
    pool_size: int = 1

    def __post_init__(self, **kwargs):
        for name in ("teacher_hidden_size", "tap_every", "num_attention_heads", "pool_size"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(
                    f"alignment_config.{name} is {getattr(self, name)}; it must be at least 1."
                )
        if self.teacher_hidden_size % self.num_attention_heads:
            raise ValueError(
                f"alignment_config.teacher_hidden_size ({self.teacher_hidden_size}) is not a "
                "multiple of "
                f"num_attention_heads ({self.num_attention_heads}); choose a number of heads that "
                "divides it."
            )
        super().__post_init__(**kwargs)


class EveConfig(PreTrainedConfig):
    """An encoder-free vision-language model on any decoder-only language model.

    `text_config` is the decoder's own configuration (any model type that `AutoModel` knows), never
    flattened into this one.  `image_token_id` is the placeholder id that the processor repeats once
    per picture token; it may lie beyond the decoder's vocabulary, as for the published checkpoints,
    whose
    32,000 words have no row for it.  `alignment_config` is only set for training.
    `projector_depth` counts the projector's linear layers; the published models have two.
    """

    model_type = "eve"
    sub_configs = {
        "text_config": AutoConfig,
        "vision_config": EveVisionConfig,
        "alignment_config": EveAlignmentConfig,
    }

    # Given as dicts or None (a config.json); configuration objects after construction.
    text_config: Any = None
    vision_config: Any = None
    alignment_config: Any = None
    image_token_id: int = 32000
    projector_depth: int = 2
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs):
        self.text_config = _text_config(self.text_config)
        _check_head(self.text_config)
        if self.vision_config is None:
            self.vision_config = EveVisionConfig()
        elif isinstance(self.vision_config, dict):
            self.vision_config = _vision_config(self.vision_config)
        if isinstance(self.alignment_config, dict):
            self.alignment_config = EveAlignmentConfig(**self.alignment_config)
        # The library ties weights by the outer flag; the decoder's own flag decides (SmolLM2 is
        # tied).
        self.tie_word_embeddings = bool(self.text_config.tie_word_embeddings)
        if self.image_token_id < 0:
            raise ValueError(f"image_token_id is {self.image_token_id}; token ids begin at 0.")
        if self.projector_depth < 1:
            raise ValueError(
                f"projector_depth is {self.projector_depth}; the projector has at least 1 layer."
            )
        # Losses are looked up by class name, which knows no "ForPreTraining" of ours.
        kwargs.setdefault("loss_type", "ForCausalLM")
        super().__post_init__(**kwargs)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | PathLike, *args, **kwargs
    ) -> "EveConfig":
        """The library's; remembers where from, because a published file needs its neighbours."""
        kwargs.setdefault("name_or_path", str(pretrained_model_name_or_path))
        return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs) -> "EveConfig":
        """The library's, which also takes the flat dictionary of a published checkpoint."""
        if is_published(config_dict):
            preprocessor = find_preprocessor(config_dict, kwargs.get("name_or_path"))
            config_dict = nested_config(
                config_dict, preprocessor, teacher_hidden_size=teacher_width(config_dict)
            )
        return super().from_dict(config_dict, **kwargs)


def _text_config(given: dict | PreTrainedConfig | None) -> PreTrainedConfig:
    """The decoder's configuration object; None means the published 7B Llama shape."""
    if given is None:
        return CONFIG_MAPPING["llama"](max_position_embeddings=4096)
    if isinstance(given, dict):
        given = dict(given)
        model_type = given.pop("model_type", "llama")
        if model_type not in CONFIG_MAPPING:
            raise ValueError(
                f"text_config.model_type is {model_type!r}, which the installed transformers does "
                "not know; give a decoder-only model type such as 'llama' or 'qwen3'."
            )
        return CONFIG_MAPPING[model_type](**given)
    return given


def _vision_config(given: dict) -> PreTrainedConfig:
    """Ours, or that of a model with another vision part (`encoder_twin_eve.py`)."""
    given = dict(given)
    model_type = given.pop("model_type", EveVisionConfig.model_type)
    if model_type == EveVisionConfig.model_type:
        return EveVisionConfig(**given)
    if model_type not in CONFIG_MAPPING:
        raise ValueError(
            f"vision_config.model_type is {model_type!r}, which is not known here; it is "
            f"{EveVisionConfig.model_type!r} for EVE, and other parts need eve_vlm imported."
        )
    return CONFIG_MAPPING[model_type](**given)


# What some decoders (Gemma 2, Granite, Cohere) do to logits behind the head; values of no effect.
LOGIT_SETTINGS = {
    "final_logit_softcapping": (None,),
    "logits_scaling": (None, 1),
    "logit_scale": (None, 1),
}


def _check_head(text_config: PreTrainedConfig) -> None:
    """Refuses decoders whose head is more than one matrix product: left out, it would be wrong."""
    settings = text_config.to_dict()
    for name, neutral in LOGIT_SETTINGS.items():
        if settings.get(name) not in neutral:
            raise ValueError(
                f"text_config.{name} is {settings[name]}: this decoder changes its logits behind "
                "the language head, which is not supported; take a decoder that does not."
            )


__all__ = ["EveAlignmentConfig", "EveConfig", "EveVisionConfig"]
