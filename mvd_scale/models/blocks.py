"""The transformer block that encoders and decoders share (Sec. 3.3: vanilla, joint space-time attention).

Legend: B clips, N tokens, K output tokens, D width.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from mvd_kernels import AddLayerNorm, LayerNorm, attention
from mvd_scale.models.drop_path import DropPath

if TYPE_CHECKING:
    from mvd_scale.config.training import Checkpointing

OutputTokens = Tensor | int | None
"""Tokens whose output is needed: indices int64 (B, K), an integer for the last K tokens, or None for all."""

_CACHED_TOKENS = 1600
"""Tokens per pass through a block on a CPU: about one clip of 1568 tokens, or the frames of one. Activations of more
tokens leave the cache between the block's layers."""


def select_output_tokens(tokens: Tensor, output_tokens: OutputTokens) -> Tensor:
    """Select tokens of (B, N, D): (B, K, D)."""
    if output_tokens is None:
        return tokens
    if isinstance(output_tokens, int):
        return tokens[:, -output_tokens:]
    return tokens.gather(1, output_tokens.unsqueeze(-1).expand(-1, -1, tokens.shape[-1]))


class QKV(nn.Module):
    """Packed projection to query, key and value, with biases for query and value only.

    A bias of the keys would add the same number to all scores of a query, which the softmax cancels.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(3 * width, width))
        self.q_bias = nn.Parameter(torch.zeros(width))
        self.v_bias = nn.Parameter(torch.zeros(width))
        nn.init.xavier_uniform_(self.weight)

    def forward(self, tokens: Tensor) -> Tensor:
        """Project tokens to query, key and value: (B, N, D) to (B, N, 3 D)."""
        return F.linear(tokens, self.weight, self.bias())

    def bias(self) -> Tensor:
        """Return the packed bias (3 D,), which is zero for the keys."""
        return torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])


class Attention(nn.Module):
    """Multi-head self-attention over all tokens."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv: nn.Module = QKV(width)
        self.proj: nn.Module = nn.Linear(width, width)

    def qkv_by_head(self, tokens: Tensor) -> Tensor:
        """Project tokens to the queries, keys and values of each head: (B, N, D) to (B, N, 3, heads, D / heads)."""
        clips, count, width = tokens.shape
        packed: Tensor = self.qkv(tokens).view(clips, count, 3, self.heads, width // self.heads)
        return packed

    def forward(self, tokens: Tensor, output_tokens: OutputTokens = None) -> Tensor:
        """Attend from the tokens `output_tokens` (all if None) to all tokens: (B, N, D) to (B, K, D)."""
        packed = self.qkv_by_head(tokens)
        last = output_tokens if isinstance(output_tokens, int) else None
        attended = attention(packed, last)
        projected: Tensor = self.proj(attended if last is not None else select_output_tokens(attended, output_tokens))
        return projected


class Mlp(nn.Module):
    """Two linear layers with GELU between them; the names of its layers are those of the published weights."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1: nn.Module = nn.Linear(width, hidden)
        self.act = nn.GELU()
        self.fc2: nn.Module = nn.Linear(hidden, width)

    def forward(self, tokens: Tensor) -> Tensor:
        """Apply both layers to each token: (B, N, D) to (B, N, D)."""
        updates: Tensor = self.fc2(self.act(self.fc1(tokens)))
        return updates


class Block(nn.Module):
    """Pre-norm attention and MLP, each with a residual and stochastic depth."""

    def __init__(self, width: int, heads: int, mlp_ratio: float, drop_path: float) -> None:
        super().__init__()
        self.norm1: nn.Module = LayerNorm(width)
        self.attn = Attention(width, heads)
        self.norm2: nn.Module = AddLayerNorm(width)
        self.mlp: nn.Module = Mlp(width, int(width * mlp_ratio))
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(
        self, tokens: Tensor, output_tokens: OutputTokens = None, *, recompute_attention: bool = False
    ) -> Tensor:
        """Apply the block: (B, N, D) to (B, K, D).

        Args:
            tokens: (B, N, D).
            output_tokens: tokens to return, all if None. They attend to all tokens; the MLP computes only them.
            recompute_attention: recompute the attention half in the backward pass instead of storing its activations.
        """
        if recompute_attention:
            update = self.drop_path(checkpoint(self._attend, tokens, output_tokens, use_reentrant=False))
        else:
            update = self.drop_path(self._attend(tokens, output_tokens))
        tokens, normed = self.norm2(select_output_tokens(tokens, output_tokens), update)
        # A block's memory peaks in the MLP, which does not need it.
        del update
        return tokens + self.drop_path(self.mlp(normed))

    def _attend(self, tokens: Tensor, output_tokens: OutputTokens) -> Tensor:
        attended: Tensor = self.attn(self.norm1(tokens), output_tokens)
        return attended


class Blocks(nn.ModuleList):
    """A stack of blocks; stochastic depth grows linearly from 0 to `drop_path`."""

    def __init__(self, width: int, depth: int, heads: int, mlp_ratio: float = 4.0, drop_path: float = 0.0) -> None:
        rates = [drop_path * i / max(depth - 1, 1) for i in range(depth)]
        super().__init__(Block(width, heads, mlp_ratio, rate) for rate in rates)
        self.gradient_checkpointing: Checkpointing = "none"
        self.needs_whole_batch = False
        """Whether a block must get the whole batch at once, since its sequences belong to different weights."""

    def forward(self, tokens: Tensor, output_tokens: OutputTokens = None) -> Tensor:
        """Apply all blocks, (B, N, D) to (B, K, D); the last one returns only `output_tokens` (None: all tokens)."""
        again = self.gradient_checkpointing if self.training else "none"
        for number, block in enumerate(self, start=1):
            arguments = (tokens, output_tokens if number == len(self) else None)
            if again == "block":
                tokens = checkpoint(block, *arguments, use_reentrant=False)
            elif (
                tokens.device.type == "cpu"
                and not torch.is_grad_enabled()
                and not self.needs_whole_batch
                and not _gathers(block)
            ):
                tokens = _in_chunks(block, *arguments)
            else:
                tokens = block(*arguments, recompute_attention=again == "attention")
        return tokens


def _gathers(block: nn.Module) -> bool:
    """Whether each call of a block gathers its weights from all ranks (ZeRO-3).

    Then all ranks must make the same number of calls, so a block must not be split by batch size.
    """
    return any(hasattr(parameter, "ds_id") for parameter in block.parameters())


def _in_chunks(block: nn.Module, tokens: Tensor, output_tokens: OutputTokens) -> Tensor:
    """Apply a block to a few sequences at a time, so that activations between its layers stay in the CPU's cache."""
    size = max(_CACHED_TOKENS // tokens.shape[1], 1)
    if len(tokens) <= size:
        whole: Tensor = block(tokens, output_tokens)
        return whole
    parts = tokens.split(size)
    keeps = output_tokens.split(size) if isinstance(output_tokens, Tensor) else [output_tokens] * len(parts)
    return torch.cat([block(*part) for part in zip(parts, keeps, strict=True)])


def set_gradient_checkpointing(model: nn.Module, checkpointing: Checkpointing) -> None:
    """Set which activations the backward pass of a model's blocks recomputes: none, attention or whole blocks."""
    for module in model.modules():
        if isinstance(module, Blocks):
            module.gradient_checkpointing = checkpointing
