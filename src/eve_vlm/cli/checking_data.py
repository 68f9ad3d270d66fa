"""The command `eve data check`: every record read once, before a training finds out.

What does the work is `eve_vlm.data.check`, imported inside.  Easy to get wrong: exit code 1 means
that records are bad, 2 that it could not be checked, so Ctrl-C is neither and ends with 130.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .check_subject import Subject, read_subject
from .data import cores, in_columns

if TYPE_CHECKING:
    from eve_vlm.data.check import CheckResult, DataSet, Plan


def check(
    files: Annotated[
        list[str],
        typer.Argument(
            metavar="FILES|RECIPE", help="Data files, patterns or URLs; or one recipe (.yaml)."
        ),
    ],
    kind: Annotated[
        str, typer.Option(help="Form of the records: llava, messages, captions or text.")
    ] = "llava",
    image_folder: Annotated[
        str | None, typer.Option(help="Folder, tar or URL that picture names start from.")
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(help="Folder of a model whose tokenizer, template and pictures count."),
    ] = None,
    format: Annotated[
        str | None, typer.Option(help="With --model: chat (unless told otherwise) or plain.")
    ] = None,
    max_length: Annotated[
        int | None,
        typer.Option(help="With --model: longest sequence; what the model takes by itself.", min=1),
    ] = None,
    fast: Annotated[
        bool, typer.Option("--fast", help="Read headers of pictures and do not decode them.")
    ] = False,
    report: Annotated[Path | None, typer.Option(help="Write a page (.html).")] = None,
    quarantine: Annotated[
        Path | None, typer.Option(help="Write the bad records (.jsonl), for data.quarantine.")
    ] = None,
    error: Annotated[
        list[str] | None,
        typer.Option(help="Count a warning as an error, e.g. same-record; may be repeated."),
    ] = None,
    show: Annotated[
        list[str] | None,
        typer.Option(
            metavar="N|ID",
            help="Only show this record, what is learnt in colour; may be repeated.",
        ),
    ] = None,
    workers: Annotated[
        int | None, typer.Option(help="Processes; all cores unless given.", min=0)
    ] = None,
) -> None:
    """Read every record once: pictures, marks, answers, lengths, duplicates; show what is learnt.

    eve data check data/llava_v1_5_mix665k.json --image-folder data/images --report check.html

    Ends with 0 if all is well, 1 if records are bad, 2 if it could not be checked.
    """
    _check_arguments(report, quarantine, error or [])
    subject = read_subject(files, kind, image_folder, model, format, max_length)
    processes = cores() if workers is None else workers
    if show and (report or quarantine):
        raise ValueError(
            "--show only shows records and checks none; leave out --report and --quarantine."
        )
    if show:
        for wanted in show:
            typer.echo(_shown(subject, wanted))
        return
    _check_names(subject, quarantine)
    with _stopped_by_hand() as done, _quarantine_file(quarantine) as on_bad:
        result = _checked(subject, done, fast=fast, workers=processes, errors=error, on_bad=on_bad)
        plan = _planned(subject, result)
    _say(result, plan)
    if report is not None:
        from eve_vlm.data.check.page import write_page

        write_page(report, result, subject.data_sets, plan)
        typer.echo(f"{report} is written; open it in a browser.")
    if quarantine is not None:
        typer.echo(f"{quarantine} lists {on_bad.records:,} records; name it as data.quarantine.")
    if any(one.stopped for one in result.data_sets):
        raise typer.Exit(2)
    if not result.ok:
        raise typer.Exit(1)


def _check_arguments(report: Path | None, quarantine: Path | None, error: list[str]) -> None:
    from eve_vlm.data.check import KINDS

    for file in (report, quarantine):
        if file is not None and not file.absolute().parent.is_dir():
            raise ValueError(f"{file} has no folder to be written to; make {file.parent} first.")
    if unknown := sorted(set(error) - set(KINDS)):
        names = ", ".join(name for name, kind in KINDS.items() if not kind.error)
        raise ValueError(f"--error is {unknown[0]!r}; use one of {names}.")


def _check_names(subject: Subject, quarantine: Path | None) -> None:
    names = [data_set.name for data_set in subject.data_sets]
    twice = [name for name in names if names.count(name) > 1]
    if twice and (quarantine is not None or any(subject.listed)):
        raise ValueError(
            f"Two data sets are called {twice[0]!r}, so a quarantine list cannot tell them apart; "
            "give every source of the recipe a name of its own."
        )


# --- checking -------------------------------------------------------------------------------------


@contextmanager
def _stopped_by_hand() -> Iterator[list[int]]:
    """Ctrl-C ends with one line; what is yielded counts the records until then."""
    done = [0]
    try:
        yield done
    except KeyboardInterrupt:
        typer.echo(f"\nStopped after {done[0]:,} records; nothing was written.", err=True)
        raise typer.Exit(130) from None


class _Nowhere:
    """In place of a quarantine file."""

    records = 0

    def __call__(self, source: str, problems: Any) -> None:
        """Writes nothing."""


@contextmanager
def _quarantine_file(file: Path | None) -> Iterator[Any]:
    from eve_vlm.data.check.quarantine_file import QuarantineFile
    from eve_vlm.output_folder import written_whole

    if file is None:
        yield _Nowhere()
        return
    with written_whole(file) as part, part.open("w", encoding="utf-8") as stream:
        yield QuarantineFile(stream)


def _checked(
    subject: Subject,
    done: list[int],
    *,
    fast: bool,
    workers: int,
    errors: list[str] | None,
    on_bad: Callable[..., object],
) -> "CheckResult":
    from tqdm.auto import tqdm

    from eve_vlm.data.check import check_data_sets

    counts = [data_set.records for data_set in subject.data_sets]
    total = None if None in counts else sum(count or 0 for count in counts)
    with tqdm(total=total, desc="checking", unit=" records", unit_scale=True) as bar:

        def progress(records: int) -> None:
            done[0] += records
            bar.update(records)

        return check_data_sets(
            subject.data_sets,
            subject.encoder,
            fast=fast,
            workers=workers,
            errors=errors or (),
            listed=subject.listed,
            on_bad=on_bad,
            progress=progress,
        )


def _planned(subject: Subject, result: "CheckResult") -> "Plan | None":
    """An epoch of the recipe, where it can be counted."""
    from tqdm.auto import tqdm

    from eve_vlm.data.check import Numbered, plan_epoch
    from eve_vlm.data.packing import Budget

    recipe = subject.recipe
    sources = [one.source for one in subject.data_sets if isinstance(one, Numbered)]
    if recipe is None or len(sources) < len(subject.data_sets):
        return None
    packing, training = recipe.data.packing, recipe.training
    with tqdm(desc="planning rows", unit=" windows", leave=False) as bar:
        return plan_epoch(
            subject.sections,
            sources,
            result.data_sets,
            seed=recipe.seed,
            budget=Budget(recipe.data.max_length)
            if packing is None
            else Budget(packing.tokens, packing.patches),
            packs=packing is not None,
            window=1024 if packing is None else packing.window,
            batch=training["per_device_train_batch_size"],
            accumulate=training.get("gradient_accumulation_steps", 1),
            progress=lambda windows: bar.update(windows),
        )


# --- what is shown --------------------------------------------------------------------------------


def _say(result: "CheckResult", plan: "Plan | None") -> None:
    from eve_vlm.data.check.summary import mixture_table, plan_lines, summary

    typer.echo(summary(result, blocks="utf" in (sys.stdout.encoding or "").lower()))
    if plan is not None:
        typer.echo("\n" + in_columns(mixture_table(plan)))
        for line in plan_lines(plan):
            typer.echo(line)


def _shown(subject: Subject, wanted: str) -> str:
    """One record in colours, and what is wrong with it."""
    from eve_vlm.data.check.record import RecordChecker
    from eve_vlm.data.check.view import harmless, printed, view_of, wants_colours

    data_set, number = _found(subject, wanted)
    record = data_set.read(number)
    facts = RecordChecker(subject.encoder, fast=False)(record)
    segments = view_of(record, subject.encoder)
    colours = wants_colours(terminal=sys.stdout.isatty())
    lines = [f"{data_set.name} record {number}, id {harmless(record.id)}"]
    if subject.encoder is not None and facts.length >= 0:
        lines[0] += f": {facts.length:,} tokens, {facts.learnt:,} learnt"
    lines += [f"  {kind}: {harmless(message)}" for kind, message in facts.problems]
    return "\n".join([*lines, printed(segments, colours=colours), ""])


def _found(subject: Subject, wanted: str) -> "tuple[DataSet, int]":
    """The record that `N`, `ID`, `NAME:N` or `NAME:ID` means; a plain number counts from 0."""
    data_sets = subject.data_sets
    for data_set in data_sets:
        if wanted.startswith(f"{data_set.name}:"):
            data_sets, wanted = [data_set], wanted[len(data_set.name) + 1 :]
            break
    if wanted.isdecimal() and str(int(wanted)) == wanted:
        return data_sets[0], int(wanted)
    for data_set in data_sets:
        number = data_set.find(wanted)
        if number is not None:
            return data_set, number
    raise ValueError(
        f"No record has the id {wanted!r}; a number without leading zeros counts records from 0."
    )


__all__ = ["check"]
