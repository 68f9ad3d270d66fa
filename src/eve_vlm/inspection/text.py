"""Facts as text for a terminal, or as JSON for a machine; no fact is worked out here.

Tables are plain columns, so that they survive a mail or an issue.  Easy to get wrong: the JSON also
holds what is computed from the facts (totals, whether two things are equal), which `asdict` alone
would leave out.
"""

import json
import math
import textwrap
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from eve_vlm.inspection.differences import Differences, collapsed
from eve_vlm.inspection.facts import (
    PATCH_EMBEDDING,
    ModelFacts,
    PartFact,
    TokensFact,
    WeightsCheck,
    size,
)
from eve_vlm.inspection.subjects import Facts, PictureFacts, RecipeFacts, SizeFacts

SHOWN = 12  # weight names listed before "and n more"
LONGEST_VALUE = 60  # characters of a differing setting; a chat template would fill the screen
LINE = 100  # characters
GLUE = "\u00a0"  # between a name and its value, which a line break must not part
# Settings that say how a part behaves and not what it is made of; JSON has them.
MINOR = (
    *("model_type", "num_channels", "layer_norm_eps", "initializer_range"),
    *("image_mean", "image_std", "resample", "rescale_factor", "do_convert_rgb"),
    *("do_normalize", "do_rescale", "do_resize", "default_to_square"),
)


def facts_text(facts: Facts, *, shapes: bool = False) -> str:
    """Everything about one thing; `shapes` lists a model's weights too."""
    if isinstance(facts, ModelFacts):
        return _model_text(facts, shapes=shapes)
    if isinstance(facts, RecipeFacts):
        return _recipe_text(facts)
    if isinstance(facts, PictureFacts):
        return _picture_text(facts)
    return f"Any picture of {_by(facts)} pixels\n\n{_seen_text(facts.tokens)}"


def facts_json(facts: Facts) -> str:
    """The facts as JSON."""
    data = {"kind": type(facts).__name__.removesuffix("Facts").lower(), **asdict(facts)}
    if isinstance(facts, ModelFacts):
        data |= {"parameters": facts.parameters, "bytes": facts.bytes, "form": facts.kind}
        data["kind"] = "model"
    return json.dumps(_finite(data), indent=1, default=str)


def differences_json(found: Differences) -> str:
    """The differences as JSON."""
    return json.dumps(_finite(asdict(found) | {"equal": found.equal}), indent=1, default=str)


def differences_text(found: Differences) -> str:
    """The differences, section by section; one line where there are none."""
    blocks = []
    sections = dict.fromkeys(one.section for one in found.differences)
    for section in sections:
        rows = [
            (one.name, _value(one.left), _value(one.right))
            for one in found.differences
            if one.section == section
        ]
        blocks.append(table((section, found.left, found.right), rows, numbers=False))
    if found.weights is not None:
        blocks.append(_values_text(found))
    if found.equal:
        blocks.append(f"{found.left} and {found.right} do not differ.")
    return "\n\n".join(blocks)


def table(
    header: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    sums: Sequence[Sequence[str]] = (),
    numbers: bool = True,
) -> str:
    """Columns under a ruled header; numbers stand at the right, the first column at the left.

    Args:
        sums: rows under a second rule.
        numbers: whether the columns behind the first hold numbers.
    """
    all_rows = [header, *rows, *sums]
    widths = [max(len(line[place]) for line in all_rows) for place in range(len(header))]
    rule = "-" * (sum(widths) + 2 * (len(widths) - 1))
    lines = []
    for line in all_rows:
        cells = [
            cell.rjust(width) if numbers and place else cell.ljust(width)
            for place, (cell, width) in enumerate(zip(line, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    lines.insert(1, rule)
    if sums:
        lines.insert(2 + len(rows), rule)
    return "\n".join(lines)


def bytes_text(count: int) -> str:
    """A size in powers of 1000, as disks are sold.

    >>> bytes_text(13536796672), bytes_text(2048), bytes_text(12)
    ('13.54 GB', '2.05 kB', '12 B')
    """
    for unit, factor in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= factor:
            return f"{count / factor:.2f} {unit}"
    return f"{count} B"


def _by(facts: PictureFacts | SizeFacts | TokensFact) -> str:
    return f"{facts.width} x {facts.height}"


# --- models ---------------------------------------------------------------------------------------


def _model_text(facts: ModelFacts, *, shapes: bool) -> str:
    blocks = [f"{facts.source}: {facts.kind}", _settings_text(facts), _parts_text(facts)]
    if facts.weights is not None:
        blocks.append(_check_text(facts.weights))
    if facts.tokens:
        blocks.append(_sizes_text(facts.tokens, of="the context"))
    if shapes:
        blocks.append(_shapes_text(facts))
    blocks += facts.notes
    return "\n\n".join(blocks)


def _settings_text(facts: ModelFacts) -> str:
    """What the parts are made of, a line each."""
    decoder = dict(facts.decoder)
    lines = {
        "decoder": ", ".join([decoder.pop("model_type"), _pairs(decoder)]),
        "patch embedding": _pairs(
            {**facts.vision, "projector_depth": facts.settings.get("projector_depth")}
        ),
        "aligner": "none" if facts.alignment is None else _pairs(facts.alignment),
        "special ids": _pairs(facts.special_ids),
    }
    words = facts.decoder.get("vocab_size")
    if words is not None and facts.special_ids["image_token_id"] >= words:
        lines["special ids"] += " (the image placeholder has no row in the embedding)"
    if "configuration" not in facts.kind and facts.images is not None:
        template = facts.chat_template
        lines["chat template"] = "none" if not template else f"{len(template)} characters"
    if facts.images is not None:
        lines["pictures"] = _pairs(facts.images)
    width = max(map(len, lines)) + 2
    return "\n".join(
        textwrap.fill(
            name.ljust(width) + text,
            LINE,
            subsequent_indent=" " * width,
            break_long_words=False,
            break_on_hyphens=False,
        ).replace(GLUE, " ")
        for name, text in lines.items()
    )


def _pairs(settings: dict[str, Any]) -> str:
    """`name value` of every setting that says what something is made of."""
    flat = {name: value for name, value in settings.items() if name not in MINOR}
    if isinstance(size := flat.get("size"), dict):
        flat = {k: v for k, v in size.items() if v is not None} | flat
        flat.pop("size")
    return ", ".join(f"{name}{GLUE}{value}" for name, value in flat.items() if value is not None)


def _parts_text(facts: ModelFacts) -> str:
    total = max(facts.parameters, 1)

    def row(part: PartFact) -> tuple[str, ...]:
        kinds = ", ".join(part.dtypes) or "none stored"
        share = f"{100 * part.parameters / total:.2f} %"
        return (
            *(part.name, str(part.tensors), f"{part.parameters:,}", share),
            *(bytes_text(part.bytes), kinds),
        )

    rows = [row(part) for part in facts.parts]
    own = [part for part in facts.parts if part.name in PATCH_EMBEDDING]
    answering = [part for part in facts.parts if part.name != "aligner"]
    sums = [row(_sum("patch embedding layer in all", own))]
    if len(answering) < len(facts.parts):
        sums.append(row(_sum("total without the aligner", answering)))
    sums.append(row(_sum("total", facts.parts)))
    text = table(("part", "tensors", "parameters", "share", "size", "type"), rows, sums=sums)
    tied = [f"{second} is {first}, counted once." for second, first in facts.tied.items()]
    return "\n\n".join([text, *tied])


def _sum(name: str, parts: Sequence[PartFact]) -> PartFact:
    dtypes: dict[str, int] = {}
    for part in parts:
        for key, count in part.dtypes.items():
            dtypes[key] = dtypes.get(key, 0) + count
    return PartFact(
        name=name,
        tensors=sum(part.tensors for part in parts),
        parameters=sum(part.parameters for part in parts),
        bytes=sum(part.bytes for part in parts),
        dtypes=dtypes,
    )


def _check_text(check: WeightsCheck) -> str:
    lines = []
    if check.not_compared is not None:
        lines.append(f"Weights not compared with the configuration: {check.not_compared}.")
    for title, names in (
        ("Missing", check.missing),
        ("Not of this model", check.unexpected),
        ("Of another shape", check.other_shape),
    ):
        if names:
            lines.append(f"{title}: {len(names)} weights ({_listed(names)}).")
    if not lines:
        lines.append("Every weight that the configuration asks for is there, in its shape.")
    if check.left_out:
        names = check.left_out
        lines.append(f"Stored but not part of the model: {len(names)} ({_listed(names)}).")
    return "\n".join(lines)


def _listed(names: Sequence[str]) -> str:
    groups = [name if count == 1 else f"{name} x{count}" for name, count in collapsed(names)]
    more = f" and {len(groups) - SHOWN} more" if len(groups) > SHOWN else ""
    return ", ".join(groups[:SHOWN]) + more


def _shapes_text(facts: ModelFacts) -> str:
    groups: dict[tuple[tuple[int, ...], str, str], list[str]] = {}
    for tensor in facts.tensors:
        groups.setdefault((tensor.shape, tensor.dtype, tensor.part), []).append(tensor.name)
    order = {tensor.name: place for place, tensor in enumerate(facts.tensors)}
    rows = []
    for (shape, dtype, part), names in groups.items():
        for (name, count), first in zip(collapsed(names), _firsts(names), strict=True):
            line = (name, size(shape), dtype, "" if count == 1 else f"x{count}", part)
            rows.append((order[first], line))
    return table(
        ("weight", "shape", "type", "", "part"), [line for _, line in sorted(rows)], numbers=False
    )


def _firsts(names: Sequence[str]) -> list[str]:
    """The first name of each group that `collapsed` makes of the names."""
    first: dict[str, str] = {}
    for name in names:
        key = ".".join("#" if part.isdigit() else part for part in name.split("."))
        first.setdefault(key, name)
    return list(first.values())


# --- pictures, sizes and recipes ------------------------------------------------------------------


def _picture_text(facts: PictureFacts) -> str:
    lines = [
        f"{facts.source}: {facts.format} picture, {facts.mode}, "
        f"{facts.stored_width} x {facts.stored_height} pixels, {bytes_text(facts.bytes)}",
    ]
    if facts.orientation != "upright":
        lines.append(f"EXIF: {facts.orientation}, so it is seen as {_by(facts)}.")
    if facts.mode != "RGB":
        lines.append(f"A model sees it in RGB, made of {facts.mode}.")
    if facts.animated:
        lines.append("An animation or of several pages: the first frame is seen.")
    return "\n".join(lines) + "\n\n" + _seen_text(facts.tokens)


def _seen_text(tokens: Sequence[TokensFact]) -> str:
    """One picture under several settings."""
    header = ("seen with", "resized to", "cells", "tokens", "patches", "of the context")
    return table(header, [(fact.settings, *_tokens_row(fact)) for fact in tokens])


def _sizes_text(tokens: Sequence[TokensFact], *, of: str) -> str:
    """Several picture sizes under one setting."""
    header = ("picture", "resized to", "cells", "tokens", "patches", f"of {of}")
    return table(header, [(_by(fact), *_tokens_row(fact)) for fact in tokens])


def _tokens_row(fact: TokensFact) -> tuple[str, ...]:
    share = "unknown"
    if fact.context is not None:
        share = f"{100 * fact.tokens / fact.context:.1f} % of {fact.context:,}"
    return (
        f"{fact.resized_width} x {fact.resized_height}",
        f"{fact.rows} x {fact.cols}",
        *(f"{fact.tokens:,}", f"{fact.patches:,}", share),
    )


def _recipe_text(facts: RecipeFacts) -> str:
    groups = [
        (
            *(f"{group.learning_rate:.2e}", f"{group.weight_decay:g}"),
            *(str(group.tensors), f"{group.parameters:,}"),
        )
        for group in facts.groups
    ]
    most = facts.sequences * facts.max_length
    blocks = [
        f"{facts.source}: recipe {facts.name}, stage {facts.stage}, starts from {facts.start}",
        facts.table,
        table(("learning rate", "weight decay", "tensors", "parameters"), groups),
        f"A step takes {facts.sequences} sequences per device of at most {facts.max_length:,} "
        f"tokens: {most:,} at most.",
        _sizes_text(facts.tokens, of="a sequence"),
    ]
    return "\n\n".join(blocks)


# --- differences ----------------------------------------------------------------------------------


def _value(value: Any) -> str:
    if value is None:
        return "-"
    text = f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
    text = " ".join(text.split())
    return text if len(text) <= LONGEST_VALUE else text[: LONGEST_VALUE - 3] + "..."


def _values_text(found: Differences) -> str:
    """Weights whose values differ, the furthest first."""
    weights = found.weights or ()
    unlike = sorted((one for one in weights if one.differing), key=lambda one: -one.largest)
    equal = f"{len(weights) - len(unlike)} of {len(weights)} compared weights are equal"
    if not unlike:
        return f"{equal}."
    rows = [
        (
            *(one.name, f"{one.elements:,}", f"{100 * one.differing / one.elements:.2f} %"),
            f"{one.largest:.3g}",
        )
        for one in unlike
    ]
    header = ("weights that differ", "numbers", "differing", "largest difference")
    return f"{table(header, rows)}\n\n{equal}."


def _finite(data: Any) -> Any:
    """JSON knows no infinity; it becomes a text."""
    if isinstance(data, dict):
        return {str(key): _finite(value) for key, value in data.items()}
    if isinstance(data, (list, tuple)):
        return [_finite(value) for value in data]
    return str(data) if isinstance(data, float) and not math.isfinite(data) else data


__all__ = [
    "bytes_text",
    "differences_json",
    "differences_text",
    "facts_json",
    "facts_text",
    "table",
]
