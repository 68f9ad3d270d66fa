"""Merges a run with LoRA into its base: a plain folder, as if the run had trained in full.

Unlike an export it brings no code and keeps the aligner, because the next stage may start from it.
Easy to get wrong: a run with `lora.quantize` was trained on rounded weights; merged are its
adapters and the base in full precision, which answer nearly, and not exactly, as the run did.
"""

from pathlib import Path

import torch

from eve_vlm.export.folder import DTYPES, Exported
from eve_vlm.loading import find_model, load_config, load_processor, load_with_lora
from eve_vlm.lora_folder import QUANTIZE, find_base, require_adapter, stored_notes
from eve_vlm.output_folder import new_folder, require_new
from eve_vlm.quantization import is_quantized


def merge_run(
    run: str | Path,
    out: str | Path,
    *,
    base: str | Path | None = None,
    any_base: bool = False,
    dtype: str | None = None,
) -> Exported:
    """Writes the model that a LoRA folder makes of its base.

    Args:
        run: what training with `lora` wrote, or one of its checkpoints, or a folder of PEFT.
        out: a new folder; it appears when everything is in it.
        base: the model that it was trained on; None finds the one that the run names.
        any_base: take a base whose weights or name are not those that the run was trained on.
        dtype: one of `DTYPES` for the weights written; None keeps the base's own.

    Raises:
        ValueError: for anything that a user can mend; nothing is left behind then.
    """
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype!r}; choose one of {', '.join(DTYPES)}.")
    run = Path(run)
    require_adapter(run)
    require_new(out)
    place = find_model(find_base(run) if base is None else base)
    # PEFT's own folders have no configuration, and may have no processor.
    own = (run / "config.json").is_file()
    config = load_config(run if own else place)
    processor = load_processor(run if own else place)
    model, notes = load_with_lora(place, run, any_base=any_base, config=config)
    if any(is_quantized(weight) for weight in model.parameters()):
        raise ValueError(
            f"{place} holds quantized weights, which adapters are not merged into; give the model "
            "in full precision as --base."
        )
    if kind := stored_notes(run).get(QUANTIZE):
        notes.append(
            f"It was trained on {kind} weights and merged into those in full precision, so it "
            f"answers a little otherwise than with --quantize {kind} before."
        )
    if dtype is not None:
        model = model.to(getattr(torch, dtype))
    size = sum(weight.numel() * weight.element_size() for weight in model.parameters())
    with new_folder(out, needed=size) as folder:
        # In our own layout: a published checkpoint would be written back as it was read.
        model.save_pretrained(folder, save_original_format=False)
        processor.save_pretrained(folder)
    files = [file for file in Path(out).rglob("*") if file.is_file()]
    return Exported(
        Path(out), model.num_parameters(), sum(f.stat().st_size for f in files), tuple(notes)
    )


__all__ = ["merge_run"]
