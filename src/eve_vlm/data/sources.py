"""Where records come from, behind one shape: a length and records by index.

A mixture joins sources, each used `weight` times per epoch.  Records are decoded only when asked
for. Easy to get wrong: nothing is dropped here; a record that cannot be used raises when it is
asked for, and the data set below turns that into a counted `BadRecord`.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from eve_vlm.data.encode import BadRecord, EncodedRecord, Encoder
from eve_vlm.data.records import Record


class Source(Protocol):
    """A finite, ordered set of records."""

    def __len__(self) -> int:
        """Number of records."""

    def __getitem__(self, index: int) -> Record:
        """Record `index`."""


class LlavaSource:
    """Records of a JSON or JSON Lines file in the published LLaVA form.

    A sample is `{"id", "image" (one name, several, or none), "conversations": [{"from", "value"},
    ...]}`. As in the published preprocessing `<image>` marks go to the front of their turn, and an
    assistant turn before the first user turn is left out.
    """

    def __init__(self, path: str | Path, image_folder: str | Path | None = None):
        self.path = Path(path)
        if not self.path.is_file():
            raise ValueError(f"{self.path} is not a file; check data.sources.path in the recipe.")
        self.image_folder = Path(image_folder) if image_folder is not None else self.path.parent
        self._samples = _read_json(self.path)

    def __len__(self) -> int:
        """Number of samples in the file."""
        return len(self._samples)

    def __getitem__(self, index: int) -> Record:
        """Sample `index`, its pictures not opened yet.

        Raises:
            ValueError: if the sample lacks a key or a role is unknown.
        """
        sample = self._samples[index]
        try:
            id = str(sample.get("id", index))
            names = sample.get("image") or []
            names = [names] if isinstance(names, str) else list(names)
            turns = [(turn["from"], turn["value"]) for turn in sample["conversations"]]
        except (KeyError, TypeError, AttributeError) as error:
            problem = f"lacks {error}" if isinstance(error, KeyError) else f"is malformed ({error})"
            raise ValueError(
                f"Record {index} of {self.path} {problem}; a sample needs 'conversations' with "
                "'from' and 'value'."
            ) from None
        for text in (*names, *(text for turn in turns for text in turn)):
            if not isinstance(text, str):
                raise ValueError(
                    f"Record {index} of {self.path} has {text!r} where a text or a picture's name "
                    "belongs; mend or remove it."
                )
        if turns and turns[0][0] == "gpt":
            turns = turns[1:]
        messages = [_message(role, value, bool(names), id) for role, value in turns]
        return Record(id=id, messages=messages, images=[self.image_folder / name for name in names])


class Mixture:
    """Several sources as one; each is used `weight` times per epoch (0.5: every other record).

    The order is fixed; shuffling is the sampler's, from the recipe's seed.
    """

    def __init__(self, sources: Sequence[Source], weights: Sequence[float]):
        self._sources = list(sources)
        self._sizes = [
            round(len(source) * weight) for source, weight in zip(sources, weights, strict=True)
        ]
        if not sum(self._sizes):
            raise ValueError("The data sources hold no records; check data.sources in the recipe.")

    def __len__(self) -> int:
        """Records of one epoch."""
        return sum(self._sizes)

    def __getitem__(self, index: int) -> Record:
        """Record `index` of the epoch."""
        for source, size in zip(self._sources, self._sizes, strict=True):
            if index < size:
                # A share of a source is spread over it; several uses go round it again.
                return source[
                    index * len(source) // size if size < len(source) else index % len(source)
                ]
            index -= size
        raise IndexError("record index out of range")


class EncodedDataset:
    """A mixture encoded on demand: what a data loader reads."""

    def __init__(self, records: Source, encoder: Encoder):
        self.records, self.encoder = records, encoder

    def __len__(self) -> int:
        """Number of records."""
        return len(self.records)

    def __getitem__(self, index: int) -> EncodedRecord | BadRecord:
        """Record `index` as arrays, or the reason why it cannot be."""
        try:
            return self.encoder(self.records[index])
        except ValueError as error:
            return BadRecord(str(error))


def build_source(
    kind: str, *, path: str | None, image_folder: str | None, options: Mapping[str, Any], seed: int
) -> Source:
    """Makes the source that a recipe describes.

    Raises:
        ValueError: if the options do not fit the kind.
    """
    if kind == "scenes":
        # Imported here: pictograms are an extra.
        from eve_vlm.data.scene_source import SceneSource

        return SceneSource.from_options(options, seed=seed)
    if options:
        raise ValueError(
            f"data.sources.options has {sorted(options)}, but the kind {kind!r} takes none; "
            "remove them."
        )
    if path is None:
        raise ValueError(f"data.sources.path is missing for the kind {kind!r}; name a JSON file.")
    return LlavaSource(path, image_folder)


def _read_json(path: Path) -> list[dict]:
    before = 0  # lines before the one that is being read
    with path.open(encoding="utf-8") as file:
        try:
            if path.suffix == ".jsonl":
                samples = []
                for line in file:
                    if line.strip():
                        samples.append(json.loads(line.rstrip()))
                    before += 1
                return samples
            samples = json.load(file)
        except json.JSONDecodeError as error:
            raise ValueError(
                f"{path}, line {before + error.lineno}: not valid JSON ({error.msg}); mend or "
                "remove it."
            ) from None
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{path} is not UTF-8 text ({error.reason}); save it as UTF-8."
            ) from None
    if not isinstance(samples, list):
        raise ValueError(
            f"{path} holds a {type(samples).__name__}, not a list of samples; give a LLaVA JSON "
            "file."
        )
    return samples


ROLES = {"human": "user", "gpt": "assistant", "system": "system"}


def _message(role: str, value: str, with_pictures: bool, id: str) -> dict[str, Any]:
    if role not in ROLES:
        raise ValueError(
            f"Record {id!r}: the role {role!r} is unknown; use one of {', '.join(ROLES)}."
        )
    content: list[dict] = []
    if with_pictures and role == "human":
        marks = value.count("<image>")
        content += [{"type": "image"}] * marks
        if marks:
            value = value.replace("<image>", "").strip()
    if value or not content:
        content.append({"type": "text", "text": value})
    return {"role": ROLES[role], "content": content}


__all__ = ["EncodedDataset", "LlavaSource", "Mixture", "Source", "build_source"]
