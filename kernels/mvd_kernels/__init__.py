"""Operators of the distillation step. Imports nothing of `mvd_scale`."""

from mvd_kernels.attention import attention, attention_backend
from mvd_kernels.chunked_attention import bf16_instructions
from mvd_kernels.int8_linear import Int8Linear
from mvd_kernels.masked_distance import masked_distance
from mvd_kernels.norm import LayerNorm
from mvd_kernels.tube_gather import tube_pixels, tube_rows

__all__ = [
    "Int8Linear",
    "LayerNorm",
    "attention",
    "attention_backend",
    "bf16_instructions",
    "masked_distance",
    "tube_pixels",
    "tube_rows",
]
