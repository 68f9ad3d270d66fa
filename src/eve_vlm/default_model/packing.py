"""`eve small pack`: from a finished run to the files that are shipped, and the model's card.

The card's numbers come from the results of `eve eval` and from the run itself, never from a text.
Easy to get wrong: scores belong to the model as it is shipped, whose change was cut and rounded,
so evaluate that (`eve eval` without a model), not the folder that training left.
"""

import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from tqdm.auto import tqdm

import eve_vlm
from eve_vlm.default_model.assembling import (
    DECODER,
    FACTS,
    NEW,
    SHIPPED,
    WEIGHTS,
    WHOLE,
    settings_of,
    weights_file,
)
from eve_vlm.default_model.card import write_card
from eve_vlm.default_model.difference import LIMIT, Difference, make_difference, sha256_of
from eve_vlm.default_model.examples import EXAMPLES, answered_examples
from eve_vlm.encoder_twin_eve import EveEncoderConfig
from eve_vlm.eval.tables import all_results
from eve_vlm.loading import load_config, load_model, load_processor
from eve_vlm.output_folder import new_folder, written_whole
from eve_vlm.versions import commit_of

RUN_FILE, RECIPE_FILE, VERSIONS_FILE = "run.json", "recipe.resolved.yaml", "versions.json"


class Packed(NamedTuple):
    """What was written."""

    folder: Path
    weights: Path
    difference: Difference | None
    """None for a whole model."""
    facts: dict[str, Any]


def pack(
    trained: Path,
    base: Path | None,
    stages: list[Path],
    *,
    out: Path = SHIPPED,
    limit: int = LIMIT,
    results: Path | None = None,
) -> Packed:
    """Writes the weights, what is known of them, and the card.

    Args:
        trained: a plain model folder.
        base: the model that training began with, whose decoder is not shipped; None ships the
            whole model.
        stages: folders of the run's stages, in their order.
        out: a folder; what it holds of an earlier model is replaced.
        limit: most bytes of the weights.
        results: a folder of `eve eval` whose scores the card shows.

    Raises:
        ValueError: if the run is not finished, the two models do not belong together, or the
            results are not whole, or a whole model is above the limit or cannot be asked about
            pictures here, because what draws them is not installed.
    """
    there = (trained / "config.json").is_file()
    if there and isinstance(load_config(trained).vision_config, EveEncoderConfig):
        raise ValueError(
            f"{trained} is an encoder-based twin, which is for comparison and not shipped; give "
            "the run that it is the twin of."
        )
    told = [_told(stage) for stage in stages]
    if results is not None:
        all_results(results)  # what is not whole is refused before the packing
    out.mkdir(parents=True, exist_ok=True)
    settings = settings_of(trained)
    commit = str(commit_of(Path(eve_vlm.__file__).parent))
    recipes = hashlib.sha256("".join(stage["recipe"] for stage in told).encode()).hexdigest()
    difference: Difference | None = None
    if base is None:
        shipped = _whole(trained, out, limit)
    else:
        notes = {"settings": json.dumps(settings), "commit": commit, "recipes": recipes}
        difference = make_difference(
            trained,
            base,
            out / WEIGHTS,
            notes=notes,
            limit=limit,
            progress=lambda names: tqdm(names, desc="packing", unit=" weights"),
        )
        shutil.rmtree(out / WHOLE, ignore_errors=True)
        shipped = {
            "decoder": DECODER,
            "kept": round(difference.kept, 6),
            "ranks": [
                min(difference.ranks.values(), default=0),
                max(difference.ranks.values(), default=0),
            ],
        }
    weights = weights_file(out)
    facts = {
        "sha256": sha256_of(weights),
        "bytes": weights.stat().st_size,
        **shipped,
        "vision": settings["vision"],
        "longest_edge": settings["longest_edge"],
        "commit": commit,
        "recipes": recipes,
        "recipe_folder": _recipe_folder(told[-1]),
        "stages": [{name: stage[name] for name in SHOWN} for stage in told],
    }
    with written_whole(out / FACTS) as part:
        part.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    for name in EXAMPLES:
        (out / f"{name}.png").unlink(missing_ok=True)
    # What is shipped is asked; a difference would have to be put on its decoder first.
    shown = answered_examples(out / WHOLE, out) if base is None else []
    write_card(out, facts, results=results, shown=shown)
    return Packed(out, weights, difference, facts)


def _whole(trained: Path, out: Path, limit: int) -> dict[str, Any]:
    """Writes the model without its aligner, which is for training alone; returns what is said."""
    model, processor = load_model(trained), load_processor(trained)
    size = sum(weight.numel() * weight.element_size() for weight in model.parameters())
    if size > limit:
        raise ValueError(
            f"{trained} has {size / 1e6:.1f} MB of weights, but {limit / 1e6:.1f} MB are allowed; "
            "train a narrower decoder."
        )
    model.config.alignment_config = None
    shutil.rmtree(out / WHOLE, ignore_errors=True)
    with new_folder(out / WHOLE) as folder:
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
        for file in folder.iterdir():
            file.chmod(0o644)  # safetensors writes 0600, which others cannot read
    (out / WEIGHTS).unlink(missing_ok=True)
    text = model.config.get_text_config()
    return {
        "decoder": NEW,
        "parameters": model.num_parameters(),
        "layers": text.num_hidden_layers,
        "width": text.hidden_size,
    }


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


def _recipe_folder(stage: Mapping[str, Any]) -> str:
    """Where the package's recipes of this name lie: `eve_small_cpu` of `eve-small-cpu-finetune`."""
    name = str(yaml.safe_load(stage["recipe"])["name"])
    return name.removesuffix(f"-{stage['name']}").replace("-", "_")


__all__ = ["Packed", "pack"]
