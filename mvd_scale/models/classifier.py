"""The fine-tuned classifier: encoder over all tokens, mean pooling, norm, linear head.

Legend: B clips, T frames, H W pixels, C classes.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mvd_kernels import LayerNorm
from mvd_scale.config import ModelConfig
from mvd_scale.models.blocks import QKV
from mvd_scale.models.encoder import Encoder


class Classifier(nn.Module):
    """Encoder over all tokens with joint space-time attention, and a head (Sec. 3.3, Tables 3 to 5)."""

    def __init__(self, config: ModelConfig, classes: int, *, dropout: float = 0.0, init_scale: float = 1.0) -> None:
        """Build with random weights.

        Args:
            config: shape of the encoder.
            classes: outputs of the head, C.
            dropout: rate of the dropout before the head.
            init_scale: factor on the head's initial weights.
        """
        super().__init__()
        self.encoder = Encoder(config, final_norm=False)
        self.norm = LayerNorm(self.encoder.width)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(self.encoder.width, classes)
        self.apply(init_finetune_weights)
        with torch.no_grad():
            self.head.weight *= init_scale

    def forward(self, pixels: Tensor) -> Tensor:
        """Compute class scores (logits) of clips: uint8 (B, T, H, W, 3) to (B, C)."""
        tokens = self.encoder(pixels)
        scores: Tensor = self.head(self.dropout(self.norm(tokens.mean(dim=1))))
        return scores


def init_finetune_weights(module: nn.Module) -> None:
    """Initialise one module for fine-tuning as published, before an encoder is loaded; meant for `Module.apply`."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)
    elif isinstance(module, QKV):
        nn.init.trunc_normal_(module.weight, std=0.02)
