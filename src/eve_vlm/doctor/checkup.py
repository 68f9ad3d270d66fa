"""The examination behind `eve doctor`: facts to findings, the self-test, and the report.

This file and those that it builds on import neither torch nor transformers at their top, because
people call a doctor when exactly these cannot be imported. Easy to get wrong: the report is made to
be pasted into a bug report, so it shows no user name, host name or home folder.
"""

import json
import textwrap
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from eve_vlm.doctor.facts import DISTRIBUTION, Facts
from eve_vlm.doctor.findings import Finding, devices, extras, hub, torch_build, versions
from eve_vlm.doctor.known import GROUP, KNOWN

if TYPE_CHECKING:
    from eve_vlm.doctor.self_test import Row

WIDTH = 100  # characters of a line in the report
MARKS = {"ok": "ok  ", "warn": "warn", "bad": "BAD "}
HALVES = ("bfloat16", "float16")


def examine(facts: Facts) -> list[Finding]:
    """All findings: versions, devices, extras, known trouble."""
    found: list[Finding] = []
    for check in (versions, torch_build, devices, hub, extras):
        found += check(facts)
    return found + [check(facts) for check in KNOWN]


def places(facts: Facts, device: str | None, dtypes: Sequence[str]) -> list[tuple[str, str]]:
    """(device, dtype) pairs for the self-test: as asked, else the best device.

    Float32 always, and bfloat16 where a GPU has it: on CPUs without it, it proves nothing anybody
    should use.

    Raises:
        ValueError: if there is no such device.
    """
    available = ["cpu", *(f"cuda:{index}" for index in range(len(facts.torch.get("gpus", ()))))]
    available += ["mps"] if facts.torch.get("mps") else []
    best = "cuda:0" if "cuda:0" in available else available[-1]
    chosen = {"cuda": "cuda:0", None: best}.get(device, device)
    if chosen not in available:
        raise ValueError(
            f"There is no device {device!r} here that torch can use; take one of "
            f"{', '.join(available)}."
        )
    return [(str(chosen), dtype) for dtype in dtypes or _usual_dtypes(str(chosen), facts)]


def _usual_dtypes(device: str, facts: Facts) -> list[str]:
    if not device.startswith("cuda:"):
        return ["float32", "bfloat16"] if device == "mps" else ["float32"]
    native = facts.torch["gpus"][int(device.removeprefix("cuda:"))]["bfloat16"]
    return ["float32", "bfloat16"] if native else ["float32"]


def kernels(facts: Facts, device: str, dtype: str, asked: Sequence[str]) -> list[str]:
    """Attention kernels to hold against sdpa: eager, flash-attn where it can run, and those asked.

    Flex attention compiles for up to a minute, so it only runs when asked for.
    """
    found = ["eager"]
    flash = "flash-attn" in facts.versions and "flash-attn" not in facts.import_errors
    if flash and device.startswith("cuda") and dtype in HALVES:
        found.append("flash_attention_2")
    return list(dict.fromkeys([*found, *asked]))


def self_tests(
    facts: Facts, chosen: Iterable[tuple[str, str]], asked: Sequence[str] = ()
) -> dict[tuple[str, str], list["Row"]]:
    """The self-test's rows for each device and dtype; none where torch or the package is broken."""
    if {"torch", DISTRIBUTION} & facts.import_errors.keys():
        return {}
    from eve_vlm.doctor.self_test import run_self_test

    return {
        (device, dtype): run_self_test(device, dtype, kernels=kernels(facts, device, dtype, asked))
        for device, dtype in chosen
    }


def is_bad(findings: Iterable[Finding], tests: dict[tuple[str, str], list["Row"]]) -> bool:
    """Whether anything needs mending before work; warnings do not."""
    failed = any(not row.passed for rows in tests.values() for row in rows)
    return failed or any(finding.state == "bad" for finding in findings)


def as_text(
    findings: Sequence[Finding], tests: dict[tuple[str, str], list["Row"]], *, verbose: bool = False
) -> str:
    """The report for people; of known trouble only what is there, unless `verbose`."""
    lines: list[str] = []
    for group in dict.fromkeys(finding.group for finding in findings):
        members = [finding for finding in findings if finding.group == group]
        shown = [one for one in members if verbose or group != GROUP or one.state != "ok"]
        lines += ["", group.capitalize()]
        width = max((len(one.name) for one in shown), default=0)
        for one in shown:
            lines += _finding_lines(one, width, verbose)
        if len(shown) < len(members):
            hidden = len(members) - len(shown)
            lines.append(f"  {hidden} more looked for, all well (--verbose lists them)")
    for (device, dtype), rows in tests.items():
        lines += ["", f"Self-test on {device} in {dtype}", *_test_lines(rows)]
    return "\n".join([*lines, "", _summary(findings, tests)]).lstrip("\n")


def _finding_lines(one: Finding, width: int, verbose: bool) -> list[str]:
    head = f"  {MARKS[one.state]}  {one.name.ljust(width)}  "
    # Pip lines and error texts are copied, so they are not broken inside words or at hyphens.
    lines = textwrap.wrap(
        one.found, WIDTH - len(head), break_long_words=False, break_on_hyphens=False
    ) or [""]
    indent = " " * len(head)
    made = [head + lines[0], *(indent + line for line in lines[1:])]
    if one.mend:
        made.append(f"{indent}-> {one.mend}")
    if one.source and (verbose or one.state != "ok"):
        made.append(f"{indent}   ({one.source})")
    return made


def _test_lines(rows: Sequence["Row"]) -> list[str]:
    width = max(len(row.what) for row in rows)
    lines = [f"        {'what'.ljust(width)}  difference  tolerance  why this tolerance"]
    for row in rows:
        mark = MARKS["ok" if row.passed else "bad"]
        difference = "did not run" if row.difference is None else _number(row.difference)
        numbers = f"{difference:>10}  {_number(row.tolerance):>9}"
        lines.append(f"  {mark}  {row.what.ljust(width)}  {numbers}  {row.why}")
    return lines


def _number(value: float) -> str:
    return f"{value:.0f}" if value == int(value) else f"{value:.1e}" if value == value else "nan"


def _summary(findings: Sequence[Finding], tests: dict[tuple[str, str], list["Row"]]) -> str:
    bad = sum(finding.state == "bad" for finding in findings)
    warned = sum(finding.state == "warn" for finding in findings)
    rows = [row for of_one in tests.values() for row in of_one]
    failed = sum(not row.passed for row in rows)
    if not rows:
        tested = "the self-test did not run"
    elif failed:
        tested = f"{failed} of {len(rows)} lines of the self-test failed"
    else:
        tested = f"all {len(rows)} lines of the self-test passed"
    lines = f"{bad} bad, {warned} to know about; {tested}."
    if failed and not bad:
        lines += (
            "\nA failed line means that this machine computes something else than EVE; please "
            "report it with all of the above."
        )
    return lines


def as_json(findings: Sequence[Finding], tests: dict[tuple[str, str], list["Row"]]) -> str:
    """The report for programs; a difference that is no number is null."""
    data: dict[str, Any] = {
        "bad": is_bad(findings, tests),
        "findings": [finding._asdict() for finding in findings],
        "self_test": [
            {
                "device": device,
                "dtype": dtype,
                **row._asdict(),
                "difference": None if row.difference != row.difference else row.difference,
                "passed": row.passed,
            }
            for (device, dtype), rows in tests.items()
            for row in rows
        ],
    }
    return json.dumps(data, indent=2)


__all__ = ["as_json", "as_text", "examine", "is_bad", "places", "self_tests"]
