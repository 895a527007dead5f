"""`decoder_input` in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor


def decoder_input(embedded: Tensor, mask_token: Tensor, positions: Tensor, visible: Tensor, masked: Tensor) -> Tensor:
    """See `mvd_kernels.decoder_input`."""
    positions = positions.detach().to(embedded.dtype)
    class_tokens, seen = embedded.split([embedded.shape[1] - visible.shape[1], visible.shape[1]], dim=1)
    hidden = mask_token.to(embedded.dtype) + positions[masked]
    return torch.cat([class_tokens, seen + positions[visible], hidden], dim=1)
