"""Tasks whose samples are drawn anew on every machine and must be the same on each.

A file `splits/<task>.json` in the package says which draw it is (a seed or ids) and holds a SHA-256
over all that a model is asked and marked by.  `FixedTask` draws, compares, and refuses what is not
that set: a changed generator would otherwise give new questions under an old version.  Easy to get
wrong: pixels are not in the digest, because renderers differ in the last bit; layouts belong into
`Sample.facts`, which is.
"""

import hashlib
import json
from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from importlib.resources import files
from typing import Any

from eve_vlm.eval.task import Sample, Task


def load_split(name: str) -> dict[str, Any]:
    """What `splits/<name>.json` says: `version`, `samples`, `sha256`, and what is drawn from."""
    path = files("eve_vlm.eval.offline") / "splits" / f"{name}.json"
    split: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return split


def digest(samples: Iterable[Sample]) -> str:
    """SHA-256 over everything of the samples but their pixels, in their order."""
    total = hashlib.sha256()
    for sample in samples:
        said = [
            *(sample.id, sample.question, sample.answers, sample.options),
            *(sample.group, sample.unit, dict(sample.facts)),
        ]
        total.update(json.dumps(said, ensure_ascii=False, sort_keys=True).encode())
        total.update(b"\n")
    return total.hexdigest()


class FixedTask(Task):
    """A task with a split file."""

    def __init__(self, split: Mapping[str, Any] | None = None) -> None:
        """Take another split than that of the package; its results are not comparable."""
        self._split = split

    @cached_property
    def split(self) -> Mapping[str, Any]:
        """The split file's content."""
        return self._split if self._split is not None else load_split(self.name)

    @abstractmethod
    def draw(self) -> Sequence[Sample]:
        """The samples of `self.split`, the same on every machine."""

    def samples(self) -> Sequence[Sample]:
        """The samples of the split.

        Raises:
            MissingDataError: if they are not on this machine.
            ValueError: if this machine draws others than the split file fixed.
        """
        return self._samples

    @cached_property
    def _samples(self) -> tuple[Sample, ...]:
        samples = tuple(self.draw())
        found, wanted = digest(samples), self.split["sha256"]
        if found != wanted:
            raise ValueError(
                f"The task {self.name} drew {len(samples)} samples with the digest {found[:12]} "
                f"but version {self.version} is the {self.split['samples']} with {wanted[:12]}; "
                "install the versions of eve-vlm, numpy and the picture sets that belong together."
            )
        return samples


__all__ = ["FixedTask", "digest", "load_split"]
