"""The model: patch embedding, projector, and any decoder of the library behind them.

A forward pass:
  1. `EvePatchEmbedding` and the projector turn the packed patches of all pictures into tokens of
     the decoder's width (`patch_embedding_eve.py`);
  2. they replace the image placeholders among the embedded words, in order;
  3. the decoder, an unchanged `AutoModel`, does the rest;
  4. the language head runs where it is needed: in training where there is a label, in generation on
     the last position.

Easy to get wrong: pictures have no batch dimension; they belong to the texts by the order of their
placeholders.

Legend: `B` batch, `T` text positions, `N` image tokens, `I` pictures, `D` decoder width.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AutoModel, GenerationMixin
from transformers.cache_utils import Cache
from transformers.modeling_outputs import (
    BaseModelOutputWithPast,
    BaseModelOutputWithPooling,
    CausalLMOutputWithPast,
)
from transformers.utils.generic import can_return_tuple

from .cache_name_eve import CACHE, the_cache
from .configuration_eve import EveConfig
from .language_loss_eve import language_loss
from .layer_taps_eve import LayerTaps
from .patch_embedding_eve import (
    EvePreTrainedModel,
    EveProjector,
    on_host,
    sample_of_picture,
    tokens_of_pictures,
    vision_tower_of,
)


@dataclass
class EveModelOutput(BaseModelOutputWithPast):
    """What `EveModel` returns beyond the decoder's output.

    image_hidden_states: picture tokens, (N, D).
    image_taps: the tapped layers' states at picture positions, each (N, D); None unless asked for.
    """

    image_hidden_states: torch.Tensor | None = None
    image_taps: tuple[torch.Tensor, ...] | None = None


@dataclass
class EveCausalLMOutput(CausalLMOutputWithPast):
    """What `EveForConditionalGeneration` returns; the cache goes by the library's name.

    loss: scalar, when labels were given.
    loss_terms: the loss by name, unweighted (`lm`, and `alignment` in pre-training).
    logits: (B, kept positions, vocabulary); None in training (the head runs where labels are).
    group_losses, group_counts: see `LanguageLoss`; when label groups were given.
    image_taps: see `EveModelOutput`.
    """

    image_hidden_states: torch.Tensor | None = None
    loss_terms: dict[str, torch.Tensor] | None = None
    group_losses: torch.Tensor | None = None
    group_counts: torch.Tensor | None = None
    image_taps: tuple[torch.Tensor, ...] | None = None


class EveModel(EvePreTrainedModel):
    """Patch embedding, projector and decoder, without a language head."""

    def __init__(self, config: EveConfig):
        super().__init__(config)
        self.vision_tower = vision_tower_of(config.vision_config)
        self.multi_modal_projector = EveProjector(config)
        self.language_model = AutoModel.from_config(config.text_config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """The decoder's word embedding."""
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replaces the decoder's word embedding."""
        self.language_model.set_input_embeddings(value)

    def get_image_features(
        self, pixel_values: torch.Tensor, image_grid_thw: torch.Tensor, **kwargs
    ) -> BaseModelOutputWithPooling:
        """Pictures as the decoder sees them.

        Returns:
            `last_hidden_state` (N, D) packed, and `pooler_output`, one (tokens, D) per picture.
        """
        image_grid_thw = on_host(image_grid_thw)  # once: whatever is read of it is there then
        tokens = self.multi_modal_projector(self.vision_tower(pixel_values, image_grid_thw))
        sizes = tokens_of_pictures(image_grid_thw, self.config.vision_config.merge_size)
        return BaseModelOutputWithPooling(
            last_hidden_state=tokens, pooler_output=torch.split(tokens, sizes.tolist())
        )

    def _placeholders(
        self, input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor, expected: int
    ) -> torch.Tensor:
        """(N,) places among all B * T where a picture token goes; the host waits for their number.

        Raises:
            ValueError: with both numbers, if placeholders and picture tokens differ in number.
        """
        if input_ids is None:
            if self.config.image_token_id >= self.config.text_config.vocab_size:
                raise ValueError(
                    f"The image placeholder {self.config.image_token_id} has no embedding to be "
                    "found by; give input_ids, or inputs_embeds with the pictures already in them."
                )
            placeholder = inputs_embeds.new_full((), self.config.image_token_id, dtype=torch.long)
            mask = (inputs_embeds == self.get_input_embeddings()(placeholder)).all(-1)
        else:
            mask = input_ids == self.config.image_token_id
        places = mask.flatten().nonzero().squeeze(1)
        if len(places) != expected:
            raise ValueError(
                f"The text holds {len(places)} image placeholders but the pictures make "
                f"{expected} tokens; "
                "let EveProcessor make text and pictures together, and do not cut its output."
            )
        return places

    def _embed(
        self,
        input_ids: torch.Tensor | None,
        inputs_embeds: torch.Tensor | None,
        pixel_values: torch.Tensor | None,
        image_grid_thw: torch.Tensor | None,
        mm_encoder_outputs: dict[str, Any] | None,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """Words with pictures put in (B, T, D), their places (N,) of B * T, their tokens (N, D)."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Give exactly one of input_ids and inputs_embeds.")
        if (pixel_values is None) != (image_grid_thw is None):
            raise ValueError("Give pixel_values and image_grid_thw together, or neither of them.")
        embeds: Any = inputs_embeds
        if input_ids is not None:
            # The placeholder may have no row in the embedding; what stands there is overwritten.
            words = input_ids.masked_fill(input_ids == self.config.image_token_id, 0)
            embeds = self.get_input_embeddings()(words)
        features = None
        if mm_encoder_outputs and mm_encoder_outputs.get("image") is not None:
            features = torch.cat(list(mm_encoder_outputs["image"].pooler_output))
        elif pixel_values is not None and image_grid_thw is not None:
            features = self.get_image_features(pixel_values, image_grid_thw).last_hidden_state
        if features is None:
            zero = self._untouched_patch_embedding() if self.training else None
            return embeds if zero is None else embeds + zero, None, None
        features = features.to(embeds.device, embeds.dtype)
        places = self._placeholders(input_ids, embeds, len(features))
        mixed = embeds.flatten(0, 1).index_copy(0, places, features)
        return mixed.view_as(embeds), places, features

    def _untouched_patch_embedding(self) -> torch.Tensor:
        """Exactly zero, but through every patch embedding weight.

        A text-only batch would otherwise leave them out of one rank's backward pass, and the
        collectives of DDP and ZeRO-3 wait for ever (QwenLM/Qwen3-VL#126).  One blank cell is the
        cheapest picture.
        """
        vision, device = self.config.vision_config, self.vision_tower.row_end_embedding.device
        pixels = torch.zeros(
            vision.merge_size**2, vision.num_channels * vision.patch_size**2, device=device
        )
        grid = torch.tensor([[1, vision.merge_size, vision.merge_size]])
        features = self.multi_modal_projector(self.vision_tower(pixels, grid))
        return (0.0 * features.sum()).to(self.language_model.dtype)

    @can_return_tuple  # vLLM asks for tuples
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.Tensor | None = None,
        image_grid_thw: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        mm_encoder_outputs: dict[str, Any] | None = None,
        image_taps: tuple[int, ...] | None = None,
        cache: Cache | None = None,
        **kwargs,
    ) -> EveModelOutput:
        """Runs the decoder over words and pictures.

        Args:
            input_ids: (B, T), with one image placeholder per picture token.
            pixel_values, image_grid_thw: all pictures of the batch, packed in the order of their
                placeholders.
            attention_mask: (B, T), or None for packed documents with restarting `position_ids`.
            mm_encoder_outputs: `{"image": ...}` from `get_image_features`, instead of pixels.
            image_taps: layers whose states at picture positions are returned (0 is the embedded
                input, the number of layers is the last state after the final norm).
            past_key_values, cache: one cache by either name.
        """
        cache = the_cache(past_key_values, cache)
        inputs_embeds, places, features = self._embed(
            input_ids, inputs_embeds, pixel_values, image_grid_thw, mm_encoder_outputs
        )
        beginning = cache is None or cache.get_seq_length() == 0
        if features is None and input_ids is not None and beginning:
            # Later steps of generation have their pictures in the cache, and no time to count.
            self._placeholders(input_ids, inputs_embeds, 0)
        taps = LayerTaps(self.language_model, image_taps)
        with taps:
            outputs = self.language_model(
                inputs_embeds=inputs_embeds,
                attention_mask=attention_mask,
                position_ids=position_ids,
                **{CACHE: cache},
                **kwargs,
            )
        return EveModelOutput(
            last_hidden_state=outputs.last_hidden_state,
            **{CACHE: outputs.get(CACHE)},
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=features,
            image_taps=taps.at(places, inputs_embeds, outputs.last_hidden_state),
        )


class EveForConditionalGeneration(EvePreTrainedModel, GenerationMixin):
    """The model that answers: `EveModel` and a language head.

    `loss_implementation` says who computes the language loss (`language_loss_eve.py`).
    """

    loss_implementation: str = "auto"

    _tp_plan = {"lm_head": "colwise_gather_output"}

    def __init__(self, config: EveConfig):
        super().__init__(config)
        self.model = EveModel(config)
        self.lm_head = nn.Linear(
            config.text_config.hidden_size, config.text_config.vocab_size, bias=False
        )
        # Not every decoder calls its word embedding `embed_tokens` (GPT-2: `wte`).
        words = self.get_input_embeddings()
        name = next(name for name, module in self.named_modules() if module is words)
        self._tied_weights_keys = {"lm_head.weight": f"{name}.weight"}
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """The decoder's word embedding."""
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replaces the decoder's word embedding."""
        self.model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        """The language head."""
        return self.lm_head

    def set_output_embeddings(self, value: nn.Linear) -> None:
        """Replaces the language head."""
        self.lm_head = value

    def get_image_features(
        self, pixel_values: torch.Tensor, image_grid_thw: torch.Tensor, **kwargs
    ) -> BaseModelOutputWithPooling:
        """See `EveModel.get_image_features`."""
        return self.model.get_image_features(pixel_values, image_grid_thw)

    @can_return_tuple  # vLLM asks for tuples
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.Tensor | None = None,
        image_grid_thw: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        num_items_in_batch: torch.Tensor | int | None = None,
        mm_encoder_outputs: dict[str, Any] | None = None,
        cache: Cache | None = None,
        **kwargs,
    ) -> EveCausalLMOutput:
        """See `EveModel.forward`.

        Args:
            labels: (B, T), -100 where nothing is to be learnt.  With labels no logits are returned
                in training mode: the head then runs only at the positions that have a label.
            logits_to_keep: number of last positions, or positions, to compute logits for; 0 means
                all.
            num_items_in_batch: labels in the whole accumulated batch, or the sum of their weights,
                to divide the summed loss by.
            label_weights, label_groups, num_groups: `weights`, `groups` and `num_groups` of
                `language_loss`, by keyword.
        """
        # Not in the signature: where evaluation looks for labels, Trainer demands every argument
        # with "label" in its name.
        weights, groups = kwargs.pop("label_weights", None), kwargs.pop("label_groups", None)
        num_groups = kwargs.pop("num_groups", None)
        if labels is not None:
            # A cache would make packed documents see each other, silently.
            kwargs["use_cache"] = False
        outputs = self.model(
            input_ids=input_ids,
            pixel_values=pixel_values,
            image_grid_thw=image_grid_thw,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=the_cache(past_key_values, cache),
            inputs_embeds=inputs_embeds,
            mm_encoder_outputs=mm_encoder_outputs,
            **kwargs,
        )
        hidden, loss, logits = outputs.last_hidden_state, None, None
        if labels is not None:
            loss = language_loss(
                hidden,
                self.lm_head,
                labels,
                weights=weights,
                groups=groups,
                num_groups=num_groups,
                num_items_in_batch=num_items_in_batch,
                implementation=self.loss_implementation,
            )
        if labels is None or not self.training:
            last = isinstance(logits_to_keep, int)
            kept = slice(-logits_to_keep, None) if last else logits_to_keep
            logits = self.lm_head(hidden[:, kept, :])
        return EveCausalLMOutput(
            loss=None if loss is None else loss.total,
            logits=logits,
            **{CACHE: outputs.get(CACHE)},
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=outputs.image_hidden_states,
            loss_terms=None if loss is None else {"lm": loss.total.detach()},
            group_losses=None if loss is None else loss.group_losses,
            group_counts=None if loss is None else loss.group_counts,
            image_taps=outputs.image_taps,
        )

    def prepare_inputs_for_generation(
        self, input_ids: torch.Tensor, inputs_embeds: torch.Tensor | None = None, **kwargs
    ) -> dict[str, Any]:
        """The library's inputs; pictures in the first step only, later they are in the cache."""
        first = kwargs.get("is_first_iteration", False) or not kwargs.get("use_cache", True)
        inputs = super().prepare_inputs_for_generation(
            input_ids, inputs_embeds=inputs_embeds, **kwargs
        )
        if not first:
            for name in ("pixel_values", "image_grid_thw", "mm_encoder_outputs"):
                inputs.pop(name, None)
        return inputs

    def _expand_inputs_for_generation(
        self, expand_size: int = 1, is_encoder_decoder: bool = False, input_ids=None, **model_kwargs
    ):
        """Repeats pictures sample by sample for beams and several answers.

        The library repeats each row of packed pixels next to itself, which keeps every count right
        and every picture wrong (seen: 6 of 9 sequences).
        """
        pixels = model_kwargs.pop("pixel_values", None)
        grids = model_kwargs.pop("image_grid_thw", None)
        if expand_size > 1 and pixels is not None:
            owner = sample_of_picture(input_ids, grids, self.config)
            counts = torch.bincount(owner, minlength=input_ids.shape[0]).tolist()
            per_picture = pixels.split(grids.prod(-1).tolist())
            order = [
                index
                for group in torch.arange(len(owner)).split(counts)
                for _ in range(expand_size)
                for index in group.tolist()
            ]
            pixels, grids = torch.cat([per_picture[index] for index in order]), grids[order]
        input_ids, model_kwargs = super()._expand_inputs_for_generation(
            expand_size=expand_size,
            is_encoder_decoder=is_encoder_decoder,
            input_ids=input_ids,
            **model_kwargs,
        )
        if pixels is not None:
            model_kwargs |= {"pixel_values": pixels, "image_grid_thw": grids}
        return input_ids, model_kwargs


__all__ = ["EveForConditionalGeneration", "EveModel"]
