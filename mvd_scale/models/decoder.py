"""Decoders (g of Eq. 1): prediction of features at masked tokens from encoded visible tokens.

Legend: B clips, V visible, M masked, E encoder width, D decoder width, K channels of the target, G decoders.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from mvd_kernels import LayerNorm, decoder_input
from mvd_scale.config import DecoderConfig, ModelConfig
from mvd_scale.config.target import DecoderKind
from mvd_scale.models.blocks import Blocks
from mvd_scale.models.grouped import GroupedLinear, grouped_blocks
from mvd_scale.models.initialization import init_mask_token, init_pretrain_weights
from mvd_scale.models.layers.shared_rows import MaskPlaces
from mvd_scale.models.positions import position_table


class Decoder(nn.Module):
    """A shallow transformer over visible and mask tokens with a linear head (Sec. 3.3, "Decoder")."""

    positions: Tensor

    def __init__(
        self, config: DecoderConfig, encoder: ModelConfig, out_channels: int, *, predicts_visible: bool = False
    ) -> None:
        """Build the decoder with random weights.

        Args:
            config: shape of the decoder.
            encoder: shape of the encoder.
            out_channels: channels of the target, K.
            predicts_visible: whether it predicts visible tokens too, in front of the masked ones.
        """
        super().__init__()
        assert encoder.width is not None
        self.config = config
        self.predicts_visible = predicts_visible
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

    @property
    def kind(self) -> DecoderKind:
        """Kind of the decoder: those of one kind can be batched."""
        return self.config, self.predicts_visible

    def forward(self, encoded: Tensor, visible: Tensor, masked: Tensor) -> Tensor:
        """Predict the target at masked tokens, or at visible and masked tokens.

        Args:
            encoded: (B, V, E), or (B, 1 + V, E) with a class token in front.
            visible: int64 (B, V).
            masked: int64 (B, M).

        Returns:
            (B, M, K), in the order of `masked`; (B, V + M, K) if it predicts visible tokens, which come first.
        """
        tokens, places = first_tokens(self.embed(encoded), self.mask_token, self.positions, visible, masked)
        predictions: Tensor = self.head(self.norm(self.blocks(tokens, self.outputs(visible, masked), places=places)))
        return predictions

    def outputs(self, visible: Tensor, masked: Tensor) -> int:
        """Number of tokens at the end of a clip that are predicted."""
        return masked.shape[1] + (visible.shape[1] if self.predicts_visible else 0)


class GroupedDecoders(nn.Module):
    """Batched pass of several decoders of one shape, each with its own weights and its own head."""

    def __init__(self, decoders: Mapping[str, Decoder]) -> None:
        """Group decoders of one shape and of the same tokens, given by target name; they remain submodules of the
        student only."""
        super().__init__()
        self.decoders = tuple(decoders.items())
        self.embed = GroupedLinear(decoder.embed for decoder in decoders.values())
        self.blocks = grouped_blocks(decoder.blocks for decoder in decoders.values())

    def forward(self, encoded: Tensor, visible: Tensor, masked: Tensor) -> dict[str, Tensor]:
        """Predict with every decoder, with arguments and results of `Decoder.forward`, by target name."""
        count, first = len(self.decoders), self.decoders[0][1]
        embedded = self.embed.forward_grouped(encoded.expand(count, -1, -1, -1)).flatten(0, 1)
        mask_tokens = torch.cat([decoder.mask_token for _, decoder in self.decoders])
        tokens, places = first_tokens(embedded, mask_tokens, first.positions, visible, masked)
        parts = self.blocks(tokens, first.outputs(visible, masked), places=places).chunk(count)
        return {
            name: decoder.head(decoder.norm(part)) for (name, decoder), part in zip(self.decoders, parts, strict=True)
        }


def first_tokens(
    embedded: Tensor, mask_token: Tensor, positions: Tensor, visible: Tensor, masked: Tensor
) -> tuple[Tensor, MaskPlaces | None]:
    """Make the input of the first block of decoders, see `decoder_input`.

    Mask tokens are equal in all clips but for their positions. If the clips have more of them than there are positions,
    the block gets one row for each position, and its places in the clips.

    Args:
        embedded: (G B, P + V, D), with P class tokens in front.
        mask_token: (G, 1, D).
        positions: (N, D).
        visible: int64 (B, V).
        masked: int64 (B, M).

    Returns:
        tokens (G B, P + V + M, D) and None; or rows (G, B (P + V) + N, D) and the places of the last N.
    """
    places = MaskPlaces(masked, len(positions))
    if not places.saves():
        return decoder_input(embedded, mask_token, positions, visible, masked), None
    seen = decoder_input(embedded, mask_token, positions, visible, masked[:, :0])
    hidden = mask_token.to(seen.dtype) + positions.to(seen.dtype)
    return torch.cat([seen.unflatten(0, (len(mask_token), -1)).flatten(1, 2), hidden], dim=1), places
