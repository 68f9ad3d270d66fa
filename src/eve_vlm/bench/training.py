"""What a training step costs: forward and backward, by stage, packed and padded, aligned or not.

Records go through the encoder and collator of training, and the model learns as a recipe's stage
would have it; there is no optimizer step.  With alignment the teacher's features are random numbers
of the right shape: a frozen teacher costs the same for every student, and a run may have them on
disk.  Easy to get wrong: a backward pass leaves gradients behind, which the next would add to, so
they are cleared before the clock is read.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from eve_vlm.alignment_eve import EveForPreTraining, EvePatchAligner, cells_per_image
from eve_vlm.data.collator import EveCollator
from eve_vlm.data.encode import IGNORED, EncodedRecord, Encoder
from eve_vlm.flops import Work, flops_of, terms_of, work_of
from eve_vlm.modeling_eve import EveForConditionalGeneration
from eve_vlm.parameter_names import matches_any, names_of

from .measuring import Case, Clock, Need, weight_bytes
from .subjects import Subject, globs_of
from .words import records

# Stage, packed, aligned.  Without alignment padded and packed; with it each stage.
STEPS = (
    ("pretrain", False, False),
    ("pretrain", True, False),
    ("prealign", True, True),
    ("pretrain", True, True),
    ("finetune", True, True),
)
OTHERS = ("record_ids", "source_names", "bad_records", "num_tokens")  # not for the model


def training_cases(subject: Subject, edge: int, batch: int) -> list[Case]:
    """The same records of mixed pictures in every case of a stage."""
    aligned = _aligned(subject)
    return [
        _case(subject, aligned, edge, batch, stage=stage, packed=packed, with_teacher=with_teacher)
        for stage, packed, with_teacher in STEPS
    ]


def _aligned(subject: Subject) -> EveForPreTraining:
    """The training class around the subject's own weights, with a new aligner."""
    config = subject.aligned_config()
    with torch.device("meta"):
        model = EveForPreTraining(config)
    with torch.random.fork_rng(), torch.device(subject.device):
        torch.manual_seed(0)
        aligner = EvePatchAligner(config)
    model.aligner = aligner.to(subject.dtype)
    model.model, model.lm_head = subject.model.model, subject.model.lm_head
    return model


def _case(
    subject: Subject,
    aligned: EveForPreTraining,
    edge: int,
    batch: int,
    *,
    stage: str,
    packed: bool,
    with_teacher: bool,
) -> Case:
    model = aligned if with_teacher else subject.model
    encode = Encoder(
        subject.processor(edge),
        format="chat" if stage == "finetune" else "plain",
        max_length=subject.config.text_config.max_position_embeddings,
    )
    encoded = [encode(record) for record in records(batch, stage)]
    inputs = batch_of(encoded, subject, packed=packed)
    inputs.pop("attention_mask", None)  # the trainer hands on none: rows are padded at their end
    if with_teacher:
        inputs["teacher_features"] = teacher_features(aligned, inputs["image_grid_thw"])
    work = step_work(encoded, subject, aligned=aligned if with_teacher else None)
    globs = globs_of(stage)

    def run(clock: Clock) -> dict[str, float]:
        with learning(model, globs):
            return _step(model, inputs, clock)

    with learning(model, globs):
        flops = flops_of(terms_of(model), work)
        gradients = sum(part.nbytes for part in model.parameters() if part.requires_grad)
    weights = weight_bytes([model])
    tokens = sum(len(record.input_ids) for record in encoded)
    return Case(
        section="training",
        model="eve",
        name=f"{edge} px: {stage}, {batch} mixed, {'packed' if packed else 'padded'}, "
        f"{'aligned' if with_teacher else 'not aligned'}",
        run=run,
        needs={
            "forward": Need(flops.forward, weights),
            "backward": Need(flops.backward, weights + gradients),
            "step": Need(flops.needed, 2 * weights + gradients),
        },
        tokens=dict.fromkeys(("forward", "backward", "step"), tokens),
        facts={
            "longest_edge": edge,
            "batch": batch,
            "stage": stage,
            "packed": packed,
            "aligned": with_teacher,
            "positions": inputs["input_ids"].numel(),
            "labels": work.labels,
        },
        modules=[model],
    )


@contextmanager
def learning(model: EveForConditionalGeneration, globs: Iterable[str]) -> Iterator[None]:
    """Lets globs of a model's parameters learn for a while; afterwards nothing does."""
    globs = tuple(globs)
    for parameter, names in names_of(model).items():
        parameter.requires_grad_(matches_any(names, globs))
    model.train()
    try:
        yield
    finally:
        model.zero_grad()
        model.eval().requires_grad_(False)


def _step(model: nn.Module, inputs: dict[str, Any], clock: Clock) -> dict[str, float]:
    started = clock()
    loss = model(**inputs).loss
    forward = clock()
    loss.backward()
    done = clock()
    return {"forward": forward - started, "backward": done - forward, "step": done - started}


def batch_of(
    encoded: list[EncodedRecord], subject: Subject, *, packed: bool
) -> dict[str, torch.Tensor]:
    """A batch of the collator on the device: all records in one row, or a row for each."""
    collate = EveCollator(subject.tokenizer.pad_token_id or 0, packed=packed)
    batch = collate([encoded] if packed else [[record] for record in encoded])
    return {name: value.to(subject.device) for name, value in batch.items() if name not in OTHERS}


def teacher_features(model: EveForPreTraining, grids: torch.Tensor) -> torch.Tensor:
    """(Z, W) random numbers, as many as the teacher gives for these (I, 3) patch grids."""
    aligner = model.aligner
    cells = cells_per_image(grids, merge_size=aligner.merge_size, pool_size=aligner.pool_size)
    generator = torch.Generator().manual_seed(0)
    assert model.config.alignment_config is not None
    width = model.config.alignment_config.teacher_hidden_size
    made = torch.randn(int(cells.sum()), width, generator=generator)
    return made.to(grids.device)


def aligner_bytes(subject: Subject, cells: int) -> int:
    """What a step takes more with the aligner: weights, gradients, and each tap in float32.

    A tap's cells are kept as they are picked, normed and mapped.
    """
    config = subject.aligned_config()
    with torch.device("meta"):
        aligner = EvePatchAligner(config)
    width = 2 * config.text_config.hidden_size + subject.shape.teacher
    weights = sum(part.numel() for part in aligner.parameters()) * subject.dtype.itemsize
    return 2 * weights + len(aligner.taps) * cells * width * torch.float32.itemsize


def step_work(
    encoded: list[EncodedRecord], subject: Subject, *, aligned: EveForPreTraining | None
) -> Work:
    """What one step has to do, from the records alone."""
    grids = [tuple(grid[1:]) for one in encoded for grid in one.image_grid_thw.tolist()]
    return work_of(
        [len(record.input_ids) for record in encoded],
        grids,
        labels=sum(int((record.labels[1:] != IGNORED).sum()) for record in encoded),
        config=subject.config if aligned is None else aligned.config,
    )


__all__ = [
    "STEPS",
    "aligner_bytes",
    "batch_of",
    "learning",
    "step_work",
    "teacher_features",
    "training_cases",
]
