"""Merges a PEFT LoRA adapter into a model, and makes sure that nothing of it is lost on the way.

Others lose the picture side here: the trained patch embedding is in another file than the loader
wants, and only the text side of the training survives.  So every weight of the adapter folder is
accounted for, by name and shape, before merging and by value after it.  Easy to get wrong: PEFT
itself only warns about weights that an adapter lacks and leaves those at random.
"""

import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from eve_vlm.errors import first_line, listed
from eve_vlm.lora_adapters import require_peft
from eve_vlm.lora_folder import bare, check_base, check_weights, require_adapter, weights_for
from eve_vlm.modeling_eve import EveForConditionalGeneration

PARTS = {
    "model.vision_tower.": "patch embedding",
    "model.multi_modal_projector.": "projector",
    "model.language_model.": "decoder",
    "lm_head.": "language head",
    "aligner.": "aligner",
}


def merge_lora(
    model: EveForConditionalGeneration,
    folder: str | Path,
    *,
    base: str | Path,
    any_base: bool = False,
    progress: bool = True,
) -> tuple[EveForConditionalGeneration, list[str]]:
    """Merges an adapter folder into a model, which is changed.

    Args:
        model: what the adapter was trained on.
        folder: what training with `lora`, or PEFT's `save_pretrained`, wrote.
        base: the model's name or folder, to compare with the one that the adapter names.
        any_base: do not compare them.
        progress: show a bar.

    Returns:
        The merged model, and sentences about what the adapter did and did not bring.

    Raises:
        ValueError: if the adapter is not whole, belongs to another model, or PEFT is not installed.
    """
    folder = Path(folder)
    require_adapter(folder)
    notes = [] if any_base else [note for note in [check_base(folder, base)] if note]
    require_peft("Merging a LoRA adapter")
    import peft

    weights = weights_for(model, folder)
    if tied := bool(model.config.tie_word_embeddings):
        _untie(model)
    names = set(model.state_dict())
    dtype = model.dtype
    with warnings.catch_warnings(action="ignore"):  # what it warns of is checked here
        try:
            config = peft.PeftConfig.from_pretrained(str(folder))
            wrapped = peft.get_peft_model(model, config)
            wanted = peft.get_peft_model_state_dict(wrapped, save_embedding_layers=False)
        except (ValueError, RuntimeError, TypeError) as error:
            raise ValueError(
                f"The adapter {folder} does not fit {base} ({first_line(error)}); check that it "
                "was trained on this model."
            ) from None
        check_weights(folder, base, weights, wanted, wrapped.state_dict())
        peft.set_peft_model_state_dict(wrapped, weights)
        try:
            merged = wrapped.merge_and_unload(progressbar=progress, safe_merge=True)
        except ValueError as error:  # not-a-number, found by safe_merge
            raise ValueError(
                f"The adapter {folder} cannot be merged ({first_line(error)}); take an earlier "
                "checkpoint of its training."
            ) from None
    merged = merged.to(dtype)  # PEFT keeps the parts that it replaced in float32
    _check_merged(folder, names, weights, merged.state_dict())
    if tied:
        _tie_again(merged, notes)
    return merged, [*_account(weights), *notes]


def _check_merged(
    folder: Path,
    names: set[str],
    given: Mapping[str, torch.Tensor],
    merged: Mapping[str, torch.Tensor],
) -> None:
    """Nothing of PEFT is left over, and what the adapter holds whole is there bit by bit."""
    lost = sorted(names ^ merged.keys())
    for name, weight in given.items():
        here = bare(name)
        whole = here in merged and ".base_layer." not in name
        if whole and not torch.equal(merged[here], weight.to(merged[here].dtype)):
            lost.append(here)
    if lost:
        raise ValueError(
            f"{len(lost)} weights of the adapter {folder} did not arrive in the merged model "
            f"({listed(lost)}); the installed peft cannot merge it, so try another version."
        )


def _untie(model: EveForConditionalGeneration) -> None:
    """Gives the head a weight of its own: merging changes a shared one twice, or only for one."""
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())


def _tie_again(model: EveForConditionalGeneration, notes: list[str]) -> None:
    """Shares embedding and head again where they are still the same; else says so for good."""
    words = model.get_input_embeddings().get_parameter("weight")
    same = torch.equal(model.lm_head.weight, words)
    # Merging changes the outer flag (peft 0.21), the decoder's is the one that counts on loading.
    model.config.tie_word_embeddings = model.config.text_config.tie_word_embeddings = same
    if same:
        model.tie_weights()
        return
    notes.append(
        "The adapter trained the word embedding or the head alone, which the model shares; the "
        "merged model has both."
    )


def _account(weights: Mapping[str, torch.Tensor]) -> list[str]:
    """Which parts of the model the adapter adds to, replaces, and leaves alone."""
    done: dict[str, dict[str, int]] = {part: {} for part in PARTS.values()}
    for name in weights:
        part = next((part for begin, part in PARTS.items() if bare(name).startswith(begin)), "")
        kind = "lora" if ".lora_" in name else "whole"
        if part:
            done[part][kind] = done[part].get(kind, 0) + 1
    notes = []
    for part, kinds in done.items():
        if part == "aligner" and not kinds:
            continue  # most models have none
        said = []
        if "lora" in kinds:
            said.append("LoRA merged")
        if "whole" in kinds:
            said.append(f"{kinds['whole']} weights replaced")
        notes.append(f"{part}: {' and '.join(said) or 'as in the model; the adapter has none'}.")
    return notes


__all__ = ["merge_lora"]
