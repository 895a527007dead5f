"""The trained model of every method: one encoder and a decoder per target.

Legend: B clips, T frames, H W pixels, V visible, M masked, K channels of a target.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from mvd_scale.config import DecoderConfig, ModelConfig
from mvd_scale.models.blocks import Blocks
from mvd_scale.models.decoder import Decoder
from mvd_scale.models.encoder import Encoder


class Student(nn.Module):
    """Encoder over visible tubes; separate decoders with separate weights (Sec. 3.2, 3.3, Algorithm 1)."""

    def __init__(self, config: ModelConfig, decoders: Mapping[str, tuple[DecoderConfig, int]]) -> None:
        """Build from the encoder's shape and, by target name, a decoder's shape and its output channels."""
        super().__init__()
        self.encoder = Encoder(config)
        self.decoders = nn.ModuleDict(
            {name: Decoder(decoder, config, channels) for name, (decoder, channels) in decoders.items()}
        )

    def checkpoint_gradients(self) -> None:
        """Recompute each block in the backward pass instead of keeping its activations."""
        for module in self.modules():
            if isinstance(module, Blocks):
                module.gradient_checkpointing = True

    def forward(self, pixels: Tensor, visible: Tensor, masked: Tensor) -> dict[str, Tensor]:
        """Predict every target at the masked tokens.

        Args:
            pixels: uint8 (B, T, H, W, 3).
            visible: int64 (B, V).
            masked: int64 (B, M).

        Returns:
            {target name: (B, M, K)}.
        """
        encoded = self.encoder(pixels, visible)
        return {name: decoder(encoded, visible, masked) for name, decoder in self.decoders.items()}
