"""The pre-trained model of every method: one encoder and one head per target.

Legend: B clips, T frames, H W pixels, N tokens, V visible, M masked, K channels of a target.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Protocol, Self

from torch import Tensor, nn

from mvd_scale.config import DecoderConfig, HeadConfig, ModelConfig, Recipe
from mvd_scale.config.target import group_decoders
from mvd_scale.models.decoder import Decoder, GroupedDecoders
from mvd_scale.models.encoder import Encoder
from mvd_scale.models.heads import TokenHead


class PredictedTarget(Protocol):
    """Properties of a target that its head depends on."""

    channels: int
    """Number of channels (K)."""


class Student(nn.Module):
    """Encoder over visible tokens, and a decoder or token head with its own weights per target (Sec. 3.2, 3.3)."""

    def __init__(
        self, config: ModelConfig, heads: Mapping[str, tuple[HeadConfig, int]], dense: Collection[str] = ()
    ) -> None:
        """Build the student with random weights.

        Args:
            config: shape of the encoder.
            heads: shape and output channels of the head of each target, by target name.
            dense: targets whose decoders predict visible tokens too.
        """
        super().__init__()
        self.encoder = Encoder(config)
        self.decoders, self.heads, self.grouped_decoders = nn.ModuleDict(), nn.ModuleDict(), nn.ModuleList()
        for name, (head, channels) in heads.items():
            if isinstance(head, DecoderConfig):
                self.decoders[name] = Decoder(head, config, channels, predicts_visible=name in dense)
            else:
                self.heads[name] = TokenHead(head, config, channels)

    @classmethod
    def from_recipe(cls, recipe: Recipe, targets: Mapping[str, PredictedTarget]) -> Self:
        """Build the student of a recipe with random weights and a head per target, in the order of `targets`."""
        heads = {name: (recipe.targets[name].head_config, target.channels) for name, target in targets.items()}
        return cls(recipe.model, heads, [name for name in targets if recipe.targets[name].visible_weight])

    def groups_by_shape(self) -> list[dict[str, Decoder]]:
        """Group decoders of the same shape that predict the same tokens: one {target name: decoder} per group of at
        least two."""
        decoders: dict[str, Decoder] = {}
        for name, decoder in self.decoders.items():
            assert isinstance(decoder, Decoder)
            decoders[name] = decoder
        groups = group_decoders({name: decoder.kind for name, decoder in decoders.items()})
        return [{name: decoders[name] for name in group} for group in groups]

    def batch_decoders(self) -> None:
        """Run decoders of the same shape as one batched pass in all following calls of `forward`."""
        self.grouped_decoders = nn.ModuleList(GroupedDecoders(group) for group in self.groups_by_shape())

    def forward(self, pixels: Tensor, visible: Tensor, masked: Tensor) -> dict[str, Tensor]:
        """Predict every target: decoders at the masked tokens (or the visible, then the masked), token heads at the
        visible tokens.

        Args:
            pixels: uint8 (B, T, H, W, 3).
            visible: int64 (B, V).
            masked: int64 (B, M).

        Returns:
            {target name: (B, M, K), (B, V + M, K) or (B, V, K)}.
        """
        everything = visible.shape[1] == len(self.encoder.positions)
        encoded = self.encoder(pixels, None if everything else visible)
        predictions = {name: head(encoded, visible) for name, head in self.heads.items()}
        for group in self.grouped_decoders:
            predictions |= group(encoded, visible, masked)
        # In the order of construction, which is the same on all ranks: ZeRO-3 gathers weights in this order.
        apart = {name: decoder for name, decoder in self.decoders.items() if name not in predictions}
        return predictions | {name: decoder(encoded, visible, masked) for name, decoder in apart.items()}
