"""`eve small train`: all that makes `eve-small`, in one command that goes on where it stopped.

With a GPU a base is made from the asset `smollm2`, its decoder answers some thousand prompts
without a picture, the three recipes in `recipes/eve_small` run one after the other, and what their
adapters learnt is merged into a plain folder after each.  Without one a small decoder is made from
nothing by the four recipes in `recipes/eve_small_cpu`, or by others of the same stages.  An
encoder-based twin for comparison is trained by the recipes that a run left, so that no value can
differ but those of `twin_recipe`.
Easy to get wrong: nothing is fetched here, so that a machine without a network says at once what it
lacks and not in the middle of the second stage.
"""

import json
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

from tqdm.auto import tqdm
from transformers.utils import logging as transformers_logging

from eve_vlm.assets.catalogue import asset_folder
from eve_vlm.configuration_eve import EveVisionConfig
from eve_vlm.conversing import ConverseSettings, converse, load_speaker
from eve_vlm.data.sources import source_of
from eve_vlm.decoders.initialize import initialize
from eve_vlm.default_model.assembling import DECODER as SMOLLM2
from eve_vlm.default_model.assembling import NEW
from eve_vlm.export.merged_run import merge_run
from eve_vlm.lora_adapters import require_peft
from eve_vlm.output_folder import new_folder
from eve_vlm.train.build import build_teacher
from eve_vlm.train.devices import check_device
from eve_vlm.train.recipe import find_recipe, load_recipe
from eve_vlm.train.run import finished_run, train
from eve_vlm.train.run_folder import RECIPE_FILE
from eve_vlm.train.sections import EncoderSection, Recipe
from eve_vlm.vision_encoder import EFFICIENTNET

STAGES = {
    SMOLLM2: ("1_prealign", "2_pretrain", "3_finetune"),
    NEW: ("0_language", "1_prealign", "2_pretrain", "3_finetune"),
}
"""Recipes by decoder."""
RECIPES = {SMOLLM2: "eve_small", NEW: "eve_small_cpu"}
"""Their folders, unless told otherwise."""
BASE = "base"  # folder of a run on the asset's decoder, beside those of the stages
LANGUAGE = "language"  # the stage that makes a new decoder
TEXTS = "conversations.jsonl"  # in the folder of a run: records without a picture
NUM_TEXTS = 6000
# What globs of eve-small's trainable parts mean in its twin, where `*` and `*.layers.*` may name
# the frozen encoder too; it has no aligner.
ROW_END = "model.vision_tower.row_end_embedding"
TWIN_GLOBS = {
    "*": ("model.language_model.*", "model.multi_modal_projector.*", ROW_END),
    "*.layers.*": ("model.language_model.layers.*",),
    "model.vision_tower.*": (ROW_END,),
}
ALIGNER = "aligner."


def stage_recipes(
    output: Path,
    *,
    decoder: str = SMOLLM2,
    folder: str | None = None,
    steps_scale: float = 1.0,
    overrides: Sequence[str] = (),
    twin_of: Path | None = None,
) -> list[Recipe]:
    """The shipped recipes with their folders below `output`, or those of a twin.

    Args:
        output: folder of the run.
        decoder: a key of `STAGES`; that of a twin is the one of its run.
        folder: other recipes of the same stages, the name of a folder of the package's recipes or
            the path of one; a twin has those of its run.
        steps_scale: factor of every recipe's `training.max_steps`.
        overrides: `key=value` for every stage; `finetune:key=value` for one.
        twin_of: folder of another run, by whose recipes and conversations a twin is trained; from
            its base too where that is still there, or from its new decoder.

    Raises:
        ValueError: as `load_recipe`, for a stage or decoder that there is none of, or a run that
            lacks a stage.
    """
    if steps_scale <= 0:
        raise ValueError(f"--steps-scale is {steps_scale}; give a number above 0.")
    if twin_of is not None:
        decoder = decoder_of(twin_of)
        if folder is not None:
            raise ValueError("--twin-of takes the recipes of its run; leave --recipes out.")
    if decoder not in STAGES:
        raise ValueError(f"--decoder is {decoder}; use {' or '.join(STAGES)}.")
    recipes: list[Recipe] = []
    stages, texts = STAGES[decoder], output / TEXTS
    if twin_of is None:
        folder = folder or RECIPES[decoder]
        _check_decoder(decoder, folder)
    start = output / BASE if decoder == SMOLLM2 else None
    if twin_of is not None:
        texts = twin_of / TEXTS
        if decoder == NEW:
            start, stages = _new_decoder(twin_of), stages[1:]
        elif (twin_of / BASE / "config.json").is_file():
            start = twin_of / BASE
    for name in stages:
        stage = name.split("_", 1)[1]
        file = f"{folder}/{name}" if twin_of is None else _recipe_file(twin_of, output, stage)
        given = load_recipe(file)
        steps = max(round(given.training["max_steps"] * steps_scale), 1)
        begin = [] if start is None else [f"model.init_from={json.dumps(str(start))}"]
        recipe = load_recipe(
            file,
            [
                f"output_dir={json.dumps(str(output / stage))}",
                *begin,
                f"training.max_steps={steps}",
                *_texts(texts, given),
                *_overrides_of(stage, overrides),
            ],
        )
        recipes.append(recipe)
        start = merged_folder(recipe)
    return recipes if twin_of is None else _twins(recipes)


def _check_decoder(decoder: str, folder: str) -> None:
    """Refuses recipes that make a new decoder where another one is to be taken."""
    first = find_recipe(f"{folder}/{STAGES[decoder][0]}")
    maker = first.with_name(f"{STAGES[NEW][0]}.yaml")
    if decoder != NEW and maker.is_file():
        raise ValueError(
            f"{folder} begins with {maker.stem}, which is for --decoder {NEW}; add it."
        )


def usual_output(decoder: str, folder: str | None = None) -> Path:
    """Where a run lies unless told otherwise: `runs/eve-small-cpu` of `eve_small_cpu`."""
    recipes = folder or RECIPES.get(decoder, RECIPES[SMOLLM2])
    return Path("runs") / Path(recipes).name.replace("_", "-")


def decoder_of(run: Path) -> str:
    """What the decoder of a run or of its twin is, a key of `STAGES`."""
    last = run / "finetune" / RECIPE_FILE
    made = (run / LANGUAGE).is_dir() or (last.is_file() and load_recipe(last).lora is None)
    return NEW if made else SMOLLM2


def _new_decoder(run: Path) -> Path:
    """The folder of the decoder that a run made; a twin starts from the same."""
    folder = run / LANGUAGE
    if not (folder / "config.json").is_file():
        raise ValueError(
            f"{folder} has no finished decoder, from which the twin would start; run `eve small "
            f"train --decoder {NEW} --output {run}` first."
        )
    return folder


def twin_recipe(recipe: Recipe, encoder: EncoderSection) -> Recipe:
    """The same stage of an encoder-based twin: all that the two may differ in, beside folders.

    A frozen encoder and a new projector stand in place of the patch embedding layer, and nothing
    is aligned, because the aligner is EVE's.
    """
    globs = [glob for glob in recipe.stage.trainable if not glob.startswith(ALIGNER)]
    rates = recipe.stage.learning_rates.items()
    return replace(
        recipe,
        name=f"eve-small-twin-{recipe.stage.name}",
        model=replace(recipe.model, encoder=encoder),
        stage=replace(
            recipe.stage,
            trainable=[name for glob in globs for name in TWIN_GLOBS.get(glob, (glob,))],
            learning_rates={glob: rate for glob, rate in rates if not glob.startswith(ALIGNER)},
            alignment=None,
        ),
    )


def _twins(recipes: Sequence[Recipe]) -> list[Recipe]:
    """Of all stages.  The encoder is the teacher of the stages that have one, as published."""
    teachers = (one.stage.alignment for one in recipes if one.stage.alignment is not None)
    teacher = next(teachers, None)
    encoder = EncoderSection(name=EFFICIENTNET)
    if teacher is not None:
        encoder = EncoderSection(name=teacher.teacher, layer=teacher.layer)
    return [twin_recipe(recipe, encoder) for recipe in recipes]


def _recipe_file(run: Path, output: Path, stage: str) -> Path:
    """The recipe that a stage of another run was trained by."""
    if run.resolve() == output.resolve():
        raise ValueError(f"{output} is the run that the twin is of; give it another --output.")
    file = run / stage / RECIPE_FILE
    if not file.is_file():
        raise ValueError(
            f"{file} is not there, so the {stage} of its twin is not known; give the folder of an "
            "`eve small train` that came to its last stage."
        )
    return file


def merged_folder(recipe: Recipe) -> Path:
    """Where the plain model of a stage lies: beside its adapters, or where it was trained."""
    folder = Path(recipe.output_dir)
    return folder if recipe.lora is None else folder.with_name(f"{folder.name}-merged")


def train_small(
    output: Path,
    *,
    decoder: str = SMOLLM2,
    folder: str | None = None,
    steps_scale: float = 1.0,
    overrides: Sequence[str] = (),
    base: Path | None = None,
    twin_of: Path | None = None,
    say: Callable[[str], object] = lambda text: None,
) -> Path:
    """Trains `eve-small` or a twin of it; stages that an earlier call finished are kept.

    Args:
        output: folder of the run, with one folder for each stage below.
        decoder, folder, steps_scale, overrides, twin_of: see `stage_recipes`.
        base: a model to start from in place of a new one on the asset's decoder.
        say: told in a sentence what is done.

    Returns:
        The folder of the trained model, a plain one.

    Raises:
        ValueError: for what is missing, and for what a user can mend in overrides and folders.
    """
    transformers_logging.disable_progress_bar()
    recipes = stage_recipes(
        output,
        decoder=decoder,
        folder=folder,
        steps_scale=steps_scale,
        overrides=overrides,
        twin_of=twin_of,
    )
    if lacking := lacking_parts(recipes, decoder=base is None):
        raise ValueError(f"eve-small cannot be trained yet: {' '.join(lacking)}")
    if recipes[0].model.init_from is not None:
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
    checks: list[Callable[[], object]] = []
    if any(recipe.lora is not None for recipe in recipes):
        checks += [lambda: require_peft("Training with lora")]
    start = recipes[0].model.init_from
    if decoder and start is not None and not (Path(start) / "config.json").is_file():
        checks += [lambda: asset_folder(SMOLLM2)]
    for recipe in recipes:
        checks += [partial(check_device, recipe), partial(build_teacher, recipe)]
        checks += [
            partial(source_of, source, seed=recipe.seed)
            for source in recipe.data.sources
            # That of the run itself is made when it is its turn.
            if source.path != str(Path(recipe.output_dir).parent / TEXTS)
        ]
    for check in checks:
        try:
            check()
        except ValueError as error:
            found[str(error)] = None
    return list(found)


def _overrides_of(stage: str, overrides: Sequence[str]) -> list[str]:
    """Those that concern a stage, without its name in front."""
    known = list(
        dict.fromkeys(name.split("_", 1)[1] for names in STAGES.values() for name in names)
    )
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


def _texts(file: Path, recipe: Recipe) -> list[str]:
    """The override that puts a run's own file of conversations into a recipe that has some."""
    return [
        f"data.sources.{index}.path={json.dumps(str(file))}"
        for index, source in enumerate(recipe.data.sources)
        if Path(source.path or "").name == TEXTS
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
    say(f"{folder}: made of the decoder in the asset {SMOLLM2}")
    initialize(
        asset_folder(SMOLLM2),
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
    part = file.with_name(f"begun-{file.name}")
    say(f"{file}: the decoder answers {NUM_TEXTS:,} prompts without a picture")
    speaker = load_speaker(SMOLLM2)
    settings = ConverseSettings(number=NUM_TEXTS, batch_size=speaker.batch_size)
    with tqdm(total=NUM_TEXTS, desc="answering", unit=" prompts") as bar:
        converse(
            speaker.decoder,
            speaker.tokenizer,
            part,
            settings,
            name=SMOLLM2,
            progress=bar.update,
        )
    os.replace(part, file)


__all__ = [
    "BASE",
    "NEW",
    "SMOLLM2",
    "STAGES",
    "decoder_of",
    "lacking_parts",
    "merged_folder",
    "stage_recipes",
    "train_small",
    "twin_recipe",
    "usual_output",
]
