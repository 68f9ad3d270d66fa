"""Which parameters of a model learn, at which rate and with which weight decay.

A stage names parameters by globs, and a glob that matches nothing is an error: a mistyped name
would otherwise freeze a part of the model for days without a word.

Easy to get wrong: tied weights are one parameter with two names. It is trained if either name is
chosen, its learning rate is that of the first glob that matches either, and it is counted once.
"""

import difflib
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from typing import NamedTuple

from torch import nn

from eve_vlm.encoder_twin_eve import encoder_parameters
from eve_vlm.parameter_names import hidden_matrices, matches_any, names_of
from eve_vlm.quantization import count_weights
from eve_vlm.train.sections import StageSection

TOWER = "model.vision_tower."
NORM_TYPES = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.modules.batchnorm._NormBase)


class ParameterSetting(NamedTuple):
    """One trainable parameter with what the optimizer does to it."""

    name: str
    parameter: nn.Parameter
    learning_rate: float
    weight_decay: float
    muon: bool
    """Moved by Muon: a matrix that `stage.muon` names."""


def select_trainable(model: nn.Module, stage: StageSection) -> list[str]:
    """Freeze everything except what `stage.trainable` names; returns the trainable names.

    Raises:
        ValueError: If a glob matches no parameter.
    """
    names = names_of(model)
    everything = [alias for aliases in names.values() for alias in aliases]
    require_matches(stage.trainable, everything, key="stage.trainable", kind="parameter")
    require_frozen_encoder(model, stage.trainable)
    chosen = []
    for name, parameter in model.named_parameters():
        learns = matches_any(names[parameter], stage.trainable)
        parameter.requires_grad_(learns)
        if learns:
            chosen.append(name)
    return chosen


def require_frozen_encoder(model: nn.Module, globs: Iterable[str]) -> None:
    """Refuses globs that would train the encoder of a twin.

    Raises:
        ValueError: with the glob, and what to name instead.
    """
    frozen = set(encoder_parameters(model))
    names = names_of(model)
    fixed = [alias for parameter in frozen for alias in names[parameter]]
    for glob in globs:
        if matches_any(fixed, [glob]):
            parts = {
                ".".join(alias.split(".")[:-1][:2]) + ".*"
                for parameter, aliases in names.items()
                if parameter not in frozen and not aliases[0].startswith(TOWER)
                for alias in aliases[:1]
            }
            instead = ", ".join([f"{TOWER}row_end_embedding", *sorted(parts, reverse=True)])
            raise ValueError(
                f"stage.trainable: the glob {glob!r} would train the encoder of model.encoder, "
                f"which stays frozen; name the other parts ({instead})"
            )


def optimizer_groups(model: nn.Module, stage: StageSection) -> list[dict]:
    """Split the trainable parameters into groups of equal learning rate and weight decay.

    Each group is `{"params", "names", "lr", "weight_decay"}`, in a stage with `muon` also `muon`,
    and can be handed to any torch optimizer. Every trainable parameter is in exactly one group.

    Raises:
        ValueError: If a glob is idle or a trainable parameter has no learning rate.
    """
    groups: dict[tuple[float, float, bool], dict] = {}
    settings = parameter_settings(model, stage)
    for name, parameter, rate, decay, muon in settings:
        empty = {"params": [], "names": [], "lr": rate, "weight_decay": decay}
        empty |= {"muon": muon} if stage.muon else {}
        group = groups.setdefault((rate, decay, muon), empty)
        group["params"].append(parameter)
        group["names"].append(name)
    grouped = [id(parameter) for group in groups.values() for parameter in group["params"]]
    trainable = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    assert len(grouped) == len(set(grouped)) and set(grouped) == trainable
    return list(groups.values())


def parameter_settings(model: nn.Module, stage: StageSection) -> list[ParameterSetting]:
    """Learning rate and weight decay of every trainable parameter, in the order of the model."""
    names = names_of(model)
    trainable = {
        parameter: aliases for parameter, aliases in names.items() if parameter.requires_grad
    }
    learning = [alias for aliases in trainable.values() for alias in aliases]
    globs = list(stage.learning_rates)
    require_matches(globs, learning, key="stage.learning_rates", kind="trainable parameter")
    _require_first_matches(globs, learning)
    everything = [alias for aliases in names.values() for alias in aliases]
    require_matches(stage.no_decay, everything, key="stage.no_decay", kind="parameter")
    plain, hidden = _parameters_without_decay(model), hidden_matrices(model)
    matrices = [alias for aliases in hidden.values() for alias in aliases]
    kind = "trainable matrix, word embeddings and head aside,"
    require_matches(stage.muon, matrices, key="stage.muon", kind=kind)
    settings = []
    for parameter, aliases in trainable.items():
        glob = next((glob for glob in globs if matches_any(aliases, [glob])), None)
        if glob is None:
            raise ValueError(
                f"stage.learning_rates: no glob matches the trainable parameter {aliases[0]!r}; "
                f"add a line for it or a last line '*' for all the rest"
            )
        exempt = parameter in plain or matches_any(aliases, stage.no_decay)
        decay = 0.0 if exempt else stage.weight_decay
        muon = parameter in hidden and matches_any(aliases, stage.muon)
        rate = stage.learning_rates[glob]
        settings.append(ParameterSetting(aliases[0], parameter, rate, decay, muon))
    return settings


def parameter_table(model: nn.Module, stage: StageSection) -> str:
    """A text table of the parts of the model: size, trained or frozen, learning rate, decay."""
    settings = {setting.parameter: setting for setting in parameter_settings(model, stage)}
    rows: dict[tuple[str, ...], list[int]] = {}
    for name, parameter in model.named_parameters():
        part = ".".join(name.split(".")[:-1][:2]) or name
        if ".lora_" in name:
            part += " (LoRA)"
        marks = ("no", "-", "-")
        if setting := settings.get(parameter):
            marks = ("yes", f"{setting.learning_rate:.2e}", f"{setting.weight_decay:g}")
        rows.setdefault((part, *marks), []).append(count_weights(parameter))
    header = ("part", "tensors", "parameters", "trained", "learning rate", "weight decay")
    lines: list[tuple[str, ...]] = [header]
    for (part, *rest), sizes in rows.items():
        lines.append((part, str(len(sizes)), human_count(sum(sizes)), *rest))
    total = sum(count_weights(parameter) for parameter in model.parameters())
    learning = sum(parameter.numel() for parameter in settings)
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    text = [_aligned(line, widths) for line in lines]
    text.insert(1, "-" * len(text[0]))
    text.append(
        f"{total:,} parameters: {learning:,} trained ({human_count(learning)}), "
        f"{total - learning:,} frozen ({human_count(total - learning)})"
    )
    return "\n".join(text)


def human_count(number: int) -> str:
    """A count as people say it.

    >>> human_count(29_982_720), human_count(1_024), human_count(6_768_398_336)
    ('29.98 M', '1.02 K', '6.77 B')
    """
    for unit, size in (("B", 10**9), ("M", 10**6), ("K", 10**3)):
        if number >= size:
            return f"{number / size:.2f} {unit}"
    return str(number)


def _aligned(line: Sequence[str], widths: list[int]) -> str:
    """The first column to the left, all others to the right, as numbers are read."""
    cells = [line[0].ljust(widths[0])]
    cells += [cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True)]
    return "  ".join(cells)


def _parameters_without_decay(model: nn.Module) -> set[nn.Parameter]:
    """Biases, and the weights of normalisation layers of any class (Llama brings its own RMSNorm).

    A class that only has "Norm" in its name counts for its vectors, so that a normalising linear
    layer keeps the decay of its matrix.
    """
    exempt = set()
    for module in model.modules():
        known = isinstance(module, NORM_TYPES)
        named = "norm" in type(module).__name__.lower()
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            is_bias = name == "bias" or name.endswith("_bias")
            if is_bias or known or (named and parameter.ndim <= 1):
                exempt.add(parameter)
    return exempt


def require_matches(globs: Iterable[str], names: list[str], *, key: str, kind: str) -> None:
    """Refuses a glob that fits none of the names.

    Raises:
        ValueError: with the nearest names.
    """
    for glob in globs:
        if matches_any(names, [glob]):
            continue
        paths = [name.split(".")[:-1] for name in names]
        parts = {".".join([*path[:depth], "*"]) for path in paths for depth in (1, 2, 3)}
        near = difflib.get_close_matches(glob, sorted(parts) + names, n=3, cutoff=0.3)
        known = ", ".join(near or sorted(parts)[:3]) or "none"
        raise ValueError(
            f"{key}: the glob {glob!r} matches no {kind} of the model; "
            f"correct or remove it (the nearest names are {known})"
        )


def _require_first_matches(globs: list[str], names: list[str]) -> None:
    """Refuse a glob that an earlier one leaves nothing to decide."""
    for index, glob in enumerate(globs):
        mine = [name for name in names if fnmatchcase(name, glob)]
        if all(matches_any([name], globs[:index]) for name in mine):
            raise ValueError(
                f"stage.learning_rates: the glob {glob!r} is idle, because the lines above it "
                f"match all its parameters first; move it up or remove it"
            )
