"""What is trained for the paper's claims: a table of variants, and the stages of each.

A variant is the tiny recipes with a few values changed.  Variants that begin alike share their
first stages: a stage is known by the digest of its own recipe and of all before it, so what two
claims need is trained once, and a finished stage is kept until something that it learnt from
changes.

Easy to get wrong: every variant of a seed starts from the same decoder, so that differences between
variants can be paired by seed; what only one variant changes must not reach the language stage.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from eve_vlm.train.recipe import load_recipe
from eve_vlm.train.sections import Recipe

STAGES = ("language", "prealign", "pretrain", "finetune")
PICTURE_STAGES = STAGES[1:]
LANGUAGE_OF_NOBODY = 1  # steps after which a decoder still is what its seed made it
NAMES = ("name", "output_dir")  # keys that say where, not what
LOGGING_STEPS = 10  # or all, where a stage has fewer
DIGITS = 12  # of a digest in the name of a folder


@dataclass(frozen=True, kw_only=True, slots=True)
class Variant:
    """One way to train."""

    name: str
    """Names its results."""
    title: str
    """What it is, for tables and figures."""
    stages: tuple[str, ...] = PICTURE_STAGES
    """Stages behind the language stage."""
    data: float = 1.0
    """Steps of the pretrain stage, and so its samples, as a share of the recipe's."""
    overrides: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """Stage to values that differ from its recipe."""
    twin: bool = False
    """Whether it is the encoder-based twin."""
    without: tuple[str, ...] = ()
    """Attentions of the patch embedding that are switched off."""
    new_decoder: bool = False
    """Whether its decoder never learnt a language."""
    scored: bool = True
    """Whether it is asked questions; else only its losses count."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Stage:
    """One stage of a variant with one seed."""

    name: str
    """The stage."""
    recipe: Recipe
    """All of it, with its folders."""
    digest: str
    """Of its recipe and of all stages before it."""
    before: str | None
    """Digest of the stage that it starts from."""
    without: tuple[str, ...] = ()
    """Attentions that the stage before still has."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """One variant with one seed."""

    variant: Variant
    """What is trained."""
    seed: int
    """Of data, weights and order."""
    scale: float
    """Share of the steps of the recipes."""
    questions: int
    """Questions of each family that it is asked."""
    stages: tuple[Stage, ...]
    """In order, the language stage first."""

    @property
    def name(self) -> str:
        """Names its results."""
        return f"{self.variant.name}-s{self.seed}"

    @property
    def digest(self) -> str:
        """Of everything that decides its results."""
        return _digest([self.stages[-1].digest, self.questions if self.variant.scored else 0])


def run_of(
    variant: Variant, seed: int, *, work: Path, scale: float = 1.0, questions: int = 200
) -> Run:
    """The stages of a variant with a seed, with folders below `work`.

    Raises:
        ValueError: if an override does not fit its recipe.
    """
    made: list[Stage] = []
    for name in ("language", *variant.stages):
        steps = scale * (variant.data if name == "pretrain" else 1.0)
        made.append(_stage(variant, name, seed, steps, work, made[-1] if made else None))
    return Run(variant=variant, seed=seed, scale=scale, questions=questions, stages=tuple(made))


def _stage(
    variant: Variant, name: str, seed: int, steps: float, work: Path, before: Stage | None
) -> Stage:
    folder = "tiny_twin" if variant.twin and before is not None else "tiny"
    shipped = f"{folder}/{STAGES.index(name)}_{name}"
    max_steps = max(1, round(_steps_of(shipped) * steps))
    if name == "language" and variant.new_decoder:
        max_steps = LANGUAGE_OF_NOBODY
    values = [f"seed={seed}", f"training.max_steps={max_steps}"]
    values.append(f"training.logging_steps={min(LOGGING_STEPS, max_steps)}")
    if before is not None:
        values += [f"model.vision.{attention}=false" for attention in variant.without]
        values += variant.overrides.get(name, ())
    recipe = load_recipe(shipped, values)
    first = before is not None and before.before is None
    without = variant.without if first else ()
    digest = _digest([_what(recipe), None if before is None else before.digest])
    start = None
    if before is not None:
        start = work / (f"{digest[:DIGITS]}-start" if without else before.digest[:DIGITS])
    placed = replace(
        recipe,
        output_dir=str(work / digest[:DIGITS]),
        model=replace(recipe.model, init_from=None if start is None else str(start)),
    )
    return Stage(
        name=name,
        recipe=placed,
        digest=digest,
        before=None if before is None else before.digest,
        without=without,
    )


@lru_cache
def _steps_of(shipped: str) -> int:
    return load_recipe(shipped).training["max_steps"]


def _what(recipe: Recipe) -> dict[str, Any]:
    """A recipe without its folders, and without what only makes it faster.

    Keys that came later are left out too, where they say what was so before: results of then are
    still known.
    """
    values = asdict(recipe)
    values["model"]["init_from"] = None
    del values["model"]["record_layers"]
    if not values["stage"]["muon"]:
        del values["stage"]["muon"]
    return {name: value for name, value in values.items() if name not in NAMES}


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


# --- the table ------------------------------------------------------------------------------------

# The globs of prealign name the aligner, which is not there without alignment.
_NO_ALIGNMENT = {
    "prealign": (
        "stage.alignment=null",
        'stage.trainable=["model.vision_tower.*", "model.multi_modal_projector.*"]',
        'stage.learning_rates={"*": 2.0e-3}',
    ),
    "pretrain": ("stage.alignment=null",),
}


def _taps(every: str) -> dict[str, tuple[str, ...]]:
    value = f"stage.alignment.tap_every={every}"
    return {"prealign": (value,), "pretrain": (value,)}


def _shapes(square: str) -> dict[str, tuple[str, ...]]:
    """Pictures of four shapes, and what is done to make them square."""
    scenes = "[[112, 112], [84, 112], [112, 84]]"
    single = "[[112, 112], [56, 112], [112, 56], [84, 112], [112, 84]]"
    at = "data.sources.{}.options"
    values = {
        "prealign": [(0, "single_canvases", "[[56, 56], [28, 56], [56, 28]]")],
        "pretrain": [(0, "canvases", scenes), (0, "single_canvases", single)],
        "finetune": [
            (0, "single_canvases", single),
            (1, "canvases", scenes),
            (2, "canvases", scenes),
        ],
    }
    return {
        stage: (
            *(f"{at.format(place)}.settings.{key}={value}" for place, key, value in rows),
            *(f"{at.format(place)}.square={square}" for place in {place for place, _, _ in rows}),
        )
        for stage, rows in values.items()
    }


_LOW = ("model.image.longest_edge=56",)
_WITHOUT_FIRST = ("pretrain", "finetune")

VARIANTS: dict[str, Variant] = {
    variant.name: variant
    for variant in (
        Variant(name="base", title="as the recipes are"),
        # Table 5 and figure 5.
        Variant(name="none", title="no stage 1", stages=_WITHOUT_FIRST),
        Variant(
            name="none_long", title="no stage 1, twice the data", stages=_WITHOUT_FIRST, data=2
        ),
        Variant(name="only", title="stage 1 only", stages=("prealign", "finetune")),
        Variant(name="long", title="stages 1 and 2, twice the data", data=2),
        Variant(
            name="scratch",
            title="from scratch, twice the data",
            stages=("pretrain",),
            data=2,
            new_decoder=True,
            scored=False,
        ),
        # Table 4 and figure 8.
        Variant(name="few", title="a quarter of the data", data=0.25),
        Variant(
            name="few_no_alignment",
            title="no alignment, a quarter of the data",
            data=0.25,
            overrides=_NO_ALIGNMENT,
        ),
        Variant(name="no_alignment", title="no alignment", overrides=_NO_ALIGNMENT),
        Variant(
            name="long_no_alignment",
            title="no alignment, twice the data",
            data=2,
            overrides=_NO_ALIGNMENT,
        ),
        # Figure 6; the recipes tap every second layer.
        Variant(name="tap_last", title="last layer only", overrides=_taps("null")),
        Variant(name="tap_4", title="every fourth layer", overrides=_taps("4")),
        Variant(name="tap_1", title="every layer", overrides=_taps("1")),
        # Table 4.
        Variant(name="no_ca1", title="no local attention", without=("merge_attention",)),
        Variant(name="no_ca2", title="no class attention", without=("class_attention",)),
        # Figure 7.
        Variant(name="few_twin", title="twin, a quarter of the data", data=0.25, twin=True),
        Variant(name="twin", title="encoder-based twin", twin=True),
        Variant(name="long_twin", title="twin, twice the data", data=2, twin=True),
        # Pictures of four shapes.
        Variant(name="any_ratio", title="any shape", overrides=_shapes("null")),
        Variant(name="padded", title="padded to squares", overrides=_shapes("pad")),
        Variant(name="squeezed", title="squeezed to squares", overrides=_shapes("squeeze")),
        # Table 5, the rows HD: twice the edge is four times the cells.
        Variant(
            name="low", title="56 pixels to the end", overrides={"pretrain": _LOW, "finetune": _LOW}
        ),
        Variant(name="high_last", title="112 pixels in stage 3", overrides={"pretrain": _LOW}),
    )
}


def runs_of(
    names: Sequence[str], seeds: Sequence[int], *, work: Path, scale: float, questions: int
) -> list[Run]:
    """Every named variant with every seed; all of one seed before the next."""
    return [
        run_of(VARIANTS[name], seed, work=work, scale=scale, questions=questions)
        for seed in seeds
        for name in names
    ]


__all__ = ["DIGITS", "STAGES", "VARIANTS", "Run", "Stage", "Variant", "run_of", "runs_of"]
