"""Features of pictures for `spread`: the mean over patches of a frozen vision model, of length 1.

The models are those of `vision_encoder.py`, so EfficientNet-Lite0 works without a network and any
CLIP, SigLIP or DINOv2 with one.  Easy to get wrong: pictures are stretched to a square and not
cropped, since a crop could cut off what makes two pictures different.
"""

from collections.abc import Iterable
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from PIL import Image

from eve_vlm.curate.places import open_rows
from eve_vlm.curate.recipe import SpreadSection
from eve_vlm.curate.tasks import Task

if TYPE_CHECKING:
    import pyarrow as pa

FEATURES = "spread.features"


class _Model(NamedTuple):
    module: Any
    layer: int
    mean: Any  # (3, 1, 1)
    std: Any
    device: str


def make_features(rows: "pa.Table", task: Task) -> "pa.Table":
    """The features of every row: id and vector."""
    import pyarrow as pa

    section = task.recipe.spread
    assert section is not None, "the stage is left out without its section"
    model = _model(section.model, section.layer)
    vectors = []
    for batch in rows.to_batches(max_chunksize=section.batch_size):
        vectors.append(_features(open_rows(batch.to_pylist(), task.recipe.decode), model, section))
    width = vectors[0].shape[1] if vectors else 1
    flat = np.concatenate(vectors).ravel() if vectors else np.empty(0, np.float16)
    column = pa.FixedSizeListArray.from_arrays(pa.array(flat, pa.float16()), width)
    return pa.table({"id": rows["id"].combine_chunks(), "vector": column})


def vectors_of(table: "pa.Table") -> np.ndarray:
    """The vectors of a table as (rows, width) float32."""
    column = table["vector"].combine_chunks()
    width = column.type.list_size
    flat = column.flatten().to_numpy(zero_copy_only=False)
    return flat.astype(np.float32).reshape(-1, width)


def _features(pictures: Iterable[Image.Image], model: _Model, section: SpreadSection) -> np.ndarray:
    import torch

    from eve_vlm.vision_encoder import patch_features

    side = (section.image_size, section.image_size)
    pixels = np.stack([np.asarray(one.resize(side, Image.Resampling.BICUBIC)) for one in pictures])
    inputs = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255  # (I, 3, side, side)
    inputs = ((inputs - model.mean) / model.std).to(model.device)
    with torch.inference_mode():
        pooled = patch_features(model.module, inputs, model.layer).mean(1)  # (I, width)
    found = torch.nn.functional.normalize(pooled.float(), dim=-1)
    return found.cpu().numpy().astype(np.float16)


@lru_cache(maxsize=1)
def _model(name: str, layer: int) -> _Model:
    """The model, loaded once in a worker, on a GPU where the worker has one."""
    import torch

    from eve_vlm.vision_encoder import load_encoder, read_encoder

    facts = read_encoder(name, layer, role="vision model", key="spread")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    module = load_encoder(facts, role="vision model", key="spread").to(device)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (facts.mean, facts.std))
    return _Model(module, layer, mean, std, device)


__all__ = ["FEATURES", "make_features", "vectors_of"]
