"""What stands beside a run: progress, log file, sample answers, meter, report.

All of it only watches.  Easy to get wrong: the order counts, because callbacks are called in it:
answers and log lines have to be written before the report that shows them.
"""

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerControl
from transformers.utils import logging as transformers_logging

from eve_vlm.data.sources import Mixture
from eve_vlm.data.sources.streams import StreamMixture
from eve_vlm.flops import Term, terms_of
from eve_vlm.peaks import peak_of
from eve_vlm.processing_eve import EveProcessor
from eve_vlm.train.build import build_records
from eve_vlm.train.evaluating import Evaluation
from eve_vlm.train.meter import Meter
from eve_vlm.train.progress import StageProgress
from eve_vlm.train.run_log import RunLog
from eve_vlm.train.run_report import RunReport
from eve_vlm.train.sample_answers import Records, SampleAnswers, held_out, model_inside
from eve_vlm.train.sections import Recipe
from eve_vlm.train.trainer import EveTrainer
from eve_vlm.versions import write_versions

logger = logging.getLogger(__name__)


def watch(
    trainer: EveTrainer,
    recipe: Recipe,
    *,
    records: Mixture | StreamMixture,
    processor: EveProcessor,
    report: bool = True,
) -> None:
    """Puts everything that watches beside a trainer, before it trains.

    Args:
        records: of the run, for sample answers where the recipe holds nothing out.
        report: whether pages are written.
    """
    folder, arguments = Path(recipe.output_dir), trainer.args
    # The library's own bars, for each save, would break up ours.
    transformers_logging.disable_progress_bar()
    trainer.meter = meter_of(trainer, processor)
    if trainer.is_world_process_zero():
        write_versions(folder, world_size=arguments.world_size, device=arguments.device)
    trainer.add_callback(StageProgress(recipe.name))
    trainer.add_callback(RunLog(folder))
    strategy = recipe.devices.strategy
    sharded = strategy != "ddp" or trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled
    if recipe.samples is not None:
        answers = SampleAnswers(
            recipe.samples,
            sample_records(recipe, records),
            processor,
            folder,
            format=recipe.data.format,
            seed=recipe.seed,
            sharded=sharded,
        )
        answers.show = lambda logs: _tell(trainer, logs)
        trainer.add_callback(answers)
    if recipe.evaluation is not None:
        evaluation = Evaluation(recipe.evaluation, processor, folder, sharded=sharded)
        evaluation.show = lambda logs: _tell(trainer, logs)
        trainer.add_callback(evaluation)
    trainer.add_callback(RunReport(folder, trainer.data_log, page=report))


def _tell(trainer: EveTrainer, logs: dict[str, Any]) -> None:
    """Tells callbacks alone, trackers among them: what it came from is in a file of its own.

    With a control of its own, or the step's figures would count as logged.
    """
    trainer.callback_handler.on_log(trainer.args, trainer.state, TrainerControl(), logs)


def sample_records(recipe: Recipe, records: Mixture | StreamMixture) -> Records:
    """Records that the recipe holds out where it holds any out, else its own."""
    sources = held_out(recipe.data.sources)
    if sources:
        try:
            held = build_records(replace(recipe, data=replace(recipe.data, sources=sources)))
            return _counted(held, recipe)
        except ValueError as error:
            # The slice may be as long as the file, and nothing is left over.
            logger.warning("Sample answers are about records of the run itself. %s", error)
    return _counted(records, recipe)


def _counted(records: Mixture | StreamMixture, recipe: Recipe) -> Records:
    """Records by number: of a stream the first ones, read apart from the run."""
    if isinstance(records, Mixture):
        return records
    assert recipe.samples is not None
    beginning = records.shard(0, 1)
    return [next(beginning) for _ in range(recipe.samples.number)]


def meter_of(trainer: EveTrainer, processor: EveProcessor) -> Meter:
    """A meter of one process; without a share of the peak where it cannot be known."""
    model = model_inside(trainer.model)
    terms: list[Term] = []
    try:
        terms = terms_of(model)
    except ValueError as error:
        logger.warning("The share of the device's peak (MFU) is left out. %s", error)
    arguments = trainer.args
    dtype = torch.bfloat16 if arguments.bf16 else torch.float16 if arguments.fp16 else model.dtype
    return Meter(
        terms,
        model.config,
        pad_token_id=processor.tokenizer.pad_token_id,
        peak=peak_of(arguments.device, dtype) if terms else None,
        device=arguments.device,
    )


__all__ = ["meter_of", "sample_records", "watch"]
