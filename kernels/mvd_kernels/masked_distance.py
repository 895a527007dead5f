"""Distance of Eq. 2 between predictions and teacher features at masked tokens.

Legend: B clips, N tokens, M masked tokens, D channels.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from mvd_kernels.dispatch import uses_triton
from mvd_kernels.reference.masked_distance import masked_distance as reference

Distance = Literal["smooth_l1", "l1", "l2", "cosine"]


def masked_distance(
    predictions: Tensor, features: Tensor, masked: Tensor | None, *, distance: Distance, norm: bool = False
) -> Tensor:
    """Compute the mean distance over clips, masked tokens and channels in float32 (Eq. 2).

    The kernel reads each row of both tensors once in the forward and once in the backward pass, without a copy. It adds
    in a fixed order: the same input gives the same bits.

    Args:
        predictions: (B, M, D), any floating dtype.
        features: (B, N, D) at all tokens, or (B, M, D) at the masked ones if `masked` is None. No gradient flows here.
        masked: int64 (B, M), the tokens of `features` that the predictions are compared with.
        distance: smooth L1 (beta 1), L1, L2 (squared error), or 1 minus the cosine similarity over channels.
        norm: first apply a LayerNorm without affine parameters (eps 1e-6) to the features.

    Returns:
        float32 scalar.
    """
    if uses_triton(predictions):
        from mvd_kernels.triton_ops.masked_distance import masked_distance as fused

        return fused(predictions, features, masked, distance=distance, norm=norm)
    return reference(predictions, features, masked, distance=distance, norm=norm)
