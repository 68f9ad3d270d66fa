"""Choices that several commands offer, so that `--help` shows them and a typing error is refused.

They are enumerations because Typer lists their members; what does the work takes plain text.
"""

from enum import StrEnum


class Dtype(StrEnum):
    """Types of numbers that weights are stored in and computed with."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class FewerBits(StrEnum):
    """Ways to hold decoder weights in fewer bits."""

    int8 = "int8"
    nf4 = "nf4"


__all__ = ["Dtype", "FewerBits"]
