"""The encoder (f of Eq. 1): a plain vision transformer that can embed a subset of the tokens.

Legend: B clips, T frames, H W pixels, N tokens, K chosen tokens, D width, C channels of a head.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mvd_kernels import LayerNorm, tube_rows
from mvd_scale.config import ModelConfig
from mvd_scale.models.blocks import Blocks
from mvd_scale.models.initialization import init_patch_embed, init_pretrain_weights
from mvd_scale.models.layers.rotary import rotation_table
from mvd_scale.models.positions import encoder_positions, resize_positions

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Patchify:
    """Parameters of the conversion of clips to rows of a patch embedding."""

    tubelet: int
    patch: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    dtype: torch.dtype

    def rows(self, pixels: Tensor, tokens: Tensor | None = None) -> Tensor:
        """Extract the normalised pixels of tubelets.

        Args:
            pixels: (B, T, H, W, 3), uint8 in 0..255 or floating in 0..1.
            tokens: int64 (B, K), or None for all tokens.

        Returns:
            (B, K, t p p 3) in `dtype`.
        """
        shape = {"tubelet": self.tubelet, "patch": self.patch}
        return tube_rows(pixels, tokens, **shape, mean=self.mean, std=self.std, dtype=self.dtype)


class Encoder(nn.Module):
    """Tubelet embedding, fixed positions, blocks and a final norm (Sec. 3.3, "Encoder").

    Teachers and classifiers have no final norm: features are the output of the last block.
    """

    positions: Tensor
    """Table (N, D) that is added to the tokens; for rotary positions the rotation (2, N, C) of queries and keys."""

    def __init__(self, config: ModelConfig, *, final_norm: bool = True) -> None:
        super().__init__()
        assert config.width is not None
        assert config.depth is not None
        assert config.heads is not None
        self.config = config
        self.mean, self.std = IMAGENET_MEAN, IMAGENET_STD
        self.patch_embed = nn.Linear(3 * config.tubelet * config.patch_size**2, config.width)
        self.class_token = nn.Parameter(torch.zeros(1, 1, config.width)) if config.class_token else None
        self.register_buffer("positions", encoder_positions(config), persistent=False)
        shape = (config.width, config.depth, config.heads, config.mlp_ratio, config.drop_path)
        self.blocks = Blocks(*shape, key_bias=config.is_rotary, rms=config.rms_norm)
        self.norm = LayerNorm(config.width) if final_norm else None
        self.layers: tuple[int, ...] = ()
        """Blocks whose outputs are the features, see `Blocks.forward`."""
        init_patch_embed(self.patch_embed, config)
        self.blocks.apply(init_pretrain_weights)
        if self.class_token is not None:
            nn.init.normal_(self.class_token, std=0.02)

    def store_positions(self, table: Tensor) -> None:
        """Replace the fixed position table by another one (N, D), which becomes part of the state dict."""
        self.register_buffer("positions", table)

    @property
    def width(self) -> int:
        """Width D of the tokens."""
        return self.patch_embed.out_features

    def grid_of(self, pixels: Tensor) -> tuple[int, int, int]:
        """Number of tokens of clips (B, T, H, W, 3) along time, height and width."""
        _, frames, height, width, _ = pixels.shape
        return frames // self.config.tubelet, height // self.config.patch_size, width // self.config.patch_size

    def _positions_of(self, pixels: Tensor) -> Tensor:
        grid, model = self.grid_of(pixels), self.config
        if grid == model.grid:
            return self.positions
        if model.is_rotary:
            return rotation_table(model.positions, grid, model.head_width).to(self.positions)
        return resize_positions(self.positions, model.grid, grid)

    @property
    def patchify(self) -> Patchify:
        """Parameters of the conversion of this encoder's clips to rows, in the dtype of its weights."""
        shape, dtype = self.config, self.patch_embed.weight.dtype
        return Patchify(shape.tubelet, shape.patch_size, self.mean, self.std, dtype)

    def forward(
        self,
        pixels: Tensor,
        tokens: Tensor | None = None,
        output_tokens: Tensor | None = None,
        rows: Tensor | None = None,
    ) -> Tensor:
        """Encode all or some tokens of each clip.

        For frames of another size than the model's, the position table is interpolated to their grid; rotary
        positions are computed for it.

        Args:
            pixels: (B, T, H, W, 3), uint8 in 0..255 or floating in 0..1.
            tokens: int64 (B, K) indices of the tokens to encode, or None for all.
            output_tokens: int64 (B, M) positions among the encoded tokens whose features are returned, or None for all
                of them and the class token.
            rows: (B, K, t p p 3), result of `patchify.rows` if it was already computed.

        Returns:
            (B, K, D) in the dtype of the weights, preceded by the class token if the model has one; (B, M, D) with
            `output_tokens`. With L `layers`, L D channels.

        Raises:
            ValueError: some tokens are to be encoded by a model with rotary positions.
        """
        rotary = self.config.is_rotary
        if rotary and tokens is not None:
            raise ValueError("a model with rotary positions encodes whole clips, not a part of their tokens")
        if rows is None:
            rows = self.patchify.rows(pixels, tokens)
        # As one matrix (B K, t p p 3): `rows` may be a strided view, which a 2-D product reads without a copy.
        embedded = self.patch_embed(rows.flatten(0, 1)).unflatten(0, rows.shape[:2])
        positions = self._positions_of(pixels)
        if rotary:
            encoded = embedded
        else:
            table = positions.to(embedded.dtype)
            encoded = embedded + (table if tokens is None else table[tokens])
        # Else they would be held while the blocks run.
        del rows, embedded
        if self.class_token is not None:
            encoded = torch.cat([self.class_token.expand(encoded.shape[0], -1, -1), encoded], dim=1)
        if output_tokens is not None and self.class_token is not None:
            output_tokens = output_tokens + 1
        encoded = self.blocks(encoded, output_tokens, positions if rotary else None, layers=self.layers)
        if self.norm is None:
            return encoded
        by_layer = encoded if len(self.layers) < 2 else encoded.unflatten(-1, (len(self.layers), -1))
        return self.norm(by_layer).view_as(encoded)
