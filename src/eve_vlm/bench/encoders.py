"""Encoder-based models of equal decoder: LLaVA-1.5 and LLaVA-1.6 from their configurations.

The library's own classes with random weights, around the very decoder that EVE has here, so what
differs is how pictures get into it.  LLaVA-1.5 sees one square, LLaVA-1.6 the same square and 2 x 2
parts of a larger one.  Easy to get wrong: LLaVA-1.6 adds the end of each row to the parts' tokens,
so a square takes 2928 positions where the paper counts 5 x 576 = 2880.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import (
    CLIPVisionConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import (
    LlavaNextImageProcessorPil,
)

from eve_vlm.flops import flops_of, terms_of, work_of
from eve_vlm.modeling_eve import EveForConditionalGeneration

from .answering import PREFILL, cache_bytes, in_parts, parts_needed
from .measuring import Case, Clock, Need, timed, weight_bytes
from .paper import TILES, encoder_flops, projector_flops
from .words import picture

NAMES = ("llava-1.5", "llava-1.6")
Run = Callable[[Clock], dict[str, float]]
FEATURE_LAYER = -2  # so that one layer of the encoder is run in vain; the floor does without it


class EncoderBased:
    """One of both models, and a question about a square ready for it.

    Args:
        name: of `NAMES`.
        eve: whose decoder and head it shares.
        encoder: of the vision encoder.
        words: ids of the question.
    """

    def __init__(
        self,
        name: str,
        eve: EveForConditionalGeneration,
        encoder: CLIPVisionConfig,
        words: torch.Tensor,
    ):
        self.name, self.eve, self.encoder = name, eve, encoder
        self.tiles = TILES if name == "llava-1.6" else 1
        self.model = _built(name, eve, encoder)
        side = encoder.image_size
        square = {"height": side, "width": side}
        settings = {"size": {"shortest_edge": side}, "crop_size": square}
        self.pictures: Any = (
            CLIPImageProcessorPil(**settings)
            if self.tiles == 1
            else LlavaNextImageProcessorPil(image_grid_pinpoints=[[2 * side] * 2], **settings)
        )
        self.picture = picture((2 * side, 2 * side))
        made = self.pictures(images=[self.picture], return_tensors="pt")
        self.inputs = {key: value.to(eve.device) for key, value in made.items()}
        self.inputs["pixel_values"] = self.inputs["pixel_values"].to(eve.dtype)
        self.image_tokens = image_tokens(encoder, tiled=self.tiles > 1)
        placeholders = torch.full((self.image_tokens,), eve.config.image_token_id)
        self.input_ids = torch.cat([placeholders, words])[None].to(eve.device)

    @torch.inference_mode()
    def see(self) -> Any:
        """Pictures through encoder and projector."""
        return self.model.model.get_image_features(
            **self.inputs,
            vision_feature_layer=FEATURE_LAYER,
            vision_feature_select_strategy="default",
        )

    @torch.inference_mode()
    def read(self) -> Any:
        """Picture and question, up to what decides the first token."""
        return self.model(input_ids=self.input_ids, use_cache=True, logits_to_keep=1, **self.inputs)

    def cases(self, edge: int) -> list[Case]:
        """Preprocessing, encoder with projector, and prefill."""
        parts: list[nn.Module] = [
            self.model.model.vision_tower,
            self.model.model.multi_modal_projector,
        ]
        pixels = self.inputs["pixel_values"].nbytes
        width = self.eve.config.text_config.hidden_size
        patches = self.tiles * (self.encoder.image_size // self.encoder.patch_size) ** 2
        seeing = self.tiles * encoder_flops(
            self.encoder, layers=self.encoder.num_hidden_layers + FEATURE_LAYER + 1
        ) + patches * projector_flops(self.encoder.hidden_size, width)
        made = self.image_tokens * width * self.eve.dtype.itemsize
        length = self.input_ids.shape[1]
        decoder = flops_of(
            [term for term in terms_of(self.eve) if term.part in ("decoder", "attention", "head")],
            work_of([length], labels=1, config=self.eve.config),
        ).forward
        moved = weight_bytes([self.model]) + length * cache_bytes(self.eve)
        read = 3 * self.picture.width * self.picture.height

        def process() -> Any:
            return self.pictures(images=[self.picture], return_tensors="pt")

        def case(section: str, run: Run, needs: dict[str, Need], **given: Any) -> Case:
            return Case(
                section=section,
                model=self.name,
                name=f"{edge} px: one square",
                run=run,
                needs=needs,
                facts={"longest_edge": edge, "image_tokens": self.image_tokens},
                **given,
            )

        seen, tokens = Need(seeing, weight_bytes(parts) + pixels + made), self.image_tokens
        return [
            case(
                "preprocessing",
                lambda clock: {"seconds": timed(clock, process)},
                {"seconds": Need(0, read + pixels)},
                tokens={"seconds": tokens},
            ),
            case(
                "embedding",
                lambda clock: {"seconds": timed(clock, self.see)},
                {"seconds": seen},
                tokens={"seconds": tokens},
                modules=parts,
            ),
            case(
                "prefill",
                lambda clock: in_parts(clock, self.read, self.model.model),
                parts_needed(Need(seeing + decoder, moved), seen),
                tokens=dict.fromkeys(PREFILL, length) | {"vision": tokens},
                modules=[self.model],
            ),
        ]


def image_tokens(encoder: CLIPVisionConfig, *, tiled: bool) -> int:
    """Positions of a square: its patches, and with parts those of 2 x 2 of them with row ends.

    >>> from eve_vlm.bench.paper import CLIP_L_336
    >>> image_tokens(CLIP_L_336, tiled=False), image_tokens(CLIP_L_336, tiled=True)
    (576, 2928)
    """
    side = encoder.image_size // encoder.patch_size
    return side**2 + (2 * side * (2 * side + 1) if tiled else 0)


def encoder_bytes(encoder: CLIPVisionConfig, width: int, dtype: torch.dtype) -> int:
    """Weights of encoder and projector, before they are made; embeddings and norms left out."""
    layer = 4 * encoder.hidden_size**2 + 2 * encoder.hidden_size * encoder.intermediate_size
    projector = encoder.hidden_size * width + width**2
    return (encoder.num_hidden_layers * layer + projector) * dtype.itemsize


def _built(
    name: str, eve: EveForConditionalGeneration, encoder: CLIPVisionConfig
) -> LlavaForConditionalGeneration | LlavaNextForConditionalGeneration:
    """Built around a decoder of one layer, which EVE's then takes the place of."""
    text = type(eve.config.text_config).from_dict(
        eve.config.text_config.to_dict() | {"num_hidden_layers": 1, "layer_types": None}
    )
    given = {
        "vision_config": encoder,
        "text_config": text,
        "image_token_id": eve.config.image_token_id,
        "vision_feature_layer": FEATURE_LAYER,
    }
    side = encoder.image_size
    with torch.random.fork_rng(), eve.device:
        torch.manual_seed(0)
        model: Any = (
            LlavaForConditionalGeneration._from_config(LlavaConfig(**given), dtype=eve.dtype)
            if name == NAMES[0]
            else LlavaNextForConditionalGeneration._from_config(
                LlavaNextConfig(**given, image_grid_pinpoints=[[2 * side] * 2]), dtype=eve.dtype
            )
        )
    model.model.language_model, model.lm_head = eve.model.language_model, eve.lm_head
    return model.eval().requires_grad_(False)


__all__ = ["NAMES", "EncoderBased", "encoder_bytes", "image_tokens"]
