"""Transformers of one shape as one: their clips in one batch, each with its own weights in batched products.

Weights are stacked anew in every pass, which is little beside the tokens, and so stay what DeepSpeed shards and
checkpoints hold.

Legend: G transformers, B clips of each, N tokens, D width, E channels out.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from mvd_kernels import add_layer_norm
from mvd_scale.models.blocks import QKV, Block, Blocks


class _Together(nn.Module):
    """Layers of one shape that are called as one; they belong to others, which train and save their weights."""

    def __init__(self, layers: Iterable[Any]) -> None:
        super().__init__()
        # In a tuple, so that they are not taken for parts of this module.
        self.layers = tuple(layers)


class LinearTogether(_Together):
    """Layers `torch.nn.Linear` or `QKV`."""

    def forward(self, tokens: Tensor) -> Tensor:
        """(G B, N, D) to (G B, N, E)."""
        return self.of_each(tokens.unflatten(0, (len(self.layers), -1))).flatten(0, 1)

    def of_each(self, tokens: Tensor) -> Tensor:
        """(G, B, N, D) to (G, B, N, E)."""
        rows, weights = tokens.flatten(1, -2), torch.stack([layer.weight for layer in self.layers]).mT
        biases = [layer.bias() if isinstance(layer, QKV) else layer.bias for layer in self.layers]
        products = rows @ weights
        if biases[0] is not None:
            # Not `baddbmm`: on GPUs it copies the bias to every row first, and a compiler could not merge this.
            products.add_(torch.stack(biases).unsqueeze(1))
        return products.view(*tokens.shape[:-1], -1)


class NormTogether(_Together):
    """Layers `LayerNorm`."""

    def forward(self, tokens: Tensor) -> Tensor:
        """(G B, N, D), normalised."""
        parts = zip(self.layers, tokens.chunk(len(self.layers)), strict=True)
        return torch.cat([layer(part) for layer, part in parts])


class AddNormTogether(_Together):
    """Layers `AddLayerNorm`."""

    def forward(self, residual: Tensor, update: Tensor) -> tuple[Tensor, Tensor]:
        """`residual + update` and its norm, both (G B, N, D)."""
        weight = torch.stack([layer.weight for layer in self.layers])
        bias = torch.stack([layer.bias for layer in self.layers])
        return add_layer_norm(residual, update, weight, bias, self.layers[0].eps)


class BlockTogether(Block):
    """What `Block` computes, with the layers of several."""

    def __init__(self, blocks: tuple[Any, ...]) -> None:
        with torch.device("meta"):
            super().__init__(blocks[0].attn.proj.in_features, blocks[0].attn.heads, mlp_ratio=1.0, drop_path=0.0)
        self.norm1 = NormTogether(block.norm1 for block in blocks)
        self.attn.qkv = LinearTogether(block.attn.qkv for block in blocks)
        self.attn.proj = LinearTogether(block.attn.proj for block in blocks)
        self.norm2 = AddNormTogether(block.norm2 for block in blocks)
        self.mlp.fc1 = LinearTogether(block.mlp.fc1 for block in blocks)
        self.mlp.fc2 = LinearTogether(block.mlp.fc2 for block in blocks)


def blocks_together(stacks: Iterable[Blocks]) -> Blocks:
    """Stacks of one shape as one over (G B, N, D), the clips of the first of them first; it owns no parameters."""
    blocks = Blocks(0, 0, 1)
    blocks.whole = True
    blocks.extend(BlockTogether(level) for level in zip(*stacks, strict=True))
    return blocks
