"""Merges a PEFT LoRA adapter into a model, and makes sure that nothing of it is lost on the way.

Others lose the picture side here: the trained patch embedding is in another file than the loader
wants, and only the text side of the training survives.  So every weight of the adapter folder is
accounted for, by name and shape, before merging and by value after it.  Easy to get wrong: PEFT
itself only warns about weights that an adapter lacks and leaves those at random.
"""

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from eve_vlm.errors import first_line
from eve_vlm.modeling_eve import EveForConditionalGeneration

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# Weight files that a training checkpoint holds beside the adapter, and that are no model weights.
NOT_WEIGHTS = ("training_args.bin", "optimizer.bin", "scheduler.bin", "scaler.bin")
PREFIX = "base_model.model."
PARTS = {
    "model.vision_tower.": "patch embedding",
    "model.multi_modal_projector.": "projector",
    "model.language_model.": "decoder",
    "lm_head.": "language head",
    "aligner.": "aligner",
}
SHOWN = 3  # names in a message


def require_adapter(folder: str | Path) -> dict:
    """The settings of a LoRA adapter folder, checked to be whole; reads no weights.

    Raises:
        ValueError: if it is no folder that PEFT wrote, no LoRA, or holds weights in other files.
    """
    folder = Path(folder)
    if not (folder / CONFIG).is_file():
        raise ValueError(
            f"{folder} holds no adapter (no {CONFIG}); name a folder that PEFT's save_pretrained "
            "wrote."
        )
    try:
        settings = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(
            f"{folder / CONFIG} cannot be read ({first_line(error)}); save the adapter again."
        ) from None
    kind = settings.get("peft_type")
    if kind != "LORA":
        raise ValueError(f"{folder} holds an adapter of type {kind}; only LoRA can be merged here.")
    if not (folder / WEIGHTS).is_file():
        raise ValueError(
            f"{folder} holds no {WEIGHTS}; save the adapter again with PEFT's save_pretrained."
        )
    others = sorted(
        file.name
        for file in folder.iterdir()
        if file.suffix in (".bin", ".safetensors") and file.name not in (WEIGHTS, *NOT_WEIGHTS)
    )
    if others:
        raise ValueError(
            f"{folder} also holds weights in {', '.join(others)}, which merging would lose; train "
            "with modules_to_save, so that all weights are in the adapter, or move the file away."
        )
    return settings


def check_base(settings: Mapping[str, Any], base: str | Path) -> str | None:
    """Compares the model that an adapter was trained on with the one that it is merged into.

    Names are compared by their last part, because folders move between machines.

    Returns:
        A remark where the adapter does not say its model; else None.

    Raises:
        ValueError: if it names another one.
    """
    named = settings.get("base_model_name_or_path")
    if not named:
        return "The adapter does not say which model it was trained on; only shapes were compared."
    given = Path(base)
    if Path(named).name not in (given.name, given.resolve().name):
        raise ValueError(
            f"The adapter was trained on {named} but is merged into {base}; name that model, or "
            "add --any-base if it was only renamed."
        )
    return None


def merge_lora(
    model: EveForConditionalGeneration,
    folder: str | Path,
    *,
    base: str | Path,
    any_base: bool = False,
) -> tuple[EveForConditionalGeneration, list[str]]:
    """Merges an adapter folder into a model, which is changed.

    Args:
        model: what the adapter was trained on.
        folder: what PEFT's `save_pretrained` wrote.
        base: the model's name or folder, to compare with the one that the adapter names.
        any_base: do not compare them.

    Returns:
        The merged model, and sentences about what the adapter did and did not bring.

    Raises:
        ValueError: if the adapter is not whole, belongs to another model, or PEFT is not installed.
    """
    folder = Path(folder)
    settings = require_adapter(folder)
    notes = [] if any_base else [note for note in [check_base(settings, base)] if note]
    try:
        import peft
    except ImportError:
        raise ValueError(
            'Merging a LoRA adapter needs peft; install it with: pip install "eve-vlm[lora]"'
        ) from None
    try:
        weights = peft.load_peft_weights(str(folder), device="cpu")
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{folder / WEIGHTS} cannot be read ({first_line(error)}); copy or save it again."
        ) from None
    weights = {
        name: weight for name, weight in weights.items() if not _bare(name).startswith("aligner.")
    }
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
        _check_weights(folder, base, weights, wanted, wrapped.state_dict())
        peft.set_peft_model_state_dict(wrapped, weights)
        try:
            merged = wrapped.merge_and_unload(progressbar=True, safe_merge=True)
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


def _bare(name: str) -> str:
    """A weight of the adapter by its name in the model."""
    return name.removeprefix(PREFIX).replace(".base_layer.", ".")


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def _check_weights(
    folder: Path,
    base: str | Path,
    given: Mapping[str, torch.Tensor],
    wanted: Mapping[str, torch.Tensor],
    everything: Mapping[str, torch.Tensor],
) -> None:
    """Compares the adapter's weights with those that its settings call for on this model."""
    missing = sorted(wanted.keys() - given.keys())
    if missing:
        raise ValueError(
            f"The adapter {folder} lacks {len(missing)} weights that its settings name "
            f"({_listed([_bare(name) for name in missing])}); they would stay untrained, so save "
            "it again with PEFT's save_pretrained."
        )
    # Embeddings that PEFT saved whole beside the adapter are not among the wanted ones.
    shapes = {name: weight.shape for name, weight in (*everything.items(), *wanted.items())}
    surplus = sorted(given.keys() - shapes.keys())
    if surplus:
        raise ValueError(
            f"The adapter {folder} has {len(surplus)} weights that {base} has no place for "
            f"({_listed([_bare(name) for name in surplus])}); it belongs to another model."
        )
    wrong = sorted(name for name, weight in given.items() if weight.shape != shapes[name])
    if wrong:
        name = wrong[0]
        raise ValueError(
            f"{len(wrong)} weights of the adapter {folder} do not fit {base} ({_bare(name)} is "
            f"{tuple(given[name].shape)} there and {tuple(shapes[name])} here); it belongs to "
            "another model."
        )


def _check_merged(
    folder: Path,
    names: set[str],
    given: Mapping[str, torch.Tensor],
    merged: Mapping[str, torch.Tensor],
) -> None:
    """Nothing of PEFT is left over, and what the adapter holds whole is there bit by bit."""
    lost = sorted(names ^ merged.keys())
    for name, weight in given.items():
        here = _bare(name)
        whole = here in merged and ".base_layer." not in name
        if whole and not torch.equal(merged[here], weight.to(merged[here].dtype)):
            lost.append(here)
    if lost:
        raise ValueError(
            f"{len(lost)} weights of the adapter {folder} did not arrive in the merged model "
            f"({_listed(lost)}); the installed peft cannot merge it, so try another version."
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
    done: dict[str, dict[str, int]] = {part: {} for part in PARTS.values() if part != "aligner"}
    for name in weights:
        part = next((part for begin, part in PARTS.items() if _bare(name).startswith(begin)), "")
        kind = "lora" if ".lora_" in name else "whole"
        if part:
            done[part][kind] = done[part].get(kind, 0) + 1
    notes = []
    for part, kinds in done.items():
        said = []
        if "lora" in kinds:
            said.append("LoRA merged")
        if "whole" in kinds:
            said.append(f"{kinds['whole']} weights replaced")
        notes.append(f"{part}: {' and '.join(said) or 'as in the model; the adapter has none'}.")
    return notes


__all__ = ["check_base", "merge_lora", "require_adapter"]
