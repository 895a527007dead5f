"""Heads on the encoder's tokens: feature distillation uses them in place of mask tokens and a decoder (Sec. 4.3).

Legend: B clips, V visible, E encoder width, K channels of the target.
"""

from __future__ import annotations

from torch import Tensor, nn

from mvd_scale.config import ModelConfig, TokenHeadConfig
from mvd_scale.models.initialization import init_pretrain_weights


class TokenHead(nn.Module):
    """Linear layer or MLP that is applied to every token."""

    def __init__(self, config: TokenHeadConfig, encoder: ModelConfig, out_channels: int) -> None:
        super().__init__()
        assert encoder.width is not None
        self.layers: nn.Module
        if config.kind == "linear":
            self.layers = nn.Linear(encoder.width, out_channels)
        else:
            hidden = config.hidden or encoder.width
            self.layers = nn.Sequential(nn.Linear(encoder.width, hidden), nn.GELU(), nn.Linear(hidden, out_channels))
        self.apply(init_pretrain_weights)

    def forward(self, encoded: Tensor, visible: Tensor) -> Tensor:
        """Predict the target at visible tokens.

        Args:
            encoded: (B, V, E), or (B, 1 + V, E) with a class token in front, which is dropped.
            visible: int64 (B, V).

        Returns:
            (B, V, K), in the order of `visible`.
        """
        predictions: Tensor = self.layers(encoded[:, encoded.shape[1] - visible.shape[1] :])
        return predictions
