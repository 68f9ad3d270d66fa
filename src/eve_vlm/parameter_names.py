"""Parameters of a model by their names: all names of each, globs over them, and Muon's matrices.

Training chooses by these what learns and how, and `eve fits` counts the same without training.
Easy to get wrong: tied weights are one parameter with several names, and any of them may be meant.
"""

from collections.abc import Iterable
from fnmatch import fnmatchcase

from torch import nn


def names_of(model: nn.Module) -> dict[nn.Parameter, list[str]]:
    """Every parameter with all its names; tied weights have more than one."""
    names: dict[nn.Parameter, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(parameter, []).append(name)
    return names


def matches_any(names: Iterable[str], globs: Iterable[str]) -> bool:
    """Whether any of the names fits any of the globs."""
    return any(fnmatchcase(name, glob) for glob in globs for name in names)


def hidden_matrices(model: nn.Module) -> dict[nn.Parameter, list[str]]:
    """What Muon can move, with all names: matrices that learn, word embeddings and head aside.

    A step moves few rows of those two, so Muon is not for them.
    """
    words = {
        parameter
        for path, module in model.named_modules()
        if isinstance(module, nn.Embedding) or path.endswith("lm_head")
        for parameter in module.parameters(recurse=False)
    }
    return {
        parameter: names
        for parameter, names in names_of(model).items()
        if parameter.requires_grad and parameter.ndim == 2 and parameter not in words
    }


__all__ = ["hidden_matrices", "matches_any", "names_of"]
