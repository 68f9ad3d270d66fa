"""How much each label of a record counts in the language loss.

The loss is sum(weight x cross-entropy) / sum(weights), so what is equal in the sum counts equally:
tokens, records, or in between.  Easy to get wrong: the first label of a record is never learnt,
because no word of the record comes before it to be its prediction's place.
"""

import numpy as np

from eve_vlm.data.encode import IGNORED


def weights_of(labels: np.ndarray, kind: str) -> np.ndarray:
    """Weights of one record's labels: (T,) integers to (T,) float32, 0 where nothing is learnt.

    Args:
        labels: of one record alone, not of a row of several.
        kind: `token`: every label counts 1; `sample`: those of a record add up to 1; `sqrt`: they
            add up to the square root of their number.

    >>> weights_of(np.array([7, -100, 7, 7, 7, 7]), "sqrt").tolist()
    [0.0, 0.0, 0.5, 0.5, 0.5, 0.5]
    """
    learnt = labels != IGNORED
    learnt[:1] = False
    count = max(1, int(learnt.sum()))
    return learnt * np.float32({"token": 1.0, "sample": 1 / count, "sqrt": count**-0.5}[kind])


__all__ = ["weights_of"]
