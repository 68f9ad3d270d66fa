"""Assets: a language model, teachers and picture sets for a machine without a model hub.

`assets.yaml` says what there is, under which licence, with which sizes and checksums.  `fetch`
brings one into `<cache>/assets/<name>` with a `manifest.json` beside its files, `asset_folder`
gives the folder to other code, `check` reads everything again.  Easy to get wrong: nothing of this
may enter the repository or the wheel, because some of the licences ask that what is passed on stays
under them; an asset goes from its registry to the user's own cache and nowhere else.
"""

import difflib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock, Timeout
from tqdm.auto import tqdm

from eve_vlm.assets.archives import TRY, Archive, download, find_archive, sha256_of
from eve_vlm.assets.unpacking import unpack
from eve_vlm.cache import cache_folder

MANIFEST = "manifest.json"
PARTIAL = "partial"  # beside the assets: locks, and what an unfinished fetch has verified so far
BLOCK = 4096  # bytes that the smallest file takes on usual file systems


@dataclass(frozen=True, kw_only=True, slots=True)
class Asset:
    """What `assets.yaml` says about one asset.

    Attributes:
        name: what users call it.
        what: what it is, in a line.
        used_for: what it is good for here.
        licence: short name of the licence.
        licence_note: what the licence asks, in a sentence.
        permissive: whether it may be passed on without the duty to keep its licence.
        files: number of files once unpacked, second names included, the manifest not.
        unpacked: bytes that they take, second names counted once.
        archives: where it comes from.
        instead: what a user can do who lacks the tool.
    """

    name: str
    what: str
    used_for: str
    licence: str
    licence_note: str
    permissive: bool
    files: int
    unpacked: int
    archives: tuple[Archive, ...]
    instead: str = ""

    @property
    def bytes(self) -> int:
        """Bytes to download."""
        return sum(archive.bytes for archive in self.archives)

    @property
    def versions(self) -> list[str]:
        """What a manifest notes as the versions that were asked for."""
        return [f"{archive.kind}:{archive.package}:{archive.version}" for archive in self.archives]


@dataclass(frozen=True, kw_only=True, slots=True)
class Fetched:
    """How a fetch ended.

    Attributes:
        folder: where the asset is.
        already: whether it was there, whole.
        files: how many files it has, second names included.
        bytes: what they take, second names counted once.
        links: how many of the files are second names of others.
        seconds: time that it took.
        versions: the archives as fetched, `package version (kind)`.
    """

    folder: Path
    already: bool
    files: int
    bytes: int
    links: int
    seconds: float
    versions: list[str]


@cache
def assets() -> dict[str, Asset]:
    """{name: asset}, in the order of `assets.yaml`."""
    table = yaml.safe_load((files("eve_vlm.assets") / "assets.yaml").read_text(encoding="utf-8"))
    return {
        name: Asset(
            name=name,
            **{
                **entry,
                "archives": tuple(Archive(**archive) for archive in entry["archives"]),
            },
        )
        for name, entry in table.items()
    }


def find_asset(name: str) -> Asset:
    """The asset of this name.

    Raises:
        ValueError: if there is none; names the nearest.
    """
    if name not in assets():
        close = difflib.get_close_matches(name, assets(), n=1)
        hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(assets())}."
        raise ValueError(f"There is no asset {name!r}: {hint}")
    return assets()[name]


def assets_folder() -> Path:
    """Where all of them are: `assets` in the cache folder."""
    return cache_folder() / "assets"


def asset_folder(name: str) -> Path:
    """The folder of a fetched asset, with the files of its table entry.

    Raises:
        ValueError: if there is no such asset, or it was not fetched or lost files since.
    """
    state = asset_state(name)
    if state != "present":
        raise ValueError(
            f"The asset {name} is {state} in {assets_folder()}; run `eve assets fetch {name}`."
        )
    return assets_folder() / name


def asset_state(name: str) -> str:
    """`present`, `absent`, `begun`, `outdated` or `damaged`; looks at names and sizes only."""
    asset = find_asset(name)
    manifest = _manifest(name)
    if manifest is not None:
        if manifest["wanted"] != asset.versions:
            return "outdated"
        return "damaged" if _lacking(name, manifest) else "present"
    if (assets_folder() / name).exists():
        return "damaged"
    begun = assets_folder() / PARTIAL / name
    return "begun" if begun.is_dir() and any(begun.iterdir()) else "absent"


def check(name: str) -> list[str]:
    """Reads every file of a fetched asset again.

    Returns:
        What is wrong, a path and a word for each file; empty if the asset is whole.
    """
    find_asset(name)
    manifest = _manifest(name)
    if manifest is None:
        return [f"{MANIFEST} is missing or cannot be read"]
    total = sum(size for size, _ in manifest["files"].values())
    with tqdm(total=total, unit="B", unit_scale=True, desc=f"check {name}", leave=False) as bar:
        return _lacking(name, manifest, bar=bar)


def fetch(
    name: str,
    *,
    any_version: bool = False,
    source: Path | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> Fetched:
    """Makes sure that an asset is there and whole.

    What is there is read again and kept if it is whole; archives that an earlier fetch verified are
    taken up.  Two fetches of one asset wait for each other.

    Args:
        name: which.
        any_version: of Debian packages, take the version that this machine's lists offer.
        source: a folder with the archives, to take them from instead of fetching.
        say: told when another process has to be waited for.

    Raises:
        ValueError: if a tool is missing or fails, an archive is not what it should be, or the cache
            cannot be written.
    """
    asset, begin = find_asset(name), time.monotonic()
    if asset_state(name) == "present" and not check(name):
        return _fetched(name, already=True, begin=begin)
    partial = assets_folder() / PARTIAL / name
    with _writing(), _lock(name, say):
        # Another process may have fetched it meanwhile.
        if asset_state(name) == "present" and not check(name):
            return _fetched(name, already=True, begin=begin)
        partial.mkdir(parents=True, exist_ok=True)
        for left in [*partial.glob(f"{TRY}*"), partial / "content"]:
            shutil.rmtree(left, ignore_errors=True)
        got = [
            (archive, find_archive(archive, source))
            if source is not None
            else download(archive, partial, any_version=any_version, instead=asset.instead)
            for archive in asset.archives
        ]
        _install(asset, got, partial)
    return _fetched(name, already=False, begin=begin)


def require_space(names: Iterable[str]) -> None:
    """Refuses a fetch that the disk cannot hold, before it begins.

    An archive is on the disk up to twice while pip copies it, and until it is unpacked.

    Raises:
        ValueError: with what is needed and what is free.
    """
    chosen = [find_asset(name) for name in names if asset_state(name) != "present"]
    if not chosen:
        return
    kept = sum(asset.unpacked + asset.files * BLOCK for asset in chosen)
    needed = kept + 2 * max(asset.bytes for asset in chosen)
    folder = assets_folder()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise ValueError(
            f"The disk of {assets_folder()} has {free / 1e6:,.0f} MB free, but fetching "
            f"{', '.join(asset.name for asset in chosen)} needs {needed / 1e6:,.0f} MB; make room, "
            "or set EVE_CACHE to a folder on another disk."
        )


# --- inside ---------------------------------------------------------------------------------------


def _manifest(name: str) -> dict[str, Any] | None:
    """What a fetch noted, or None where nothing that can be read is there."""
    try:
        text = (assets_folder() / name / MANIFEST).read_text(encoding="utf-8")
        manifest = json.loads(text)
    except (OSError, ValueError):
        return None
    keys = {"wanted", "files", "links", "archives"}
    return manifest if isinstance(manifest, dict) and keys <= manifest.keys() else None


def _lacking(name: str, manifest: dict[str, Any], *, bar: tqdm | None = None) -> list[str]:
    """What is wrong with the files of a manifest; their contents are read only with a `bar`."""
    bad = []
    for relative, (size, checksum) in manifest["files"].items():
        path = assets_folder() / name / relative
        try:
            found = path.stat().st_size
        except OSError:
            bad.append(f"{relative} is missing")
            continue
        if found != size:
            bad.append(f"{relative} has {found:,} bytes instead of {size:,}")
        elif bar is not None and sha256_of(path, bar=bar) != checksum:
            bad.append(f"{relative} has changed")
    return bad


def _fetched(name: str, *, already: bool, begin: float) -> Fetched:
    manifest = _manifest(name)
    if manifest is None:
        raise ValueError(f"The asset {name} went away while it was looked at; fetch it again.")
    return Fetched(
        folder=assets_folder() / name,
        already=already,
        files=len(manifest["files"]),
        bytes=sum(
            size for path, (size, _) in manifest["files"].items() if path not in manifest["links"]
        ),
        links=len(manifest["links"]),
        seconds=time.monotonic() - begin,
        versions=[f"{a['package']} {a['version']} ({a['kind']})" for a in manifest["archives"]],
    )


def _install(asset: Asset, got: list[tuple[Archive, Path]], partial: Path) -> None:
    """Unpacks beside, then renames: another process sees the whole asset or none of it."""
    content, target = partial / "content", assets_folder() / asset.name
    content.mkdir()
    found: dict[str, tuple[int, str]] = {}
    links: dict[str, str] = {}
    title = f"unpack {asset.name}"
    with tqdm(total=asset.unpacked, unit="B", unit_scale=True, desc=title, leave=False) as bar:
        for archive, path in got:
            unpacked = unpack(archive, path, content, bar=bar)
            found.update(unpacked.files)
            links.update(unpacked.links)
    manifest = {
        "name": asset.name,
        "licence": asset.licence,
        "licence_note": asset.licence_note,
        "fetched": datetime.now(UTC).isoformat(timespec="seconds"),
        "wanted": asset.versions,
        "archives": [
            {key: value for key, value in asdict(archive).items() if key != "unpack"}
            for archive, _ in got
        ],
        "links": links,
        "files": found,
    }
    text = json.dumps(manifest, indent=1, ensure_ascii=False)
    (content / MANIFEST).write_text(text, encoding="utf-8")
    if target.exists():  # damaged, or another version
        os.replace(target, partial / "old")
    os.replace(content, target)
    shutil.rmtree(partial)


@contextmanager
def _lock(name: str, say: Callable[[str], None]) -> Iterator[None]:
    """One fetch of an asset at a time; the system frees the lock of a process that dies."""
    folder = assets_folder() / PARTIAL
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / f"{name}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        say(f"another process fetches {name}; waiting for it")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


@contextmanager
def _writing() -> Iterator[None]:
    """Says which folder it is that cannot be written."""
    try:
        yield
    except OSError as error:
        raise ValueError(
            f"The folder {assets_folder()} cannot be written ({error.strerror or error}: "
            f"{error.filename or 'no file named'}); mend that, or set EVE_CACHE to one that can."
        ) from None


__all__ = [
    "Asset",
    "Fetched",
    "asset_folder",
    "asset_state",
    "assets",
    "assets_folder",
    "check",
    "fetch",
    "find_asset",
    "require_space",
]
