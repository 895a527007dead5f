"""The trained model of every method: one encoder and a head per target.

Legend: B clips, T frames, H W pixels, N tokens, V visible, M masked, K channels of a target.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from mvd_scale.config import DecoderConfig, HeadConfig, ModelConfig
from mvd_scale.models.decoder import Decoder
from mvd_scale.models.encoder import Encoder
from mvd_scale.models.heads import TokenHead


class Student(nn.Module):
    """Encoder over visible tubes; separate decoders with separate weights (Sec. 3.2, 3.3, Algorithm 1)."""

    def __init__(self, config: ModelConfig, heads: Mapping[str, tuple[HeadConfig, int]]) -> None:
        """Build from the encoder's shape and, by target name, a head's shape and its output channels."""
        super().__init__()
        self.encoder = Encoder(config)
        self.decoders, self.heads = nn.ModuleDict(), nn.ModuleDict()
        for name, (head, channels) in heads.items():
            if isinstance(head, DecoderConfig):
                self.decoders[name] = Decoder(head, config, channels)
            else:
                self.heads[name] = TokenHead(head, config, channels)

    def forward(self, pixels: Tensor, visible: Tensor, masked: Tensor) -> dict[str, Tensor]:
        """Predict every target: by decoders at the masked tokens, by other heads at the visible ones.

        Args:
            pixels: uint8 (B, T, H, W, 3).
            visible: int64 (B, V).
            masked: int64 (B, M).

        Returns:
            {target name: (B, M, K) or (B, V, K)}.
        """
        everything = visible.shape[1] == len(self.encoder.positions)
        encoded = self.encoder(pixels, None if everything else visible)
        predictions = {name: decoder(encoded, visible, masked) for name, decoder in self.decoders.items()}
        return predictions | {name: head(encoded, visible) for name, head in self.heads.items()}
