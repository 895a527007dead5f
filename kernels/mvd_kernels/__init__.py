"""Operators of the distillation step: Triton kernels on GPUs, plain torch elsewhere. Does not import `mvd_scale`.

Each operator has five files of the same name: one here (its contract, and the choice of the implementation), one in
`reference` (plain torch), one in `triton_ops` (Triton kernels, their launch and autograd), one in `bench`, and a
test. `native` contains C++ versions of the few operators that are faster with one on CPUs. `linear` and `cpu_attention`
compute bfloat16 on CPUs in the ways that they are told; `cpu_trial` times these ways.
"""

from mvd_kernels.add_layer_norm import add_layer_norm
from mvd_kernels.attention import attention, attention_backend, attention_backends
from mvd_kernels.cpu_attention import AttentionWays
from mvd_kernels.decoder_input import decoder_input
from mvd_kernels.int8_linear import Int8Linear
from mvd_kernels.linear import Linear, LinearWays, linear
from mvd_kernels.masked_distance import masked_distance
from mvd_kernels.native.attention import bf16_instructions
from mvd_kernels.norm import AddLayerNorm, LayerNorm
from mvd_kernels.tube_rows import tube_rows
from mvd_kernels.tube_targets import tube_pixels, tube_targets
from mvd_kernels.tubes import max_pixel_value

__all__ = [
    "AddLayerNorm",
    "AttentionWays",
    "Int8Linear",
    "LayerNorm",
    "Linear",
    "LinearWays",
    "add_layer_norm",
    "attention",
    "attention_backend",
    "attention_backends",
    "bf16_instructions",
    "decoder_input",
    "linear",
    "masked_distance",
    "max_pixel_value",
    "tube_pixels",
    "tube_rows",
    "tube_targets",
]
