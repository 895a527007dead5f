"""The distance of Eq. 2 between predictions and teacher features at masked tokens.

Legend: B clips, N tokens, M masked tokens, D channels.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from mvd_kernels.dispatch import takes_kernel
from mvd_kernels.twins.masked_distance import masked_distance as twin

Distance = Literal["smooth_l1", "l1", "l2", "cosine"]


def masked_distance(
    predictions: Tensor, features: Tensor, masked: Tensor | None, *, distance: Distance, norm: bool = False
) -> Tensor:
    """Mean distance over clips, masked tokens and channels, in float32 (Eq. 2).

    The kernel reads each row of both once, forward and backward, and copies none. Its sums have a fixed order: the same
    input gives the same bits.

    Args:
        predictions: (B, M, D), any floating dtype.
        features: (B, N, D) of all tokens; (B, M, D) of the chosen ones if `masked` is None. No gradient flows here.
        masked: int64 (B, M), the tokens of `features` to compare with.
        distance: smooth L1 (beta 1), L1, L2 (squared error), or 1 minus the cosine of a token's channels.
        norm: take features through a LayerNorm without affine (eps 1e-6) first.

    Returns:
        float32 scalar.
    """
    if takes_kernel(predictions):
        from mvd_kernels.fused.masked_distance import masked_distance as fused

        return fused(predictions, features, masked, distance=distance, norm=norm)
    return twin(predictions, features, masked, distance=distance, norm=norm)
