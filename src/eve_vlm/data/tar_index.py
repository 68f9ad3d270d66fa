"""What a tar holds and where, so that a picture in it is read by its bytes and not by unpacking.

Members with the same name up to the first dot are one sample, as in WebDataset shards: `0001.jpg`
and `0001.txt`.  Easy to get wrong: a tar that was cut between two members looks whole to most
programs, so the two empty blocks that end a tar are asked for here.
"""

import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from eve_vlm.data.files import open_file, place_is_said
from eve_vlm.data.kept_files import kept_array, stamp_of

PACKED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")


class Member(NamedTuple):
    """A regular file in a tar."""

    name: str
    """Its name, with folders."""
    offset: int
    """Where its bytes begin in the tar."""
    length: int
    """How many there are."""

    @property
    def key(self) -> str:
        """The name up to the first dot behind the last slash: the sample it belongs to."""
        folder, slash, name = self.name.rpartition("/")
        return folder + slash + name.partition(".")[0]

    @property
    def ending(self) -> str:
        """What follows that dot, in small letters: `jpg`, or `left.jpg`."""
        return self.name.rpartition("/")[2].partition(".")[2].lower()


class TarIndex:
    """The members of a tar that is not compressed, in its order.

    Raises:
        ValueError: if the tar is not there, compressed, cut short, or holds a name twice.
    """

    def __init__(self, path: str | Path):
        self.path = str(path)
        if self.path.endswith(PACKED):
            raise ValueError(
                f"{path} is compressed, so its members cannot be read by number; unpack it to a "
                ".tar, or read it in order with streaming: true."
            )
        self.stamp = stamp_of(path)
        self._kept = kept_array("tar", self.stamp, lambda: _kept_form(self.path))

    def __reduce__(self) -> tuple[Any, ...]:
        """To another process goes the name alone: it maps the same file."""
        return TarIndex, (self.path,)

    def members(self) -> list[Member]:
        """All regular files."""
        count = int(self._kept[:8].view(np.int64)[0])
        table = self._kept[8 : 8 + 16 * count].view(np.int64).reshape(count, 2).tolist()
        names = self._kept[8 + 16 * count :].tobytes().decode("utf-8", "surrogateescape")
        # An empty tar has one empty name and no row.
        return [
            Member(name, offset, length)
            for name, (offset, length) in zip(names.split("\0"), table, strict=False)
        ]

    def samples(self) -> list[list[Member]]:
        """Members grouped by their key, in the order of the tar.

        Raises:
            ValueError: if the members of a key do not stand behind one another.
        """
        groups: dict[str, list[Member]] = {}
        last = None
        for member in self.members():
            key = member.key
            if key != last and key in groups:
                raise ValueError(
                    f"{self.path} has members of {key!r} in two places, so it is not clear what "
                    "belongs together; give every sample a key of its own."
                )
            groups.setdefault(key, []).append(member)
            last = key
        return list(groups.values())


def _kept_form(path: str) -> np.ndarray:
    """Count, table and names of the members as bytes."""
    members = list(_whole(path))
    table = np.array([(member.offset, member.length) for member in members], np.int64)
    names = "\0".join(member.name for member in members).encode("utf-8", "surrogateescape")
    data = np.int64(len(members)).tobytes() + table.tobytes() + names
    return np.frombuffer(data, np.uint8)


def _whole(path: str) -> Iterator[Member]:
    seen: set[str] = set()
    with open_file(path) as file:
        for member, _ in walk_tar(file, path):
            if member.name in seen:
                raise ValueError(
                    f"{path} holds {member.name!r} twice, so one of the two would be lost; give "
                    "every member a name of its own."
                )
            seen.add(member.name)
            yield member


def walk_tar(file: BinaryIO, path: str, start: int = 0) -> Iterator[tuple[Member, int]]:
    """Regular files of an open tar from a member's header on, each with the place behind it.

    Raises:
        ValueError: if it is no tar, or cut short.
    """
    file.seek(start)
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            while (found := tar.next()) is not None:
                tar.members.clear()  # type: ignore[attr-defined]  # it would keep a list of all
                if found.issym() or found.islnk():
                    raise ValueError(
                        f"{path} holds {found.name!r} as a link; pack it again with tar "
                        "--dereference --hard-dereference."
                    )
                if found.isfile():
                    yield Member(found.name, found.offset_data, found.size), tar.offset
            end = tar.offset  # of the first empty block
    except (tarfile.TarError, EOFError, zlib.error) as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"{path} is no whole tar ({reason}); it is cut short or damaged, so get it again."
        ) from None
    with place_is_said(path):
        file.seek(end)
        closing = file.read(tarfile.BLOCKSIZE)
    if closing != bytes(tarfile.BLOCKSIZE):
        raise ValueError(
            f"{path} is no whole tar (no empty block closes it behind byte {end:,}); it is cut "
            "short or damaged, so get it again."
        )


__all__ = ["Member", "TarIndex", "walk_tar"]
