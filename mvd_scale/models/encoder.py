"""f of Eq. 1: a plain vision transformer that embeds only the tokens it is asked for.

Legend: B clips, T frames, H W pixels, N tokens, K chosen tokens, D width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mvd_kernels import LayerNorm, tube_rows
from mvd_scale.config import ModelConfig
from mvd_scale.models.blocks import Blocks, initialise
from mvd_scale.models.positions import position_table, resize_positions

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Patching:
    """How clips become rows of a patch embedding."""

    tubelet: int
    patch: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    dtype: torch.dtype

    def rows(self, pixels: Tensor, tokens: Tensor | None = None) -> Tensor:
        """Pixels as `Encoder.forward` takes them to (B, K, t p p 3), for some tokens or all."""
        shape = {"tubelet": self.tubelet, "patch": self.patch}
        return tube_rows(pixels, tokens, **shape, mean=self.mean, std=self.std, dtype=self.dtype)


class Encoder(nn.Module):
    """Tubelet embedding, fixed positions, blocks and a final norm (Sec. 3.3, "Encoder").

    Teachers and classifiers have no final norm: features are the output of the last block.
    """

    positions: Tensor

    def __init__(self, config: ModelConfig, *, final_norm: bool = True) -> None:
        super().__init__()
        assert config.width is not None
        assert config.depth is not None
        assert config.heads is not None
        self.config = config
        self.mean, self.std = IMAGENET_MEAN, IMAGENET_STD
        self.patch_embed = nn.Linear(3 * config.tubelet * config.patch_size**2, config.width)
        self.class_token = nn.Parameter(torch.zeros(1, 1, config.width)) if config.class_token else None
        table = position_table(config.positions, config.grid, config.width)
        self.register_buffer("positions", table, persistent=False)
        self.blocks = Blocks(config.width, config.depth, config.heads, config.mlp_ratio, config.drop_path)
        self.norm = LayerNorm(config.width) if final_norm else None
        self.apply(initialise)
        if self.class_token is not None:
            nn.init.normal_(self.class_token, std=0.02)

    def store_positions(self, table: Tensor) -> None:
        """Add a table of the model's own, (N, D), instead of the fixed one, and keep it in the state dict."""
        self.register_buffer("positions", table)

    @property
    def width(self) -> int:
        """D."""
        return self.patch_embed.out_features

    def grid_of(self, pixels: Tensor) -> tuple[int, int, int]:
        """Tokens of clips (B, T, H, W, 3) along time, height and width."""
        _, frames, height, width, _ = pixels.shape
        return frames // self.config.tubelet, height // self.config.patch_size, width // self.config.patch_size

    def _positions_of(self, pixels: Tensor) -> Tensor:
        grid = self.grid_of(pixels)
        return self.positions if grid == self.config.grid else resize_positions(self.positions, self.config.grid, grid)

    @property
    def patching(self) -> Patching:
        """How its clips become rows."""
        shape, dtype = self.config, self.patch_embed.weight.dtype
        return Patching(shape.tubelet, shape.patch_size, self.mean, self.std, dtype)

    def forward(
        self, pixels: Tensor, tokens: Tensor | None = None, kept: Tensor | None = None, rows: Tensor | None = None
    ) -> Tensor:
        """Encode the chosen tokens of each clip.

        Frames of another size than the model's are seen whole by a table of positions that is resized to them.

        Args:
            pixels: (B, T, H, W, 3), uint8 in 0..255 or floating in 0..1.
            tokens: int64 (B, K) indices of the tokens to see, or None for all.
            kept: int64 (B, M) places among those seen whose features are wanted, or None for all and a class token.
            rows: (B, K, t p p 3), the clips as `patching` makes rows of them, if that was done before.

        Returns:
            (B, K, D) in the dtype of the weights, one more token in front if the model has a class token;
            (B, M, D) with `kept`.
        """
        if rows is None:
            rows = self.patching.rows(pixels, tokens)
        # As one matrix, whose rows may lie apart.
        embedded = self.patch_embed(rows.flatten(0, 1)).unflatten(0, rows.shape[:2])
        positions = self._positions_of(pixels).to(embedded.dtype)
        encoded = embedded + (positions if tokens is None else positions[tokens])
        if self.class_token is not None:
            encoded = torch.cat([self.class_token.expand(encoded.shape[0], -1, -1), encoded], dim=1)
        if kept is not None and self.class_token is not None:
            kept = kept + 1
        encoded = self.blocks(encoded, kept)
        return encoded if self.norm is None else self.norm(encoded)
