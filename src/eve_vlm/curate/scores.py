"""The stage `score`: models that the user names look at every picture, and high scores are dropped.

Any image classification model of transformers will do: one that knows NSFW pictures, one that knows
watermarks.  Every score stays in the rows, so a limit can be chosen from the histogram.  Easy to
get wrong: the label must be one of the model's; a misspelt one would score nothing and keep all.
"""

from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from eve_vlm.curate.blocks import with_reasons
from eve_vlm.curate.places import open_rows
from eve_vlm.curate.recipe import ScoreSection
from eve_vlm.curate.tasks import Task
from eve_vlm.errors import first_line

if TYPE_CHECKING:
    import pyarrow as pa


def drop_high_scores(rows: "pa.Table", task: Task) -> "pa.Table":
    """The rows with a column for each score, each with why it is dropped or None."""
    import pyarrow as pa

    why: list[str | None] = [None] * len(rows)
    because: list[str | None] = [None] * len(rows)
    for section in task.recipe.scores:
        scores = _scores(rows, section, task)
        for place, score in enumerate(scores.tolist()):
            if score > section.most and why[place] is None:
                why[place] = f"{section.name} score"
                because[place] = f"{score:.3f} against {section.most:g}"
        shares = [f"{int(10 * min(score, 0.999))} tenths" for score in scores.tolist()]
        task.counts[f"{section.name} score"].update(shares)
        rows = rows.append_column(f"score_{section.name}", pa.array(scores, pa.float32()))
    return with_reasons(rows, why, because)


def _scores(rows: "pa.Table", section: ScoreSection, task: Task) -> np.ndarray:
    """The probability of the label for each row."""
    classify = _classifier(section.model, section.label)
    found = []
    for batch in rows.to_batches(max_chunksize=section.batch_size):
        pictures = list(open_rows(batch.to_pylist(), task.recipe.decode))
        answers = classify(pictures, batch_size=len(pictures), top_k=None)
        found += [
            next(one["score"] for one in answer if one["label"] == section.label)
            for answer in answers
        ]
    return np.array(found, np.float32)


@lru_cache(maxsize=4)
def _classifier(model: str, label: str) -> Any:
    """The model, loaded once in a worker, on a GPU where the worker has one.

    Raises:
        ValueError: if it cannot be loaded, or has no such label.
    """
    import torch
    from transformers import pipeline

    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        loaded = pipeline("image-classification", model=model, device=device)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"The model {model!r} of scores cannot be loaded ({first_line(error)}); give the "
            "folder or name of a Hugging Face image classification model."
        ) from None
    labels = sorted(loaded.model.config.id2label.values())
    if label not in labels:
        raise ValueError(
            f"The model {model!r} of scores has no label {label!r}; give one of "
            f"{', '.join(labels)}."
        )
    return loaded


__all__ = ["drop_high_scores"]
