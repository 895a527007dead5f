"""`masked_distance` in plain torch."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F


def _cosine(predictions: Tensor, features: Tensor) -> Tensor:
    return 1 - F.cosine_similarity(predictions, features, dim=-1).mean()


_DISTANCES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "smooth_l1": F.smooth_l1_loss,
    "l1": F.l1_loss,
    "l2": F.mse_loss,
    "cosine": _cosine,
}


def masked_distance(
    predictions: Tensor, features: Tensor, masked: Tensor | None, *, distance: str, norm: bool = False
) -> Tensor:
    """See `mvd_kernels.masked_distance`."""
    features = features.detach()
    if masked is not None:
        clip = torch.arange(features.shape[0], device=features.device).unsqueeze(1)
        features = features[clip, masked]
    features = features.float()
    if norm:
        features = F.layer_norm(features, features.shape[-1:], eps=1e-6)
    return _DISTANCES[distance](predictions.float(), features)
