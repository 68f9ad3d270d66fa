"""A LoRA folder: adapters and the parts that were trained whole, and which model they belong to.

It is what PEFT writes: `adapter_config.json` and `adapter_model.safetensors`, where whole parts
stand beside the adapters under the names of `modules_to_save`.  The header of the weights also has
a fingerprint of the model that was trained on, so that another one is refused even where all shapes
fit.  Easy to get wrong: a base that lies beside is written as a relative path, which starts from
the folder here; PEFT itself would look from wherever the process happens to be.
"""

import copy
import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from .checkpoint_files import FILES, WeightReader
from .errors import first_line, listed
from .lora_adapters import ADAPTER, put_adapters, require_peft
from .output_folder import written_whole

if TYPE_CHECKING:
    from .modeling_eve import EveForConditionalGeneration

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# Weight files that a training checkpoint holds beside the adapter, and that are no model weights.
NOT_WEIGHTS = ("training_args.bin", "optimizer.bin", "scheduler.bin", "scaler.bin")
PREFIX = "base_model.model."
ALIGNER = "aligner."
BASE, QUANTIZE = "eve_base", "eve_quantize"  # keys in the header of the weights
SAMPLES = 16  # values of each weight that its fingerprint is made of


def is_lora(folder: str | Path) -> bool:
    """Whether a folder holds an adapter and no model of its own."""
    folder = Path(folder)
    whole = any((folder / name).is_file() for pair in FILES for name in pair)
    return (folder / CONFIG).is_file() and not whole


def require_adapter(folder: str | Path) -> dict[str, Any]:
    """The settings of a LoRA adapter folder, checked to be whole; reads no weights.

    Raises:
        ValueError: if it is no folder that PEFT wrote, no LoRA, or holds weights in other files.
    """
    folder = Path(folder)
    if not (folder / CONFIG).is_file():
        raise ValueError(
            f"{folder} holds no adapter (no {CONFIG}); name a folder that training with lora or "
            "PEFT's save_pretrained wrote."
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


# --- which model it belongs to --------------------------------------------------------------------


def find_base(folder: str | Path) -> str:
    """The model that an adapter was trained on: a folder that is here, or a Hub id.

    Looked for from the adapter's folder, then as it is written, then by its name beside the folder.

    Raises:
        ValueError: if the adapter names none, or a folder that is not here.
    """
    folder = Path(folder)
    named = require_adapter(folder).get("base_model_name_or_path")
    mend = (
        f"run `eve merge {folder} OUT --base MODEL`, or write the model's folder as "
        f"base_model_name_or_path into {folder / CONFIG}."
    )
    if not named:
        raise ValueError(f"The adapter {folder} does not say which model it was trained on; {mend}")
    beside = folder.resolve().parent / Path(named).name
    for place in (folder / named, Path(named).expanduser(), beside):
        if (place / "config.json").is_file():
            return str(place)
    parts = Path(named).parts
    if len(parts) == 2 and not named.startswith((".", "/", "~")):
        return named
    raise ValueError(
        f"The adapter {folder} was trained on {named}, and there is no model folder of that name "
        f"here; {mend}"
    )


def fingerprint(folder: str | Path) -> str:
    """Name, shape and some values of every weight of a model folder, as one short text.

    Values are rounded to bfloat16, so a copy in that type has the same fingerprint, and so has one
    in other shards.  The aligner, which a copy may lack, does not count.  Reads headers and a few
    pages of each file (measured for 2.4 GB: 0.05 s, and 2 s where nothing of it was in memory).
    """
    digest = hashlib.sha256()
    with WeightReader(folder) as reader:
        for name in sorted(reader.entries):
            if name.startswith(ALIGNER):
                continue
            weight = reader.read(name).flatten()
            some = weight[:: max(len(weight) // SAMPLES, 1)][:SAMPLES].to(torch.bfloat16)
            digest.update(f"{name} {reader.entries[name].shape}".encode())
            digest.update(some.view(torch.int16).numpy().tobytes())
    return digest.hexdigest()[:32]


def stored_notes(folder: str | Path) -> dict[str, str]:
    """What the header of an adapter's weights says beside them."""
    file = Path(folder) / WEIGHTS
    try:
        with safe_open(file, framework="pt") as opened:
            return opened.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{file} cannot be read ({first_line(error)}); copy or save it again."
        ) from None


def check_base(folder: str | Path, base: str | Path) -> str | None:
    """Compares the model that an adapter was trained on with the one that it is put into.

    By the fingerprint where the adapter has one and the model is a folder; else by the last part of
    their names, because folders move between machines.

    Returns:
        A remark where nothing could be compared; else None.

    Raises:
        ValueError: if it is another one.
    """
    settings, given = require_adapter(folder), Path(base)
    wanted, named = stored_notes(folder).get(BASE), settings.get("base_model_name_or_path")
    if wanted and given.is_dir():
        if fingerprint(given) != wanted:
            raise ValueError(
                f"The adapter {folder} was trained on {named}, whose weights are not those of "
                f"{base}; name that model, or add --any-base to `eve merge` if it was only stored "
                "in another form."
            )
        return None
    if not named:
        return "The adapter does not say which model it was trained on; only shapes were compared."
    if Path(named).name not in (given.name, given.resolve().name):
        raise ValueError(
            f"The adapter was trained on {named} but is merged into {base}; name that model, or "
            "add --any-base if it was only renamed."
        )
    return None


# --- its weights ----------------------------------------------------------------------------------


def bare(name: str) -> str:
    """A weight of an adapter by its name in the model."""
    return name.removeprefix(PREFIX).replace(".base_layer.", ".")


def has_aligner(names: Iterable[str]) -> bool:
    """Whether the patch aligning layer is among the weights of a model or of an adapter."""
    return any(bare(name).startswith(ALIGNER) for name in names)


def weights_for(model: nn.Module, folder: str | Path) -> dict[str, torch.Tensor]:
    """The weights of an adapter folder, without an aligner that the model has no place for."""
    weights = read_weights(folder)
    if has_aligner(model.state_dict()):
        return weights
    return {name: one for name, one in weights.items() if not has_aligner([name])}


def read_weights(folder: str | Path) -> dict[str, torch.Tensor]:
    """The weights of an adapter folder by PEFT's names, on the CPU.

    Raises:
        ValueError: if the file cannot be read, or PEFT is not installed.
    """
    require_peft("Reading a LoRA adapter")
    import peft

    try:
        return peft.load_peft_weights(str(folder), device="cpu")
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{Path(folder) / WEIGHTS} cannot be read ({first_line(error)}); copy or save it again."
        ) from None


def check_weights(
    folder: str | Path,
    base: str | Path,
    given: Mapping[str, torch.Tensor],
    wanted: Mapping[str, torch.Tensor],
    everything: Mapping[str, torch.Tensor],
) -> None:
    """Compares an adapter's weights with those that its settings call for on a model.

    Args:
        given: those of the folder.
        wanted: those that must be there.
        everything: all that the model has a place for.

    Raises:
        ValueError: with the names, if any is missing, surplus or of another shape.
    """
    missing = sorted(wanted.keys() - given.keys())
    if missing:
        raise ValueError(
            f"The adapter {folder} lacks {len(missing)} weights that its settings name "
            f"({listed([bare(name) for name in missing])}); they would stay untrained, so save "
            "it again with PEFT's save_pretrained."
        )
    # Embeddings that PEFT saved whole beside the adapter are not among the wanted ones.
    shapes = {name: weight.shape for name, weight in (*everything.items(), *wanted.items())}
    surplus = sorted(given.keys() - shapes.keys())
    if surplus:
        raise ValueError(
            f"The adapter {folder} has {len(surplus)} weights that {base} has no place for "
            f"({listed([bare(name) for name in surplus])}); it belongs to another model."
        )
    wrong = sorted(name for name, weight in given.items() if weight.shape != shapes[name])
    if wrong:
        name = wrong[0]
        raise ValueError(
            f"{len(wrong)} weights of the adapter {folder} do not fit {base} ({bare(name)} is "
            f"{tuple(given[name].shape)} there and {tuple(shapes[name])} here); it belongs to "
            "another model."
        )


def adapter_weights(
    model: "EveForConditionalGeneration", state: Mapping[str, torch.Tensor] | None = None
) -> dict[str, torch.Tensor]:
    """What the folder of a model with adapters in place holds, by PEFT's names.

    Args:
        model: with adapters that `put_adapters` put in place, and the parts that are trained whole
            in the `modules_to_save` of its settings.
        state: its whole state where that had to be gathered from several devices.
    """
    import peft

    state = model.state_dict() if state is None else state
    whole = tuple(f"{part}." for part in model.peft_config[ADAPTER].modules_to_save)
    names = peft.get_peft_model_state_dict(model, dict(state), save_embedding_layers=False)
    names |= {name: weight for name, weight in state.items() if name.startswith(whole)}
    return {PREFIX + name: weight for name, weight in names.items()}


def load_adapter(
    model: "EveForConditionalGeneration", folder: str | Path, *, base: str | Path
) -> None:
    """Puts a folder's weights into a model with the same adapters in place, all of them.

    Raises:
        ValueError: if the folder holds other weights than the model has a place for.
    """
    import peft

    given, wanted = weights_for(model, folder), adapter_weights(model)
    check_weights(folder, base, given, wanted, {})
    peft.set_peft_model_state_dict(model, {name[len(PREFIX) :]: w for name, w in given.items()})


def attach_adapter(
    model: "EveForConditionalGeneration", folder: str | Path, *, base: str | Path
) -> None:
    """Puts an adapter beside the weights of a model, which stay as they are: quantized ones, say.

    Raises:
        ValueError: if the folder does not belong to this model.
    """
    require_peft("Reading a LoRA adapter")
    import peft

    settings = peft.PeftConfig.from_pretrained(str(folder))
    whole, settings.modules_to_save = settings.modules_to_save or [], None
    try:
        put_adapters(model, settings)
    except (ValueError, RuntimeError, TypeError) as error:
        raise ValueError(
            f"The adapter {folder} does not fit {base} ({first_line(error)}); check that it was "
            "trained on this model."
        ) from None
    settings.modules_to_save = whole
    load_adapter(model, folder, base=base)
    model.requires_grad_(False)


def save_adapter(
    model: "EveForConditionalGeneration",
    folder: str | Path,
    *,
    run: str | Path,
    notes: Mapping[str, str],
    state: Mapping[str, torch.Tensor] | None = None,
) -> None:
    """Writes a folder that PEFT and this package read, with the settings of the merged model.

    Args:
        model: see `adapter_weights`; its settings name the base by an absolute path.
        folder: where to; what is there is replaced file by file.
        run: the folder itself, or that of the run where this is one of its checkpoints; a base
            beside or below it is named by a relative path, so that both can move together.
        notes: for the header of the weights: `BASE`, `QUANTIZE`.
        state: see `adapter_weights`.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    # Copies, because tied weights share memory, which the format refuses.
    weights = {
        name: weight.detach().cpu().contiguous().clone()
        for name, weight in adapter_weights(model, state).items()
    }
    with written_whole(folder / WEIGHTS) as part:
        save_file(weights, part, metadata={"format": "pt", **notes})
    settings = copy.copy(model.peft_config[ADAPTER])
    settings.inference_mode = True
    base, run = Path(settings.base_model_name_or_path).resolve(), Path(run).resolve()
    # A checkpoint may be written elsewhere first, but it will lie in its run's folder.
    place = run if folder.resolve() == run else run / folder.name
    near = run.parent in base.parents
    settings.base_model_name_or_path = os.path.relpath(base, place) if near else str(base)
    settings.save_pretrained(str(folder))
    config = copy.deepcopy(model.config)
    if QUANTIZE in notes:
        del config.quantization_config  # the base on disk is not quantized
    config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)


__all__ = [
    "BASE",
    "CONFIG",
    "NOT_WEIGHTS",
    "PREFIX",
    "QUANTIZE",
    "WEIGHTS",
    "adapter_weights",
    "attach_adapter",
    "bare",
    "check_base",
    "check_weights",
    "find_base",
    "fingerprint",
    "has_aligner",
    "is_lora",
    "load_adapter",
    "read_weights",
    "require_adapter",
    "save_adapter",
    "stored_notes",
    "weights_for",
]
