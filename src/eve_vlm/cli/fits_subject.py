"""What `eve fits` is asked about: a model or recipe and the options, as workloads to estimate.

The options are kept as they were typed; a recipe fills in what they leave open, and the published
settings what a recipe leaves open. Easy to get wrong: on a CPU everything is float32, because half
precision is many times slower there, so a recipe's bfloat16 counts for GPUs alone.
"""

from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .options import Dtype

if TYPE_CHECKING:
    from eve_vlm.configuration_eve import EveConfig
    from eve_vlm.image_processing_eve import EveImageProcessor
    from eve_vlm.memory.estimate import MemoryModel
    from eve_vlm.memory.formulas import Workload
    from eve_vlm.memory.machine import Device
    from eve_vlm.train.sections import Recipe

# The published teacher; its sizes are no secret, so it need not be at hand.
CLIP_LARGE_NAME = "openai/clip-vit-large-patch14-336"
CLIP_LARGE = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
}
PREALIGNED = ("model.vision_tower.*", "model.multi_modal_projector.*", "aligner.*")
USUAL_LENGTH, USUAL_WORDS, USUAL_ANSWER, USUAL_RANK = 2048, 64, 128, 16


class Task(StrEnum):
    """What memory is wanted for."""

    answer = "answer"
    train = "train"


class Stage(StrEnum):
    """Stages of training."""

    prealign = "prealign"
    pretrain = "pretrain"
    finetune = "finetune"


class Optim(StrEnum):
    """Optimizers whose memory is known."""

    adamw = "adamw"
    adamw_fused = "adamw_fused"
    adamw8bit = "adamw8bit"
    sgd = "sgd"


@dataclass
class Asked:
    """The options of the command line as they were given."""

    task: Task | None
    stage: Stage | None
    recipe: str | None
    teacher: str | None
    dtype: Dtype | None
    lora: int | None
    length: int | None
    batch: int | None
    picture: str | None
    pictures: int
    gpus: int
    zero: int | None
    fsdp: bool
    gpu_memory: str | None
    gradient_checkpointing: bool | None
    optimizer: Optim | None


@dataclass
class Subject:
    """What MODEL and --recipe say: shape, picture sizes, and how the recipe trains."""

    name: str
    config: "EveConfig"
    pictures: "EveImageProcessor"
    recipe: "Recipe | None"
    memory: "MemoryModel"
    align: bool

    @classmethod
    def of(cls, name: str, asked: Asked) -> "Subject":
        """Reads shapes, and headers of weights at most.

        Raises:
            ValueError: if it is no model and no recipe, or cannot be read.
        """
        from eve_vlm.image_processing_eve import EveImageProcessor
        from eve_vlm.inspection.subjects import kind_of
        from eve_vlm.loading import load_config, load_processor
        from eve_vlm.memory.estimate import MemoryModel
        from eve_vlm.train.build import picture_settings
        from eve_vlm.train.recipe import load_recipe

        kind = kind_of(name)
        if kind not in ("model", "config", "recipe"):
            raise ValueError(
                f"{name} is a {kind}; name a model folder, a Hub id, a config.json or a recipe."
            )
        recipe = load_recipe(asked.recipe) if asked.recipe else None
        stored: dict[str, Any] = {}
        if kind == "recipe":
            if recipe is not None:
                raise ValueError(f"{name} is a recipe already; leave --recipe out.")
            recipe = load_recipe(name)
            config = _config_of(recipe)
        else:
            config = load_config(name)
        if kind == "model":
            pictures = load_processor(name).image_processor
            stored = _stored(Path(name))
        elif kind == "recipe" and recipe is not None:
            pictures = EveImageProcessor(**picture_settings(recipe))
        else:
            pictures = _pictures_of(config)
        teacher = _teacher(config, pictures, recipe, asked)
        memory = MemoryModel(config, teacher=teacher, **stored)
        return cls(name, config, pictures, recipe, memory, teacher is not None)


def _config_of(recipe: "Recipe") -> "EveConfig":
    """The shape that a recipe trains; its own, where the start is not there yet."""
    from eve_vlm.train.run import model_on_meta

    return model_on_meta(recipe).config


def _pictures_of(config: "EveConfig") -> "EveImageProcessor":
    """24 x 24 cells, as the published models see a square, where no processor says otherwise."""
    from eve_vlm.image_processing_eve import EveImageProcessor

    vision = config.vision_config
    cell = vision.patch_size * vision.merge_size
    return EveImageProcessor(
        size={"longest_edge": 24 * cell},
        size_multiple=cell,
        patch_size=vision.patch_size,
        merge_size=vision.merge_size,
    )


def _stored(folder: Path) -> dict[str, Any]:
    """The largest file of a checkpoint, and the type in which its weights need no copy."""
    from eve_vlm.checkpoint_files import list_weights
    from eve_vlm.lora_folder import is_lora

    if not folder.is_dir() or is_lora(folder):
        return {}
    entries = list(list_weights(folder).values())
    files = {entry.file for entry in entries}
    kinds = {entry.dtype for entry in entries}
    plain = len(kinds) == 1 and all(file.suffix == ".safetensors" for file in files)
    return {
        "largest_shard": max(file.stat().st_size for file in files),
        "mapped": kinds.pop() if plain else None,
    }


def _teacher(
    config: "EveConfig", pictures: "EveImageProcessor", recipe: "Recipe | None", asked: Asked
) -> Any:
    """The frozen teacher on `meta`, and the aligner's sizes put into `config`; None for none."""
    from eve_vlm.configuration_eve import EveAlignmentConfig
    from eve_vlm.encoder_twin_eve import EveEncoderConfig

    alignment = recipe.stage.alignment if recipe else None
    name = asked.teacher or (alignment.teacher if alignment else "none")
    if name == "none":
        return None
    if isinstance(config.vision_config, EveEncoderConfig):
        raise ValueError("An encoder-based twin has no aligner; leave --teacher out.")
    cells = pictures.size["longest_edge"] // pictures.size_multiple
    teacher = _teacher_on_meta(name, cells=cells, layer=alignment.layer if alignment else -2)
    vision = config.vision_config
    config.alignment_config = EveAlignmentConfig(
        teacher_hidden_size=teacher.hidden_size,
        tap_every=alignment.tap_every if alignment else 4,
        num_attention_heads=vision.num_attention_heads,
        pool_size=pictures.size_multiple // (vision.patch_size * vision.merge_size),
    )
    return teacher


def _teacher_on_meta(name: str, *, cells: int, layer: int) -> Any:
    """`FrozenTeacher` around a model without memory."""
    import torch
    from transformers import AutoConfig, AutoModel, CLIPVisionConfig

    from eve_vlm.data.teacher_view import TeacherView
    from eve_vlm.efficientnet_lite import lite0_config
    from eve_vlm.errors import first_line
    from eve_vlm.train.teacher import FrozenTeacher
    from eve_vlm.vision_encoder import EFFICIENTNET, patch_features

    if name == EFFICIENTNET:
        config: Any = lite0_config(layer)
    elif name == CLIP_LARGE_NAME:
        config = CLIPVisionConfig(**CLIP_LARGE)
    else:
        try:
            config = AutoConfig.from_pretrained(name)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"The teacher {name!r} cannot be read ({first_line(error)}); give --teacher with a "
                "vision model's folder or name, efficientnet-lite0, or none."
            ) from None
        config = config.vision_config if "vision_config" in config.sub_configs else config
    with torch.device("meta"):
        model = AutoModel.from_config(config)
    return FrozenTeacher(
        model,
        lambda model, pixels: patch_features(model, pixels, layer),
        view=TeacherView(cells=cells, cell_pixels=config.patch_size, fill=(0, 0, 0)),
        hidden_size=config.hidden_size,
        mean=(0.5,) * 3,  # values cost nothing
        std=(0.5,) * 3,
    )


# --- workloads ------------------------------------------------------------------------------------


def rows_of(subject: Subject, asked: Asked) -> "list[tuple[str, Workload]]":
    """(name, workload for a CPU) of every line to show."""
    if asked.task is Task.answer:
        return [("answer", _answering(subject, asked))]
    recipe = subject.recipe
    rank = asked.lora or (recipe.lora.rank if recipe and recipe.lora else 0)
    if asked.task is Task.train:
        stage = asked.stage or _stage_of(subject)
        return [(_title(stage, rank), _training(subject, asked, stage, rank))]
    rows = [("answer", _answering(subject, asked))]
    for stage in [asked.stage] if asked.stage else list(Stage):
        ranks = (0,) if stage is Stage.prealign else (0, rank or USUAL_RANK)
        rows += [(_title(stage, one), _training(subject, asked, stage, one)) for one in ranks]
    return rows


def _title(stage: Stage, rank: int) -> str:
    return f"{stage.value}, LoRA {rank}" if rank else stage.value


def _stage_of(subject: Subject) -> Stage:
    name = subject.recipe.stage.name if subject.recipe else "finetune"
    return Stage(name) if name in list(Stage) else Stage.pretrain


def _grid(subject: Subject, asked: Asked) -> dict[str, Any]:
    from eve_vlm.inspection.subjects import parse_size

    if asked.picture:
        width, height = parse_size(asked.picture)
        grid = subject.pictures.grid_of(height, width)
    else:
        grid = subject.pictures.square_grid()
    return {"rows": grid.rows, "cols": grid.cols, "pictures": asked.pictures}


def _answering(subject: Subject, asked: Asked) -> "Workload":
    import torch

    from eve_vlm.image_processing_eve import num_image_tokens
    from eve_vlm.memory.formulas import Workload

    grid = _grid(subject, asked)
    limit = subject.config.text_config.max_position_embeddings
    tokens = grid["pictures"] * num_image_tokens(grid["rows"], grid["cols"])
    length = asked.length or min(tokens + USUAL_WORDS + USUAL_ANSWER, limit)
    # Two thirds of a short sequence's words are the answer's.
    new_tokens = max(1, min(USUAL_ANSWER, (length - tokens) * 2 // 3))
    batch = asked.batch or 1
    return Workload(
        training=False,
        length=length,
        new_tokens=new_tokens,
        batch=batch,
        padded=batch > 1,
        dtype=getattr(torch, asked.dtype or "float32"),
        **grid,
    )


def _training(subject: Subject, asked: Asked, stage: Stage, rank: int) -> "Workload":
    """One stage as the recipe, or the published settings, would train it."""
    import torch

    from eve_vlm.memory.formulas import Workload

    recipe = subject.recipe
    limit = subject.config.text_config.max_position_embeddings
    usual = Workload(
        training=True,
        length=min(USUAL_LENGTH, limit),
        trainable=PREALIGNED if stage is Stage.prealign else ("*",),
        optimizer="adamw_fused",  # the default of TrainingArguments
        aligned=subject.align,
        **_grid(subject, asked),
    )
    if recipe is not None:
        usual = _as_recipe(usual, recipe, stage)
    batch = asked.batch or usual.batch
    checkpointing = asked.gradient_checkpointing
    return replace(
        usual,
        length=asked.length or usual.length,
        batch=batch,
        padded=batch > 1,
        dtype=getattr(torch, asked.dtype or "float32"),
        lora=rank,
        gradient_checkpointing=usual.gradient_checkpointing
        if checkpointing is None
        else checkpointing,
        optimizer=asked.optimizer.value if asked.optimizer else usual.optimizer,
        muon=() if asked.optimizer else usual.muon,
    )


def _as_recipe(work: "Workload", recipe: "Recipe", stage: Stage) -> "Workload":
    training = recipe.training
    if stage.value == recipe.stage.name or recipe.stage.name == "language":
        work = replace(work, trainable=tuple(recipe.stage.trainable))
    checkpointing = training.get("gradient_checkpointing", training.get("activation_checkpointing"))
    return replace(
        work,
        length=recipe.data.max_length,
        batch=training["per_device_train_batch_size"],
        accumulation=training.get("gradient_accumulation_steps", 1),
        gradient_checkpointing=bool(checkpointing),
        attention=recipe.model.attn_implementation,
        optimizer=_optimizer_of(training.get("optim", "adamw_torch_fused")),
        muon=tuple(recipe.stage.muon),
    )


def _optimizer_of(name: str) -> Any:
    """Our name of a `TrainingArguments.optim`."""
    known = {
        "adamw_torch": "adamw",
        "adamw_torch_fused": "adamw_fused",
        "adamw_bnb_8bit": "adamw8bit",
        "adamw_8bit": "adamw8bit",
        "sgd": "sgd",
    }
    if name not in known:
        raise ValueError(
            f"training.optim is {name}, whose memory is not known here; give --optimizer."
        )
    return known[name]


def on_device(work: "Workload", device: "Device", subject: Subject, asked: Asked) -> "Workload":
    """The workload as it runs on a device: on GPUs in bfloat16, and sharded as asked."""
    import torch

    if device.kind == "cpu":
        return work
    recipe = subject.recipe
    half = recipe.model.dtype if recipe else "bfloat16"
    work = replace(
        work,
        device="cuda",
        dtype=work.dtype if asked.dtype else getattr(torch, half),
    )
    return (
        replace(work, gpus=asked.gpus, sharding=_sharding(recipe, asked)) if work.training else work
    )


def _sharding(recipe: "Recipe | None", asked: Asked) -> Any:
    """What is shared between GPUs, as options or the recipe say."""
    if asked.fsdp:
        return "fsdp"
    stage = asked.zero
    if stage is None and recipe is not None:
        from eve_vlm.train.devices import strategy_arguments

        spread = {**strategy_arguments(recipe.devices), **recipe.training}
        if spread.get("fsdp"):
            return "fsdp"
        deepspeed = spread.get("deepspeed")
        if isinstance(deepspeed, dict):
            stage = deepspeed.get("zero_optimization", {}).get("stage", 0)
    return f"zero{stage}" if stage else "none"


__all__ = ["Asked", "Optim", "Stage", "Subject", "Task", "on_device", "rows_of"]
