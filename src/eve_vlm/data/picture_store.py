"""Pictures that were drawn or made smaller once, with what is known of them, in one tar each.

`kept_pictures` makes `<cache>/pictures/NAME-DIGEST.tar` on all cores where it is not there yet, and
opens it.  Members are WebP files by number and, last, `index.json` with the facts of each, so a
store needs nothing beside it: carried to another machine's cache folder it works there without the
assets it was made of.  Easy to get wrong: the digest is of the `key` alone, so the key must say all
that the pixels and facts depend on, the version of the code that made them too.
"""

import hashlib
import io
import json
import logging
import os
import sys
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from filelock import FileLock
from PIL import Image
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from eve_vlm.cache import cache_folder
from eve_vlm.data.files import read_range
from eve_vlm.data.picture_ref import PicturePart
from eve_vlm.data.tar_index import TarIndex
from eve_vlm.output_folder import written_whole

logger = logging.getLogger(__name__)

INDEX = "index.json"
LOSSY = 90  # WebP's quality; halves the bytes of 95 and shows no blocks at 336 pixels


class Drawn(NamedTuple):
    """One picture for a store."""

    facts: dict[str, Any]
    """What is known of it, as JSON."""
    data: bytes
    """Its WebP file."""
    size: tuple[int, int]
    """Width and height."""


class LeftOut(NamedTuple):
    """A picture that is not stored."""

    reason: str
    """Why: counted and logged by it."""


def webp(picture: Image.Image, facts: dict[str, Any], *, lossless: bool) -> Drawn:
    """A picture as it is stored."""
    stream = io.BytesIO()
    picture.save(stream, "WEBP", lossless=lossless, quality=LOSSY, method=4)
    return Drawn(facts, stream.getvalue(), picture.size)


class PictureStore:
    """The pictures of one tar, by number.

    Raises:
        ValueError: if the tar is not there, cut short, or not such a store.
    """

    def __init__(self, path: Path | str) -> None:
        self._tar = TarIndex(path)
        members = self._tar.members()
        if not members or members[-1].name != INDEX:
            raise ValueError(f"{path} does not end with {INDEX}; remove it to have it made again.")
        *self._members, last = members
        index = json.loads(read_range(self._tar.path, last.offset, last.length))
        self.facts: list[dict[str, Any]] = index["facts"]
        """What is known of each picture."""
        self._sizes: list[tuple[int, int]] = [(width, height) for width, height in index["sizes"]]

    @property
    def path(self) -> Path:
        """The tar."""
        return Path(self._tar.path)

    def __len__(self) -> int:
        """Number of pictures."""
        return len(self.facts)

    def picture(self, number: int) -> PicturePart:
        """Where a picture lies, for a record."""
        member = self._members[number]
        return PicturePart(
            name=f"{self.path.name}:{member.name}",
            known_size=self._sizes[number],
            path=self._tar.path,
            offset=member.offset,
            length=member.length,
        )

    def drawing(self, number: int) -> Image.Image:
        """A picture with its alpha channel, RGBA."""
        with Image.open(io.BytesIO(self.picture(number).read())) as picture:
            return picture.convert("RGBA")


def kept_pictures(
    name: str,
    key: Any,
    jobs: Callable[[], Sequence[Any]],
    draw: Callable[[Any], Drawn | LeftOut],
) -> PictureStore:
    """The store of this name and key in the cache folder; made where it is not there or damaged.

    Args:
        name: the file's name begins with it; the progress bar says it.
        key: all that the store depends on, as JSON.
        jobs: what to draw, in the order of the store; asked for only where it has to be made.
        draw: draws one, in another process.
    """
    digest = hashlib.sha256(json.dumps([name, key]).encode()).hexdigest()[:12]
    path = cache_folder() / "pictures" / f"{name}-{digest}.tar"
    if path.is_file():
        try:
            return PictureStore(path)
        except ValueError as error:  # nothing in a cache is lost
            logger.warning("%s It is made again.", error)
            path.unlink(missing_ok=True)
    work = jobs()
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_suffix(".lock")):  # the processes of one run ask at the same time
        if not path.is_file():
            with written_whole(path) as part:
                _write(part, name, _in_processes(work, draw), total=len(work))
    return PictureStore(path)


def _write(path: Path, name: str, drawn: Iterator[Drawn | LeftOut], *, total: int) -> None:
    facts: list[dict[str, Any]] = []
    sizes: list[tuple[int, int]] = []
    left_out: Counter[str] = Counter()
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for one in tqdm(drawn, total=total, desc=f"drawing {name}", unit=" pictures"):
            if isinstance(one, LeftOut):
                left_out[one.reason] += 1
                continue
            _add(tar, f"{len(facts)}.webp", one.data)
            facts.append(one.facts)
            sizes.append(one.size)
        index = {"facts": facts, "sizes": sizes, "left_out": left_out}
        _add(tar, INDEX, json.dumps(index, ensure_ascii=False).encode())
    for reason, number in sorted(left_out.items()):
        logger.warning("%s: %d pictures left out: %s", name, number, reason)


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def _in_processes(jobs: Sequence[Any], draw: Callable[[Any], Any]) -> Iterator[Any]:
    """`draw` of every job, in order, on all cores; the renderer holds the lock of Python."""
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    loader: Any = DataLoader(
        _Jobs(jobs, draw),  # type: ignore[arg-type]
        batch_size=None,
        num_workers=cores if len(jobs) > 100 else 0,  # starting processes takes longer than 100
        collate_fn=_as_it_is,
    )
    return iter(loader)


class _Jobs:
    """Jobs by number, for the workers of a data loader."""

    def __init__(self, jobs: Sequence[Any], draw: Callable[[Any], Any]) -> None:
        self._jobs, self._draw = jobs, draw

    def __len__(self) -> int:
        return len(self._jobs)

    def __getitem__(self, number: int) -> Any:
        return self._draw(self._jobs[number])


def _as_it_is(drawn: Any) -> Any:
    return drawn


__all__ = ["Drawn", "LeftOut", "PictureStore", "kept_pictures", "webp"]
