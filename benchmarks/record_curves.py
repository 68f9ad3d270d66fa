"""Records the losses of the tiny stages, which `eve compare-run` puts beside a run.

    python benchmarks/record_curves.py                  # three seeds, half an hour on two cores
    python benchmarks/record_curves.py --seeds 0 1 --runs runs/curves

Trains the four recipes of `recipes/tiny` one after the other for every seed and writes what they
logged to `recipes/tiny/curves.json`. A stage that is already complete in the folder of the runs is
read, not trained again. To be run again whenever a tiny recipe, the order of its records or the
loss changes; the commit then shows old and new curves.

Easy to get wrong: a single seed has no spread, and without it nothing can be said to differ.
"""

import argparse
import json
import platform
import time
from pathlib import Path

import torch
import transformers

from eve_vlm.train.curves import CURVES_FILE, loss_terms
from eve_vlm.train.recipe import load_recipe, recipes_folder
from eve_vlm.train.run import finished_run, train

STAGES = ("0_language", "1_prealign", "2_pretrain", "3_finetune")
DIGITS = 4


def record(seed: int, folder: Path) -> dict[str, dict]:
    """Name of the recipe to what one seed logged: steps, and every loss term."""
    curves, before = {}, None
    for stage in STAGES:
        output = folder / f"seed-{seed}" / stage
        overrides = [f"output_dir={output}", f"seed={seed}"]
        if before is not None:
            overrides.append(f"model.init_from={before}")
        recipe = load_recipe(f"tiny/{stage}", overrides)
        result = finished_run(recipe) or train(recipe, resume=True)
        curves[recipe.name] = {
            "steps": [entry["step"] for entry in result.losses],
            "seed": seed,
            "terms": {
                name: [round(value, DIGITS) for value in values]
                for name, values in loss_terms(result.losses).items()
            },
        }
        before = output
    return curves


def main() -> None:
    """Trains, or reads, every seed and writes the file of curves."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--runs", type=Path, default=Path("runs/curves"))
    parser.add_argument("--to", type=Path, default=recipes_folder() / "tiny" / CURVES_FILE)
    options = parser.parse_args()
    started = time.perf_counter()
    seen = [record(seed, options.runs) for seed in options.seeds]
    recipes = {
        name: {
            "steps": first["steps"],
            "runs": [
                {"seed": curves[name]["seed"], "terms": curves[name]["terms"]} for curves in seen
            ],
        }
        for name, first in seen[0].items()
    }
    about = {
        "command": "python benchmarks/record_curves.py --seeds "
        + " ".join(map(str, options.seeds)),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }
    lines = ['{"recorded": ' + json.dumps(about) + ",", ' "recipes": {']
    for number, (name, curve) in enumerate(recipes.items()):
        end = "," if number < len(recipes) - 1 else ""
        lines.append(f"  {json.dumps(name)}: {json.dumps(curve)}{end}")
    options.to.write_text("\n".join([*lines, "}}"]) + "\n", encoding="utf-8")
    print(f"{options.to}: {len(seen)} seeds, {time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
