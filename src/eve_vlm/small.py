"""`eve small train`: all that makes `eve-small`, in one command that goes on where it stopped.

A base is made from the asset `smollm2`, its decoder answers some thousand prompts without a
picture, the three recipes in `recipes/eve_small` run one after the other, and what their adapters
learnt is merged into a plain folder after each.  Easy to get wrong:
nothing is fetched here, so that a machine without a network says at once what it lacks and not in
the middle of the second stage.
"""

import json
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
from tqdm.auto import tqdm
from transformers.utils import logging as transformers_logging

from eve_vlm.assets.catalogue import asset_folder
from eve_vlm.configuration_eve import EveVisionConfig
from eve_vlm.conversing import ON_CPU, ON_GPU, ConverseSettings, converse
from eve_vlm.data.sources import source_of
from eve_vlm.decoders.initialize import initialize
from eve_vlm.decoders.loading import load_decoder, load_decoder_tokenizer
from eve_vlm.export.decoder import require_gguf
from eve_vlm.export.merged_run import merge_run
from eve_vlm.lora_adapters import require_peft
from eve_vlm.output_folder import new_folder
from eve_vlm.train.build import build_teacher
from eve_vlm.train.recipe import load_recipe
from eve_vlm.train.run import finished_run, train
from eve_vlm.train.sections import Recipe

STAGES = ("1_prealign", "2_pretrain", "3_finetune")
DECODER = "smollm2"  # the asset
BASE = "base"  # folder of a run, beside those of the stages
TEXTS = "conversations.jsonl"  # in the folder of a run: records without a picture
NUM_TEXTS = 6000


def stage_recipes(
    output: Path, *, steps_scale: float = 1.0, overrides: Sequence[str] = ()
) -> list[Recipe]:
    """The shipped recipes with their folders below `output`.

    Args:
        output: folder of the run.
        steps_scale: factor of every recipe's `training.max_steps`.
        overrides: `key=value` for every stage; `finetune:key=value` for one.

    Raises:
        ValueError: as `load_recipe`, or for a stage that there is none of.
    """
    if steps_scale <= 0:
        raise ValueError(f"--steps-scale is {steps_scale}; give a number above 0.")
    recipes: list[Recipe] = []
    start = output / BASE
    for name in STAGES:
        stage = name.split("_", 1)[1]
        steps = load_recipe(f"eve_small/{name}").training["max_steps"]
        recipe = load_recipe(
            f"eve_small/{name}",
            [
                f"output_dir={json.dumps(str(output / stage))}",
                f"model.init_from={json.dumps(str(start))}",
                f"training.max_steps={max(round(steps * steps_scale), 1)}",
                *_texts(output / TEXTS, name),
                *_overrides_of(stage, overrides),
            ],
        )
        recipes.append(recipe)
        start = merged_folder(recipe)
    return recipes


def merged_folder(recipe: Recipe) -> Path:
    """Where the plain model of a stage lies: beside its adapters, or where it was trained."""
    folder = Path(recipe.output_dir)
    return folder if recipe.lora is None else folder.with_name(f"{folder.name}-merged")


def train_small(
    output: Path,
    *,
    steps_scale: float = 1.0,
    overrides: Sequence[str] = (),
    base: Path | None = None,
    say: Callable[[str], object] = lambda text: None,
) -> Path:
    """Trains `eve-small`; stages that an earlier call finished are kept.

    Args:
        output: folder of the run, with one folder for each stage below.
        steps_scale, overrides: see `stage_recipes`.
        base: a model to start from in place of a new one on the asset's decoder.
        say: told in a sentence what is done.

    Returns:
        The folder of the trained model, a plain one.

    Raises:
        ValueError: for what is missing, and for what a user can mend in overrides and folders.
    """
    transformers_logging.disable_progress_bar()
    recipes = stage_recipes(output, steps_scale=steps_scale, overrides=overrides)
    if lacking := lacking_parts(recipes, decoder=base is None):
        raise ValueError(f"eve-small cannot be trained yet: {' '.join(lacking)}")
    _make_base(recipes[0], base, say)
    if any(source.path == str(output / TEXTS) for one in recipes for source in one.data.sources):
        _make_texts(output / TEXTS, say)
    newly: Recipe | None = None
    for recipe in recipes:
        stage, merged = recipe.stage.name, merged_folder(recipe)
        if finished_run(recipe) is not None:
            if newly is not None:
                raise ValueError(
                    f"{recipe.output_dir} was trained from another {newly.output_dir} than the "
                    "one that was trained now; remove it, so that it is trained again."
                )
            say(f"{stage}: finished before, kept")
        else:
            newly = recipe
            if recipe.lora is not None:
                shutil.rmtree(merged, ignore_errors=True)  # of a run that is no longer there
            say(f"{stage}: {recipe.training['max_steps']:,} steps")
            done = train(recipe, resume=True, say=say)
            say(f"{stage}: {done.records:,} records in {done.seconds:,.0f} s")
        if recipe.lora is not None and not merged.is_dir():
            merge_run(recipe.output_dir, merged)
    return merged_folder(recipes[-1])


def lacking_parts(recipes: Sequence[Recipe], *, decoder: bool = True) -> list[str]:
    """What the stages need and this machine lacks, a sentence each with the command that mends it.

    Args:
        decoder: whether a base is still to be made of the asset's decoder.
    """
    found: dict[str, None] = {}
    checks: list[Callable[[], object]] = [lambda: require_peft("Training with lora")]
    if decoder and not (Path(recipes[0].model.init_from or "") / "config.json").is_file():
        checks += [lambda: asset_folder(DECODER), require_gguf]
    for recipe in recipes:
        checks += [partial(build_teacher, recipe)]
        checks += [
            partial(source_of, source, seed=recipe.seed)
            for source in recipe.data.sources
            if Path(source.path or "").name != TEXTS  # is made when it is its turn
        ]
    for check in checks:
        try:
            check()
        except ValueError as error:
            found[str(error)] = None
    return list(found)


def _overrides_of(stage: str, overrides: Sequence[str]) -> list[str]:
    """Those that concern a stage, without its name in front."""
    known = [name.split("_", 1)[1] for name in STAGES]
    kept = []
    for override in overrides:
        name, colon, rest = override.partition(":")
        if not colon or "=" in name:  # the colon of a value
            kept.append(override)
        elif name not in known:
            raise ValueError(f"{override}: there is no stage {name}; give {', '.join(known)}.")
        elif name == stage:
            kept.append(rest)
    return kept


def _texts(file: Path, name: str) -> list[str]:
    """The override that puts the run's own file of conversations into a recipe that has some."""
    sources = load_recipe(f"eve_small/{name}").data.sources
    return [
        f"data.sources.{index}.path={json.dumps(str(file))}"
        for index, source in enumerate(sources)
        if source.name == TEXTS.removesuffix(".jsonl")
    ]


def _make_base(first: Recipe, base: Path | None, say: Callable[[str], object]) -> None:
    """The model that the first stage starts from: the decoder and a fresh patch embedding."""
    folder, vision = Path(first.model.init_from or ""), first.model.vision
    if folder.is_dir():
        return
    if base is not None:
        with new_folder(folder) as part:
            shutil.copytree(base, part, dirs_exist_ok=True)
        return
    say(f"{folder}: made of the decoder in the asset {DECODER}")
    initialize(
        asset_folder(DECODER),
        folder,
        vision=EveVisionConfig(**asdict(vision)),
        longest_edge=first.model.image.longest_edge,
        seed=first.seed,
        # Without the decoder's own introduction, which would be 20 tokens of every record, and
        # with marks around answers: one rendering finds them all (0.4 ms of a core, else 2).
        chat_template="chatml",
    )


def _make_texts(file: Path, say: Callable[[str], object]) -> None:
    """Conversations of the decoder itself, unless the file is there; goes on with begun ones."""
    if file.is_file():
        return
    gpu, part = torch.cuda.is_available(), file.with_name(f"begun-{file.name}")
    settings = ConverseSettings(number=NUM_TEXTS, batch_size=ON_GPU if gpu else ON_CPU)
    say(f"{file}: the decoder answers {NUM_TEXTS:,} prompts without a picture")
    folder = asset_folder(DECODER)
    decoder = load_decoder(folder, dtype=torch.bfloat16 if gpu else torch.float32).model
    with tqdm(total=NUM_TEXTS, desc="answering", unit=" prompts") as bar:
        converse(
            decoder.to("cuda" if gpu else "cpu"),
            load_decoder_tokenizer(folder),
            part,
            settings,
            name=DECODER,
            progress=bar.update,
        )
    os.replace(part, file)


__all__ = ["STAGES", "lacking_parts", "merged_folder", "stage_recipes", "train_small"]
