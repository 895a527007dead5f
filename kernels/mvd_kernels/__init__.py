"""Operators of the distillation step. Imports nothing of `mvd_scale`."""

from mvd_kernels.attention import attention, attention_backend
from mvd_kernels.masked_distance import masked_distance
from mvd_kernels.norm import LayerNorm
from mvd_kernels.tube_gather import tube_pixels, tube_rows

__all__ = ["LayerNorm", "attention", "attention_backend", "masked_distance", "tube_pixels", "tube_rows"]
