"""Attentive probe on the tokens of a frozen encoder: one block of cross-attention with one learnt query.

Legend: B clips, N tokens, D width, C classes.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mvd_kernels import LayerNorm


class AttentiveHead(nn.Module):
    """Cross-attention from one query to all tokens, MLP, norm and linear head: the attentive probe of V-JEPA."""

    def __init__(self, width: int, heads: int, classes: int) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Parameter(torch.zeros(1, 1, width))
        self.norm_tokens = LayerNorm(width)
        self.to_query = nn.Linear(width, width)
        self.to_key_value = nn.Linear(width, 2 * width)
        self.project = nn.Linear(width, width)
        self.norm_mlp = LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.norm = LayerNorm(width)
        self.head = nn.Linear(width, classes)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
        nn.init.trunc_normal_(self.query, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        """Compute class scores of clips: (B, N, D) to (B, C)."""
        query = self.query.expand(len(tokens), -1, -1)
        key, value = self.to_key_value(self.norm_tokens(tokens)).chunk(2, dim=-1)
        parts = (self.to_query(query), key, value)
        split = [part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in parts]
        seen = query + self.project(F.scaled_dot_product_attention(*split).transpose(1, 2).flatten(2))
        seen = seen + self.mlp(self.norm_mlp(seen))
        scores: Tensor = self.head(self.norm(seen[:, 0]))
        return scores
