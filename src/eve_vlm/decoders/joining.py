"""Puts a decoder into a new EVE model: `eve init` and recipes with `model.decoder` both do it here.

The decoder is moved, not copied, so that no more than it and the new patch embedding layer are in
memory.  The new model must give the decoder's own logits for a text.  Easy to get wrong: the
decoder's logits are taken before its vocabulary grows.
"""

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from eve_vlm.alignment_eve import EveForPreTraining
from eve_vlm.configuration_eve import EveAlignmentConfig, EveConfig, EveVisionConfig
from eve_vlm.modeling_eve import EveForConditionalGeneration
from eve_vlm.processing_eve import EveProcessor

PROBE = "The quick brown fox jumps over"  # a few words; what they say does not matter
SAME = 1e-6  # of the largest logit; the same operations in the same order give 0
# Settings of sampling, which the library refuses to save beside do_sample=False (Vicuna 1.5).
SAMPLING = ("temperature", "top_p", "top_k", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff")


@torch.no_grad()
def put_decoder(
    decoder: PreTrainedModel,
    processor: EveProcessor,
    *,
    vision: EveVisionConfig,
    projector_depth: int = 2,
    alignment: EveAlignmentConfig | None = None,
    seed: int | None = None,
    grow: bool = True,
) -> EveForConditionalGeneration:
    """An EVE model around a decoder, which is moved into it; the rest is new.

    Args:
        alignment: for the training class.
        seed: of the new weights; None goes on with torch's own.
        grow: gives a placeholder beyond the embedding a row; the published models have none.

    Raises:
        ValueError: if a text has other logits in the new model than in the decoder.
    """
    placeholder = processor.image_token_id
    ids = torch.tensor([processor.tokenizer.encode(PROBE, add_special_tokens=False)[:8]])
    expected = decoder(input_ids=ids).logits
    if grow and placeholder >= decoder.get_input_embeddings().weight.shape[0]:
        grow_embedding(decoder, placeholder + 1, words=len(processor.tokenizer) - 1)
    config = EveConfig(
        text_config=decoder.config,
        vision_config=vision,
        alignment_config=alignment,
        image_token_id=placeholder,
        projector_depth=projector_depth,
        dtype=decoder.dtype,
    )
    cls = EveForConditionalGeneration if alignment is None else EveForPreTraining
    with torch.device("meta"):
        model = cls(config)
    if type(decoder.base_model) is not type(model.model.language_model):
        raise ValueError(
            f"A {decoder.config.model_type} language model holds a decoder of another kind "
            f"({type(decoder.base_model).__name__}); take another one."
        )
    model.model.language_model = decoder.base_model
    model.set_output_embeddings(decoder.get_output_embeddings())
    with torch.random.fork_rng(enabled=seed is not None):
        if seed is not None:
            torch.manual_seed(seed)
        for part in new_parts(model):
            part.to_empty(device=decoder.device)
            part.apply(model._init_weights)
            part.to(decoder.dtype)
    model.tie_weights()
    model.generation_config = decoder.generation_config
    check_same_logits(model.eval(), ids, expected)
    return model


def new_parts(model: EveForConditionalGeneration) -> list[torch.nn.Module]:
    """What is not the decoder's."""
    parts = [model.model.vision_tower, model.model.multi_modal_projector]
    return [*parts, model.aligner] if isinstance(model, EveForPreTraining) else parts


def grow_embedding(decoder: PreTrainedModel, rows: int, *, words: int) -> None:
    """Adds rows to the words, and to the head where it is not tied: the mean of the known rows.

    The library does the growing.  Its own mean comes with a covariance of all words (2.6 TFLOP for
    152,000 of them, 4,096 wide), which is scaled to nothing and left out here.
    """
    before = decoder.get_input_embeddings().weight.shape[0]
    with torch.random.fork_rng():
        decoder.resize_token_embeddings(rows, mean_resizing=False)
    for layer in (decoder.get_input_embeddings(), decoder.get_output_embeddings()):
        weight = layer.weight.data
        weight[before:] = weight[: min(words, before)].mean(0, dtype=torch.float32).to(weight.dtype)


@torch.no_grad()
def check_same_logits(
    model: EveForConditionalGeneration, ids: torch.Tensor, expected: torch.Tensor
) -> None:
    """Compares the new model with the bare decoder on a text.

    Args:
        expected: (1, T, rows) logits of the decoder, before it grew.

    Raises:
        ValueError: if they differ, which would go unnoticed otherwise.
    """
    found = model(input_ids=ids).logits[..., : expected.shape[-1]]
    far = float((found - expected).abs().max() / expected.abs().max())
    if not far <= SAME:  # also where it is no number
        raise ValueError(
            f"The new model's logits for a text are {far:.1e} (of the largest) away from those of "
            f"the bare {model.config.text_config.model_type} decoder, so it does something that "
            "EVE does not know of; take another decoder."
        )


def pad_with_something(tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
    """Gives a tokenizer without a padding token one that it has; padding is never attended to."""
    if tokenizer.pad_token is not None:
        return ()
    tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    return (f"Padding, which the tokenizer has no token for, is {tokenizer.pad_token}.",)


def end_ids(config: GenerationConfig) -> list[int]:
    """Every id that ends an answer; the library keeps one, a list or None."""
    ends = config.eos_token_id
    return [ends] if isinstance(ends, int) else list(ends or [])


def settle_generation(
    model: EveForConditionalGeneration, processor: EveProcessor
) -> tuple[str, ...]:
    """Completes generation settings; the placeholder is no word of an answer."""
    config = model.generation_config
    notes: tuple[str, ...] = ()
    tokenizer: PreTrainedTokenizerBase = processor.tokenizer
    if config.eos_token_id is None:
        config.eos_token_id = tokenizer.eos_token_id
    if config.pad_token_id is None:
        config.pad_token_id = tokenizer.pad_token_id
    never = [*(config.suppress_tokens or []), processor.image_token_id]
    config.suppress_tokens = list(dict.fromkeys(never))
    try:
        config.validate(strict=True)
    except ValueError:
        if not config.do_sample:
            for name in SAMPLING:
                setattr(config, name, None)
            notes = ("Its settings of sampling, which it does not use, are left out.",)
    rows = model.config.text_config.vocab_size
    if processor.image_token_id >= rows and config.repetition_penalty not in (None, 1.0):
        # The library looks up the logit of every id of the prompt, and this one has none.
        notes += (f"Its repetition_penalty ({config.repetition_penalty}) is left out.",)
        config.repetition_penalty = None
    return notes


__all__ = [
    "check_same_logits",
    "end_ids",
    "grow_embedding",
    "new_parts",
    "pad_with_something",
    "put_decoder",
    "settle_generation",
]
