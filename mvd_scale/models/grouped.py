"""Grouped transformers: several of the same shape run as one batch, each with its own weights in batched products.

The weights are stacked in every pass, so that the parameters that DeepSpeed shards and checkpoints contain stay the
separate ones. The copy is small compared with the tokens.

Legend: G transformers, B clips of each, N tokens, D width, E channels out.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from mvd_kernels import add_layer_norm
from mvd_scale.models.blocks import QKV, Block, Blocks


class _Grouped(nn.Module):
    """Group of layers of one shape that is called as one layer; other modules own, train and save their weights."""

    def __init__(self, layers: Iterable[Any]) -> None:
        super().__init__()
        # In a tuple, so that torch does not register them as submodules a second time.
        self.layers = tuple(layers)


class GroupedLinear(_Grouped):
    """Group of `torch.nn.Linear` or `QKV` layers."""

    def forward(self, tokens: Tensor) -> Tensor:
        """Apply each layer to its part of the batch: (G B, N, D) to (G B, N, E)."""
        return self.forward_grouped(tokens.unflatten(0, (len(self.layers), -1))).flatten(0, 1)

    def forward_grouped(self, tokens: Tensor) -> Tensor:
        """Apply each layer to its part of the batch: (G, B, N, D) to (G, B, N, E)."""
        rows, weights = tokens.flatten(1, -2), torch.stack([layer.weight for layer in self.layers]).mT
        biases = [layer.bias() if isinstance(layer, QKV) else layer.bias for layer in self.layers]
        products = rows @ weights
        if biases[0] is not None:
            # Not `baddbmm`: on GPUs it copies the bias to every row first, and a compiler could not merge this.
            products.add_(torch.stack(biases).unsqueeze(1))
        return products.view(*tokens.shape[:-1], -1)


class GroupedNorm(_Grouped):
    """Group of `LayerNorm` layers."""

    def forward(self, tokens: Tensor) -> Tensor:
        """Normalise each part of the batch by its layer: (G B, N, D) to (G B, N, D)."""
        parts = zip(self.layers, tokens.chunk(len(self.layers)), strict=True)
        return torch.cat([layer(part) for layer, part in parts])


class GroupedAddNorm(_Grouped):
    """Group of `AddLayerNorm` layers."""

    def forward(self, residual: Tensor, update: Tensor) -> tuple[Tensor, Tensor]:
        """Return `residual + update` and its norm, both (G B, N, D)."""
        weight = torch.stack([layer.weight for layer in self.layers])
        bias = torch.stack([layer.bias for layer in self.layers])
        return add_layer_norm(residual, update, weight, bias, self.layers[0].eps)


class GroupedBlock(Block):
    """Group of blocks: `Block.forward` with grouped layers."""

    def __init__(self, blocks: tuple[Any, ...]) -> None:
        with torch.device("meta"):
            super().__init__(blocks[0].attn.proj.in_features, blocks[0].attn.heads, mlp_ratio=1.0, drop_path=0.0)
        self.norm1 = GroupedNorm(block.norm1 for block in blocks)
        self.attn.qkv = GroupedLinear(block.attn.qkv for block in blocks)
        self.attn.proj = GroupedLinear(block.attn.proj for block in blocks)
        self.norm2 = GroupedAddNorm(block.norm2 for block in blocks)
        self.mlp.fc1 = GroupedLinear(block.mlp.fc1 for block in blocks)
        self.mlp.fc2 = GroupedLinear(block.mlp.fc2 for block in blocks)
        self.drop_path = blocks[0].drop_path


def grouped_blocks(stacks: Iterable[Blocks]) -> Blocks:
    """Group stacks of one shape into one stack over (G B, N, D), ordered by stack; it owns no parameters."""
    blocks = Blocks(0, 0, 1)
    blocks.needs_whole_batch = True
    blocks.extend(GroupedBlock(level) for level in zip(*stacks, strict=True))
    return blocks
