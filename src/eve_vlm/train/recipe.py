"""A recipe: one complete YAML file that says everything about one training stage.

There is no inheritance between recipes: whoever reads the file sees the whole stage, and the four
files of a model lie side by side for comparison. The `training:` section goes to
`transformers.TrainingArguments`; its names and types are checked against the installed version.

The sections are in `sections.py`.  Easy to get wrong: an override on the command line is checked as
strictly as the file, so `4e-4`, which YAML reads as a text, is refused in both.
"""

import dataclasses
import inspect
import re
import typing
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from transformers import TrainingArguments

from eve_vlm.data.sources.made import MADE
from eve_vlm.train.devices import strategy_arguments
from eve_vlm.train.sections import Recipe, SourceSection, StageSection
from eve_vlm.train.strict_yaml import Origin, apply_overrides, build, nearest, read_mapping, typed

OWNED = {
    "output_dir": "output_dir at the top of the recipe",
    "run_name": "name at the top of the recipe",
    "seed": "seed at the top of the recipe",
    "data_seed": "seed at the top of the recipe",
    "learning_rate": "stage.learning_rates",
    "weight_decay": "stage.weight_decay",
    "resume_from_checkpoint": "the command line of `eve train`",
    "restore_callback_states_from_checkpoint": "nothing, because guards always go on from theirs",
    "parallelism_config": "the accelerate configuration file",
    "local_rank": "the launcher (torchrun sets it)",
    "do_train": "nothing, because a recipe always trains",
    "do_eval": "nothing, because a recipe always trains",
    "do_predict": "nothing, because a recipe always trains",
    "remove_unused_columns": "nothing, because Trainer would drop the pictures",
    "label_names": "nothing, because the model names its labels itself",
    "average_tokens_across_devices": "nothing, because every label counts alike on all devices",
    "label_smoothing_factor": "nothing, because the model computes the loss itself",
}
"""Training arguments that a recipe does not take, and where their value belongs."""

# transformers 5.23 renamed these and will drop the old names in 6; 5.17 has only the old ones.
# Recipes may use either, and training_arguments_dict() writes the one that is installed.
_RENAMED = {
    "gradient_checkpointing": "activation_checkpointing",
    "gradient_checkpointing_kwargs": "activation_checkpointing_kwargs",
}
_GONE = {"warmup_ratio": "write warmup_steps: 0.03, where a value below 1 is a share of the run"}
ADAMW = ("adamw_torch_fused", "adamw_torch")  # what stands beside Muon
_AT_LEAST_ONE = ("per_device_train_batch_size", "gradient_accumulation_steps")


def recipes_folder() -> Path:
    """The recipes that come with the package, or those of the repository it runs from."""
    packaged = resources.files("eve_vlm") / "recipes"
    if packaged.is_dir():
        return Path(str(packaged))
    return Path(__file__).resolve().parents[3] / "recipes"


def stage_recipes() -> dict[str, Path]:
    """{name: file} of the shipped recipes of training stages; those of `eve curate` are others."""
    folder = recipes_folder()
    names = {
        file.relative_to(folder).with_suffix("").as_posix(): file
        for file in sorted(folder.rglob("*.yaml"))
    }
    return {name: file for name, file in names.items() if not name.startswith("curate/")}


def find_recipe(path: str | Path) -> Path:
    """The file that `path` means: itself, with `.yaml`, or a shipped one such as `tiny/1_prealign`.

    Raises:
        ValueError: If there is none; the message lists the nearest shipped names.
    """
    given, folder = Path(path), recipes_folder()
    inside = Path(*given.parts[1:]) if given.parts[:1] == ("recipes",) else given
    for candidate in (given, folder / inside):
        named = [candidate, candidate.with_name(candidate.name + ".yaml")] if candidate.name else []
        for file in named:
            if file.is_file():
                return file
    shipped = [
        file.relative_to(folder).with_suffix("").as_posix() for file in folder.rglob("*.yaml")
    ]
    hint = nearest(inside.as_posix().removesuffix(".yaml"), shipped)
    if not hint.startswith("did you mean"):
        folders = sorted({name.partition("/")[0] for name in shipped})
        hint = f"the shipped ones are in {', '.join(folders)}" if shipped else "check the path"
    raise ValueError(f"{given}: there is no such recipe, neither here nor in {folder}; {hint}")


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe, apply `key.path=value` overrides and check every key, type and value.

    Raises:
        ValueError: One sentence with the file, the dotted key, what is wrong and how to mend it.
    """
    file = find_recipe(path)
    data = read_mapping(file)
    origin = apply_overrides(data, overrides, cls=Recipe, file=str(path))
    recipe = build(Recipe, data, origin=origin)
    _check_training(recipe.training, origin)
    _check_values(recipe, origin)
    return recipe


def resolved_yaml(recipe: Recipe) -> str:
    """The recipe as YAML, every default and override written out; it loads as the same recipe."""
    data = dataclasses.asdict(recipe)
    return yaml.safe_dump(data, sort_keys=False, allow_unicode=True, width=100)


def field_help(cls: type) -> dict[str, str]:
    """Field name to the string below it, for help texts and generated documentation."""
    pattern = re.compile(r'^    (\w+): .+\n    """(.+?)"""$', re.MULTILINE)
    return dict(pattern.findall(inspect.getsource(cls)))


def training_arguments_dict(recipe: Recipe) -> dict[str, Any]:
    """Keyword arguments for `TrainingArguments`, under the names of the installed transformers.

    `learning_rate` is the highest of the stage: the optimizer groups carry the real ones.
    """
    known = _training_hints()
    names = {
        old: old if old in known and new not in known else new for old, new in _RENAMED.items()
    }
    names |= {new: names[old] for old, new in _RENAMED.items()}
    arguments = {names.get(key, key): value for key, value in recipe.training.items()}
    return {
        "report_to": "none",
        **strategy_arguments(recipe.devices),
        **arguments,
        "output_dir": recipe.output_dir,
        "run_name": recipe.name,
        "seed": recipe.seed,
        "data_seed": recipe.seed,
        "learning_rate": max(recipe.stage.learning_rates.values()),
        "weight_decay": recipe.stage.weight_decay,
        "remove_unused_columns": False,
    }


def _training_hints() -> dict[str, Any]:
    hints = typing.get_type_hints(TrainingArguments)
    return {field.name: hints[field.name] for field in dataclasses.fields(TrainingArguments)}


def _check_training(training: dict[str, Any], origin: Origin) -> None:
    """Names and types against TrainingArguments; what the recipe sets itself is refused."""
    hints = _training_hints()
    for old, new in _RENAMED.items():
        hints[old] = hints[new] = bool | None if old == "gradient_checkpointing" else dict[str, Any]
        if old in training and new in training:
            origin.fail(("training", old), f"says the same as training.{new}; keep one of the two")
    for name, value in training.items():
        key = ("training", name)
        if name in OWNED:
            origin.fail(key, f"is not set in this section; it belongs to {OWNED[name]}")
        if name in _GONE:
            origin.fail(key, f"is no longer an argument of transformers; {_GONE[name]}")
        if name not in hints:
            known = set(hints) - set(OWNED)
            origin.fail(key, f"is not a key of TrainingArguments; {nearest(name, known)}")
        typed(value, hints[name], key=key, origin=origin)
        if name in _AT_LEAST_ONE and value < 1:
            origin.fail(key, f"must be at least 1, but it is {value}; give a count")
    if "per_device_train_batch_size" not in training:
        origin.fail(("training", "per_device_train_batch_size"), "is missing; add a count")
    if not {"max_steps", "num_train_epochs"} & set(training):
        origin.fail(("training", "max_steps"), "is missing; add max_steps or num_train_epochs")


def _check_values(recipe: Recipe, origin: Origin) -> None:
    """What types cannot say: positive sizes, shares, and keys that depend on one another."""
    model, data, stage = recipe.model, recipe.data, recipe.stage
    if model.init_from is not None and model.decoder is not None:
        problem = "gives init_from and decoder; keep the one that the stage starts from"
        origin.fail(("model",), problem)
    if model.init_from is None and model.decoder is None and model.text_config is None:
        problem = "gives no start; add init_from, decoder, or text_config for a new decoder"
        origin.fail(("model",), problem)
    for section in ("vision", "image"):
        for name, value in dataclasses.asdict(model)[section].items():
            if value is not False:  # a switch, not a size
                _positive(("model", section, name), value, origin)
    vision, image = model.vision, model.image
    for name, value, of, unit in (
        (
            "vision.hidden_size",
            vision.hidden_size,
            "num_attention_heads",
            vision.num_attention_heads,
        ),
        (
            "image.size_multiple",
            image.size_multiple,
            "one token",
            vision.patch_size * vision.merge_size,
        ),
        ("image.longest_edge", image.longest_edge, "size_multiple", image.size_multiple),
    ):
        if value % unit:
            near = {value // unit * unit or unit, (value // unit + 1) * unit}
            fix = f"{' or '.join(map(str, sorted(near)))} would do"
            problem = f"is {value}, not a multiple of {of} ({unit}); {fix}"
            origin.fail(("model", *name.split(".")), problem)
    _positive(("data", "max_length"), data.max_length, origin)
    if not 0 <= data.max_bad_share <= 1:
        problem = (
            f"must be between 0 and 1, but it is {data.max_bad_share}; 0.01 is one in a hundred"
        )
        origin.fail(("data", "max_bad_share"), problem)
    _check_sources(data.sources, origin)
    _check_packing(recipe, origin)
    _check_stage(stage, origin)
    _check_muon(recipe, origin)
    if model.encoder is not None and stage.alignment is not None:
        problem = "must be null with model.encoder; the aligner belongs to EVE, without an encoder"
        origin.fail(("stage", "alignment"), problem)
    _check_lora(recipe, origin)
    _check_recording(recipe, origin)


def _check_sources(sources: list[SourceSection], origin: Origin) -> None:
    if not sources:
        origin.fail(("data", "sources"), "is an empty list; add at least one source")
    for index, source in enumerate(sources):
        key = ("data", "sources", str(index))
        _positive((*key, "repeat"), source.repeat, origin)
        if source.weight is not None:
            _positive((*key, "weight"), source.weight, origin)
        if (source.weight is None) != (sources[0].weight is None):
            problem = "is given for some sources only; give every source a weight, or none"
            origin.fail((*key, "weight"), problem)
        if source.weight is not None and source.repeat != 1:
            origin.fail((*key, "repeat"), "stands beside weight; keep one of the two")
        if source.kind not in MADE and source.path is None:
            origin.fail(
                (*key, "path"), f"is missing; kind {source.kind} needs a file or a data set"
            )


def _check_packing(recipe: Recipe, origin: Origin) -> None:
    """Packed rows against the longest record, and against the attention that reads them."""
    packing, model = recipe.data.packing, recipe.model
    if packing is None:
        return
    for name, value in dataclasses.asdict(packing).items():
        if value is not None:
            _positive(("data", "packing", name), value, origin)
    if packing.tokens < recipe.data.max_length:
        problem = (
            f"is {packing.tokens}, so a record of max_length ({recipe.data.max_length}) has no "
            "row; make it at least that"
        )
        origin.fail(("data", "packing", "tokens"), problem)
    rows = recipe.training["per_device_train_batch_size"]
    if model.attn_implementation.startswith("flash") and rows > 1:
        problem = (
            f"is {rows}, but FlashAttention reads packed records from one row; set it to 1 and "
            f"data.packing.tokens to {rows} times as many"
        )
        origin.fail(("training", "per_device_train_batch_size"), problem)


def _check_stage(stage: StageSection, origin: Origin) -> None:
    if not stage.trainable:
        origin.fail(("stage", "trainable"), "is an empty list; add a glob, such as '*' for all")
    if not stage.learning_rates:
        origin.fail(("stage", "learning_rates"), "is empty; add a line such as '*': 4.0e-5")
    for glob, rate in stage.learning_rates.items():
        _positive(("stage", "learning_rates", glob), rate, origin)
    if stage.weight_decay < 0:
        problem = f"must not be negative, but it is {stage.weight_decay}; 0.0 switches it off"
        origin.fail(("stage", "weight_decay"), problem)
    if stage.alignment is not None:
        if stage.alignment.tap_every is not None:
            _positive(("stage", "alignment", "tap_every"), stage.alignment.tap_every, origin)
        _positive(("stage", "alignment", "weight"), stage.alignment.weight, origin)
        _positive(("stage", "alignment", "cache_gb"), stage.alignment.cache_gb, origin)
        if stage.name == "language":
            origin.fail(
                ("stage", "alignment"), "must be null in the stage language; it has no pictures"
            )


def _check_muon(recipe: Recipe, origin: Origin) -> None:
    """Muon needs whole matrices, and has AdamW beside it."""
    if not recipe.stage.muon:
        return
    optim = recipe.training.get("optim", ADAMW[0])
    if optim not in ADAMW:
        problem = f"stands beside training.optim: {optim}; use {' or '.join(ADAMW)} there"
        origin.fail(("stage", "muon"), problem)
    if recipe.devices.strategy != "ddp":
        problem = (
            f"needs whole matrices, which {recipe.devices.strategy} shares out; take "
            "devices.strategy: ddp, or an empty list here"
        )
        origin.fail(("stage", "muon"), problem)


def _check_lora(recipe: Recipe, origin: Origin) -> None:
    """The section against itself, the start and the devices."""
    section = recipe.lora
    if section is None:
        return
    _positive(("lora", "rank"), section.rank, origin)
    _positive(("lora", "alpha"), section.alpha, origin)
    if not 0 <= section.dropout < 1:
        problem = f"must be at least 0 and below 1, but it is {section.dropout}; 0.05 is usual"
        origin.fail(("lora", "dropout"), problem)
    if section.target_modules == []:
        origin.fail(("lora", "target_modules"), "is an empty list; give names, or null for all")
    if recipe.model.init_from is None:
        problem = (
            "needs a saved model that adapters belong to, and this recipe makes a new one; run "
            "`eve init` first and give its folder as model.init_from"
        )
        origin.fail(("lora",), problem)
    if section.quantize is not None and recipe.devices.strategy != "ddp":
        problem = (
            f"is {section.quantize}, and quantized weights are not spread by "
            f"{recipe.devices.strategy}; take devices.strategy: ddp, or null here"
        )
        origin.fail(("lora", "quantize"), problem)


def _check_recording(recipe: Recipe, origin: Origin) -> None:
    """What recordings of layers cannot go with."""
    if not recipe.model.record_layers:
        return
    training = recipe.training
    for holds, needs in (
        (recipe.data.packing is not None, "data.packing"),
        (training["per_device_train_batch_size"] == 1, "training.per_device_train_batch_size: 1"),
        (
            training.get("gradient_accumulation_steps", 1) == 1,
            "training.gradient_accumulation_steps: 1",
        ),
        (not training.get("gradient_checkpointing"), "training.gradient_checkpointing: false"),
        (recipe.model.attn_implementation == "sdpa", "model.attn_implementation: sdpa"),
        (recipe.devices.strategy == "ddp", "devices.strategy: ddp"),
        (
            training.get("bf16") or training.get("fp16") or recipe.model.dtype != "float32",
            "training.bf16: true",  # packed rows are one kernel in half precision only
        ),
        (not training.get("torch_compile"), "training.torch_compile: false"),
        (recipe.lora is None or recipe.lora.quantize is None, "lora.quantize: null"),
    ):
        if not holds:
            origin.fail(("model", "record_layers"), f"needs {needs}; set that, or false here")


def _positive(key: tuple[str, ...], value: float, origin: Origin) -> None:
    if value <= 0:
        origin.fail(key, f"must be above 0, but it is {value}; give a positive number")
