"""The transformer block that encoders and decoders share (Sec. 3.3: vanilla, joint space-time attention).

Legend: B clips, N tokens, K tokens that are kept, D width.
"""

from __future__ import annotations

import torch
from timm.layers import Mlp
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from mvd_kernels import AddLayerNorm, LayerNorm, attention
from mvd_scale.config.training import Checkpointing
from mvd_scale.models.drop_path import DropPath

Kept = Tensor | int | None
"""Tokens whose output is needed: int64 (B, K), the last so many, or all."""

_CACHED_TOKENS = 1600
"""That a CPU takes through a block together: one clip, or the frames of one."""


def keep(tokens: Tensor, kept: Kept) -> Tensor:
    """Some tokens of (B, N, D)."""
    if kept is None:
        return tokens
    if isinstance(kept, int):
        return tokens[:, -kept:]
    return tokens.gather(1, kept.unsqueeze(-1).expand(-1, -1, tokens.shape[-1]))


class QKV(nn.Module):
    """Packed projection with biases for query and value only.

    A bias of the keys would add the same number to all scores of a query, which the softmax cancels.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(3 * width, width))
        self.q_bias = nn.Parameter(torch.zeros(width))
        self.v_bias = nn.Parameter(torch.zeros(width))
        nn.init.xavier_uniform_(self.weight)

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, N, D) to (B, N, 3 D)."""
        return F.linear(tokens, self.weight, self.bias())

    def bias(self) -> Tensor:
        """(3 D,), zero for the keys."""
        return torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])


class Attention(nn.Module):
    """Multi-head self-attention over all tokens."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv: nn.Module = QKV(width)
        self.proj: nn.Module = nn.Linear(width, width)

    def forward(self, tokens: Tensor, kept: Kept = None) -> Tensor:
        """(B, N, D) to (B, N, D), or (B, K, D) for the tokens that are kept."""
        clips, count, width = tokens.shape
        packed = self.qkv(tokens).view(clips, count, 3, self.heads, width // self.heads)
        last = kept if isinstance(kept, int) else None
        attended = attention(packed, last)
        projected: Tensor = self.proj(attended if last is not None else keep(attended, kept))
        return projected


class Block(nn.Module):
    """Pre-norm attention and MLP, each with a residual and stochastic depth."""

    def __init__(self, width: int, heads: int, mlp_ratio: float, drop_path: float) -> None:
        super().__init__()
        self.norm1: nn.Module = LayerNorm(width)
        self.attn = Attention(width, heads)
        self.norm2: nn.Module = AddLayerNorm(width)
        self.mlp: nn.Module = Mlp(width, int(width * mlp_ratio), act_layer=nn.GELU)
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, tokens: Tensor, kept: Kept = None, *, attend_again: bool = False) -> Tensor:
        """(B, N, D) to (B, N, D), or (B, K, D) for the tokens that are kept: all are seen, the others not computed.

        With `attend_again` the backward pass computes the attention half again.
        """
        if attend_again:
            update = self.drop_path(checkpoint(self._attend, tokens, kept, use_reentrant=False))
        else:
            update = self.drop_path(self._attend(tokens, kept))
        tokens, normed = self.norm2(keep(tokens, kept), update)
        return tokens + self.drop_path(self.mlp(normed))

    def _attend(self, tokens: Tensor, kept: Kept) -> Tensor:
        attended: Tensor = self.attn(self.norm1(tokens), kept)
        return attended


class Blocks(nn.ModuleList):
    """A stack of blocks; stochastic depth grows linearly from 0 to `drop_path`."""

    def __init__(self, width: int, depth: int, heads: int, mlp_ratio: float = 4.0, drop_path: float = 0.0) -> None:
        rates = [drop_path * i / max(depth - 1, 1) for i in range(depth)]
        super().__init__(Block(width, heads, mlp_ratio, rate) for rate in rates)
        self.gradient_checkpointing: Checkpointing = "none"
        self.whole = False
        """Whether a block must see all sequences at once."""

    def forward(self, tokens: Tensor, kept: Kept = None) -> Tensor:
        """(B, N, D) to (B, N, D), or (B, K, D) for the tokens that the last block keeps."""
        again = self.gradient_checkpointing if self.training else "none"
        for number, block in enumerate(self, start=1):
            arguments = (tokens, kept if number == len(self) else None)
            if again == "block":
                tokens = checkpoint(block, *arguments, use_reentrant=False)
            elif tokens.device.type == "cpu" and not torch.is_grad_enabled() and not self.whole and not _gathers(block):
                tokens = _in_parts(block, *arguments)
            else:
                tokens = block(*arguments, attend_again=again == "attention")
        return tokens


def _gathers(block: nn.Module) -> bool:
    """Whether every call of a block gathers its weights (ZeRO-3), which all ranks must do as often."""
    return any(hasattr(parameter, "ds_id") for parameter in block.parameters())


def _in_parts(block: nn.Module, tokens: Tensor, kept: Kept) -> Tensor:
    """A block over some sequences at a time, so that what lies between its layers stays in the cache."""
    size = max(_CACHED_TOKENS // tokens.shape[1], 1)
    if len(tokens) <= size:
        whole: Tensor = block(tokens, kept)
        return whole
    parts = tokens.split(size)
    keeps = kept.split(size) if isinstance(kept, Tensor) else [kept] * len(parts)
    return torch.cat([block(*part) for part in zip(parts, keeps, strict=True)])


def checkpoint_gradients(model: nn.Module, checkpointing: Checkpointing) -> None:
    """Choose what the backward pass of a model's blocks computes again instead of keeping it."""
    for module in model.modules():
        if isinstance(module, Blocks):
            module.gradient_checkpointing = checkpointing


def initialise(module: nn.Module) -> None:
    """Published weights before pre-training: linear layers Xavier uniform, biases 0. For `Module.apply`."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
