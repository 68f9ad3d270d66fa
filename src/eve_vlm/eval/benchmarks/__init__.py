"""The public benchmarks: the ten of EVE's paper and eight that others report for EVE.

`build_benchmark` gives a task by name; nothing is read until its samples are asked for.
"""

from collections.abc import Mapping
from pathlib import Path

from .base import Benchmark
from .judge import Judge, judge_or_none, no_judge
from .judged import MathVista, MmVet
from .multiple_choice import Ai2d, MmBench, Mmmu, ScienceQa, SeedBench
from .presets import DEFAULT_PRESET, load_preset, preset_names
from .published import published_note, published_scores, published_sources
from .short_answer import ChartQa, Gqa, OcrBench, TextVqa, VizWiz, VqaV2
from .video import ActivityNetQa, MsrvttQa, MsvdQa
from .yes_no import Mme, Pope

KINDS: tuple[type[Benchmark], ...] = (
    *(VqaV2, Gqa, VizWiz, ScienceQa, TextVqa, Pope, Mme, MmBench, SeedBench, MmVet),
    *(OcrBench, MathVista, Mmmu, Ai2d, ChartQa, MsvdQa, MsrvttQa, ActivityNetQa),
)
_BY_NAME = {kind.name: kind for kind in KINDS}
BENCHMARKS: tuple[str, ...] = tuple(_BY_NAME)


def build_benchmark(
    name: str,
    *,
    data_root: Path | None = None,
    preset: str = DEFAULT_PRESET,
    judge: Judge | None = None,
    splits: Mapping[str, str] | None = None,
) -> Benchmark:
    """A benchmark by its name.

    Args:
        data_root: folder with data sets, each under its Hub id; None for the Hub's cache.
        preset: how it is asked.
        judge: for benchmarks that need one; without it they can be read and compared, not marked.
        splits: other splits than the preset's, by benchmark.

    Raises:
        ValueError: if there is no such benchmark or preset.
    """
    if name not in _BY_NAME:
        raise ValueError(f"There is no benchmark {name!r}; there are {', '.join(BENCHMARKS)}.")
    return _BY_NAME[name](
        load_preset(preset, name), root=data_root, split=(splits or {}).get(name), judge=judge
    )


__all__ = [
    "BENCHMARKS",
    "KINDS",
    "Benchmark",
    "Judge",
    "build_benchmark",
    "judge_or_none",
    "no_judge",
    "preset_names",
    "published_note",
    "published_scores",
    "published_sources",
]
