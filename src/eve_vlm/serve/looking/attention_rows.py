"""Rows of attention, read from a model while it says a given answer, without the whole square.

The prompt is read once as usual, into a cache; only the positions that choose the answer's tokens
run with eager attention, the one kind that tells its weights.  Easy to get wrong: the kind of
attention belongs to the model, not to a call, so it must be put back whatever happens.

Legend: `L` layers, `H` heads, `A` answer tokens, `T` prompt tokens, `S` = T + A - 1, `D` width.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from transformers import DynamicCache, PreTrainedModel

from eve_vlm.modeling_eve import EveForConditionalGeneration
from eve_vlm.patch_embedding_eve import at_least_float32

BLOCK_BYTES = 2**28  # attention of one forward pass; a 7B model with HD pictures: 25 rows of 10 MB
WHOLE = 0.01  # the weights of a row sum to 1 this closely, also when rounded to bfloat16 (0.002)


@contextmanager
def _eager(decoder: PreTrainedModel) -> Iterator[None]:
    """Attention that can be read; the decoder's own kind is put back whatever happens."""
    before = decoder.config._attn_implementation
    decoder.set_attn_implementation("eager")
    try:
        yield
    finally:
        decoder.set_attn_implementation(before)


def attention_rows(
    model: EveForConditionalGeneration,
    inputs: Mapping[str, torch.Tensor],
    answer_ids: Sequence[int],
    layers: list[int],
    *,
    gradient: bool,
) -> Iterator[torch.Tensor]:
    """The rows of the positions that choose the answer's tokens.

    Args:
        inputs: one unpadded prompt: input_ids (1, T), pixel_values, image_grid_thw.
        layers: those that are wanted.
        gradient: gives the positive part of attention x d log p / d attention instead, p being the
            probability of the token that the position chooses.

    Yields:
        (L, H, some of A, S) at least float32, on the model's device; 0 behind the position itself.

    Raises:
        ValueError: if the decoder does not tell its attention, or not all of it.
    """
    decoder, cache = model.model.language_model, DynamicCache()
    given = {name: inputs[name].to(model.device) for name in ("pixel_values", "image_grid_thw")}
    ids = inputs["input_ids"].to(model.device)
    chosen = torch.tensor([answer_ids], device=model.device)  # (1, A)
    asking = torch.cat([ids[:, -1:], chosen[:, :-1]], 1)  # the positions that choose them
    with torch.no_grad():
        model.model(input_ids=ids[:, :-1], cache=cache, use_cache=True, **given)
        embeds = model.get_input_embeddings()(asking)  # (1, A, D)
    length = ids.shape[1] + asking.shape[1] - 1
    text = model.config.text_config
    per_row = text.num_hidden_layers * text.num_attention_heads * length * 4
    # A token's own gradient needs a pass of its own: other rows' tokens would add theirs.
    step = 1 if gradient else max(1, BLOCK_BYTES // per_row)
    for first in range(0, asking.shape[1], step):
        # Inside the loop, so that the decoder is as it was while the caller has a block in hand.
        with _eager(decoder), torch.set_grad_enabled(gradient):
            outputs = model(
                # Frozen weights make no graph; what goes in does.
                inputs_embeds=embeds[:, first : first + step].detach().requires_grad_(gradient),
                cache=cache,
                use_cache=True,
                output_attentions=True,
                logits_to_keep=1,
            )
        attentions = _checked(model, outputs.attentions)
        block = at_least_float32(torch.stack([attentions[layer][0].detach() for layer in layers]))
        if gradient:
            told = at_least_float32(outputs.logits[0, -1]).log_softmax(-1)[chosen[0, first]]
            slopes = torch.autograd.grad(told, [attentions[layer] for layer in layers])
            block = (block * torch.stack([slope[0] for slope in slopes])).relu()
            # Else every pass would keep the graphs of all passes before it.
            for layer in cache.layers:
                layer.keys, layer.values = layer.keys.detach(), layer.values.detach()
        yield F.pad(block, (0, length - block.shape[-1]))


def _checked(
    model: EveForConditionalGeneration, attentions: tuple[torch.Tensor, ...] | None
) -> tuple[torch.Tensor, ...]:
    """The attention of every layer, if it is there and whole."""
    count = model.config.text_config.num_hidden_layers
    if attentions is None or len(attentions) != count or any(one is None for one in attentions):
        problem = "does not tell its attention"
    elif any(float((one.detach().float().sum(-1) - 1).abs().max()) > WHOLE for one in attentions):
        problem = "attends to something beside pictures and text"
    else:
        return attentions
    kind = model.config.text_config.model_type
    raise ValueError(f"The decoder ({kind}) {problem}, so no map can be made; take another one.")


__all__ = ["attention_rows"]
