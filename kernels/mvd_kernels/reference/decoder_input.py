"""`decoder_input` in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor


def decoder_input(embedded: Tensor, mask_token: Tensor, positions: Tensor, visible: Tensor, masked: Tensor) -> Tensor:
    """See `mvd_kernels.decoder_input`."""
    positions = positions.detach().to(embedded.dtype)
    inputs = embedded.unflatten(0, (len(mask_token), -1))
    class_tokens, seen = inputs.split([inputs.shape[2] - visible.shape[1], visible.shape[1]], dim=2)
    hidden = mask_token.unsqueeze(1).to(embedded.dtype) + positions[masked]
    return torch.cat([class_tokens, seen + positions[visible], hidden], dim=2).flatten(0, 1)
