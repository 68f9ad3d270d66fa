"""One recipe, one run: build, train, save.  `eve train` and `eve quickstart` both end here.

An output folder holds the model and its processor, and beside them `recipe.resolved.yaml`,
`parameters.txt`, `run.json` (losses by term, cost) and, while it runs, the library's `checkpoint-*`
folders. Easy to get wrong: a folder with another run in it is refused, not overwritten.
"""

import json
import logging
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PrinterCallback,
    TrainingArguments,
)

from eve_vlm.alignment_eve import EveForPreTraining
from eve_vlm.configuration_eve import EveAlignmentConfig, EveConfig, EveVisionConfig
from eve_vlm.data.collator import EveCollator
from eve_vlm.data.encode import Encoder
from eve_vlm.data.records import Record
from eve_vlm.data.sources import EncodedDataset, Mixture, build_source
from eve_vlm.data.tokenizer import train_tokenizer
from eve_vlm.image_processing_eve import EveImageProcessor, num_image_tokens
from eve_vlm.loading import load_model, load_processor, require_model_folder
from eve_vlm.modeling_eve import EveForConditionalGeneration
from eve_vlm.processing_eve import VICUNA_CHAT_TEMPLATE, EveProcessor
from eve_vlm.train.parameters import parameter_table, select_trainable
from eve_vlm.train.recipe import Recipe, resolved_yaml, training_arguments_dict
from eve_vlm.train.teacher import FrozenTeacher
from eve_vlm.train.trainer import EveTrainer, StageProgress

logger = logging.getLogger(__name__)

RECIPE_FILE = "recipe.resolved.yaml"
RESULT_FILE = "run.json"
TOKENIZER_SAMPLE = 4096  # records whose words a new tokenizer is learnt from


@dataclass(frozen=True, kw_only=True, slots=True)
class RunResult:
    """What a run leaves behind."""

    output_dir: str
    """Folder of the saved model."""
    seconds: float
    """Wall time of training and saving."""
    records: int
    """Records used."""
    steps: int
    """Optimizer steps of the whole run."""
    losses: list[dict]
    """The log, one entry per logged step, every loss term by name."""


def train(recipe: Recipe, *, resume: bool = False) -> RunResult:
    """Runs one stage and saves its model.

    Raises:
        ValueError: for anything in the recipe, the data or the folders that a user can mend.
    """
    output = Path(recipe.output_dir)
    checkpoint = _check_output(output, recipe, resume=resume)
    torch.manual_seed(recipe.seed)
    started = time.perf_counter()
    records = _build_records(recipe)
    processor = build_processor(recipe, records)
    teacher = _build_teacher(recipe)
    model = build_model(recipe, processor, teacher.hidden_size if teacher else None)
    select_trainable(model, recipe.stage)
    encoder = Encoder(
        processor,
        format=recipe.data.format,
        max_length=recipe.data.max_length,
        teacher_view=teacher.view if teacher else None,
    )
    # Here processes wait for each other: all have checked the folder before one writes into it.
    arguments = TrainingArguments(**training_arguments_dict(recipe), disable_tqdm=True)
    if arguments.process_index == 0:
        output.mkdir(parents=True, exist_ok=True)
        (output / RECIPE_FILE).write_text(resolved_yaml(recipe), encoding="utf-8")
        table = parameter_table(model, recipe.stage)
        (output / "parameters.txt").write_text(table + "\n", encoding="utf-8")
    trainer = EveTrainer(
        model=model,
        args=arguments,
        train_dataset=EncodedDataset(records, encoder),
        data_collator=EveCollator(processor.tokenizer.pad_token_id),
        stage=recipe.stage,
        teacher=teacher,
        teacher_side=recipe.model.image.size_multiple // recipe.model.vision.patch_size,
        max_bad_share=recipe.data.max_bad_share,
        callbacks=[StageProgress(recipe.name)],
    )
    trainer.remove_callback(PrinterCallback)  # the progress bar shows the same
    trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_model(str(output))
    result = RunResult(
        output_dir=str(output),
        seconds=time.perf_counter() - started,
        # From the epoch, which counts all processes and what came before a resume.
        records=round(trainer.state.epoch * len(records)),
        steps=trainer.state.global_step,
        losses=[entry for entry in trainer.state.log_history if "loss" in entry],
    )
    if trainer.is_world_process_zero():
        processor.save_pretrained(output)
        # A pickle that only this machine could read; the recipe beside the model says the same.
        (output / "training_args.bin").unlink(missing_ok=True)
        # Written last: where it is, the run is complete.
        (output / RESULT_FILE).write_text(json.dumps(asdict(result), indent=1), encoding="utf-8")
    if trainer.bad_records:
        logger.warning("%d records were left out", trainer.bad_records.total())
    return result


def finished_run(recipe: Recipe) -> RunResult | None:
    """The result of exactly this run where its output folder holds it complete, else None."""
    output = Path(recipe.output_dir)
    file = output / RECIPE_FILE
    if not file.is_file() or file.read_text(encoding="utf-8") != resolved_yaml(recipe):
        return None
    if not (output / RESULT_FILE).is_file():
        return None
    return RunResult(**json.loads((output / RESULT_FILE).read_text(encoding="utf-8")))


def describe(recipe: Recipe) -> str:
    """What a run would do, without running it: the recipe, the parameter table, tokens per step.

    Builds the model without memory for its weights, so it works for any size on any machine.
    """
    width = _teacher_width(recipe)
    try:
        text_config = _decoder_config(recipe)
    except ValueError as error:
        if not recipe.model.text_config:
            raise
        logger.warning("%s Shown is the shape in model.text_config instead.", error)
        text_config = _decoder_config(recipe, start=False)
    with torch.device("meta"):
        model = _new_model(recipe, text_config, image_token_id=0, teacher_width=width)
    select_trainable(model, recipe.stage)
    arguments = recipe.training
    sequences = arguments["per_device_train_batch_size"] * arguments.get(
        "gradient_accumulation_steps", 1
    )
    picture = EveImageProcessor(**_picture_settings(recipe)).grid_of(1, 1)
    tokens = num_image_tokens(picture.rows, picture.cols)
    return "\n".join(
        [
            resolved_yaml(recipe),
            parameter_table(model, recipe.stage),
            "",
            f"A square picture takes {picture.rows} x {picture.cols} cells = {tokens} tokens.",
            f"A step takes {sequences} sequences per device (at most "
            f"{sequences * recipe.data.max_length:,} tokens).",
        ]
    )


def build_processor(recipe: Recipe, records: Mixture) -> EveProcessor:
    """The processor of the start, with the recipe's picture sizes; or a new one."""
    image = recipe.model.image
    if recipe.model.init_from is not None:
        folder = require_model_folder(recipe.model.init_from)
        return load_processor(
            folder, longest_edge=image.longest_edge, size_multiple=image.size_multiple
        )
    name = recipe.model.tokenizer or recipe.model.decoder
    if name is not None:
        try:
            tokenizer = AutoTokenizer.from_pretrained(name)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"The tokenizer {name!r} cannot be loaded ({str(error).splitlines()[0]}); give a "
                "folder, or connect to the Hub."
            ) from None
        if "<image>" not in tokenizer.get_vocab():
            tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
        template = tokenizer.chat_template or VICUNA_CHAT_TEMPLATE
    else:
        step = max(len(records) // TOKENIZER_SAMPLE, 1)
        words = (_words(records[index]) for index in range(0, len(records), step))
        vocab_size = (recipe.model.text_config or {}).get("vocab_size", 2048)
        tokenizer = train_tokenizer(words, vocab_size=vocab_size)
        template = tokenizer.chat_template
    pictures = EveImageProcessor(**_picture_settings(recipe))
    return EveProcessor(pictures, tokenizer, chat_template=template)


def build_model(
    recipe: Recipe, processor: EveProcessor, teacher_width: int | None
) -> EveForConditionalGeneration:
    """The model of an earlier stage, a decoder with a new patch embedding, or a new one."""
    section = recipe.model
    dtype = getattr(torch, section.dtype)
    if section.init_from is not None:
        config = EveConfig.from_pretrained(section.init_from)
        _decoder_config(recipe)  # says if the recipe's text_config does not agree
        _check_vision(recipe, config)
        config.alignment_config = _alignment_config(recipe, teacher_width)
        model = load_model(
            section.init_from,
            config=config,
            dtype=dtype,
            attn_implementation=section.attn_implementation,
            new=[r"aligner\."],
        )
    else:
        decoder_config = _decoder_config(recipe)
        decoder_config.setdefault("vocab_size", len(processor.tokenizer))
        model = _new_model(
            recipe,
            decoder_config,
            image_token_id=processor.image_token_id,
            teacher_width=teacher_width,
        ).to(dtype)
        if section.decoder is not None:
            _copy_decoder(model, section.decoder, dtype)
        model.generation_config.eos_token_id = processor.tokenizer.eos_token_id
        model.generation_config.pad_token_id = processor.tokenizer.pad_token_id
    if isinstance(model, EveForPreTraining) and recipe.stage.alignment is not None:
        model.alignment_weight = recipe.stage.alignment.weight
    return model


def _new_model(
    recipe: Recipe, text_config: dict, *, image_token_id: int, teacher_width: int | None
) -> EveForConditionalGeneration:
    vision = recipe.model.vision
    config = EveConfig(
        text_config=text_config,
        vision_config=EveVisionConfig(
            patch_size=vision.patch_size,
            merge_size=vision.merge_size,
            hidden_size=vision.hidden_size,
            num_attention_heads=vision.num_attention_heads,
        ),
        alignment_config=_alignment_config(recipe, teacher_width),
        image_token_id=image_token_id,
    )
    cls = EveForConditionalGeneration if config.alignment_config is None else EveForPreTraining
    return cls._from_config(config, attn_implementation=recipe.model.attn_implementation)


def _decoder_config(recipe: Recipe, *, start: bool = True) -> dict:
    """Settings of the decoder: those of the start, which `model.text_config` must agree with.

    Without a readable start (`start=False`, for a dry run) `model.text_config` alone is taken.
    """
    section = recipe.model
    expected = dict(section.text_config or {})
    found: dict = {}
    if start and section.decoder is not None:
        try:
            found = AutoConfig.from_pretrained(section.decoder).to_dict()
        except OSError as error:
            raise ValueError(
                f"The decoder {section.decoder!r} cannot be loaded "
                f"({str(error).splitlines()[0]}); give a folder, or connect to the Hub."
            ) from None
    elif start and section.init_from is not None:
        folder = require_model_folder(section.init_from)
        found = EveConfig.from_pretrained(folder).text_config.to_dict()
    elif not expected:
        raise ValueError(
            f"{section.init_from or section.decoder} is not at hand and model.text_config does not "
            "say its shape; run the stage before first, or add model.text_config."
        )
    for name, value in expected.items():
        if name in found and found[name] != value:
            raise ValueError(
                f"model.text_config.{name} is {value} in the recipe but {found[name]} in "
                f"{section.init_from or section.decoder}; make the two agree."
            )
    return expected | found


def _copy_decoder(model: EveForConditionalGeneration, name: str, dtype: torch.dtype) -> None:
    """Puts a language model's weights into the new model."""
    decoder = AutoModelForCausalLM.from_pretrained(name, dtype=dtype)
    model.model.language_model.load_state_dict(decoder.base_model.state_dict())
    model.lm_head.load_state_dict(decoder.get_output_embeddings().state_dict())
    model.tie_weights()
    model.generation_config = decoder.generation_config


def _alignment_config(recipe: Recipe, teacher_width: int | None) -> EveAlignmentConfig | None:
    if recipe.stage.alignment is None:
        return None
    vision, image = recipe.model.vision, recipe.model.image
    return EveAlignmentConfig(
        teacher_hidden_size=teacher_width,
        tap_every=recipe.stage.alignment.tap_every,
        num_attention_heads=vision.num_attention_heads,
        pool_size=image.size_multiple // (vision.patch_size * vision.merge_size),
    )


def _check_vision(recipe: Recipe, config: EveConfig) -> None:
    for name in ("patch_size", "merge_size", "hidden_size", "num_attention_heads"):
        wanted, found = getattr(recipe.model.vision, name), getattr(config.vision_config, name)
        if wanted != found:
            raise ValueError(
                f"model.vision.{name} is {wanted} in the recipe but {found} in "
                f"{recipe.model.init_from}; "
                "make the recipe agree with the model that it starts from."
            )


def _build_records(recipe: Recipe) -> Mixture:
    sources = [
        build_source(
            source.kind,
            path=source.path,
            image_folder=source.image_folder,
            options=source.options,
            seed=recipe.seed,
        )
        for source in recipe.data.sources
    ]
    return Mixture(sources, [source.weight for source in recipe.data.sources])


def _build_teacher(recipe: Recipe) -> FrozenTeacher | None:
    alignment = recipe.stage.alignment
    if alignment is None:
        return None
    return FrozenTeacher.from_pretrained(
        alignment.teacher, cells=_cells(recipe), layer=alignment.layer
    )


def _teacher_width(recipe: Recipe) -> int | None:
    """The teacher's width for a dry run; CLIP-L's 1024 where the teacher cannot be read."""
    try:
        teacher = _build_teacher(recipe)
    except ValueError as error:
        logger.warning("%s Its width is taken to be 1024.", error)
        return 1024
    return None if teacher is None else teacher.hidden_size


def _cells(recipe: Recipe) -> int:
    return recipe.model.image.longest_edge // recipe.model.image.size_multiple


def _picture_settings(recipe: Recipe) -> dict:
    vision, image = recipe.model.vision, recipe.model.image
    return {
        "size": {"longest_edge": image.longest_edge},
        "size_multiple": image.size_multiple,
        "patch_size": vision.patch_size,
        "merge_size": vision.merge_size,
    }


def _words(record: Record) -> str:
    """All that is said in a record, in one line: every word with the blank that it will have."""
    texts = [
        part["text"]
        for message in record.messages
        for part in message["content"]
        if part["type"] == "text"
    ]
    return " ".join(texts)


def _check_output(output: Path, recipe: Recipe, *, resume: bool) -> str | None:
    """Refuses a folder that holds something else; returns the checkpoint to resume from.

    Raises:
        ValueError: if the folder holds another run, a finished one, or an unfinished one without
            `resume`.
    """
    file = output / RECIPE_FILE
    if not output.exists() or not any(output.iterdir()):
        return None
    if not file.is_file():
        raise ValueError(
            f"{output} holds other files and no run; choose another output_dir or empty it."
        )
    if file.read_text(encoding="utf-8") != resolved_yaml(recipe):
        raise ValueError(
            f"{output} already holds a different run (see {file}); choose another output_dir, or "
            "remove the folder."
        )
    if (output / RESULT_FILE).is_file():
        raise ValueError(
            f"{output} already holds this run, finished; remove the folder to train it again."
        )
    if not resume:
        raise ValueError(
            f"{output} holds this run unfinished; add --resume to go on, or remove the folder."
        )
    steps = sorted(output.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    return str(steps[-1]) if steps else None


__all__ = [
    "RunResult",
    "build_model",
    "build_processor",
    "describe",
    "finished_run",
    "train",
]
