"""The manifest of a finished set: its shards with checksums, its licences, and how it was made.

Whoever gets the set can check it with this file alone.  Easy to get wrong: it is written when every
shard stands and not before, so a folder without a manifest is a set that is not finished.
"""

import dataclasses
import importlib.metadata
import json
from collections import Counter
from pathlib import Path
from typing import Any

from eve_vlm.curate.blocks import ENDING, read_unit
from eve_vlm.curate.ledger import WORK
from eve_vlm.curate.recipe import CurateRecipe
from eve_vlm.curate.shards import SHARDS
from eve_vlm.output_folder import written_whole

MANIFEST = "manifest.json"


def write_manifest(recipe: CurateRecipe, folder: Path) -> dict[str, Any]:
    """Writes the manifest of the shards that stand, and removes shards of earlier settings."""
    lines = []
    for file in sorted((folder / WORK / "write").glob(f"*{ENDING}")):
        lines += read_unit(file).to_pylist()
    licences: Counter[str] = Counter()
    for line in lines:
        line["licences"] = json.loads(line["licences"])
        licences.update(line["licences"])
    manifest = {
        "name": recipe.name,
        "records": sum(line["records"] for line in lines),
        "licences": dict(licences),
        "form": recipe.write.form,
        "shards": lines,
        "made_with": {name: importlib.metadata.version(name) for name in ("eve-vlm", "pyarrow")},
        "recipe": dataclasses.asdict(recipe),
    }
    with written_whole(folder / MANIFEST) as part:
        part.write_text(json.dumps(manifest, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    named = {line["file"] for line in lines}
    for file in (folder / SHARDS).glob("*"):
        if f"{SHARDS}/{file.name}" not in named:
            file.unlink()
    return manifest


__all__ = ["MANIFEST", "write_manifest"]
