"""`tube_targets` in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from mvd_kernels.reference.tubes import gather_tubes
from mvd_kernels.tubes import IMAGENET_MEAN, IMAGENET_STD, max_pixel_value


def tube_targets(pixels: Tensor, tokens: Tensor | None, *, tubelet: int, patch: int, normalize: str = "none") -> Tensor:
    """See `mvd_kernels.tube_targets`."""
    tubes = gather_tubes(pixels, tokens, tubelet, patch).flatten(2, 4).to(torch.float32) / max_pixel_value(pixels)
    if normalize == "channel":
        variance, mean = torch.var_mean(tubes, dim=2, keepdim=True)
        tubes = (tubes - mean) / (variance.sqrt() + 1e-6)
    elif normalize == "patch":
        tubes = _whiten(tubes)
        variance, mean = torch.var_mean(tubes, dim=(2, 3), keepdim=True)
        tubes = (tubes - mean) / (variance + 1e-6).sqrt()
    return tubes.flatten(2)


def _whiten(tubes: Tensor) -> Tensor:
    colours = zip(tubes.unbind(-1), IMAGENET_MEAN, IMAGENET_STD, strict=True)
    return torch.stack([(colour - mean) / std for colour, mean, std in colours], dim=-1)
