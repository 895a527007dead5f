"""Decoders (g of Eq. 1): prediction of features at masked tokens from encoded visible tokens.

Legend: B clips, V visible, M masked, E encoder width, D decoder width, K channels of the target, G decoders.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from mvd_kernels import LayerNorm, decoder_input
from mvd_scale.config import DecoderConfig, ModelConfig
from mvd_scale.models.blocks import Blocks
from mvd_scale.models.grouped import GroupedLinear, grouped_blocks
from mvd_scale.models.initialization import init_mask_token, init_pretrain_weights
from mvd_scale.models.positions import position_table


class Decoder(nn.Module):
    """A shallow transformer over visible and mask tokens with a linear head (Sec. 3.3, "Decoder")."""

    positions: Tensor

    def __init__(self, config: DecoderConfig, encoder: ModelConfig, out_channels: int) -> None:
        super().__init__()
        assert encoder.width is not None
        self.config = config
        self.embed = nn.Linear(encoder.width, config.width, bias=config.embed_bias)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, config.width))
        table = position_table(encoder.positions, encoder.grid, config.width)
        self.register_buffer("positions", table, persistent=False)
        drop_path = encoder.drop_path if config.drop_path is None else config.drop_path
        self.blocks = Blocks(config.width, config.depth, config.heads, encoder.mlp_ratio, drop_path)
        self.norm = LayerNorm(config.width)
        self.head = nn.Linear(config.width, out_channels)
        self.blocks.apply(init_pretrain_weights)
        init_pretrain_weights(self.head)
        if config.embed_bias:
            init_pretrain_weights(self.embed)
        init_mask_token(self.mask_token, encoder)

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


class GroupedDecoders(nn.Module):
    """Batched pass of several decoders of one shape, each with its own weights and its own head."""

    def __init__(self, decoders: Mapping[str, Decoder]) -> None:
        """Group decoders of one `DecoderConfig`, given by target name; they remain submodules of the student only."""
        super().__init__()
        self.decoders = tuple(decoders.items())
        self.embed = GroupedLinear(decoder.embed for decoder in decoders.values())
        self.blocks = grouped_blocks(decoder.blocks for decoder in decoders.values())

    def forward(self, encoded: Tensor, visible: Tensor, masked: Tensor) -> dict[str, Tensor]:
        """Predict with every decoder, with the arguments of `Decoder.forward`: {target name: (B, M, K)}."""
        count, positions = len(self.decoders), self.decoders[0][1].positions
        embedded = self.embed.forward_grouped(encoded.expand(count, -1, -1, -1)).flatten(0, 1)
        mask_tokens = torch.cat([decoder.mask_token for _, decoder in self.decoders])
        tokens = decoder_input(embedded, mask_tokens, positions, visible, masked)
        parts = self.blocks(tokens, masked.shape[1]).chunk(count)
        return {
            name: decoder.head(decoder.norm(part)) for (name, decoder), part in zip(self.decoders, parts, strict=True)
        }
