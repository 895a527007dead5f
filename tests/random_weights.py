"""Random weights for comparisons with models of other packages."""

from __future__ import annotations

import torch
from torch import nn


def randomise(module: nn.Module) -> None:
    """Draw all parameters anew, so that none of them is 0 or 1 as after the start."""
    generator = torch.Generator().manual_seed(3)
    for name, parameter in module.named_parameters():
        offset = 1.0 if "norm" in name and name.endswith("weight") else 0.0
        scale = 0.06 if parameter.ndim > 1 else 0.5
        parameter.data = offset + scale * torch.randn(parameter.shape, generator=generator)
