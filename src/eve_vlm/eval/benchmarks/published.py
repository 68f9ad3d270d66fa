"""Scores that others published, by benchmark and model, with where each was found.

`published.yaml` holds them, with notes on what they can and cannot be compared with.  Easy to get
wrong: these are numbers of papers and a web page; none was measured with this code.
"""

from functools import cache
from importlib.resources import files
from typing import Any

import yaml


def published_scores(benchmark: str) -> dict[str, float]:
    """{model: score} in the unit of our own score; empty for a task that is no public benchmark."""
    return {name: float(score) for name, (score, _) in _of(benchmark).items()}


def published_sources(benchmark: str) -> dict[str, str]:
    """{model: where its score was found}."""
    sources = _published()["sources"]
    return {name: sources[mark] for name, (_, mark) in _of(benchmark).items()}


def published_note(benchmark: str) -> str:
    """What a reader of these scores must know; empty if nothing."""
    return _published()["notes"].get(benchmark, "")


def _of(benchmark: str) -> dict[str, tuple[float, str]]:
    return _published()["scores"].get(benchmark, {})


@cache
def _published() -> dict[str, Any]:
    text = (files("eve_vlm.eval.benchmarks") / "published.yaml").read_text(encoding="utf-8")
    return yaml.safe_load(text)


__all__ = ["published_note", "published_scores", "published_sources"]
