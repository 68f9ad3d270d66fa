"""One recipe, one run: build, train, save.  `eve train` and `eve quickstart` both end here.

An output folder holds the model and its processor, and beside them `recipe.resolved.yaml`,
`parameters.txt`, `run.json` (losses by term, cost) and, while it runs, the library's `checkpoint-*`
folders. Easy to get wrong: a folder with another run in it is refused, not overwritten.
"""

import json
import logging
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from transformers import PrinterCallback, TrainingArguments

from eve_vlm.data.sources import Mixture
from eve_vlm.data.sources.streams import StreamMixture
from eve_vlm.image_processing_eve import EveImageProcessor, num_image_tokens
from eve_vlm.modeling_eve import EveForConditionalGeneration
from eve_vlm.output_folder import written_whole
from eve_vlm.train.build import (
    build_model,
    build_processor,
    build_records,
    build_teacher,
    decoder_config,
    new_model,
    picture_settings,
    teacher_width_or_usual,
)
from eve_vlm.train.checkpoints import flush_files, last_whole_checkpoint, step_of
from eve_vlm.train.data import build_data
from eve_vlm.train.data_log import BAD_RECORDS_FILE, DataLog
from eve_vlm.train.devices import check_device
from eve_vlm.train.evaluating import check_tasks
from eve_vlm.train.lora import make_trainable, trainer_of
from eve_vlm.train.parameters import parameter_table
from eve_vlm.train.recipe import resolved_yaml, training_arguments_dict
from eve_vlm.train.recorded_layers import layers_for
from eve_vlm.train.run_folder import RESULT_FILE, changed_keys, held, is_finished, write_recipe
from eve_vlm.train.run_report import write_run_report
from eve_vlm.train.sections import Recipe
from eve_vlm.train.stopping import RunStopped, StopOnSignal
from eve_vlm.train.teacher_cache import open_table
from eve_vlm.train.trackers import check_trackers
from eve_vlm.train.watching import watch

logger = logging.getLogger(__name__)


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


def train(
    recipe: Recipe,
    *,
    resume: bool = True,
    say: Callable[[str], object] = logger.info,
    report: bool = True,
) -> RunResult:
    """Runs one stage and saves its model; goes on where the same run stands unfinished.

    Args:
        recipe: the stage.
        resume: whether it may go on; else an unfinished run is refused.
        say: told in a sentence where it goes on.
        report: whether to write `report.html`, 1.3 s of drawing; `eve report` does it at any time.

    Raises:
        ValueError: for anything in the recipe, the data or the folders that a user can mend.
        RunStopped: if a signal asked for it; the state is saved.
    """
    check_trackers(recipe.training.get("report_to"))
    check_tasks(recipe.evaluation)
    check_device(recipe)
    with held(Path(recipe.output_dir)):
        return _train(recipe, resume=resume, say=say, report=report)


def _train(
    recipe: Recipe, *, resume: bool, say: Callable[[str], object], report: bool
) -> RunResult:
    output = Path(recipe.output_dir)
    changed = changed_keys(output, recipe, resume=resume)
    torch.manual_seed(recipe.seed)
    started = time.perf_counter()
    records = build_records(recipe)
    processor = build_processor(recipe, records)
    teacher = build_teacher(recipe)
    model = build_model(recipe, processor, teacher.hidden_size if teacher else None)
    make_trainable(model, recipe)
    # Here processes wait for each other: all have checked the folder before one writes into it.
    arguments = TrainingArguments(**training_arguments_dict(recipe), disable_tqdm=True)
    checkpoint = _begin_or_go_on(output, recipe, changed, say)
    if arguments.process_index == 0:
        table = parameter_table(model, recipe.stage)
        (output / "parameters.txt").write_text(table + "\n", encoding="utf-8")
    features = open_table(recipe, teacher)
    view = teacher.view if teacher else None
    data = build_data(recipe, records, processor, arguments, view=view, table=features)
    trainer = trainer_of(recipe, processor)(
        model=model,
        args=arguments,
        train_dataset=data.dataset,
        data_collator=data.collator,
        stage=recipe.stage,
        data_log=data.log,
        sources=data.sources,
        teacher=teacher,
        teacher_table=features,
        teacher_side=recipe.model.image.size_multiple // recipe.model.vision.patch_size,
        guards=recipe.guards,
        decode=processor.tokenizer.decode,
    )
    trainer.remove_callback(PrinterCallback)  # the progress bar shows the same
    watch(trainer, recipe, records=records, processor=processor, report=report)
    with StopOnSignal() as stop, layers_for(recipe, model, arguments) as recorded:
        trainer.add_callback(stop)
        trainer.train(resume_from_checkpoint=checkpoint)
    if stop.agreed:
        raise RunStopped(
            step=trainer.state.global_step, of=trainer.state.max_steps, signum=stop.agreed
        )
    if recorded is not None and recorded.passed:
        logger.warning(
            "%d of %d rows did not fit the recordings of model.record_layers and went without",
            *(recorded.passed, recorded.passed + recorded.played),
        )
    bad = gather_object(data.log.bad)  # of all processes
    if bad and len(data.log.bad) == data.log.num_records:
        raise ValueError(
            f"None of the {len(bad)} records could be used, so nothing was learnt; the first: "
            f"{bad[0].reason}"
        )
    trainer.save_model(str(output))
    result = RunResult(
        output_dir=str(output),
        seconds=time.perf_counter() - started,
        records=_records_used(records, data.log, arguments.world_size),
        steps=trainer.state.global_step,
        losses=[entry for entry in trainer.state.log_history if "loss" in entry],
    )
    if trainer.is_world_process_zero():
        processor.save_pretrained(output)
        data.log.write(output, bad)
        flush_files(output, (file.name for file in output.iterdir() if file.is_file()))
        # Where it is, the run is complete.
        with written_whole(output / RESULT_FILE) as part:
            part.write_text(json.dumps(asdict(result), indent=1), encoding="utf-8")
        if report:
            write_run_report(output)
    if bad:
        logger.warning("%d records were left out; %s lists them", len(bad), BAD_RECORDS_FILE)
    return result


def _records_used(records: Mixture | StreamMixture, log: DataLog, processes: int) -> int:
    """From the place among the rows, which all processes share; streams only count their own."""
    if isinstance(records, StreamMixture):
        return log.num_records * processes
    return round(log.rows.epoch * len(records))


def finished_run(recipe: Recipe) -> RunResult | None:
    """The result of this run where its output folder holds it complete, else None."""
    output = Path(recipe.output_dir)
    if not is_finished(output, recipe):
        return None
    return RunResult(**json.loads((output / RESULT_FILE).read_text(encoding="utf-8")))


def model_on_meta(recipe: Recipe) -> EveForConditionalGeneration:
    """The model that a recipe trains, without memory for its weights.

    Where the start or the teacher cannot be read, the recipe's own shapes stand in, with a warning.

    Raises:
        ValueError: if neither says what the decoder looks like.
    """
    width = teacher_width_or_usual(recipe)
    try:
        text_config = decoder_config(recipe)
    except ValueError as error:
        if not recipe.model.text_config:
            raise
        logger.warning("%s Shown is the shape in model.text_config instead.", error)
        text_config = decoder_config(recipe, start=False)
    with torch.device("meta"):
        return new_model(recipe, text_config, image_token_id=0, teacher_width=width)


def describe(recipe: Recipe) -> str:
    """What a run would do, without running it: the recipe, the parameter table, tokens per step.

    Builds the model without memory for its weights, so it works for any size on any machine.
    """
    model = model_on_meta(recipe)
    make_trainable(model, recipe)
    arguments = recipe.training
    sequences = arguments["per_device_train_batch_size"] * arguments.get(
        "gradient_accumulation_steps", 1
    )
    picture = EveImageProcessor(**picture_settings(recipe)).square_grid()
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


def _begin_or_go_on(
    output: Path, recipe: Recipe, changed: list[str] | None, say: Callable[[str], object]
) -> str | None:
    """Writes the recipe into its folder; returns the checkpoint that all processes go on from."""
    checkpoint: Path | None = None
    if PartialState().is_main_process:
        if changed is not None:
            checkpoint = last_whole_checkpoint(output)
            for text in changed:
                say(f"{output}: {text}, which changes nothing of what is learnt.")
            where = f"step {step_of(checkpoint):,}" if checkpoint else "the beginning"
            say(f"{output} holds this run unfinished; it goes on from {where}.")
        write_recipe(output, recipe)
    # The others take the first one's word: it alone has read the checkpoint from end to end.
    (found,) = broadcast_object_list([None if checkpoint is None else str(checkpoint)])
    return found


__all__ = [
    "RunResult",
    "describe",
    "finished_run",
    "model_on_meta",
    "train",
]
