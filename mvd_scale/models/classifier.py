"""The fine-tuned classifier: encoder over all tokens, mean pooling, norm, linear head.

Legend: B clips, T frames, H W pixels, C classes.
"""

from __future__ import annotations

from torch import Tensor, nn

from mvd_kernels import LayerNorm
from mvd_scale.config import ModelConfig
from mvd_scale.models.encoder import Encoder
from mvd_scale.models.initialization import init_finetune_weights


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
        init_finetune_weights(self.encoder.blocks, self.head, init_scale)

    def forward(self, pixels: Tensor) -> Tensor:
        """Compute class scores (logits) of clips: uint8 (B, T, H, W, 3) to (B, C)."""
        tokens = self.encoder(pixels)
        scores: Tensor = self.head(self.dropout(self.norm(tokens.mean(dim=1))))
        return scores
