"""The distance of Eq. 2 between predictions and teacher features at masked tokens.

Legend: B clips, N tokens, M masked tokens, D channels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

Distance = Literal["smooth_l1", "l1", "l2", "cosine"]


def _cosine(predictions: Tensor, features: Tensor) -> Tensor:
    return 1 - F.cosine_similarity(predictions, features, dim=-1).mean()


_DISTANCES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "smooth_l1": F.smooth_l1_loss,
    "l1": F.l1_loss,
    "l2": F.mse_loss,
    "cosine": _cosine,
}


def masked_distance(
    predictions: Tensor, features: Tensor, masked: Tensor | None, *, distance: Distance, norm: bool = False
) -> Tensor:
    """Mean distance over clips, masked tokens and channels, in float32.

    Args:
        predictions: (B, M, D), any floating dtype.
        features: (B, N, D) of all tokens; (B, M, D) of the chosen ones if `masked` is None. No gradient flows here.
        masked: int64 (B, M), the tokens of `features` to compare with.
        distance: smooth L1 (beta 1), L1, L2 (squared error), or 1 minus the cosine of a token's channels.
        norm: take features through a LayerNorm without affine (eps 1e-6) first.

    Returns:
        float32 scalar.
    """
    features = features.detach()
    if masked is not None:
        clip = torch.arange(features.shape[0], device=features.device).unsqueeze(1)
        features = features[clip, masked]
    features = features.float()
    if norm:
        features = F.layer_norm(features, features.shape[-1:], eps=1e-6)
    return _DISTANCES[distance](predictions.float(), features)
