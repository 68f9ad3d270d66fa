"""The command about this machine: `eve doctor` looks at what is installed and tests the arithmetic.

It also runs where torch or transformers cannot be imported, because `eve_vlm_command` starts it
without them. Easy to get wrong: being offline or having no GPU ends with exit code 0.
"""

import sys
from enum import StrEnum
from typing import Annotated

import typer

from .options import Dtype


class Kernel(StrEnum):
    """Attention kernels that only run when asked for."""

    flex_attention = "flex_attention"
    flash_attention_2 = "flash_attention_2"


def doctor(
    device: Annotated[
        str | None, typer.Option(help="Device of the self-test: cpu, cuda, cuda:1, mps.")
    ] = None,
    dtype: Annotated[
        list[Dtype] | None, typer.Option(help="Dtype of the self-test; may be given twice.")
    ] = None,
    attention: Annotated[
        list[Kernel] | None,
        typer.Option(help="Test this attention kernel too; flex_attention compiles for a minute."),
    ] = None,
    self_test: Annotated[
        bool, typer.Option("--self-test/--no-self-test", help="Run the arithmetic.")
    ] = True,
    offline: Annotated[
        bool, typer.Option("--offline", help="Do not ask whether the model hub can be reached.")
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object for a program to read.")
    ] = False,
    verbose: Annotated[
        bool, typer.Option("--verbose", help="List what was looked for and not found, too.")
    ] = False,
) -> None:
    """Look at what is installed here, at known trouble, and test EVE's arithmetic in seconds.

    Exit code 0 when all is well, 1 when something must be mended.

    eve doctor --dtype float32 --dtype bfloat16
    """
    from eve_vlm.doctor import checkup as examination
    from eve_vlm.doctor.facts import gather

    # `eve_vlm_command` leaves a note where the package could not be imported.
    broken = vars(sys.modules["eve_vlm"]).get("import_error", "")
    facts = gather(offline=offline, broken=broken)
    findings = examination.examine(facts)
    tests = {}
    if self_test:
        chosen = examination.places(facts, device, [one.value for one in dtype or ()])
        tests = examination.self_tests(facts, chosen, [one.value for one in attention or ()])
    if as_json:
        typer.echo(examination.as_json(findings, tests))
    else:
        typer.echo(examination.as_text(findings, tests, verbose=verbose))
    if examination.is_bad(findings, tests):
        raise typer.Exit(1)


__all__ = ["doctor"]
