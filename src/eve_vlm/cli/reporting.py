"""The command that shows a run as a page: `eve report`, for a run that goes on or has crashed too.

A run writes the page itself at every checkpoint and at its end; the work is in
`eve_vlm.train.run_report`, imported inside so that `eve --help` does not wait for it.
"""

from pathlib import Path
from typing import Annotated

import typer


def report(
    run: Annotated[Path, typer.Argument(help="The output_dir of a run.")],
) -> None:
    """Write report.html of a run: curves, sample answers, data, parameters, environment.

    eve report runs/finetune
    """
    from eve_vlm.train.run_report import write_run_report

    typer.echo(f"{write_run_report(run)} is written; open it in a browser.")


__all__ = ["report"]
