"""Checks data sets: every record is read once, by several processes, and added up in order.

Easy to get wrong: repeated records are known only when all were read, so they are named at the end,
and a record is handed to `on_bad` at most once with all that is known of it by then.
"""

from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

from torch.utils.data import DataLoader, IterableDataset

from eve_vlm.data.check.data_sets import DataSet
from eve_vlm.data.check.looking import forget
from eve_vlm.data.check.problems import KINDS, Problem
from eve_vlm.data.check.record import RecordChecker
from eve_vlm.data.check.repeats import find_repeats
from eve_vlm.data.check.tally import BAD, LISTED, DataSetCheck
from eve_vlm.data.encode import Encoder

OnBad = Callable[[str, Sequence[Problem]], object]
"""Is told the data set and all problems of one bad record."""


class CheckResult(NamedTuple):
    """What a check found."""

    data_sets: list[DataSetCheck]
    """One for each data set, in their order."""
    encoder: Encoder | None
    """What counted tokens; None where letters were counted."""
    fast: bool
    """Whether pictures were not decoded."""
    errors: frozenset[str]
    """Kinds that make a record bad."""

    @property
    def bad(self) -> int:
        """Records that are bad."""
        return sum(check.bad for check in self.data_sets)

    @property
    def records(self) -> int:
        """Records of all data sets."""
        return sum(check.records for check in self.data_sets)

    @property
    def ok(self) -> bool:
        """Whether no record is bad and all could be read."""
        return not self.bad and not any(check.stopped for check in self.data_sets)


def check_data_sets(
    data_sets: Sequence[DataSet],
    encoder: Encoder | None,
    *,
    fast: bool = False,
    workers: int = 0,
    errors: Collection[str] = (),
    listed: Sequence[Collection[int]] | None = None,
    on_bad: OnBad = lambda name, problems: None,
    progress: Callable[[int], object] = lambda records: None,
) -> CheckResult:
    """Reads every record once and says what is wrong.

    Args:
        data_sets: what to check.
        encoder: the one of the training; None counts letters instead of tokens.
        fast: reads headers of pictures and does not decode them.
        workers: processes; 0 does it in this one.
        errors: kinds of warnings that count as errors too.
        listed: for each data set, records that a quarantine list leaves out already.
        on_bad: is told of every bad record, also of those that are listed.
        progress: is told how many more records are done.
    """
    refused = frozenset(errors) | {name for name, kind in KINDS.items() if kind.error}
    checker = RecordChecker(encoder, fast=fast)
    forget()
    checks = []
    for number, data_set in enumerate(data_sets):
        check = DataSetCheck(data_set.name, refused, listed[number] if listed else ())
        for part in _parts(data_set, checker, workers):
            if isinstance(part, str):
                check.stopped = part
                continue
            _hand_over(part.problems, refused, lambda those, of=check: on_bad(of.name, those))
            check.add(part)
            progress(len(part.columns.states))
        checks.append(check)
    repeated = find_repeats(checks, data_sets, name_all=sorted(errors))
    for check, problems in zip(checks, repeated, strict=True):
        late = [
            problem
            for problem in problems
            if problem.kind in refused and check.columns.states[problem.number] not in (BAD, LISTED)
        ]
        _hand_over(late, refused, lambda those, of=check: on_bad(of.name, those))
        check.mark([problem.number for problem in late], BAD)
        check.drop_digests()
    return CheckResult(checks, encoder, fast, refused)


def _hand_over(
    problems: Sequence[Problem], refused: Collection[str], tell: Callable[..., object]
) -> None:
    """Tells of every record with an error, once, with all its errors."""
    by_record: dict[int, list[Problem]] = {}
    for problem in problems:
        if problem.kind in refused:
            by_record.setdefault(problem.number, []).append(problem)
    for index in sorted(by_record):
        tell(by_record[index])


def _parts(data_set: DataSet, checker: RecordChecker, workers: int) -> Any:
    """Parts of a data set in order, made by worker processes."""
    parts = data_set.parts(checker)
    most = 1 if isinstance(parts, IterableDataset) else len(parts)  # type: ignore[arg-type]
    return DataLoader(parts, batch_size=None, num_workers=min(workers, most), collate_fn=_as_it_is)


def _as_it_is(part: Any) -> Any:
    return part


__all__ = ["CheckResult", "OnBad", "check_data_sets"]
