"""`eve small pack`: from a finished run to the files that are shipped, and the model's card.

The card's numbers come from the results of `eve eval` and from the run itself, never from a text.
Easy to get wrong: scores belong to the model as it is shipped, whose change was cut and rounded,
so evaluate that (`eve eval` without a model), not the folder that training left.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from tqdm.auto import tqdm

import eve_vlm
from eve_vlm.default_model.assembling import FACTS, SHIPPED, WEIGHTS, settings_of
from eve_vlm.default_model.card import write_card
from eve_vlm.default_model.difference import LIMIT, Difference, make_difference
from eve_vlm.encoder_twin_eve import EveEncoderConfig
from eve_vlm.eval.tables import all_results
from eve_vlm.loading import load_config
from eve_vlm.output_folder import written_whole
from eve_vlm.versions import commit_of

RUN_FILE, RECIPE_FILE, VERSIONS_FILE = "run.json", "recipe.resolved.yaml", "versions.json"


class Packed(NamedTuple):
    """What was written."""

    folder: Path
    difference: Difference
    facts: dict[str, Any]


def pack(
    trained: Path,
    base: Path,
    stages: list[Path],
    *,
    out: Path = SHIPPED,
    limit: int = LIMIT,
    results: Path | None = None,
) -> Packed:
    """Writes the weights, what is known of them, and the card.

    Args:
        trained: a plain model folder.
        base: the model that training began with.
        stages: folders of the run's stages, in their order.
        out: a folder; what it holds of an earlier model is replaced.
        limit: most bytes of the weights.
        results: a folder of `eve eval` whose scores the card shows.

    Raises:
        ValueError: if the run is not finished, the two models do not belong together, or the
            results are not whole.
    """
    told = [_told(stage) for stage in stages]
    if isinstance(load_config(trained).vision_config, EveEncoderConfig):
        raise ValueError(
            f"{trained} is an encoder-based twin, which is for comparison and not shipped; give "
            "the run that it is the twin of."
        )
    if results is not None:
        all_results(results)  # what is not whole is refused before the packing
    settings = settings_of(trained)
    notes = {
        "settings": json.dumps(settings),
        "commit": str(commit_of(Path(eve_vlm.__file__).parent)),
        "recipes": hashlib.sha256("".join(stage["recipe"] for stage in told).encode()).hexdigest(),
    }
    made = make_difference(
        trained,
        base,
        out / WEIGHTS,
        notes=notes,
        limit=limit,
        progress=lambda names: tqdm(names, desc="packing", unit=" weights"),
    )
    facts = {
        "sha256": made.sha256,
        "bytes": made.bytes,
        "kept": round(made.kept, 6),
        "ranks": [min(made.ranks.values(), default=0), max(made.ranks.values(), default=0)],
        "vision": settings["vision"],
        "longest_edge": settings["longest_edge"],
        "commit": notes["commit"],
        "recipes": notes["recipes"],
        "stages": [{name: stage[name] for name in SHOWN} for stage in told],
    }
    with written_whole(out / FACTS) as part:
        part.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    write_card(out, facts, results=results)
    return Packed(out, made, facts)


SHOWN = ("name", "steps", "records", "seconds", "device", "commit")


def _told(stage: Path) -> Mapping[str, Any]:
    """What a finished stage says of itself."""
    try:
        run = json.loads((stage / RUN_FILE).read_text(encoding="utf-8"))
        versions = json.loads((stage / VERSIONS_FILE).read_text(encoding="utf-8"))
        recipe = (stage / RECIPE_FILE).read_text(encoding="utf-8")
    except (OSError, ValueError):
        raise ValueError(
            f"{stage} is no finished stage; run `eve small train` again, which goes on with it."
        ) from None
    return {
        "name": stage.name,
        "steps": run["steps"],
        "records": run["records"],
        "seconds": round(run["seconds"]),
        "device": versions["device"],
        "commit": versions["commit"],
        "recipe": recipe,
    }


__all__ = ["Packed", "pack"]
