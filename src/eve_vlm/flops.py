"""Floating-point operations of a model: a table of what each part costs for each thing it is given.

A pass is described by plain counts (`Work`: positions, attention pairs, labelled positions, patches
...), a model by its `Term`s, and the operations are the products of both, summed.  The terms are
read off the modules' shapes, so a model on the `meta` device will do, with any of the library's
decoders that is made of linear layers and softmax attention; with others `terms_of` refuses rather
than guesses.

Counted are matrix products, two operations for a multiplication and its addition, as
`torch.utils.flop_counter` does.  Left out are element-wise operations (norms, softmax, the class
token's weighted sums of cells), the rotary table, the optimizer, and the frozen teacher.

Easy to get wrong: padding, pairs across documents and pairs into the future are no work, although
most kernels compute some of them.  `Work` therefore counts what has to be done, and an utilisation
by it says what padding costs.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Literal, NamedTuple

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from eve_vlm.alignment_eve import EveForPreTraining
from eve_vlm.configuration_eve import EveConfig
from eve_vlm.encoder_twin_eve import EveEncoderConfig
from eve_vlm.image_processing_eve import num_image_tokens
from eve_vlm.layer_taps_eve import LayerTaps
from eve_vlm.modeling_eve import EveForConditionalGeneration

Part = Literal["patch embedding", "projector", "decoder", "attention", "head", "aligner"]
Unit = Literal[
    "passes",
    "pictures",
    "patches",
    "cells",
    "image_tokens",
    "teacher_cells",
    "tokens",
    "pairs",
    "window_pairs",
    "labels",
]


@dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    """What goes through a model: counts, which add up over batches."""

    passes: int = 1
    """Forward passes; the learned query of the class token is computed once in each."""
    pictures: int = 0
    patches: int = 0
    cells: int = 0
    """Merged patches of all pictures."""
    image_tokens: int = 0
    """Cells, row-end and class tokens."""
    teacher_cells: int = 0
    """Cells that the aligner compares with the teacher's."""
    tokens: int = 0
    """Positions of the decoder, those of pictures among them."""
    pairs: int = 0
    """Positions that see a position, in layers that look as far back as the document goes."""
    window_pairs: int = 0
    """The same in layers with a sliding window."""
    labels: int = 0
    """Positions at which the language head runs."""

    def __add__(self, other: "Work") -> "Work":
        both = ((one.name, getattr(self, one.name), getattr(other, one.name)) for one in COUNTS)
        return Work(**{name: mine + theirs for name, mine, theirs in both})


COUNTS = fields(Work)
NOTHING = Work(passes=0)


class Term(NamedTuple):
    """Operations of one part for each of one unit."""

    part: Part
    unit: Unit
    forward: int
    backward: int
    recomputed: int = 0
    """Forward operations that activation checkpointing repeats on the way back."""


class Flops(NamedTuple):
    """Operations of a training step."""

    forward: int
    backward: int
    recomputed: int

    @property
    def needed(self) -> int:
        """Without what is computed twice: the numerator of a model's utilisation (MFU)."""
        return self.forward + self.backward

    @property
    def done(self) -> int:
        """All that the device has to do (the numerator of HFU)."""
        return self.forward + self.backward + self.recomputed


def causal_pairs(length: int, window: int | None = None) -> int:
    """Pairs of a position and one that it sees, itself included, in a document of `length`.

    >>> causal_pairs(4), causal_pairs(4, window=2)
    (10, 7)
    """
    seen = length if window is None else min(length, window)
    return seen * (seen + 1) // 2 + (length - seen) * seen


def work_of(
    documents: Sequence[int],
    grids: Iterable[tuple[int, int]] = (),
    *,
    labels: int,
    config: EveConfig,
) -> Work:
    """Counts of one training pass.

    Args:
        documents: length of each document, pictures included and padding not; a packed row holds
            several.
        grids: (rows, columns) of patches of each picture.
        labels: positions with a label.
        config: of the model; its merge size, sliding window and pool size count.
    """
    merge, window = config.vision_config.merge_size, sliding_window(config)
    cells = [(rows // merge, cols // merge) for rows, cols in grids]
    aligned = config.alignment_config is not None
    pool = config.alignment_config.pool_size if aligned else 1
    num_cells = sum(rows * cols for rows, cols in cells)
    return Work(
        pictures=len(cells),
        patches=num_cells * merge**2,
        cells=num_cells,
        image_tokens=sum(num_image_tokens(rows, cols) for rows, cols in cells),
        teacher_cells=aligned * sum((rows // pool) * (cols // pool) for rows, cols in cells),
        tokens=sum(documents),
        pairs=sum(causal_pairs(length) for length in documents),
        window_pairs=sum(causal_pairs(length, window) for length in documents),
        labels=labels,
    )


def flops_of(terms: Iterable[Term], work: Work, *, part: Part | None = None) -> Flops:
    """Operations of a training step, of one part or of all."""
    chosen = [term for term in terms if part in (None, term.part)]
    counts = [getattr(work, term.unit) for term in chosen]
    return Flops(
        *(
            sum(getattr(term, name) * count for term, count in zip(chosen, counts, strict=True))
            for name in ("forward", "backward", "recomputed")
        )
    )


def terms_of(model: EveForConditionalGeneration, *, checkpointing: bool = False) -> list[Term]:
    """What each part of a model costs, frozen and trained weights told apart.

    The way back costs one product for a trained weight's gradient and one for the gradient of what
    goes into it, and the second is left out where nothing before it learns.

    Args:
        checkpointing: activation checkpointing of the decoder's layers.

    Raises:
        ValueError: if the decoder has layers of a kind that is not counted here, or the model is an
            encoder-based twin.
    """
    config, decoder = model.config, model.model.language_model
    if isinstance(config.vision_config, EveEncoderConfig):
        raise ValueError(
            f"The operations of an encoder ({config.vision_config.encoder_name}) are not counted; "
            "take a model without one."
        )
    width = config.text_config.hidden_size
    seeing = _learns(model.model.vision_tower)
    terms = _patch_embedding(config, seeing)
    terms += _projector(config, _learns(model.model.multi_modal_projector), seeing)
    seeing = seeing or _learns(model.model.multi_modal_projector)
    words = [module for module in decoder.modules() if isinstance(module, nn.Embedding)]
    # Gradient into layer 0, 1, ...; where layers are checkpointed, the library asks for one into
    # the first even if nobody needs it.
    flows = [seeing or checkpointing or any(_learns(module) for module in words)]
    layers = LayerTaps(decoder, None).layers
    for index, layer in enumerate(layers):
        flows.append(flows[-1] or _learns(layer))
        terms += _layer(layer, config, index, back=flows[-1], again=checkpointing)
    head = 2 * width * config.text_config.vocab_size
    learns = model.lm_head.weight.requires_grad
    terms.append(Term("head", "labels", head, head * (flows[-1] + learns)))
    if isinstance(model, EveForPreTraining):
        taps = [flows[tap] for tap in model.aligner.taps]
        terms += _aligner(config, taps, _learns(model.aligner))
    return terms


def terms_of_config(config: EveConfig, *, checkpointing: bool = False) -> list[Term]:
    """The terms of a model that is not built, everything in it trained."""
    kind = EveForConditionalGeneration if config.alignment_config is None else EveForPreTraining
    with torch.device("meta"):
        return terms_of(kind(config), checkpointing=checkpointing)


def _learns(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())


def _patch_embedding(config: EveConfig, learns: bool) -> list[Term]:
    """Nothing before it learns: pixels need no gradient, and so the projection has only its own."""
    vision = config.vision_config
    square = 2 * vision.hidden_size**2
    pixels = vision.num_channels * vision.patch_size**2
    projection = 2 * pixels * vision.hidden_size
    by_head = 2 * vision.num_attention_heads * vision.hidden_size
    merging: list[tuple[Unit, int]] = [
        ("cells", 2 * square),  # query, and back through the weights of keys
        ("patches", 2 * by_head),  # scores and weighted sums
        ("cells", 2 * square),  # through the weights of values, and output
    ]
    class_token: list[tuple[Unit, int]] = [
        ("passes", 2 * square),  # its query, and back
        ("cells", by_head),  # its scores
        ("pictures", 2 * square),  # its values and output
    ]
    per_unit = merging * vision.merge_attention + class_token * vision.class_attention
    part: Part = "patch embedding"
    terms = [Term(part, unit, cost, 2 * cost * learns) for unit, cost in per_unit]
    return [Term(part, "patches", projection, projection * learns), *terms]


def _projector(config: EveConfig, learns: bool, seeing: bool) -> list[Term]:
    terms, given = [], config.vision_config.hidden_size
    for _ in range(config.projector_depth):
        cost = 2 * given * config.text_config.hidden_size
        terms.append(Term("projector", "image_tokens", cost, cost * (learns + seeing)))
        given, seeing = config.text_config.hidden_size, seeing or learns
    return terms


def _layer(
    layer: nn.Module, config: EveConfig, index: int, *, back: bool, again: bool
) -> list[Term]:
    """Linear layers (LoRA's among them) and the two products of attention.

    What is computed again ends with the last tensor that the way back needs, so the layer's last
    product is not repeated (torch's checkpointing without reentrance, which is the library's).
    """
    again = again and back
    terms: list[Term] = []
    counted = set()
    for module in layer.modules():
        if isinstance(module, nn.Linear):
            cost = 2 * module.in_features * module.out_features
        elif isinstance(module, Conv1D):
            cost = 2 * module.nx * module.nf
        else:
            continue
        counted.add(module.weight)
        backward = cost * (back + module.weight.requires_grad)
        terms.append(Term("decoder", "tokens", cost, backward, cost * again))
    if terms:
        terms[-1] = terms[-1]._replace(recomputed=0)
    for name, parameter in layer.named_parameters():
        if parameter.ndim > 1 and parameter not in counted:
            raise ValueError(
                f"The operations of {config.text_config.model_type} are not counted: layer {index} "
                f"of the decoder has {name}, which is no linear layer; take a decoder without."
            )
    heads, size, unit = _attention(config, index)
    cost = 4 * heads * size  # scores, and values weighted by them
    terms.append(Term("attention", unit, cost, 2 * cost * back, cost * again))
    return terms


def _attention(config: EveConfig, index: int) -> tuple[int, int, Unit]:
    """Heads, their size, and how far back layer `index` looks."""
    text = config.text_config.to_dict()
    kinds = text.get("layer_types")
    kind = kinds[index] if kinds else "full_attention"
    if kind not in ("full_attention", "sliding_attention") or text.get("kv_lora_rank"):
        raise ValueError(
            f"The operations of {config.text_config.model_type} are not counted: layer {index} of "
            f"the decoder has the attention {kind}; take a decoder with plain attention."
        )
    sliding = kind == "sliding_attention" or (not kinds and sliding_window(config) is not None)
    heads = config.text_config.num_attention_heads
    size = text.get("head_dim") or config.text_config.hidden_size // heads
    return heads, size, "window_pairs" if sliding else "pairs"


def sliding_window(config: EveConfig) -> int | None:
    """Positions that a layer with a sliding window sees; Qwen2's only counts if switched on."""
    text = config.text_config.to_dict()
    return text.get("sliding_window") if text.get("use_sliding_window", True) else None


def _aligner(config: EveConfig, taps: list[bool], learns: bool) -> list[Term]:
    """One map for each tap, last layer first, then a map of the last and of what it attends to."""
    teacher = config.alignment_config.teacher_hidden_size
    cost, square = 2 * config.text_config.hidden_size * teacher, 2 * teacher**2
    # Behind the norm, whose weights learn with the map's, there is always a gradient to pass on.
    terms = [
        Term("aligner", "teacher_cells", cost, cost * (learns + (learns or flows)))
        for flows in taps
    ]
    terms.append(Term("aligner", "teacher_cells", cost, cost * (learns + taps[0])))
    mapped = learns or any(taps)
    return [*terms, Term("aligner", "teacher_cells", square, square * (learns + mapped))]


__all__ = [
    "NOTHING",
    "Flops",
    "Part",
    "Term",
    "Unit",
    "Work",
    "causal_pairs",
    "flops_of",
    "sliding_window",
    "terms_of",
    "terms_of_config",
    "work_of",
]
