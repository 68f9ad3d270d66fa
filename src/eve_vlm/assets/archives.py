"""One archive of an asset, fetched by the tool that the user already has, and verified.

pip, npm and apt know the user's mirrors, proxies and certificates, so no address stands here; each
is asked for one exact version, and what it brings must have the size and the SHA-256 of our table.
Easy to get wrong: none of the three goes on inside a file that was cut off, so each attempt works
in a folder of its own, and only a verified archive gets the name that a later fetch looks for.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import unquote

from tqdm.auto import tqdm

SUFFIXES = {"pypi": ".whl", "npm": ".tgz", "debian": ".deb"}
TOOLS = {"pypi": "pip", "npm": "npm", "debian": "apt-get"}
CHUNK = 1 << 20  # bytes read at once
LOOK_EVERY = 0.2  # seconds between two looks at a file that grows
TRIES = 2  # what arrives damaged is fetched once more
LOG = "log.txt"  # what a tool said
TRY = "try-"  # how the folders of attempts begin


@dataclass(frozen=True, kw_only=True, slots=True)
class Archive:
    """A file of a package registry.

    Attributes:
        kind: `pypi`, `npm` or `debian`.
        package: its name there.
        version: the exact version.
        file: how the file is called.
        bytes: its size.
        sha256: its checksum, in hexadecimal.
        unpack: {pattern of paths inside: folder to put them in}; what no pattern fits stays behind.
            A path keeps what comes after the folders that the pattern writes out.
    """

    kind: str
    package: str
    version: str
    file: str
    bytes: int
    sha256: str
    unpack: Mapping[str, str]

    @property
    def title(self) -> str:
        """`openmoji 17.0.0 (npm)`."""
        return f"{self.package} {self.version} ({self.kind})"


def sha256_of(path: Path, *, bar: tqdm | None = None) -> str:
    """The SHA-256 of a file in hexadecimal; `bar` moves on by its bytes."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(CHUNK):
            digest.update(chunk)
            if bar is not None:
                bar.update(len(chunk))
    return digest.hexdigest()


def is_whole(path: Path, archive: Archive) -> bool:
    """Whether a file has the archive's size and checksum."""
    if not path.is_file() or path.stat().st_size != archive.bytes:
        return False
    return sha256_of(path) == archive.sha256


def find_archive(archive: Archive, folder: Path) -> Path:
    """The archive among the files of a folder, whatever it is called there.

    Raises:
        ValueError: if none of them has its size and checksum.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder; give the one that holds {archive.file}.")
    for path in sorted(folder.iterdir()):
        if is_whole(path, archive):
            return path
    raise ValueError(
        f"{folder} holds no whole {archive.file} ({archive.bytes:,} bytes, SHA-256 "
        f"{archive.sha256}); copy it there, or leave --from out to fetch it."
    )


def download(
    archive: Archive, folder: Path, *, any_version: bool = False, instead: str = ""
) -> tuple[Archive, Path]:
    """Fetches an archive into a folder, unless it lies there whole already.

    Args:
        archive: what to fetch.
        folder: where to; it exists.
        any_version: of a Debian package, take the version that this machine's package lists offer.
        instead: what else a user can do who lacks the tool, for the message.

    Returns:
        The archive, with `any_version` as it is offered, and its path.

    Raises:
        ValueError: if the tool is missing or fails, or what it brings is something else.
    """
    path = folder / archive.file
    if is_whole(path, archive):
        return archive, path
    command = _command(archive, instead)
    if archive.kind == "debian":
        archive = _offer(archive, any_version=any_version)
        command[-1] = f"{archive.package}={archive.version}"
        path = folder / archive.file
        if is_whole(path, archive):
            return archive, path
    path.unlink(missing_ok=True)
    came = "nothing"
    for _ in range(TRIES):
        with tempfile.TemporaryDirectory(dir=folder, prefix=TRY) as attempt:
            _run(command, archive, Path(attempt))
            for found in Path(attempt).glob(f"*{SUFFIXES[archive.kind]}"):
                if is_whole(found, archive):
                    os.replace(found, path)
                    return archive, path
                came = f"{found.name}, {found.stat().st_size:,} bytes of SHA-256 {sha256_of(found)}"
    raise ValueError(
        f"{TOOLS[archive.kind]} brought {came} instead of {archive.file}, {archive.bytes:,} bytes "
        f"of SHA-256 {archive.sha256}, twice; a mirror or proxy changes it, so fetch it elsewhere "
        "and give its folder with --from."
    )


def _command(archive: Archive, instead: str) -> list[str]:
    """The tool and its arguments; the last names package and version."""
    tool = TOOLS[archive.kind]
    missing = (
        find_spec("pip") is None
        if tool == "pip"
        else not (shutil.which(tool) and (tool == "npm" or shutil.which("dpkg-deb")))
    )
    if missing:
        mend = {
            "pip": "run `python -m ensurepip`",
            "npm": "install Node.js, which brings it",
            "apt-get": "use a Debian machine or container",
        }[tool]
        other = f", or {instead}" if instead else ""
        raise ValueError(
            f"{archive.package} comes with {tool}, which this machine lacks: {mend}{other}, or "
            f"fetch {archive.file} elsewhere and give its folder with --from."
        )
    if tool == "pip":
        options = "--no-deps --only-binary=:all: --no-cache-dir --no-input --progress-bar=off"
        pip = [sys.executable, "-m", "pip", "download", *options.split(), "--dest=."]
        return [*pip, f"{archive.package}=={archive.version}"]
    program = str(shutil.which(tool))
    if tool == "npm":
        return [program, "pack", "--ignore-scripts", f"{archive.package}@{archive.version}"]
    return [program, "download", archive.package]


def _environment(attempt: Path) -> dict[str, str]:
    """The user's own, with temporary files where they are watched and cleared away."""
    temporary = dict.fromkeys(("TMPDIR", "TEMP", "TMP"), str(attempt))
    pip = {"PIP_DISABLE_PIP_VERSION_CHECK": "1", "PIP_RESUME_RETRIES": "5"}
    return {**os.environ, **temporary, **pip, "LC_ALL": "C", "NO_UPDATE_NOTIFIER": "1"}


def _run(command: list[str], archive: Archive, attempt: Path) -> None:
    """Runs the tool in `attempt` and shows how much has come."""
    log = attempt / LOG
    bar = tqdm(total=archive.bytes, unit="B", unit_scale=True, desc=archive.file[:40], leave=False)
    with log.open("wb") as said, bar:
        process = subprocess.Popen(
            command,
            cwd=attempt,
            env=_environment(attempt),
            stdin=subprocess.DEVNULL,
            stdout=said,
            stderr=subprocess.STDOUT,
        )
        try:
            while True:
                try:
                    code = process.wait(LOOK_EVERY)
                    break
                except subprocess.TimeoutExpired:
                    bar.update(min(_largest(attempt), archive.bytes) - bar.n)
        except BaseException:
            process.kill()
            process.wait()
            raise
    if code != 0:
        raise ValueError(
            f"{TOOLS[archive.kind]} could not fetch {archive.package} {archive.version} "
            f"({_reason(log)}); look whether it reaches its registry, or fetch {archive.file} "
            "elsewhere and give its folder with --from."
        )


def _largest(folder: Path) -> int:
    """Bytes of the largest file; pip, for one, writes beside before it copies."""
    sizes = [0]
    for path in folder.rglob("*"):
        if path.name == LOG:
            continue
        try:
            sizes.append(path.stat().st_size)
        except OSError:  # it was renamed since
            continue
    return max(sizes)


def _reason(log: Path) -> str:
    """The line in which a tool says what went wrong."""
    lines = [line.strip() for line in log.read_text("utf-8", errors="replace").splitlines()]
    lines = [line for line in lines if line]
    marks = ("ERROR: ", "E: ", "npm error ", "npm ERR! ")
    bad = [line.removeprefix(mark) for line in lines for mark in marks if line.startswith(mark)]
    # npm says codes such as E404 first, and last the name of a log file.
    codes = ("code ", "syscall ", "errno ", "A complete log")
    said = [line for line in bad if not line.startswith(codes)]
    return ((said or lines or ["it said nothing"])[0])[:300].rstrip(".")


def _offer(archive: Archive, *, any_version: bool) -> Archive:
    """The archive as this machine's package lists have it.

    Raises:
        ValueError: if they lack it, or have another one and `any_version` is not given.
    """
    wanted = _listed(archive, f"{archive.package}={archive.version}")
    if wanted is not None and wanted.sha256 == archive.sha256:
        return wanted
    offered = wanted or _listed(archive, archive.package)
    if offered is None:
        raise ValueError(
            f"apt knows no package {archive.package} here; run `apt-get update` as root, or fetch "
            f"{archive.file} elsewhere and give its folder with --from."
        )
    if not any_version:
        other = (
            f"version {offered.version}"
            if offered.version != archive.version
            else f"another file (SHA-256 {offered.sha256})"
        )
        raise ValueError(
            f"The archive of this distribution offers {other} of {archive.package}, and not "
            f"{archive.version} as it was checked; give --any-version to take what it offers."
        )
    return offered


def _listed(archive: Archive, what: str) -> Archive | None:
    """What apt would fetch, from the line `'address' file size SHA256:checksum`."""
    with tempfile.TemporaryDirectory() as empty:  # apt lists nothing that lies there already
        done = subprocess.run(
            [str(shutil.which("apt-get")), "--print-uris", "download", what],
            cwd=empty,
            env={**os.environ, "LC_ALL": "C"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
        )
    for line in done.stdout.splitlines():
        words = line.split()
        if line.startswith("'") and len(words) == 4 and words[3].startswith("SHA256:"):
            file, size, checksum = words[1], int(words[2]), words[3].removeprefix("SHA256:")
            version = unquote(file.split("_")[1])
            return replace(archive, file=file, version=version, bytes=size, sha256=checksum)
    return None


__all__ = ["TRY", "Archive", "download", "find_archive", "is_whole", "sha256_of"]
