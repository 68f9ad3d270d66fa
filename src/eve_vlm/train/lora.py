"""LoRA and QLoRA: adapters on the decoder, all that makes pictures into tokens trained whole.

PEFT's layers are put into the model in place, so it stays the class that everything else knows and
weights keep their names: `stage.learning_rates` reaches adapters by `*.lora_*`.  Easy to get wrong:
a glob of `stage.trainable` that covers adapted matrices (`*`, say) means their adapters in the
decoder and its head, and what it says everywhere else; what a narrower one names, such as
`lm_head.*` or `*norm*`, is trained whole.
"""

import functools
import os
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from eve_vlm.encoder_twin_eve import encoder_parameters
from eve_vlm.lora_adapters import ADAPTER, put_adapters, require_peft
from eve_vlm.lora_folder import (
    BASE,
    QUANTIZE,
    fingerprint,
    is_lora,
    load_adapter,
    save_adapter,
    stored_notes,
)
from eve_vlm.modeling_eve import EveForConditionalGeneration
from eve_vlm.parameter_names import matches_any, names_of
from eve_vlm.processing_eve import EveProcessor
from eve_vlm.train.parameters import (
    require_frozen_encoder,
    require_matches,
    select_trainable,
)
from eve_vlm.train.sections import LoraSection, Recipe
from eve_vlm.train.trainer import EveTrainer

DECODER = "model.language_model."
LANGUAGE = (DECODER, "lm_head.")  # frozen under adapters
PICTURES = ("model.vision_tower", "model.multi_modal_projector")  # always trained and saved whole
ALIGNER = "aligner"
HALF = (torch.float16, torch.bfloat16)


def base_settings(recipe: Recipe) -> dict[str, Any]:
    """What `load_model` takes further, to load the base as the recipe wants it frozen.

    Raises:
        ValueError: if the base is an adapter itself.
    """
    section, start = recipe.lora, recipe.model.init_from
    if section is None:
        return {}
    assert start is not None  # recipe.py sees to it
    if is_lora(start):
        raise ValueError(
            f"{start} holds LoRA adapters and no model that new ones could belong to; run "
            f"`eve merge {start} MERGED` and start from that."
        )
    if section.quantize is None:
        return {}
    gpu = torch.cuda.is_available() and not recipe.training.get("use_cpu", False)
    place = f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if gpu else "cpu"
    return {"quantize": section.quantize, "device": place}


def make_trainable(model: EveForConditionalGeneration, recipe: Recipe) -> None:
    """Freezes what does not learn; with `lora`, puts adapters onto the decoder first.

    Raises:
        ValueError: if a glob or a target matches nothing, or PEFT is not installed.
    """
    if recipe.lora is None:
        select_trainable(model, recipe.stage)
        return
    targets = find_targets(model, recipe.lora.target_modules)
    whole = _trained_whole(model, recipe.stage.trainable, targets)
    _add_adapters(model, recipe.lora, targets)
    # PEFT froze everything but its own layers.
    for parameter in whole:
        parameter.requires_grad_(True)
    settings = model.peft_config[ADAPTER]
    settings.base_model_name_or_path = str(Path(recipe.model.init_from or "").absolute())
    settings.modules_to_save = _modules_of(model, whole)


def find_targets(model: EveForConditionalGeneration, wanted: list[str] | None) -> list[str]:
    """Full names of the decoder's linear layers, or of those with the wanted last names.

    Raises:
        ValueError: with the names that there are, if one is not among them.
    """
    linear = [
        DECODER + name
        for name, module in model.model.language_model.named_modules()
        if isinstance(module, (nn.Linear, Conv1D))
    ]
    known = sorted({_last(name) for name in linear})
    for name in wanted or ():
        if name not in known:
            raise ValueError(
                f"lora.target_modules: the decoder has no linear layer called {name!r}; those that "
                f"it has are {', '.join(known)}."
            )
    return [name for name in linear if wanted is None or _last(name) in wanted]


def _last(name: str) -> str:
    return name.rpartition(".")[2]


def _trained_whole(
    model: EveForConditionalGeneration, globs: list[str], targets: list[str]
) -> list[nn.Parameter]:
    """The parameters that learn beside the adapters."""
    names = names_of(model)
    everything = [alias for aliases in names.values() for alias in aliases]
    require_matches(globs, everything, key="stage.trainable", kind="parameter")
    inside = tuple(f"{target}." for target in targets)
    adapted = [name for name in everything if name.startswith(inside)]
    narrow = [glob for glob in globs if not matches_any(adapted, [glob])]
    require_frozen_encoder(model, globs)
    frozen = set(encoder_parameters(model))  # a twin's; it is saved whole, as all of PICTURES
    whole = []
    for parameter, aliases in names.items():
        if parameter in frozen:
            learns = False
        elif any(alias.startswith(PICTURES) for alias in aliases):
            learns = True
        elif any(alias.startswith(LANGUAGE) for alias in aliases):
            learns = matches_any(aliases, narrow)
        else:
            learns = matches_any(aliases, globs)
        if learns:
            whole.append(parameter)
    return whole


def _add_adapters(
    model: EveForConditionalGeneration, section: LoraSection, targets: list[str]
) -> None:
    require_peft("Training with lora")
    import peft

    last = sorted({re.escape(_last(name)) for name in targets})
    config = peft.LoraConfig(
        r=section.rank,
        lora_alpha=section.alpha,  # type: ignore[arg-type]  # only ever divided by the rank
        lora_dropout=section.dropout,
        # A text is a pattern of the whole name; a list of last names would match elsewhere too.
        target_modules=rf"{re.escape(DECODER)}(.+\.)?({'|'.join(last)})",
    )
    with warnings.catch_warnings(action="ignore"):  # of Conv1D, whose setting it then changes
        put_adapters(model, config)
    # As PEFT does it in its own wrapper: half precision swallows small updates.
    for name, parameter in model.named_parameters():
        if ".lora_" in name and parameter.dtype in HALF:
            parameter.data = parameter.data.float()


def _modules_of(model: EveForConditionalGeneration, whole: list[nn.Parameter]) -> list[str]:
    """The modules that are saved beside the adapters, as PEFT's settings name them."""
    saved = [*PICTURES]
    if model.config.alignment_config is not None:
        saved.append(ALIGNER)
    learning = {id(parameter) for parameter in whole}
    for name, module in model.named_modules():
        own = any(id(one) in learning for one in module.parameters(recurse=False))
        if own and not f"{name}.".startswith(tuple(f"{part}." for part in saved)):
            saved.append(name)
    return saved


class LoraTrainer(EveTrainer):
    """`EveTrainer` whose checkpoints hold adapters and whole parts, and not the frozen base.

    Args:
        recipe: with its `lora` section.
        processor: saved with every checkpoint, so that each can be asked.
    """

    def __init__(self, *args: Any, recipe: Recipe, processor: EveProcessor, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.processor = processor
        assert recipe.lora is not None and recipe.model.init_from is not None
        self.base = recipe.model.init_from
        self.notes = {BASE: fingerprint(self.base)}
        if recipe.lora.quantize is not None:
            self.notes[QUANTIZE] = recipe.lora.quantize

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        if not self.args.should_save:
            return
        folder, run = output_dir or self.args.output_dir, self.args.output_dir
        model = self.accelerator.unwrap_model(self.model)
        save_adapter(model, folder, run=run, notes=self.notes, state=state_dict)
        self.processor.save_pretrained(folder)

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: nn.Module | None = None
    ) -> None:
        if self.is_fsdp_enabled:  # its checkpoints are accelerate's
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        if stored_notes(resume_from_checkpoint).get(BASE) != self.notes[BASE]:
            raise ValueError(
                f"The weights in {self.base} are not those that {resume_from_checkpoint} was "
                "trained on; put the old ones back, or start the run again."
            )
        target = self.accelerator.unwrap_model(self.model if model is None else model)
        load_adapter(target, resume_from_checkpoint, base=self.base)


def trainer_of(recipe: Recipe, processor: EveProcessor) -> Callable[..., EveTrainer]:
    """The trainer's class for a recipe."""
    if recipe.lora is None:
        return EveTrainer
    return functools.partial(LoraTrainer, recipe=recipe, processor=processor)


__all__ = [
    "LoraTrainer",
    "base_settings",
    "find_targets",
    "make_trainable",
    "trainer_of",
]
