"""What a check found, in a few lines for a terminal: problems, lengths, and what was not checked.

Easy to get wrong: counts are of records, and one record can have several problems, so the counts of
kinds may add up to more than the number of bad records.
"""

from collections import Counter
from typing import NamedTuple

import numpy as np

from eve_vlm.data.check.histograms import (
    Histogram,
    drawn_in_text,
    of_aspects,
    of_lengths,
    of_megapixels,
    of_pictures,
)
from eve_vlm.data.check.plan import Plan
from eve_vlm.data.check.problems import KINDS, Kind, Problem
from eve_vlm.data.check.run import CheckResult
from eve_vlm.data.check.view import harmless

NAMED = 3  # records of each kind in the terminal
QUANTILES = ((0.5, "median"), (0.9, "90 %"), (0.99, "99 %"), (1.0, "most"))


class Example(NamedTuple):
    """One problem and where it is."""

    number: int
    """The data set, from 0."""
    source: str
    """Its name."""
    problem: Problem
    """What is wrong with which record."""


class Counted(NamedTuple):
    """One kind of problem over all data sets."""

    kind: Kind
    """The kind; an error where the check was told to count it as one."""
    records: int
    """Records that have it."""
    examples: list[Example]
    """The first of them."""


def counted(result: CheckResult) -> list[Counted]:
    """Kinds that were found, errors first."""
    found = []
    for kind in KINDS.values():
        records = sum(check.counts[kind.name] for check in result.data_sets)
        if records:
            examples = [
                Example(number, check.name, problem)
                for number, check in enumerate(result.data_sets)
                for problem in check.examples.get(kind.name, ())
            ]
            is_error = kind.name in result.errors
            found.append(Counted(kind._replace(error=is_error), records, examples))
    return sorted(found, key=lambda one: not one.kind.error)


def not_checked(result: CheckResult) -> list[str]:
    """What this check could not see, a sentence each."""
    left = []
    if result.encoder is None:
        left.append(
            "Tokens, max_length and the chat template were not checked, because no tokenizer is "
            "known: lengths are letters; give --model or a recipe."
        )
    if result.fast:
        left.append(
            "Pictures were not decoded, so damage behind their headers is not seen, and equal ones "
            "are known by name alone; leave out --fast to decode them."
        )
    left += [
        f"{check.name}: the rest could not be read: {check.stopped}"
        for check in result.data_sets
        if check.stopped
    ]
    return left


def verdicts(result: CheckResult) -> list[str]:
    """A sentence for each data set."""
    lines = []
    for check in result.data_sets:
        line = f"{check.name}: {records_of(check.records)}, {check.bad:,} bad, "
        line += f"{check.warned:,} with warnings"
        if check.listed:
            line += f"; {len(check.listed):,} more are in the quarantine list"
            if check.listed_but_fine:
                line += f", of which {check.listed_but_fine:,} have no problem now"
        lines.append(line)
    return lines


def records_of(count: int) -> str:
    """A number of records in words.

    >>> records_of(1), records_of(2000)
    ('1 record', '2,000 records')
    """
    return f"{count:,} record" + "s" * (count != 1)


def histograms(result: CheckResult) -> list[Histogram]:
    """Lengths, pictures of a record, megapixels and shapes; without those that hold nothing."""
    checks, encoder = result.data_sets, result.encoder
    lengths = np.concatenate([check.lengths for check in checks])
    drawn = [
        of_lengths("Letters per record", lengths)
        if encoder is None
        else of_lengths("Tokens per record", lengths, limit=encoder.max_length)
    ]
    if sum(int(check.pictures[1:].sum()) for check in checks):
        drawn += [
            of_pictures(np.sum([check.pictures for check in checks], 0)),
            of_megapixels(np.sum([check.megapixels for check in checks], 0)),
            of_aspects(np.sum([check.aspects for check in checks], 0)),
        ]
    return [one for one in drawn if one.labels]


def quantiles(result: CheckResult) -> list[tuple[str, int]]:
    """Name and value of the quantiles of lengths, rounded up to a length that is there."""
    lengths = np.concatenate([check.lengths for check in result.data_sets])
    if not len(lengths):
        return []
    return [(name, int(np.quantile(lengths, share, method="higher"))) for share, name in QUANTILES]


def learnt_share(result: CheckResult) -> tuple[int, int, float]:
    """Tokens (or letters) of records that are not bad, those learnt, and their share."""
    both = [check.learnt for check in result.data_sets]
    whole, learnt = sum(one for one, _ in both), sum(one for _, one in both)
    return whole, learnt, learnt / max(whole, 1)


def shrunk(result: CheckResult) -> list[tuple[int, int]]:
    """Longer side in pixels and the number of records whose pictures are made that small."""
    edges: Counter[int] = sum((check.edges for check in result.data_sets), Counter())
    return sorted(edges.items(), reverse=True)


def plan_lines(plan: Plan) -> list[str]:
    """Rows, steps and how full rows are."""
    size = f"{plan.budget.tokens:,} tokens"
    if plan.budget.patches is not None:
        size += f" and {plan.budget.patches:,} patches"
    rows = f"{plan.rows:,} rows" if plan.packs else f"{plan.rows:,} records"
    packing = "Packed" if plan.packs else "Packing would make"
    return [
        f"An epoch: {rows}, {plan.steps:,} steps of one process, {plan.tokens:,} tokens, of which "
        f"{plan.learnt / max(plan.tokens, 1):.1%} are learnt.",
        f"{packing} {plan.packed_rows:,} rows of {size}, filled to {plan.packed:.1%}; padded to "
        f"the longest of each batch they are filled to {plan.padded:.1%}.",
    ]


def mixture_table(plan: Plan) -> list[tuple[str, ...]]:
    """The mixture with a heading."""
    rows: list[tuple[str, ...]] = [
        ("data set", "records", "an epoch", "share", "tokens", "of them learnt")
    ]
    for one in plan.sources:
        share = one.learnt / max(one.tokens, 1)
        numbers = (f"{one.records:,}", f"{one.used:,}", f"{one.share:.1%}", f"{one.tokens:,}")
        rows.append((one.name, *numbers, f"{share:.1%}"))
    return rows


def summary(result: CheckResult, *, blocks: bool = True) -> str:
    """Everything but the mixture, as text.

    Args:
        blocks: draws with block characters; else with `#`.
    """
    lines = [*verdicts(result), ""]
    for one in counted(result):
        word = "error" if one.kind.error else "warning"
        lines.append(f"{word} {one.kind.name}: {one.kind.title}: {records_of(one.records)}")
        lines += [
            f"    {source} record {problem.number}, id {harmless(problem.id)}: "
            f"{harmless(problem.message)}"
            for _, source, problem in one.examples[:NAMED]
        ]
        if one.records > NAMED:
            lines.append(f"    and {one.records - NAMED:,} more")
    if edges := shrunk(result):
        sizes = ", ".join(f"{count:,} to {edge} pixels" for edge, count in edges)
        lines.append(f"Made smaller to fit: {sizes}.")
    if lines[-1]:
        lines.append("")
    unit = "letters" if result.encoder is None else "tokens"
    whole, learnt, share = learnt_share(result)
    if found := quantiles(result):
        values = ", ".join(f"{name} {value:,}" for name, value in found)
        lines += [f"Length in {unit}: {values}.", ""]
        lines += [drawn_in_text(histograms(result)[0], blocks=blocks), ""]
        lines.append(f"Learnt: {learnt:,} of {whole:,} {unit} ({share:.1%}).")
    lines += [f"Not checked: {sentence}" for sentence in not_checked(result)]
    return "\n".join(lines)


__all__ = [
    "Counted",
    "Example",
    "counted",
    "histograms",
    "learnt_share",
    "mixture_table",
    "not_checked",
    "plan_lines",
    "quantiles",
    "records_of",
    "shrunk",
    "summary",
    "verdicts",
]
