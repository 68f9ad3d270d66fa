"""The command `eve`.  Each command only reads its arguments and calls what does the work.

Whatever a user can mend ends as one sentence and exit code 2; `EVE_DEBUG=1` shows the traceback
too. What only one command needs is imported inside it.
"""

import os
import sys
from typing import Annotated

import typer

from .asking import ask
from .benching import bench
from .caching_features import features
from .chatting import chat
from .checking_data import check
from .comparing import parity
from .comparing_runs import compare_run
from .conversing import converse
from .curating import curate
from .data import data_app
from .evaluating import eval_app
from .exporting import export, merge
from .fetching import assets_app
from .health import doctor
from .looking import inspect
from .looking_where import look
from .machine import fits
from .models import convert
from .paging import demo
from .reporting import report
from .reproducing import reproduce
from .serving import serve
from .small import small_app
from .starting import init
from .training import quickstart, train

app = typer.Typer(
    help="Encoder-free vision-language models: train them in three stages and ask them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _version(wanted: bool) -> None:
    if wanted:
        from eve_vlm import __version__

        typer.echo(f"eve-vlm {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    pass


# In the order of `eve --help`.
COMMANDS = (
    *(init, train, report, compare_run, quickstart, ask, chat, demo, look, serve, parity),
    *(inspect, fits, bench, reproduce, convert, merge, export, curate, doctor),
)
for command in COMMANDS:
    app.command()(command)
data_app.command()(check)
data_app.command()(converse)
data_app.command()(features)
app.add_typer(data_app, name="data")
app.add_typer(eval_app, name="eval")
app.add_typer(assets_app, name="assets")
app.add_typer(small_app, name="small")


def main() -> None:
    """Runs the command line; user errors are one sentence and exit code 2."""
    try:
        app()
    except (ValueError, OSError) as error:
        if os.environ.get("EVE_DEBUG"):
            raise
        typer.echo(f"eve: {error}", err=True)
        sys.exit(2)


__all__ = ["app", "main"]
