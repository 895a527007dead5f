"""g of Eq. 1: from visible tokens to the features of masked ones.

Legend: B clips, V visible, M masked, E encoder width, D decoder width, K channels of the target.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mvd_kernels import LayerNorm, decoder_input
from mvd_scale.config import DecoderConfig, ModelConfig
from mvd_scale.models.blocks import Blocks, initialise
from mvd_scale.models.positions import position_table


class Decoder(nn.Module):
    """A shallow transformer over visible and mask tokens with a linear head (Sec. 3.3, "Decoder")."""

    positions: Tensor

    def __init__(self, config: DecoderConfig, encoder: ModelConfig, out_channels: int) -> None:
        super().__init__()
        assert encoder.width is not None
        self.embed = nn.Linear(encoder.width, config.width, bias=config.embed_bias)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, config.width))
        table = position_table(encoder.positions, encoder.grid, config.width)
        self.register_buffer("positions", table, persistent=False)
        self.blocks = Blocks(config.width, config.depth, config.heads, encoder.mlp_ratio)
        self.norm = LayerNorm(config.width)
        self.head = nn.Linear(config.width, out_channels)
        self.apply(initialise)
        nn.init.normal_(self.mask_token, std=0.02)

    def forward(self, encoded: Tensor, visible: Tensor, masked: Tensor) -> Tensor:
        """Predict the target at masked tokens.

        Args:
            encoded: (B, V, E), or (B, 1 + V, E) with a class token in front.
            visible: int64 (B, V).
            masked: int64 (B, M).

        Returns:
            (B, M, K), in the order of `masked`.
        """
        tokens = decoder_input(self.embed(encoded), self.mask_token, self.positions, visible, masked)
        predictions: Tensor = self.head(self.norm(self.blocks(tokens, masked.shape[1])))
        return predictions
