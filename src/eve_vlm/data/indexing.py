"""Makes the record index of sources on all cores: texts and picture headers, no pixel decoded.

Ranges of records go to worker processes and come back as arrays.  Easy to get wrong: an index is
kept per file of a source, so a file that is added later costs only itself.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from torch.utils.data import DataLoader

from eve_vlm.data.record_index import (
    RecordIndex,
    facts_of,
    joined,
    keep_index,
    kept_index,
    stacked,
)
from eve_vlm.data.sources.source import FileSource, JoinedSource, NamedSource, PartSource, Source

AT_ONCE = 500  # records that a worker looks at before it reports
QUANTILES = (0.5, 0.9, 0.99, 1.0)


class IndexSummary(NamedTuple):
    """What the index of a source says."""

    name: str
    """The data set."""
    records: int
    """Records of its files, before split and cap."""
    unread: int
    """Records that cannot be read."""
    pictures: int
    """Pictures of all records."""
    missing: int
    """Pictures that are not there or whose header cannot be read."""
    megapixels: float
    """Of all pictures together."""
    characters: tuple[int, ...]
    """Letters of text of a record: median, 90 %, 99 % and the most; zeros without records."""


def index_sources(
    sources: Sequence[Source],
    *,
    workers: int,
    again: bool = False,
    progress: Callable[[int], object] = lambda records: None,
) -> list[IndexSummary]:
    """Indexes what was not indexed yet, keeps it, and says what all of it holds.

    Args:
        sources: from a recipe or files; scenes have nothing to index and are left out.
        workers: processes; 0 does it in this one.
        again: indexes anew what was indexed before, for pictures may have changed.
        progress: is told how many more records are done.
    """
    summaries = []
    for source in sources:
        parts = []
        for file in files_of(source):
            index = None if again else kept_index(file.fingerprint)
            if index is None:
                index = stacked(list(_parts(file, workers, progress)))
                keep_index(file.fingerprint, index)
            else:
                progress(len(file))
            parts.append(index)
        if parts:
            summaries.append(summary_of(source.name, stacked(parts)))
    return summaries


def files_of(source: Source) -> list[FileSource]:
    """The files that a source is made of."""
    if isinstance(source, FileSource):
        return [source]
    if isinstance(source, PartSource):
        return files_of(source.source)
    if isinstance(source, JoinedSource):
        return [file for part in source.sources for file in files_of(part)]
    assert isinstance(source, NamedSource), "scenes are drawn and have no file"
    return []


def summary_of(name: str, index: RecordIndex) -> IndexSummary:
    """An index in a few numbers."""
    letters = index.characters[index.characters >= 0]
    widths, heights = index.sizes[:, 0].astype(np.int64), index.sizes[:, 1].astype(np.int64)
    return IndexSummary(
        name,
        len(index.characters),
        int((index.characters < 0).sum()),
        len(index.sizes),
        int((widths == 0).sum()),
        float((widths * heights).sum() / 1e6),
        tuple(int(value) for value in np.quantile(letters, QUANTILES))
        if len(letters)
        else (0,) * 4,
    )


class _Ranges:
    """Ranges of a source's records by number, for the workers of a data loader."""

    def __init__(self, source: FileSource):
        self.source = source

    def __len__(self) -> int:
        return -(-len(self.source) // AT_ONCE)

    def __getitem__(self, number: int) -> RecordIndex:
        records = range(number * AT_ONCE, min((number + 1) * AT_ONCE, len(self.source)))
        return joined(list(facts_of(self.source, records)))


def _parts(
    source: FileSource, workers: int, progress: Callable[[int], object]
) -> Iterator[RecordIndex]:
    ranges = _Ranges(source)
    yield joined([])  # a file without records has an index too
    loader: Any = DataLoader(
        ranges,  # type: ignore[arg-type]
        batch_size=None,
        num_workers=min(workers, len(ranges)),
        collate_fn=_as_it_is,
    )
    for part in loader:
        progress(len(part.characters))
        yield part


def _as_it_is(part: Any) -> Any:
    return part


__all__ = ["IndexSummary", "files_of", "index_sources", "summary_of"]
