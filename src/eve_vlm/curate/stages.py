"""The table of stages: what a curation does, in order, and what each result depends on.

A stage is data: its name, a line, its steps (functions over a unit's rows), and the settings that
its results depend on.  Easy to get wrong: `settings` must name all that changes results and nothing
else, or a resumed run would keep stale results, or throw good ones away.
"""

from dataclasses import asdict
from typing import Any

from eve_vlm.curate import (
    captions,
    duplicates,
    endpoint,
    features,
    fetching,
    filters,
    looking,
    recaption,
    scores,
    shards,
    sources,
    spread,
)
from eve_vlm.curate.recipe import CurateRecipe
from eve_vlm.curate.tasks import Stage, Step

READ, LISTED, FILES = "read", "read.inputs", "read.files"


def _block(name: str, work: Any, **settings: Any) -> Step:
    return Step(name=name, over="blocks", work=work, **settings)


def _read(recipe: CurateRecipe) -> Any:
    return [asdict(source) for source in recipe.sources], recipe.block


def _section(name: str) -> Any:
    def settings(recipe: CurateRecipe) -> Any:
        return asdict(getattr(recipe, name))

    return settings


def _scores(recipe: CurateRecipe) -> Any:
    return [_without(section, "batch_size") for section in recipe.scores]


def _spread(recipe: CurateRecipe) -> Any:
    return recipe.seed, _without(recipe.spread, "batch_size")


def _recaption(recipe: CurateRecipe) -> Any:
    return endpoint.settings_of(recipe.recaption) if recipe.recaption else None


def _without(section: Any, *names: str) -> dict[str, Any]:
    """A section as a dictionary, without what changes no result."""
    return {name: value for name, value in asdict(section).items() if name not in names}


def _has(name: str) -> Any:
    def wanted(recipe: CurateRecipe) -> bool:
        return bool(getattr(recipe, name))

    return wanted


STAGES: tuple[Stage, ...] = (
    Stage(
        name=READ,
        what="list the pictures of all sources",
        steps=(
            Step(name=LISTED, over="once", work=sources.list_inputs),
            Step(name=FILES, over="inputs", work=sources.list_pictures),
        ),
        settings=_read,
    ),
    Stage(
        name="fetch",
        what="fetch what is named by URL",
        steps=(_block("fetch", fetching.fetch),),
        settings=fetching.settings_of,
        wanted=lambda recipe: any(source.kind == "urls" for source in recipe.sources),
    ),
    Stage(
        name="decode",
        what="open every picture, check and measure it",
        steps=(_block("decode", looking.look),),
        settings=_section("decode"),
    ),
    Stage(
        name="filter",
        what="drop small, thin, blank and text-heavy pictures",
        steps=(_block("filter", filters.keep_good),),
        settings=_section("filter"),
    ),
    Stage(
        name="duplicates",
        what="keep one of equal files and alike pictures",
        steps=(
            _block(duplicates.KEYS, duplicates.file_keys),
            Step(
                name=duplicates.PAIRS,
                over="buckets",
                work=duplicates.find_pairs,
                reads=duplicates.KEYS,
            ),
            _block("duplicates", duplicates.drop_duplicates),
        ),
        settings=_section("duplicates"),
        wanted=_has("duplicates"),
    ),
    Stage(
        name="score",
        what="drop pictures that models of the recipe score too high",
        steps=(_block("score", scores.drop_high_scores),),
        settings=_scores,
        wanted=_has("scores"),
    ),
    Stage(
        name="spread",
        what="keep the nearest pictures to each of many centres",
        steps=(
            _block(features.FEATURES, features.make_features),
            Step(name=spread.CENTRES, over="once", work=spread.find_centres),
            _block(spread.PLACES, spread.place_pictures, reads=features.FEATURES),
            Step(
                name=spread.NEAREST, over="buckets", work=spread.keep_nearest, reads=spread.PLACES
            ),
            _block("spread", spread.drop_far),
        ),
        settings=_spread,
        wanted=_has("spread"),
    ),
    Stage(
        name="recaption",
        what="write a new caption for every picture",
        steps=(_block("recaption", recaption.recaption),),
        settings=_recaption,
        wanted=_has("recaption"),
    ),
    Stage(
        name="captions",
        what="drop captions that repeat, stop half-way, refuse or are alien",
        steps=(_block("captions", captions.keep_good_captions),),
        settings=_section("captions"),
    ),
    Stage(
        name="write",
        what="write shards and the manifest",
        steps=(Step(name="write", over="shards", work=shards.write_shard),),
        settings=_section("write"),
    ),
)


def stages_of(recipe: CurateRecipe) -> list[Stage]:
    """The stages that a recipe has, in order."""
    return [stage for stage in STAGES if stage.wanted(recipe)]


def find_step(recipe: CurateRecipe, name: str) -> Step:
    """A step by its name."""
    return next(step for stage in stages_of(recipe) for step in stage.steps if step.name == name)


__all__ = ["FILES", "LISTED", "READ", "STAGES", "find_step", "stages_of"]
