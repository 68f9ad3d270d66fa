"""The command about memory: `eve fits` says whether a model runs or trains on this machine.

Here are the options and what is printed; `fits_subject.py` makes workloads of them,
`eve_vlm.memory.estimate` estimates and `eve_vlm.memory.machine` judges. Easy to get wrong: what is
printed as needed has the safety margin in it, the table by part has not.
"""

import json
from typing import TYPE_CHECKING, Annotated

import typer

from .fits_subject import Asked, Optim, Stage, Subject, Task, on_device, rows_of
from .options import Dtype

if TYPE_CHECKING:
    from eve_vlm.memory.formulas import Workload
    from eve_vlm.memory.machine import Device, Remedy

SAFETY_PERCENT = 10
MALLOC_ADVICE = (
    "On Linux, glibc keeps freed blocks of less than 32 MiB; where it is tight, set "
    "MALLOC_MMAP_THRESHOLD_=65536 (docs/fits.md)."
)


def fits(
    model: Annotated[
        str,
        typer.Argument(
            help="A model folder, Hub id, config.json, or a recipe such as eve_7b/2_pretrain."
        ),
    ],
    task: Annotated[Task | None, typer.Option(help="One task by part; all without.")] = None,
    stage: Annotated[Stage | None, typer.Option(help="Stage of training.")] = None,
    recipe: Annotated[
        str | None, typer.Option(help="Train as this recipe does, but with MODEL's shape.")
    ] = None,
    teacher: Annotated[
        str | None,
        typer.Option(help="Teacher of the alignment, or none; a recipe's own by default."),
    ] = None,
    dtype: Annotated[
        Dtype | None, typer.Option(help="Type of the weights: float32 on CPUs, else bfloat16.")
    ] = None,
    lora: Annotated[
        int | None, typer.Option(metavar="RANK", help="LoRA on a frozen decoder.")
    ] = None,
    length: Annotated[
        int | None, typer.Option(help="Tokens of a sequence or packed row, with its pictures.")
    ] = None,
    batch: Annotated[int | None, typer.Option(help="Sequences at once on each device.")] = None,
    picture: Annotated[
        str | None, typer.Option(metavar="WxH", help="Picture size; a square by default.")
    ] = None,
    pictures: Annotated[int, typer.Option(help="Pictures in each sequence.")] = 1,
    gpus: Annotated[int, typer.Option(help="GPUs that train together.")] = 1,
    zero: Annotated[int | None, typer.Option(help="DeepSpeed ZeRO stage, 0 to 3.")] = None,
    fsdp: Annotated[bool, typer.Option("--fsdp", help="Shard by FSDP.")] = False,
    gpu_memory: Annotated[
        str | None, typer.Option(help="Judge for GPUs of this size instead, such as 40GiB.")
    ] = None,
    gradient_checkpointing: Annotated[
        bool | None, typer.Option(help="Compute layers again instead of keeping them.")
    ] = None,
    optimizer: Annotated[Optim | None, typer.Option(help="Optimizer of training.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, sizes in bytes.")] = False,
) -> None:
    """Say whether a model runs or trains here: memory by part, and what would make it fit.

    eve fits eve_7b/2_pretrain --task train --gpus 32 --gpu-memory 40GiB

    Needs no weights. Sizes are estimates, checked against measured peaks (docs/fits.md).
    """
    asked = Asked(
        task,
        stage,
        recipe,
        teacher,
        dtype,
        lora,
        length,
        batch,
        picture,
        pictures,
        gpus,
        zero,
        fsdp,
        gpu_memory,
        gradient_checkpointing,
        optimizer,
    )
    _check(asked)
    subject = Subject.of(model, asked)
    show = _print_all if asked.task is None else _print_one
    show(subject, rows_of(subject, asked), asked, as_json=as_json)


def _check(asked: Asked) -> None:
    """Refuses numbers and combinations that mean nothing.

    Raises:
        ValueError: in one sentence.
    """
    for option, value, least in (
        ("--gpus", asked.gpus, 1),
        ("--lora", asked.lora, 1),
        ("--length", asked.length, 2),
        ("--batch", asked.batch, 1),
        ("--pictures", asked.pictures, 0),
    ):
        if value is not None and value < least:
            raise ValueError(f"{option} is {value}; give at least {least}, or leave it out.")
    if asked.zero is not None and not 0 <= asked.zero <= 3:
        raise ValueError(f"--zero is {asked.zero}; DeepSpeed has the stages 0 to 3.")
    if asked.zero and asked.fsdp:
        raise ValueError("--zero and --fsdp shard in two ways; keep one of them.")
    if asked.task is Task.answer:
        for option, given in (
            ("--stage", asked.stage is not None),
            ("--lora", asked.lora is not None),
            ("--zero", asked.zero is not None),
            ("--fsdp", asked.fsdp),
            ("--optimizer", asked.optimizer is not None),
        ):
            if given:
                raise ValueError(f"{option} is for training; leave it out, or give --task train.")
    if asked.stage is Stage.prealign and asked.lora is not None:
        raise ValueError("The decoder is frozen in prealign, so --lora does nothing; leave it out.")


def _devices(asked: Asked) -> "list[Device]":
    from eve_vlm.memory.machine import Device, parse_bytes, this_machine

    if asked.gpu_memory is not None:
        return [Device(f"GPU of {asked.gpu_memory}", "cuda", parse_bytes(asked.gpu_memory))]
    return this_machine()


def _print_one(
    subject: Subject, rows: "list[tuple[str, Workload]]", asked: Asked, *, as_json: bool
) -> None:
    """One workload by part, for each kind of device, and the verdicts."""
    from eve_vlm.memory.machine import as_data, fits, human_bytes, parts_table, smallest_change

    title, plain = rows[0]
    devices, data = _devices(asked), []
    for kind in dict.fromkeys(device.kind for device in devices):
        same = [device for device in devices if device.kind == kind]
        work = on_device(plain, same[0], subject, asked)
        estimate = subject.memory.estimate(work)
        if as_json:
            data.append({"task": title, "kind": kind, **as_data(work, estimate, same)})
            continue
        typer.echo(f"{title} of {subject.name} on {_place(work)}: {_sequences(work)}\n")
        typer.echo(parts_table(estimate) + "\n")
        typer.echo(
            f"At most {human_bytes(estimate.peak)} ({estimate.peak_phase}); "
            f"{human_bytes(estimate.wanted)} with a margin of {SAFETY_PERCENT} %."
        )
        if estimate.host:
            typer.echo(f"Loading takes {human_bytes(estimate.host)} of the host's memory.")
        for device in same:
            verdict = "fits" if fits(estimate, device) else "does not fit"
            free = f", {human_bytes(device.free)} of it free now" if device.free else ""
            typer.echo(f"{device.name}, {human_bytes(device.bytes)}{free}: it {verdict}.")
        smallest = min(same, key=lambda device: device.bytes)
        if not fits(estimate, smallest):
            typer.echo(_advice(smallest_change(subject.memory, work, smallest)))
        if kind == "cpu" and work.training:
            typer.echo(MALLOC_ADVICE)
        typer.echo("")
    if as_json:
        typer.echo(json.dumps(data, indent=1))


def _print_all(
    subject: Subject, rows: "list[tuple[str, Workload]]", asked: Asked, *, as_json: bool
) -> None:
    """Every task on every device: what it needs, yes or no, and what would help."""
    from tqdm.auto import tqdm

    from eve_vlm.memory.machine import as_data, fits, human_bytes, smallest_change, table

    lines = [["task", "on", "as", "needs", "has", "fits", "smallest change that makes it fit"]]
    data = []
    todo = [(title, plain, device) for title, plain in rows for device in _devices(asked)]
    for title, plain, device in tqdm(todo, desc="estimates", leave=False, disable=None):
        work = on_device(plain, device, subject, asked)
        estimate = subject.memory.estimate(work)
        remedy = None
        if not fits(estimate, device):
            remedy = smallest_change(subject.memory, work, device)
        entry = {"task": title, "kind": device.kind, **as_data(work, estimate, [device])}
        data.append(entry | {"remedy": remedy and remedy.words})
        lines.append(
            [
                title,
                device.name,
                str(work.dtype).removeprefix("torch."),
                human_bytes(estimate.wanted),
                human_bytes(device.bytes),
                "yes" if fits(estimate, device) else "no",
                "" if fits(estimate, device) else _words(remedy),
            ]
        )
    if as_json:
        typer.echo(json.dumps(data, indent=1))
        return
    answer, training = rows[0][1], rows[-1][1]
    typer.echo(f"{subject.name}, answering: {_sequences(answer)}")
    typer.echo(f"training: {_sequences(training)}\n")
    typer.echo(table(lines, right=lambda column: column in (3, 4)))
    typer.echo(f"\nNeeds are peaks with a margin of {SAFETY_PERCENT} %; --task shows the parts.")


def _words(remedy: "Remedy | None") -> str:
    return "none found" if remedy is None else remedy.words


def _advice(remedy: "Remedy | None") -> str:
    from eve_vlm.memory.machine import human_bytes

    if remedy is None:
        return "No change tried makes it fit; take a smaller model or a larger machine."
    return f"It would fit with {remedy.words}: {human_bytes(remedy.estimate.wanted)}."


def _place(work: "Workload") -> str:
    kind = str(work.dtype).removeprefix("torch.")
    if work.device == "cpu":
        return f"the CPU in {kind}"
    shared = "" if work.sharding == "none" else f" with {work.sharding.replace('zero', 'ZeRO-')}"
    many = f"each of {work.gpus} GPUs{shared}" if work.gpus > 1 else f"a GPU{shared}"
    return f"{many} in {kind}"


def _sequences(work: "Workload") -> str:
    """What one device is given at once."""
    text = f"{work.batch} x {work.length:,} tokens, {work.picture_tokens:,} of them of "
    text += f"{work.pictures} picture{'' if work.pictures == 1 else 's'}"
    if not work.training:
        return f"{text}, {work.new_tokens} of the answer"
    checkpointing = "with" if work.gradient_checkpointing else "without"
    return f"{text}, {checkpointing} gradient checkpointing, {work.optimizer}"


__all__ = ["fits"]
