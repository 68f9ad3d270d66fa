"""What a workload holds that follows from the model's parameters alone, with its source.

Weights, gradients, the optimizer's moments and temporaries, what sharding leaves of them on each
device, and the buffers that communication needs. `memory.py` adds activations.

Easy to get wrong: torch's AdamW makes its moments in the type of the parameter, so two bytes each
for bfloat16 weights; only DeepSpeed keeps float32 masters and moments beside them.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import nn

from eve_vlm.alignment_eve import EveForPreTraining
from eve_vlm.configuration_eve import EveConfig
from eve_vlm.image_processing_eve import num_image_tokens
from eve_vlm.layer_taps_eve import LayerTaps
from eve_vlm.memory.trace import ALIGNER, DECODER, GRADIENTS, PATCH_EMBEDDING
from eve_vlm.modeling_eve import EveForConditionalGeneration
from eve_vlm.parameter_names import hidden_matrices, matches_any

TEMPORARIES = "optimizer's temporaries"

# Resident bytes of a process that has imported torch, transformers and accelerate and run a tiny
# model once: 367 MiB for answering, 382 MiB for training, rounded up. Linux, torch 2.13 (CPU),
# transformers 5.23, 2026-11-22; `benchmarks/measure_memory.py --framework` measures it again.
CPU_FRAMEWORK = 400 * 2**20
# CUDA's context, the kernels of torch and cuBLAS's workspace: a usual size, not measured here.
CUDA_FRAMEWORK = 800 * 2**20
# Kept free beside every estimate: allocators round up and leave holes. Every error of the table
# in docs/fits.md is below it.
SAFETY_MARGIN = 0.10
# A shard as the Hub usually has it, where the checkpoint itself is not at hand.
USUAL_SHARD = 5 * 10**9
# Copies of the last position's logits in float32 while `generate` chooses a word: its own copy, the
# scores with suppressed words taken out, and the result of that.
LOGIT_COPIES = 3
# DeepSpeed's defaults, in elements (its configuration reference, section zero_optimization).
REDUCE_BUCKET = ALLGATHER_BUCKET = 5 * 10**8
LIVE_PARAMETERS = 10**9
# bitsandbytes keeps one float32 scale per so many 8-bit values, and small tensors in float32.
BLOCK_8BIT, SMALL_8BIT = 256, 4096

Sharding = Literal["none", "zero1", "zero2", "zero3", "fsdp"]
Optimizer = Literal["adamw", "adamw_fused", "adamw8bit", "sgd"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Workload:
    """One way to use a model, on one device."""

    training: bool
    """A step of training; otherwise answering."""
    length: int
    """Tokens of a sequence with its pictures, and when answering with its answer."""
    rows: int
    """Rows of cells of each picture, which takes 1 + rows x (cols + 1) tokens."""
    cols: int
    """Columns of cells of each picture."""
    pictures: int = 1
    """Pictures in each sequence."""
    batch: int = 1
    """Sequences at once."""
    new_tokens: int = 128
    """Answering: how many of `length` are the answer's."""
    dtype: torch.dtype = torch.float32
    """Type of the weights in memory."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where it runs; decides the framework's share and how the optimizer steps."""
    padded: bool = False
    """Sequences of different lengths, so that attention needs a mask."""
    attention: str = "sdpa"
    """Attention of the decoder, as transformers names it."""
    trainable: tuple[str, ...] = ("*",)
    """Training: globs of the parameters that learn."""
    aligned: bool = False
    """Training: with the patch aligning layer and its teacher."""
    lora: int = 0
    """Training: rank of LoRA on the decoder's linear layers, the decoder itself frozen; 0: none."""
    gradient_checkpointing: bool = False
    """Training: keep only each layer's input and compute the layer again on the way back."""
    accumulation: int = 1
    """Training: batches whose gradients are summed up before a step."""
    optimizer: Optimizer = "adamw"
    """Training: `adamw` (torch), `adamw_fused` (torch), `adamw8bit` (bitsandbytes) or `sgd`."""
    muon: tuple[str, ...] = ()
    """Training: globs of the matrices that Muon moves; the optimizer moves all else."""
    gpus: int = 1
    """Training: devices that share the work; each has `batch` sequences."""
    sharding: Sharding = "none"
    """Training: what they share. Any `zero` means DeepSpeed, which keeps float32 masters."""

    @property
    def picture_tokens(self) -> int:
        """Tokens that the pictures of one sequence take."""
        return self.pictures * num_image_tokens(self.rows, self.cols)


class Trained(NamedTuple):
    """A parameter that learns."""

    elements: int
    bytes: int
    muon: int = 0
    """Muon's: the matrix's smaller side. 0: another optimizer's."""


class Sizes(NamedTuple):
    """A model's bytes that do not depend on what it is given."""

    weights: dict[str, int]
    parameters: int
    trained: list[Trained]
    largest_layer: int  # bytes

    @property
    def gradients(self) -> int:
        """One gradient for each parameter that learns, of its own type; tied ones are one."""
        return sum(one.bytes for one in self.trained)

    @property
    def elements(self) -> int:
        """How many numbers learn."""
        return sum(one.elements for one in self.trained)


def check(config: EveConfig, work: Workload) -> None:
    """Refuses workloads that no machine could run.

    Raises:
        ValueError: in one sentence.
    """
    limit = config.text_config.max_position_embeddings
    if work.length > limit:
        raise ValueError(
            f"A length of {work.length} tokens is beyond the {limit} positions of this decoder; "
            f"give at most {limit}."
        )
    words = work.length - work.picture_tokens - (0 if work.training else work.new_tokens)
    if words < 1:
        raise ValueError(
            f"A length of {work.length} tokens has no room for {work.pictures} pictures of "
            f"{num_image_tokens(work.rows, work.cols)} tokens"
            + ("" if work.training else f", {work.new_tokens} tokens of answer")
            + " and a word; give a larger length, or smaller or fewer pictures."
        )
    if work.sharding != "none" and work.device == "cpu":
        raise ValueError("Sharding is for GPUs; leave it out to train on the CPU.")
    if work.sharding != "none" and work.muon:
        raise ValueError(
            f"Muon needs whole matrices, which {work.sharding} shares out; leave sharding out, or "
            "name an optimizer to take in Muon's place."
        )
    if work.muon and work.optimizer not in ("adamw", "adamw_fused"):
        raise ValueError(f"Muon stands beside AdamW, not beside {work.optimizer}; keep one.")


def sizes_of(model: EveForConditionalGeneration, *, muon: Sequence[str] = ()) -> Sizes:
    """Bytes of a model's weights by part, and what learns; tied weights count once."""
    parts = parts_of(model)
    owner = {
        id(parameter): part
        for module, part in reversed(parts.items())
        for parameter in module.parameters()
    }
    weights: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        part = "LoRA" if ".down." in name or ".up." in name else owner.get(id(parameter), DECODER)
        weights[part] = weights.get(part, 0) + parameter.nbytes
    layers, hidden = layers_of(model), hidden_matrices(model)
    return Sizes(
        weights,
        sum(parameter.numel() for parameter in model.parameters()),
        [
            Trained(
                parameter.numel(),
                parameter.nbytes,
                min(parameter.shape) if matches_any(hidden.get(parameter, ()), muon) else 0,
            )
            for parameter in model.parameters()
            if parameter.requires_grad
        ],
        max(bytes_of(layer.parameters()) for layer in layers),
    )


def parts_of(model: EveForConditionalGeneration) -> dict[nn.Module, str]:
    """Which module is which part; the decoder's layers too, which checkpointing runs alone."""
    decoder = model.model.language_model
    parts = {
        model.model.vision_tower: PATCH_EMBEDDING,
        model.model.multi_modal_projector: PATCH_EMBEDDING,
        decoder: DECODER,
        **dict.fromkeys(layers_of(model), DECODER),
    }
    if isinstance(model, EveForPreTraining):
        parts[model.aligner] = ALIGNER
    return parts


def layers_of(model: EveForConditionalGeneration) -> nn.ModuleList:
    """The decoder's layers, whatever they are called in it."""
    return LayerTaps(model.model.language_model, None).layers


def held(sizes: Sizes, work: Workload) -> dict[str, int]:
    """Weights, gradients, moments, buffers of sharding and the step's temporaries, per device.

    Where they come from: torch's AdamW makes both moments like the parameter; its loop needs two
    temporaries of the largest parameter (square root, quotient), its `foreach` form, which is what
    GPUs get, one of all second moments, its fused form none. DeepSpeed keeps float32 masters of
    half-precision weights and float32 moments, and steps on float32 copies of the gradients (ZeRO,
    arXiv 1910.02054, section 3: stage 1 shards these, stage 2 gradients too, stage 3 weights too).
    Muon (`train/muon.py`) keeps one moment, and moves one matrix after the other.
    """
    share = work.gpus if work.sharding != "none" else 1
    deepspeed = work.sharding.startswith("zero")
    all_sharded = work.sharding in ("zero3", "fsdp")
    parts = {
        f"weights: {part}": size // (share if all_sharded else 1)
        for part, size in sizes.weights.items()
    }
    half = work.dtype.itemsize < 4
    if deepspeed and half:
        parts["float32 master weights"] = 4 * sizes.elements // share
    parts["optimizer's moments"] = _moments(sizes, work, deepspeed) // share
    gradients_sharded = work.sharding in ("zero2", "zero3", "fsdp")
    parts[GRADIENTS] = sizes.gradients // (share if gradients_sharded else 1)
    parts[TEMPORARIES] = _step_temporaries(sizes, work, deepspeed) // share
    buffers = _communication(sizes, work)
    return parts | ({"buffers of communication": buffers} if buffers else {})


def _moments(sizes: Sizes, work: Workload, deepspeed: bool) -> int:
    if work.optimizer == "sgd":
        return 0
    if work.optimizer == "adamw8bit":
        return sum(
            8 * count if count < SMALL_8BIT else 2 * (count + 4 * -(-count // BLOCK_8BIT))
            for count, *_ in sizes.trained
        )
    if deepspeed:
        return 2 * 4 * sizes.elements
    return sum(one.bytes if one.muon else 2 * one.bytes for one in sizes.trained)


def _step_temporaries(sizes: Sizes, work: Workload, deepspeed: bool) -> int:
    gradients = 4 * sizes.elements if deepspeed else 0
    muons = max((_muon_temporaries(one, work) for one in sizes.trained if one.muon), default=0)
    others = [one.bytes for one in sizes.trained if not one.muon]
    if work.optimizer != "adamw" or not others:
        return max(gradients, muons)
    if work.device == "cuda":
        return max(gradients + (gradients if deepspeed else sum(others)), muons)
    return max(2 * max(others), muons)


def _muon_temporaries(matrix: Trained, work: Workload) -> int:
    """The update, two of its Newton-Schulz steps and two products of its smaller side."""
    width = 4 if work.device == "cpu" else 2  # bytes, as train/muon.py multiplies
    return matrix.bytes + 2 * width * (matrix.elements + matrix.muon**2)


def _communication(sizes: Sizes, work: Workload) -> int:
    """Buffers of DDP (one copy of the gradients), DeepSpeed and FSDP (two layers in full)."""
    if work.gpus == 1:
        return 0
    width, count = work.dtype.itemsize, sizes.elements
    if work.sharding == "none":
        return sizes.gradients
    if work.sharding == "fsdp":
        return 2 * sizes.largest_layer
    reduce = width * min(REDUCE_BUCKET, count)
    if work.sharding == "zero3":
        return reduce + width * min(LIVE_PARAMETERS, sizes.parameters)
    # Two buckets, because communication overlaps with the backward pass.
    return 2 * reduce + width * min(ALLGATHER_BUCKET, count)


def framework_of(work: Workload) -> int:
    """Bytes that torch and the libraries take before there is any model."""
    return CPU_FRAMEWORK if work.device == "cpu" else CUDA_FRAMEWORK


def bytes_of(parameters: Iterable[torch.Tensor]) -> int:
    """Bytes of some tensors together."""
    return sum(parameter.nbytes for parameter in parameters)


__all__ = [
    "Optimizer",
    "Sharding",
    "Sizes",
    "Trained",
    "Workload",
    "bytes_of",
    "check",
    "framework_of",
    "held",
    "layers_of",
    "parts_of",
    "sizes_of",
]
