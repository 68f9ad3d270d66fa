"""The model that is measured: a shape with random weights, or a folder with its own.

Random weights cost what learnt ones cost, so a shape needs no download.  The decoder of `small` is
that of SmolLM2-135M, of `eve-7b` that of Vicuna-7B; both have the published patch embedding, and
`eve-small` the narrower one of the model that comes with this package.  Easy to get wrong: a larger
picture needs another `size_multiple`, as the published models have it (28 pixels at 672, 56 at
1344), or narrow pictures get other grids than theirs.
"""

import copy
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import CLIPVisionConfig, PreTrainedTokenizerBase

from eve_vlm.configuration_eve import EveAlignmentConfig, EveConfig, EveVisionConfig
from eve_vlm.data.tokenizer import train_tokenizer
from eve_vlm.image_processing_eve import EveImageProcessor
from eve_vlm.loading import load_config, load_model, load_processor
from eve_vlm.modeling_eve import EveForConditionalGeneration
from eve_vlm.processing_eve import EveProcessor
from eve_vlm.serve.engine import EveEngine
from eve_vlm.serve.static_rows import StaticRows

from .paper import CLIP_L_336
from .words import ANSWER, CAPTION, QUESTION

UNITS = 24  # size multiples along the longest edge of the published models


@dataclass(frozen=True, kw_only=True, slots=True)
class Shape:
    """Sizes of a model with random weights, and of the encoder that it is compared with."""

    text: dict[str, Any]
    """The decoder's configuration."""
    vision: dict[str, Any]
    """The patch embedding's."""
    edges: tuple[int, ...]
    """Longer sides of pictures, unless others are asked for."""
    encoder: CLIPVisionConfig = field(default_factory=lambda: CLIP_L_336)
    """Of the encoder-based models; twice its picture is the second one's."""
    teacher: int = 1024
    """Width of the teacher's features."""
    tap_every: int = 4
    """Layers between two taps of the aligner."""


IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
SMOLLM2: dict[str, Any] = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49_152,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
}
SHAPES = {
    "small": Shape(text=SMOLLM2, vision={}, edges=(672, 1344)),
    "eve-small": Shape(
        text=SMOLLM2,
        vision={"hidden_size": 768, "num_attention_heads": 8},
        edges=(336,),
        teacher=1280,
    ),
    "eve-7b": Shape(text={"max_position_embeddings": 4096}, vision={}, edges=(672, 1344)),
    "tiny": Shape(
        text={
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "vocab_size": 512,
            "max_position_embeddings": 2048,
        },
        vision={"hidden_size": 64},
        edges=(112, 224),
        encoder=CLIPVisionConfig(
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            image_size=56,
            patch_size=14,
        ),
        teacher=32,
        tap_every=2,
    ),
}


class EndlessEngine(EveEngine):
    """The engine, for answers that are all equally long: nothing ends one early."""

    def ends(self) -> list[int]:
        """None."""
        return []


class Subject:
    """What is measured.

    Args:
        name: of a shape, or a folder.
        model: a folder with weights; None gives the shape random ones.
        device, dtype: where it runs and in which numbers.
        static_cache: answers over a cache of fixed size, one for all sizes of pictures.
        compile_steps: compiles the decoder's layers for it.
    """

    def __init__(
        self,
        name: str,
        *,
        model: str | Path | None = None,
        device: torch.device,
        dtype: torch.dtype,
        static_cache: bool = False,
        compile_steps: bool = False,
    ):
        self.static_cache, self.compile_steps = static_cache or compile_steps, compile_steps
        self.name, self.device, self.dtype = name if model is None else str(model), device, dtype
        self.folder = model if model is not None else None if name in SHAPES else name
        self.random = model is None
        self.shape = SHAPES.get(name, SHAPES["small"]) if model is None else SHAPES["small"]
        self.tokenizer, self._pictures = self._words()
        self.config = self._config()
        self._model: EveForConditionalGeneration | None = None
        self._static: StaticRows | None = None

    @property
    def edges(self) -> tuple[int, ...]:
        """Longer sides of pictures that it is measured with unless asked otherwise."""
        if self.folder is None:
            return self.shape.edges
        return (self._pictures.size["longest_edge"],)

    @property
    def model(self) -> EveForConditionalGeneration:
        """The model, made when it is first asked for."""
        if self._model is None:
            self._model = self._make().eval().requires_grad_(False)
        return self._model

    def processor(self, edge: int) -> EveProcessor:
        """Its processor for pictures whose longer side becomes `edge` pixels.

        Raises:
            ValueError: if patches do not fit the edge.
        """
        pictures = copy.deepcopy(self._pictures)
        pictures.size = {"longest_edge": edge}
        if self.folder is None:
            cell, step = pictures.patch_size * pictures.merge_size, edge // UNITS
            published = edge % UNITS == 0 and step > cell and step % cell == 0
            pictures.size_multiple = step if published else cell
        pictures.grid_of(1, 1)  # refuses sizes that do not fit each other
        return EveProcessor(pictures, self.tokenizer, chat_template=self._template)

    def engine(self, edge: int) -> EndlessEngine:
        """What users ask, for pictures of this size."""
        engine = EndlessEngine(self.model, self.processor(edge))
        if self.static_cache:
            compiled: dict[str, Any] | None = {} if self.compile_steps else None
            self._static = self._static or StaticRows(self.model, compiled=compiled)
            engine.static = self._static
        return engine

    def aligned_config(self) -> EveConfig:
        """The configuration with an aligner: its own, or one of the shape's sizes."""
        config = EveConfig.from_dict(self.config.to_dict())
        if config.alignment_config is None:
            config.alignment_config = EveAlignmentConfig(
                teacher_hidden_size=self.shape.teacher, tap_every=self.shape.tap_every
            )
        return config

    def shorter(self, layers: int) -> EveForConditionalGeneration:
        """A model of random weights that differs in the number of its decoder's layers."""
        config = EveConfig.from_dict(self.config.to_dict())
        text = config.text_config
        text.num_hidden_layers = layers
        kinds = text.to_dict().get("layer_types")
        if kinds:
            text.layer_types = kinds[:layers]
        return self._random(config)

    def _words(self) -> tuple[PreTrainedTokenizerBase, EveImageProcessor]:
        if self.folder is not None:
            processor = load_processor(self.folder)
            self._template = processor.chat_template
            return processor.tokenizer, processor.image_processor
        tokenizer = train_tokenizer([QUESTION, CAPTION, ANSWER] * 4, vocab_size=400)
        self._template = tokenizer.chat_template
        return tokenizer, EveImageProcessor()

    def _config(self) -> EveConfig:
        if self.folder is not None:
            config = load_config(self.folder)
            config.alignment_config = None
            return config
        return EveConfig(
            text_config={"model_type": "llama", **IDS, **self.shape.text},
            vision_config=EveVisionConfig(**self.shape.vision),
            image_token_id=self.tokenizer.convert_tokens_to_ids("<image>"),
        )

    def _make(self) -> EveForConditionalGeneration:
        if self.random or self.folder is None:
            return self._random(self.config)
        return load_model(self.folder, device=str(self.device), dtype=self.dtype)

    def _random(self, config: EveConfig) -> EveForConditionalGeneration:
        """Made where and as it is needed: 7B in float32 on the host would be 27 GB and minutes."""
        with torch.random.fork_rng(), self.device:
            torch.manual_seed(0)
            model = EveForConditionalGeneration._from_config(config, dtype=self.dtype)
        return model.eval().requires_grad_(False)


def globs_of(stage: str) -> Collection[str]:
    """What learns in a stage, as the published recipes have it."""
    return TRAINABLE[stage]


TRAINABLE: dict[str, Sequence[str]] = {
    "prealign": ("model.vision_tower.*", "model.multi_modal_projector.*", "aligner.*"),
    "pretrain": ("*",),
    "finetune": ("*",),
}

__all__ = ["SHAPES", "EndlessEngine", "Shape", "Subject", "globs_of"]
