"""Wheels, npm archives and Debian packages, unpacked so that nothing can land outside one folder.

Python's zipfile and tarfile read them; of a Debian package `dpkg-deb` hands over the tar inside, so
that every compression works and nothing is installed.  Easy to get wrong: no link of an archive
becomes a link on the disk.  One to a file that is unpacked too becomes a second name of that file;
a path or a link that leaves the archive refuses the whole archive.
"""

import hashlib
import os
import posixpath
import shutil
import stat
import subprocess
import tarfile
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from lzma import LZMAError
from pathlib import Path
from typing import IO, NamedTuple

from tqdm.auto import tqdm

from eve_vlm.assets.archives import CHUNK, Archive
from eve_vlm.errors import first_line


class Unpacked(NamedTuple):
    """What came out of an archive.

    Attributes:
        files: {path: (bytes, SHA-256)}, second names included.
        links: {path: the path that it is a second name of}.
    """

    files: dict[str, tuple[int, str]]
    links: dict[str, str]


class _Member(NamedTuple):
    """A file or a link of an archive, with its path inside."""

    path: str
    content: IO[bytes] | None
    link: str | None


def unpack(archive: Archive, path: Path, target: Path, *, bar: tqdm) -> Unpacked:
    """Unpacks what the archive's patterns name.

    Args:
        archive: says what goes where.
        path: the archive on disk.
        target: a folder to write to; `bar` moves on by the bytes written.

    Raises:
        ValueError: if the archive is damaged or not safe, or a pattern fits nothing in it.
    """
    done = Unpacked({}, {})
    links: dict[str, str] = {}
    fitted: set[str] = set()
    try:
        for member in _members(archive, path):
            _refuse_unsafe(member.path, archive)
            pattern = _pattern(member.path, archive.unpack)
            if pattern is None:
                continue
            fitted.add(pattern)
            place = _place(member.path, pattern, archive.unpack[pattern])
            if member.content is None:
                links[place] = _target_of(member, archive)
            elif place in done.files:
                raise ValueError(f"{archive.file} holds {member.path} twice; it is not used.")
            else:
                done.files[place] = _write(member.content, target / place, bar)
    except (tarfile.TarError, zipfile.BadZipFile, zlib.error, LZMAError, EOFError) as error:
        raise ValueError(
            f"{archive.file} cannot be unpacked ({first_line(error)}); fetch it again."
        ) from None
    lacking = set(archive.unpack) - fitted
    if lacking:
        raise ValueError(
            f"{archive.title} holds nothing called {min(lacking)}, so this version is arranged in "
            "another way; take the version that `eve assets` was made for."
        )
    _link(links, done, archive, target)
    return done


def _members(archive: Archive, path: Path) -> Iterator[_Member]:
    if archive.kind == "pypi":
        with zipfile.ZipFile(path) as wheel:
            for entry in wheel.infolist():
                if stat.S_ISLNK(entry.external_attr >> 16):
                    yield _Member(entry.filename, None, wheel.read(entry).decode())
                elif not entry.is_dir():
                    with wheel.open(entry) as content:
                        yield _Member(entry.filename, content, None)
    elif archive.kind == "npm":
        with tarfile.open(path, "r|gz") as tar:
            yield from _members_of_tar(tar, archive)
    else:
        program = shutil.which("dpkg-deb")
        if program is None:
            raise ValueError(
                f"{archive.file} is a Debian package, which only dpkg-deb unpacks; install dpkg."
            )
        command = [program, "--fsys-tarfile", str(path)]
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        ) as process:
            assert process.stdout is not None
            with tarfile.open(fileobj=process.stdout, mode="r|") as tar:
                yield from _members_of_tar(tar, archive)
            process.stdout.read()
        if process.returncode != 0:
            raise tarfile.ReadError(f"dpkg-deb ended with {process.returncode}")


def _members_of_tar(tar: tarfile.TarFile, archive: Archive) -> Iterator[_Member]:
    for entry in tar:
        path = entry.name.removeprefix("./")
        if entry.isfile():
            yield _Member(path, tar.extractfile(entry), None)
        elif entry.islnk():
            yield _Member(path, None, entry.linkname.removeprefix("./"))
        elif entry.issym():
            absolute = entry.linkname.startswith("/")
            here = "" if absolute else posixpath.dirname(path)
            yield _Member(path, None, posixpath.normpath(posixpath.join(here, entry.linkname)))
        elif not entry.isdir():
            raise ValueError(f"{archive.file} holds {path}, which is no file; it is not used.")


def _refuse_unsafe(path: str, archive: Archive) -> None:
    """Only relative paths downwards, in any system's way to write them."""
    parts = path.split("/")
    if ".." in parts or path.startswith("/") or any(sign in path for sign in "\\:\0"):
        raise ValueError(f"{archive.file} holds {path!r}, outside of its folder; it is not used.")


def _pattern(path: str, patterns: Mapping[str, str]) -> str | None:
    """The first pattern that fits a path."""
    return next((pattern for pattern in patterns if fnmatchcase(path, pattern)), None)


def _place(path: str, pattern: str, folder: str) -> str:
    """Where a path goes, relative to the target."""
    fixed = posixpath.dirname(pattern.split("*")[0] if "*" in pattern else pattern)
    return posixpath.normpath(posixpath.join(folder, posixpath.relpath(path, fixed or ".")))


def _target_of(member: _Member, archive: Archive) -> str:
    """Where the file goes to which a link leads."""
    link = member.link or ""
    _refuse_unsafe(link, archive)
    pattern = _pattern(link, archive.unpack)
    if pattern is None:
        raise ValueError(
            f"{archive.file} has a link {member.path} to {link!r}, outside of what is unpacked; "
            "it is not used."
        )
    return _place(link, pattern, archive.unpack[pattern])


def _write(content: IO[bytes], path: Path, bar: tqdm) -> tuple[int, str]:
    """Writes a new file; its bytes and SHA-256."""
    path.parent.mkdir(parents=True, exist_ok=True)
    digest, size = hashlib.sha256(), 0
    with path.open("xb") as stream:
        while chunk := content.read(CHUNK):
            stream.write(chunk)
            digest.update(chunk)
            size += len(chunk)
            bar.update(len(chunk))
    return size, digest.hexdigest()


def _link(links: dict[str, str], done: Unpacked, archive: Archive, target: Path) -> None:
    """Gives each linked file its second name: a hard link, else a copy."""
    for place, goal in links.items():
        seen = {place}
        while goal in links and goal not in seen:
            seen.add(goal)
            goal = links[goal]
        if goal not in done.files or place in done.files:
            raise ValueError(f"{archive.file} has a link {place} to nowhere; it is not used.")
        (target / place).parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(target / goal, target / place)
        except OSError:  # this file system has none
            shutil.copyfile(target / goal, target / place)
        done.links[place] = goal
    done.files.update({place: done.files[goal] for place, goal in done.links.items()})


__all__ = ["Unpacked", "unpack"]
