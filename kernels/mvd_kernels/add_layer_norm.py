"""Residual connection and the LayerNorm that follows it, as one operator.

Legend: D channels; all other axes are rows; G norms.
"""

from __future__ import annotations

from torch import Tensor

from mvd_kernels.dispatch import uses_triton
from mvd_kernels.reference.add_layer_norm import add_layer_norm as reference


def add_layer_norm(
    residual: Tensor, update: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """Compute `residual + update` and its LayerNorm over the last axis in one pass; statistics in float32.

    Gradients flow to all four tensors. Those of `weight` and `bias` are summed in a fixed order.

    Args:
        residual: (..., D), any floating dtype.
        update: same shape and dtype.
        weight: (D,), same dtype; or (G, D), one norm for each of G equal parts of the first axis of `residual`.
        bias: same shape and dtype as `weight`.
        eps: added to the variance.

    Returns:
        The sum and the normalised sum, both (..., D) in the dtype of the input.

    Raises:
        ValueError: `residual` and `update` differ in shape or dtype (there is no broadcasting), `weight` and `bias`
            differ in shape, or the length of the first axis is no multiple of G.
    """
    if residual.shape != update.shape or residual.dtype != update.dtype:
        raise ValueError(
            f"residual {residual.dtype} {tuple(residual.shape)} and update {update.dtype} {tuple(update.shape)} "
            "must have the same shape and dtype"
        )
    if weight.shape != bias.shape:
        raise ValueError(f"weight {tuple(weight.shape)} and bias {tuple(bias.shape)} must have the same shape")
    if weight.dim() == 2 and len(residual) % len(weight):
        raise ValueError(f"{len(weight)} norms for {len(residual)} entries of the first axis: expected a multiple")
    if uses_triton(residual):
        from mvd_kernels.triton_ops.add_layer_norm import add_layer_norm as fused

        return fused(residual, update, weight, bias, eps)
    return reference(residual, update, weight, bias, eps)
