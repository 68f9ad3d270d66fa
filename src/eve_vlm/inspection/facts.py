"""What a model is made of, without its weights: parts, shapes, settings, tokens of a picture.

Counts come from the model built on torch's meta device, types and bytes from the headers of the
weight files, so that a 14 GB checkpoint takes a second.  Easy to get wrong: tied weights are one
parameter with two names, counted once, and a file may hold either name or both.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping

from eve_vlm.alignment_eve import EveForPreTraining
from eve_vlm.checkpoint_files import WeightEntry
from eve_vlm.configuration_eve import EveConfig
from eve_vlm.errors import first_line
from eve_vlm.image_processing_eve import EveImageProcessor, num_image_tokens
from eve_vlm.modeling_eve import EveForConditionalGeneration

# (width, height): CLIP's square, photographs and screens both ways, a page of A4 at 150 dpi.
COMMON_SIZES = ((336, 336), (640, 480), (1280, 720), (720, 1280), (1920, 1080), (1240, 1754))

ENCODER = "frozen encoder"
# Beginnings of weight names, the longest that fits decides; what is left belongs to the decoder.
PARTS = {
    "model.vision_tower.patch_projection.": "patch projection",
    "model.vision_tower.merge_attention.": "merge attention",
    "model.vision_tower.class_attention.": "class attention",
    "model.vision_tower.": "class and row-end embeddings",
    "model.vision_tower.encoder.": ENCODER,
    "model.multi_modal_projector.": "projector",
    "lm_head.": "language head",
    "aligner.": "aligner",
}
PATCH_EMBEDDING = tuple(PARTS.values())[:6]
"""The parts that make up the patch embedding layer or a twin's encoder, projector included."""

# The decoder's settings that decide its shape, as most decoders of the library call them.
DECODER_SHAPE = (
    "num_hidden_layers",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
    "max_position_embeddings",
    "sliding_window",
)
SPECIAL_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorFact:
    """One weight."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    part: str


@dataclass(frozen=True, kw_only=True, slots=True)
class PartFact:
    """One part of a model."""

    name: str
    tensors: int
    parameters: int
    bytes: int
    """In the weight files, or in the configuration's type where there are none."""
    dtypes: dict[str, int]
    """Parameters by type."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TokensFact:
    """What becomes of a picture of one size under one model's settings."""

    settings: str
    width: int
    height: int
    resized_width: int
    resized_height: int
    rows: int
    cols: int
    tokens: int
    """With the class token and the row-end tokens."""
    patches: int
    context: int | None
    """Longest sequence of the model, in tokens; None where its configuration does not say."""


@dataclass(frozen=True, kw_only=True, slots=True)
class WeightsCheck:
    """Weight files against the configuration, in our names; all empty for a sound checkpoint."""

    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    other_shape: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()
    """Stored, and by design not loaded: teacher copies, computed buffers, an unused aligner."""
    not_compared: str | None = None
    """Why names could not be compared."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelFacts:
    """A model folder, or a configuration alone (`weights` is None then)."""

    source: str
    kind: str
    decoder: dict[str, Any]
    """Type and shape."""
    vision: dict[str, Any]
    alignment: dict[str, Any] | None
    parts: tuple[PartFact, ...]
    tied: dict[str, str]
    """Second name of a tied weight: its first."""
    tensors: tuple[TensorFact, ...]
    weights: WeightsCheck | None
    special_ids: dict[str, Any]
    chat_template: str | None
    images: dict[str, Any] | None
    """Settings of the image processor."""
    tokens: tuple[TokensFact, ...]
    settings: dict[str, Any] = field(repr=False)
    """The whole configuration, with dotted keys."""
    notes: tuple[str, ...] = ()

    @property
    def parameters(self) -> int:
        """All parameters, tied ones once."""
        return sum(part.parameters for part in self.parts)

    @property
    def bytes(self) -> int:
        """Size of all weights that belong to the model."""
        return sum(part.bytes for part in self.parts)


def build_on_meta(config: EveConfig) -> EveForConditionalGeneration:
    """The model of a configuration without memory for its weights, with the aligner if it has one.

    Raises:
        ValueError: if the configuration describes nothing that can be built.
    """
    cls = EveForConditionalGeneration if config.alignment_config is None else EveForPreTraining
    try:
        with torch.device("meta"):
            return cls(config)
    except ValueError:
        raise
    except (AttributeError, TypeError, RuntimeError, LookupError, ArithmeticError) as error:
        raise ValueError(
            f"The configuration describes no {config.text_config.model_type} decoder that can be "
            f"built ({first_line(error)}); compare text_config with that of a working one."
        ) from None


def parts_of(model: EveForConditionalGeneration) -> dict[str, str]:
    """The part that each name of a weight belongs to, names of tied weights included."""
    words = model.get_input_embeddings().weight
    found = {}
    for name, weight in model.state_dict(keep_vars=True).items():
        beginnings = [start for start in PARTS if name.startswith(start)]
        if name.startswith("lm_head.") or beginnings:
            found[name] = PARTS[max(beginnings, key=len)]
        elif weight is words:
            found[name] = "word embedding"
        elif any(part.isdigit() for part in name.split(".")):
            found[name] = "decoder layers"
        else:
            found[name] = "decoder, final norm and other"
    return found


def tied_names(model: PreTrainedModel) -> dict[str, str]:
    """Second name to first name of every tied weight."""
    first: dict[int, str] = {}
    tied = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if id(parameter) in first:
            tied[name] = first[id(parameter)]
        first.setdefault(id(parameter), name)
    return tied


def tokens_facts(
    sizes: Iterable[tuple[int, int]],
    *,
    pictures: EveImageProcessor,
    settings: str,
    context: int | None = None,
) -> tuple[TokensFact, ...]:
    """What becomes of pictures of these (width, height), by the image processor's own grid."""
    facts = []
    for width, height in sizes:
        grid = pictures.grid_of(height, width)
        facts.append(
            TokensFact(
                settings=settings,
                width=width,
                height=height,
                resized_width=grid.width,
                resized_height=grid.height,
                rows=grid.rows,
                cols=grid.cols,
                tokens=num_image_tokens(grid.rows, grid.cols),
                patches=grid.rows * grid.cols * pictures.merge_size**2,
                context=context,
            )
        )
    return tuple(facts)


def context_of(config: EveConfig) -> int | None:
    """The longest sequence that the decoder's configuration names."""
    return config.text_config.to_dict().get("max_position_embeddings")


def tensor_facts(
    model: EveForConditionalGeneration,
    *,
    dtype: torch.dtype,
    entries: Mapping[str, WeightEntry] | None = None,
) -> tuple[TensorFact, ...]:
    """Every weight once, in the model's order: as stored, or as the configuration says.

    Args:
        dtype: type where no file says.
        entries: stored weights by our names; those that the model does not have come last.
    """
    parts, tied = parts_of(model), tied_names(model)
    expected = {name: tuple(w.shape) for name, w in model.state_dict().items() if name not in tied}
    if entries is None:
        return tuple(
            TensorFact(name=name, shape=shape, dtype=name_of(dtype), part=parts[name])
            for name, shape in expected.items()
        )
    stored = untied(entries, tied)
    order = [name for name in expected if name in stored]
    order += [name for name in stored if name not in expected]
    return tuple(
        TensorFact(
            name=name,
            shape=tuple(stored[name].shape),
            dtype=name_of(stored[name].dtype),
            part=parts.get(name, "not of this model"),
        )
        for name in order
    )


def part_facts(
    model: EveForConditionalGeneration, tensors: Sequence[TensorFact]
) -> tuple[PartFact, ...]:
    """Parameters of every part of the model, counted on the model; bytes and types as stored.

    A part whose weights are all tied to another's has none of its own and is left out.  Where files
    hold other names than the model (`stored_otherwise`), the stored type with the most numbers
    stands for the weights that have no namesake.
    """
    stored = {tensor.name: tensor for tensor in tensors}
    usual = None
    if stored_otherwise(model):
        counts: dict[str, int] = {}
        for tensor in tensors:
            counts[tensor.dtype] = counts.get(tensor.dtype, 0) + math.prod(tensor.shape)
        usual = max(counts, key=lambda dtype: counts[dtype], default=None)
    parts = parts_of(model)
    sizes: dict[str, list[tuple[int, str | None]]] = {}
    for name, parameter in model.named_parameters():
        dtype = stored[name].dtype if name in stored else usual
        sizes.setdefault(parts[name], []).append((parameter.numel(), dtype))
    order = [*PATCH_EMBEDDING, "word embedding", "decoder layers", "decoder, final norm and other"]
    order += ["language head", "aligner"]
    facts = []
    for part in order:
        if part not in sizes:
            continue
        dtypes: dict[str, int] = {}
        for size, dtype in sizes[part]:
            if dtype is not None:
                dtypes[dtype] = dtypes.get(dtype, 0) + size
        facts.append(
            PartFact(
                name=part,
                tensors=len(sizes[part]),
                parameters=sum(size for size, _ in sizes[part]),
                bytes=sum(getattr(torch, key).itemsize * size for key, size in dtypes.items()),
                dtypes=dtypes,
            )
        )
    return tuple(facts)


def check_weights(
    model: EveForConditionalGeneration,
    entries: Mapping[str, WeightEntry],
    *,
    left_out: Iterable[str] = (),
) -> WeightsCheck:
    """Compares stored weights, by our names, with what the configuration asks for."""
    aligner = [name for name in entries if name.startswith("aligner.")]
    if isinstance(model, EveForPreTraining):
        aligner = []
    outside = tuple(sorted([*left_out, *aligner]))
    if stored_otherwise(model):
        kind = model.config.text_config.model_type
        return WeightsCheck(
            left_out=outside,
            not_compared=f"transformers stores weights of {kind} under other names than it uses",
        )
    tied = tied_names(model)
    expected = {name: tuple(w.shape) for name, w in model.state_dict().items() if name not in tied}
    stored = untied({k: v for k, v in entries.items() if k not in set(aligner)}, tied)
    return WeightsCheck(
        missing=tuple(sorted(expected.keys() - stored.keys())),
        unexpected=tuple(sorted(stored.keys() - expected.keys())),
        other_shape=tuple(
            f"{name} is {size(stored[name].shape)}, not {size(expected[name])}"
            for name in expected
            if name in stored and tuple(stored[name].shape) != expected[name]
        ),
        left_out=outside,
    )


def stored_otherwise(model: PreTrainedModel) -> bool:
    """Whether the library joins, splits or renames weights of this decoder as it loads them."""
    return bool(get_model_conversion_mapping(model, add_legacy=False))


def untied(entries: Mapping[str, WeightEntry], tied: Mapping[str, str]) -> dict[str, WeightEntry]:
    """Entries with the first name of every tied weight, whichever of its names are stored."""
    stored: dict[str, WeightEntry] = {}
    for name, entry in entries.items():
        stored.setdefault(tied.get(name, name), entry)
    return stored


def flattened(settings: Mapping[str, Any], *, start: str = "") -> dict[str, Any]:
    """Nested settings with dotted keys; lists of mappings are numbered, others stay values.

    >>> flattened({"a": {"b": 1}, "c": [1, 2]})
    {'a.b': 1, 'c': [1, 2]}
    """
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, list) and value and all(isinstance(one, Mapping) for one in value):
            value = {str(place): one for place, one in enumerate(value)}
        if isinstance(value, Mapping) and value:
            flat |= flattened(value, start=f"{start}{key}.")
        else:
            flat[f"{start}{key}"] = value
    return flat


def name_of(dtype: torch.dtype) -> str:
    """`bfloat16` for `torch.bfloat16`."""
    return str(dtype).removeprefix("torch.")


def size(shape: Sequence[int]) -> str:
    """A shape as people write it.

    >>> size((1024, 3, 14, 14)), size(())
    ('1024 x 3 x 14 x 14', 'one number')
    """
    return " x ".join(map(str, shape)) or "one number"


__all__ = [
    "COMMON_SIZES",
    "PATCH_EMBEDDING",
    "ModelFacts",
    "PartFact",
    "TensorFact",
    "TokensFact",
    "WeightsCheck",
    "build_on_meta",
    "check_weights",
    "context_of",
    "flattened",
    "name_of",
    "part_facts",
    "parts_of",
    "size",
    "stored_otherwise",
    "tensor_facts",
    "tied_names",
    "tokens_facts",
    "untied",
]
