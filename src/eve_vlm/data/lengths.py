"""Sizes of all records in tokens and patches, measured once and kept, so that rows can be planned.

Texts are tokenised and picture headers read, on all cores; no pixel is decoded, and pictures that
are slow to draw are not drawn (`outline_of`).  Processes that
train together on one machine measure once: the first does it, the others wait for its file and not
inside a collective, which would time out.  Easy to get wrong: a size depends on the tokenizer, the
template and the picture settings too, so all of them are part of the name under which it is kept.
"""

import hashlib
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from filelock import FileLock
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from eve_vlm.data.encode import Encoder
from eve_vlm.data.packing import Size
from eve_vlm.data.sources import Mixture, Source
from eve_vlm.data.sources.source import outline_of
from eve_vlm.output_folder import written_whole

logger = logging.getLogger(__name__)

AT_ONCE = 256  # records a worker measures before it reports


class Lengths(NamedTuple):
    """Sizes of records by their numbers."""

    tokens: np.ndarray
    """(records,) int32."""
    patches: np.ndarray
    """(records,) int32."""


class MixtureLengths:
    """Sizes of the records of a mixture, each source measured once however often it is used.

    Args:
        records: the mixture.
        encoder: knows what a record takes.
        folder: where measured sizes are kept.
        workers: processes that measure.
    """

    def __init__(self, records: Mixture, encoder: Encoder, *, folder: Path, workers: int = 0):
        self.records = records
        self.by_source = [
            measured_lengths(source, encoder, folder=folder, workers=workers)
            for source in records.sources
        ]

    def __call__(self, indices: Sequence[int]) -> list[Size]:
        """The sizes of some records of the mixture by their numbers."""
        found = []
        for index in indices:
            number, place = self.records.locate(index)
            lengths = self.by_source[number]
            found.append(Size(int(lengths.tokens[place]), int(lengths.patches[place])))
        return found


def measured_lengths(
    records: Source, encoder: Encoder, *, folder: Path, workers: int = 0
) -> Lengths:
    """Sizes of all records of a source, kept in `folder`; measured where they are not there.

    Args:
        workers: processes that measure.
    """
    key = f"{records.fingerprint}\n{_settings_of(encoder)}"
    name = hashlib.sha256(key.encode()).hexdigest()[:32]
    file = folder / f"{name}.npy"
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{file}.lock"):
        if file.is_file():
            kept = np.load(file, allow_pickle=False)
            if kept.shape == (2, len(records)):
                return Lengths(*kept)
            logger.warning("%s holds the sizes of other records; they are measured again", file)
        measured = measure(records, encoder, workers=workers)
        with written_whole(file) as part, part.open("wb") as stream:
            np.save(stream, np.stack(measured))
    return measured


def measure(records: Source, encoder: Encoder, *, workers: int = 0) -> Lengths:
    """Sizes of all records; one that cannot be used takes one position, where it is counted."""
    loader: DataLoader = DataLoader(
        _Sizes(records, encoder),  # type: ignore[arg-type]
        batch_size=AT_ONCE,
        num_workers=workers,
        collate_fn=np.array,
    )
    parts = []
    with tqdm(total=len(records), desc="measuring records", unit=" records") as bar:
        for part in loader:
            parts.append(part)
            bar.update(len(part))
    both = np.concatenate(parts).astype(np.int32).T
    return Lengths(*np.ascontiguousarray(both))


class _Sizes:
    """Sizes by number, for the workers of a data loader."""

    def __init__(self, records: Source, encoder: Encoder):
        self.records, self.encoder = records, encoder

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Size:
        try:
            return self.encoder.size(outline_of(self.records, index))
        except ValueError:
            return Size(1, 0)  # its reason is said when its turn comes in training


def _settings_of(encoder: Encoder) -> str:
    """All that a size depends on beside the data."""
    processor = encoder.processor
    return json.dumps(
        {
            "tokenizer": processor.tokenizer.backend_tokenizer.to_str(),
            "template": processor.chat_template,
            "special": {
                name: str(value) for name, value in processor.tokenizer.special_tokens_map.items()
            },
            "pictures": processor.image_processor.to_dict(),
            "encoder": [encoder.format, encoder.max_length, encoder.max_patches, encoder.shrink],
        },
        sort_keys=True,
        default=str,
    )


__all__ = ["Lengths", "MixtureLengths", "measure", "measured_lengths"]
