"""Decoder weights in 8 or 4 bits, by the packages that transformers works with.

`int8` halves bfloat16 weights and changes answers little; `nf4` quarters them and changes answers a
good deal in small models (docs/fast.md has figures).  Both keep activations in full precision, so
that a batch still answers as each of its prompts alone: 8-bit kinds that round activations too
(bitsandbytes' own, torchao's dynamic one) failed that in 5 to 8 of 10 prompts.  Easy to get wrong:
what makes pictures into tokens stays as it is, by name, and so does the head, which most small
decoders share with their word embedding.
"""

from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.utils import is_bitsandbytes_available, is_torchao_available

from .errors import listed

if TYPE_CHECKING:
    from .modeling_eve import EveForConditionalGeneration

KINDS = ("int8", "nf4")
FULL_PRECISION = ["model.vision_tower", "model.multi_modal_projector", "aligner", "lm_head"]


def quantization_config(kind: str, dtype: torch.dtype) -> Any:
    """What `from_pretrained` takes to quantize while it loads.

    Args:
        kind: one of `KINDS`: `int8` by torchao, one scale for each row of a matrix; `nf4` by
            bitsandbytes, one for each 64 weights.
        dtype: type in which products are computed.

    Raises:
        ValueError: if there is no such kind, or its package is not installed.
    """
    if kind not in KINDS:
        raise ValueError(f"quantize is {kind!r}; give one of {', '.join(KINDS)}, or leave it out.")
    package, installed = {
        "int8": ("torchao", is_torchao_available),
        "nf4": ("bitsandbytes", is_bitsandbytes_available),
    }[kind]
    if not installed():
        raise ValueError(
            f"{kind} weights need {package}, which is not installed; run: pip install "
            '"eve-vlm[quantize]".'
        )
    if kind == "nf4":
        from transformers import BitsAndBytesConfig

        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=dtype,
            llm_int8_skip_modules=FULL_PRECISION,  # also of 4-bit weights, whatever its name says
        )
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    # Without its settings for the compiler, which would be the whole process's.
    settings = Int8WeightOnlyConfig(set_inductor_config=False)
    return TorchAoConfig(settings, modules_to_not_convert=FULL_PRECISION)


def check_quantized(model: "EveForConditionalGeneration", kind: str) -> None:
    """Makes sure that no matrix of the decoder was passed over, as those of unusual layers are.

    Raises:
        ValueError: with the names of those that were.
    """
    decoder = model.model.language_model
    embeddings = {
        id(weight)
        for module in decoder.modules()
        if isinstance(module, nn.Embedding)
        for weight in module.parameters(recurse=False)
    }
    whole = [
        name
        for name, weight in decoder.named_parameters()
        if weight.ndim > 1 and id(weight) not in embeddings and not is_quantized(weight)
    ]
    if whole:
        raise ValueError(
            f"{kind} passes over {len(whole)} matrices of this {decoder.config.model_type} decoder "
            f"({listed(whole)}); load the model without quantize."
        )


def is_quantized(weight: torch.Tensor) -> bool:
    """Whether a weight is held in fewer bits: as integers, or in a tensor of a type of its own."""
    return not weight.is_floating_point() or type(weight.data) is not torch.Tensor


def count_weights(weight: torch.Tensor) -> int:
    """How many weights a tensor holds; two of 4 bits lie in one byte."""
    if weight.is_floating_point() or not is_bitsandbytes_available():
        return weight.numel()
    from bitsandbytes.nn import Params4bit

    if isinstance(weight, Params4bit) and weight.quant_state is not None:
        return weight.quant_state.shape.numel()
    return weight.numel()


__all__ = [
    "FULL_PRECISION",
    "KINDS",
    "check_quantized",
    "count_weights",
    "is_quantized",
    "quantization_config",
]
