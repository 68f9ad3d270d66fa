"""How much each label of a record counts: every token alike, every record alike, or between them.

Easy to get wrong: the first token of a record is never foretold, so a label there counts nothing,
and the number of labels of a record is that of the others.
"""

from typing import Literal

import numpy as np

IGNORED = -100


def weights_of(labels: np.ndarray, kind: Literal["token", "sample", "sqrt"] | str) -> np.ndarray:
    """Weights of one record's labels: (T,) labels to (T,) float32.

    `token` gives each 1, `sample` 1 / labels of the record, `sqrt` 1 / sqrt(labels of the record).
    """
    power = {"token": 0.0, "sample": -1.0, "sqrt": -0.5}[kind]
    learnt = labels != IGNORED
    learnt[:1] = False
    count = max(int(learnt.sum()), 1)
    return np.where(learnt, np.float32(count**power), np.float32(0)).astype(np.float32)


__all__ = ["weights_of"]
