"""Presets: which split of which data set is asked in which words, frozen and read by name.

`presets.yaml` is the text; `load_preset` gives what it says of one benchmark.  Easy to get wrong:
the digest is made of what decides the asking of this one benchmark, and not of the file, so that a
new preset, or a mended remark, does not make old results stale.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cache
from importlib.resources import files
from string import ascii_uppercase
from typing import Any

import yaml

DEFAULT_PRESET = "published@1"


@dataclass(frozen=True, kw_only=True, slots=True)
class Preset:
    """How one benchmark is asked; `presets.yaml` says what the fields mean."""

    name: str
    """Of the preset, with its version."""
    benchmark: str
    data: str
    """Id of the data set on the Hub, or the folder that it has in the field."""
    split: str
    prompt: str
    max_new_tokens: int
    source: str
    config: str = ""
    pictures_config: str = ""
    """Where pictures have a table of their own."""
    option: str = ""
    hint: str = ""
    open: str = ""
    remove: str = ""
    frames: int = 0

    @property
    def text(self) -> str:
        """All that decides the asking, as it goes into results; no names, no remarks.

        What is unset is left out, so that a new field leaves old digests as they are.
        """
        said = {
            name: value
            for name, value in asdict(self).items()
            if value and name not in ("name", "source")
        }
        return json.dumps(said, ensure_ascii=False, sort_keys=True)

    @property
    def digest(self) -> str:
        """Of the text."""
        return hashlib.sha256(self.text.encode()).hexdigest()[:16]

    def words(
        self, question: str, *, options: tuple[str, ...] = (), hint: str = "", ocr: str = ""
    ) -> str:
        """The prompt for one question."""
        template = self.open if self.open and not options else self.prompt
        lines = [
            self.option.format(letter=letter, text=text)
            for letter, text in zip(ascii_uppercase, options, strict=False)
        ]
        if self.remove:
            question = question.replace(self.remove, "")
        return template.format(
            question=question.strip(),
            options="\n".join(lines),
            hint=self.hint.format(hint=hint) if hint else "",
            ocr=ocr,
        )


def load_preset(name: str, benchmark: str) -> Preset:
    """What a preset says of a benchmark.

    Raises:
        ValueError: if there is no such preset.
    """
    there = _presets()
    if name not in there:
        raise ValueError(f"There is no preset {name!r}; there are {', '.join(sorted(there))}.")
    return Preset(name=name, benchmark=benchmark, **_said_of(benchmark, there[name]))


def preset_names() -> list[str]:
    """All presets."""
    return list(_presets())


def _said_of(benchmark: str, preset: Mapping[str, Any]) -> dict[str, Any]:
    below = _presets()[preset["extends"]] if "extends" in preset else {}
    inherited = _said_of(benchmark, below) if below else {}
    return inherited | preset["benchmarks"].get(benchmark, {})


@cache
def _presets() -> dict[str, Any]:
    text = (files("eve_vlm.eval.benchmarks") / "presets.yaml").read_text(encoding="utf-8")
    return yaml.safe_load(text)


__all__ = ["DEFAULT_PRESET", "Preset", "load_preset", "preset_names"]
