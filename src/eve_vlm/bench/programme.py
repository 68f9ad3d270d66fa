"""The whole benchmark: checks that it fits, measures part by part, and makes plain data of it.

A section's cases run in turns, and the machine's rates are taken before, between and after the
sections.  Easy to get wrong: what is too large must be refused before a model is made, or a machine
without the memory for it comes to a halt instead of saying so.
"""

import datetime
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from eve_vlm.memory.estimate import MemoryModel
from eve_vlm.memory.formulas import Workload
from eve_vlm.memory.machine import Device, human_bytes, this_machine
from eve_vlm.versions import versions

from .answering import answer_case, embedding_cases, preprocessing_cases, square_cases
from .encoders import NAMES, EncoderBased, encoder_bytes
from .growth import Growth, growth_of, growth_points
from .measuring import Case, Clock, Measured, measure
from .paper_table import paper_table
from .roof import Roof, measured_roof
from .subjects import Subject
from .training import aligner_bytes, training_cases
from .words import CAPTION, QUESTION, SQUARE, mixed

FORMAT = "eve-bench/1"
SECTIONS = ("preprocessing", "embedding", "prefill", "decode", "training", "growth")
COMPARED = {"preprocessing", "embedding", "prefill"}  # with encoder-based models
TRAINING_BATCH = 4
Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """What is measured, and how often."""

    edges: tuple[int, ...]
    """Longer sides of pictures in pixels; the first is compared with LLaVA-1.5, the second with
    LLaVA-1.6, and training takes the first."""
    batches: tuple[int, ...] = (1, 4, 8, 32)
    """Questions, and pictures, at once."""
    sections: tuple[str, ...] = SECTIONS
    """Parts of the benchmark."""
    repeats: int = 5
    """Rounds that count."""
    new_tokens: int = 16
    """Length of an answer."""
    quick: bool = False
    """Fewer and smaller cases, to see that all works; its figures are no measurement."""
    paper: bool = False
    """The published table too; only what it needs is measured."""


def check(settings: Settings) -> None:
    """Refuses what cannot be measured.

    Raises:
        ValueError: in one sentence.
    """
    unknown = [name for name in settings.sections if name not in SECTIONS]
    if unknown:
        raise ValueError(f"--only {unknown[0]} is no part; name some of {', '.join(SECTIONS)}.")
    if min(settings.batches) < 1 or min(settings.edges) < 1:
        raise ValueError("--batch and --longest-edge are lists of numbers of at least 1.")
    if settings.paper and len(settings.edges) < 2:
        raise ValueError(
            "--table paper compares two sizes of pictures; give two numbers to --longest-edge."
        )


def run_bench(subject: Subject, settings: Settings, *, say: Say = lambda text: None) -> dict:
    """Measures a subject and returns everything as plain data.

    Args:
        say: told of each case that is about to run.

    Raises:
        ValueError: if something cannot be measured, or does not fit the memory.
    """
    check(settings)
    require_memory(subject, settings)
    clock, load = Clock(subject.device), [_load()]
    roofs = [measured_roof(clock, subject.dtype, quick=settings.quick)]
    measured: list[Measured] = []
    growths: list[Growth] = []

    def go(cases: Sequence[Case]) -> list[Measured]:
        done = measure(
            cases,
            clock,
            repeats=settings.repeats,
            tick=lambda case: say(f"{case.section}: {case.model}, {case.name}"),
        )
        roofs.append(measured_roof(clock, subject.dtype, quick=settings.quick))
        return done

    for cases in _sections(subject, settings):
        measured += go(cases)
    if "growth" in settings.sections and not settings.paper:
        points = growth_points(subject, settings.edges[0], quick=settings.quick)
        growths = growth_of(points, go([point.case for point in points]))
    load.append(_load())
    roof = roofs[0]
    for one in roofs[1:]:
        roof = roof.best(one)
    figures = [entry for one in measured for entry in figures_of(one, roof)]
    data = {
        "format": FORMAT,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "versions": versions(device=subject.device),
        "settings": {
            "subject": subject.name,
            "random_weights": subject.random,
            "device": str(subject.device),
            "dtype": str(subject.dtype).removeprefix("torch."),
            "threads": torch.get_num_threads(),
            "static_cache": subject.static_cache,
            "compile_steps": subject.compile_steps,
            **asdict(settings),
        },
        "load": load,
        "roof": roof.as_data() | {"measured": [one.as_data() for one in roofs]},
        "figures": figures,
        "growth": [one.as_data() for one in growths],
    }
    return data | ({"paper": paper_table(data)} if settings.paper else {})


def _sections(subject: Subject, settings: Settings) -> list[list[Case]]:
    """Cases that belong together, which are measured in turns."""
    if settings.paper:
        return [_compared(subject, settings)]
    found: dict[str, list[Case]] = {name: [] for name in SECTIONS}
    for case in _compared(subject, settings):
        found[case.section].append(case)
    for edge in settings.edges:
        engine = subject.engine(edge)
        if "preprocessing" in settings.sections:
            found["preprocessing"] += preprocessing_cases(engine, edge, quick=settings.quick)
        if "embedding" in settings.sections:
            found["embedding"] += embedding_cases(engine, edge, settings.batches)
        answering = {"prefill", "decode"} & set(settings.sections)
        for batch in settings.batches if answering else ():
            found["prefill"].append(
                answer_case(
                    engine,
                    edge,
                    mixed(batch),
                    f"{batch} asked together" if batch > 1 else "1 asked",
                    new_tokens=settings.new_tokens if "decode" in answering else 1,
                    section="prefill" if "prefill" in answering else "decode",
                )
            )
    if "training" in settings.sections:
        found["training"] = training_cases(subject, settings.edges[0], TRAINING_BATCH)
    return [cases for cases in found.values() if cases]


def _compared(subject: Subject, settings: Settings) -> list[Case]:
    """One square through EVE and through the encoder-based model of the same decoder."""
    cases: list[Case] = []
    if not COMPARED & set(settings.sections):
        return cases
    for edge, name in zip(settings.edges, NAMES, strict=False):
        engine = subject.engine(edge)
        words = engine.tokenizer(QUESTION, add_special_tokens=False, return_tensors="pt")
        other = EncoderBased(name, subject.model, subject.shape.encoder, words["input_ids"][0])
        both = [*square_cases(engine, edge), *other.cases(edge)]
        cases += [case for case in both if case.section in settings.sections]
    return cases


def figures_of(measured: Measured, roof: Roof) -> list[dict[str, Any]]:
    """The figures of a case as plain data, each beside its floor."""
    case, entries = measured.case, []
    for name, spread in measured.seconds.items():
        need, tokens = case.needs[name], case.tokens[name]
        floor = roof.floor(need)
        entries.append(
            {
                "section": "decode" if name == "token" else case.section,
                "model": case.model,
                "case": case.name,
                "figure": name,
                "seconds": spread._asdict(),
                "flops": need.flops,
                "bytes": need.bytes,
                "floor_seconds": floor,
                "bound": roof.bound(need),
                "share_of_floor": floor / spread.median,
                "tokens": tokens,
                "tokens_per_second": tokens / spread.median,
                "memory_bytes": measured.memory,
                **case.facts,
            }
        )
    return entries


def require_memory(subject: Subject, settings: Settings) -> None:
    """Refuses what does not fit this machine's memory, before a model is made.

    Raises:
        ValueError: with both sizes and what to leave out.
    """
    memory = MemoryModel(subject.config)
    device = _memory_of(subject)
    beside = 0
    if COMPARED & set(settings.sections):
        width = subject.config.text_config.hidden_size
        beside = encoder_bytes(subject.shape.encoder, width, subject.dtype)
    for work, what, remedy in _workloads(subject, settings):
        more = (
            aligner_bytes(subject, work.batch * work.rows * work.cols) if work.training else beside
        )
        needed = memory.estimate(work).wanted + more
        if needed > device.bytes:
            raise ValueError(
                f"{what} takes about {human_bytes(needed)}, but {device.name} has "
                f"{human_bytes(device.bytes)}; {remedy}."
            )


def _memory_of(subject: Subject) -> Device:
    """The memory that the model will lie in; the first of this kind where no number is given."""
    kind = subject.device.type
    found = [device for device in this_machine() if device.kind == kind]
    if not found:
        raise ValueError(f"There is no device {subject.device} here; give --device cpu or cuda.")
    return found[subject.device.index or 0]


def _workloads(subject: Subject, settings: Settings) -> list[tuple[Workload, str, str]]:
    """The largest of each kind, what it is, and what to leave out where it does not fit."""
    edge, batch = max(settings.edges), max(settings.batches)
    kind: Any = "cuda" if subject.device.type == "cuda" else "cpu"
    found = []
    if {"embedding", "prefill", "decode", "growth"} & set(settings.sections):
        grid = subject.processor(edge).image_processor.grid_of(*SQUARE)
        batch = 1 if settings.paper else batch
        new_tokens = settings.new_tokens
        work = Workload(
            training=False,
            length=1 + grid.rows * (grid.cols + 1) + _words(subject, QUESTION) + new_tokens,
            rows=grid.rows,
            cols=grid.cols,
            batch=batch,
            new_tokens=new_tokens,
            dtype=subject.dtype,
            device=kind,
            padded=batch > 1,
        )
        what = f"{batch} questions together at {edge} pixels"
        if batch == 1:
            what = f"A question at {edge} pixels"
        found.append((work, what, "give smaller numbers to --batch and --longest-edge"))
    if "training" in settings.sections and not settings.paper:
        edge = settings.edges[0]
        grid = subject.processor(edge).image_processor.grid_of(*SQUARE)
        # Everything learns; the aligner comes on top (`require_memory`).
        work = Workload(
            training=True,
            length=1 + grid.rows * (grid.cols + 1) + _words(subject, CAPTION),
            rows=grid.rows,
            cols=grid.cols,
            batch=TRAINING_BATCH,
            dtype=subject.dtype,
            device=kind,
            padded=True,
            optimizer="sgd",  # no step is made, so there are no moments
        )
        what = f"A training step of {TRAINING_BATCH} records at {edge} pixels"
        found.append((work, what, "leave training out with --only"))
    return found


def _words(subject: Subject, text: str) -> int:
    """Tokens of a text and of what a chat template puts around it, with room to spare."""
    return len(subject.tokenizer(text)["input_ids"]) + 64


def _load() -> float:
    """Processes that wanted to run in the last minute, ours among them."""
    import psutil  # comes with accelerate

    return psutil.getloadavg()[0]


__all__ = ["FORMAT", "SECTIONS", "Settings", "check", "figures_of", "require_memory", "run_bench"]
