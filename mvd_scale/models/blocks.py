"""The transformer block that encoders and decoders share (Sec. 3.3: vanilla, joint space-time attention).

Legend: B clips, N tokens, K output tokens, D width, C channels of a head.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mvd_kernels import AddLayerNorm, AttentionWays, LayerNorm, LinearWays, attention, linear
from mvd_scale.models.layers.drop_path import DropPath
from mvd_scale.models.layers.rms_norm import AddRMSNorm, RMSNorm
from mvd_scale.models.layers.rotary import rotate
from mvd_scale.models.layers.shared_rows import MaskPlaces, spread_rows

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
    """Packed projection to query, key and value, with biases for query and value.

    A bias of the keys would add the same number to all scores of a query, which the softmax cancels; unless rotary
    positions turn it by another angle at every key (`key_bias`).
    """

    ways = LinearWays()

    def __init__(self, width: int, *, key_bias: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(3 * width, width))
        self.q_bias = nn.Parameter(torch.zeros(width))
        self.k_bias = nn.Parameter(torch.zeros(width)) if key_bias else None
        self.v_bias = nn.Parameter(torch.zeros(width))
        nn.init.xavier_uniform_(self.weight)

    def forward(self, tokens: Tensor) -> Tensor:
        """Project tokens to query, key and value: (B, N, D) to (B, N, 3 D)."""
        return linear(tokens, self.weight, self.bias(), self.ways)

    def bias(self) -> Tensor:
        """Return the packed bias (3 D,), which is zero for keys without a bias."""
        of_keys = torch.zeros_like(self.q_bias) if self.k_bias is None else self.k_bias
        return torch.cat([self.q_bias, of_keys, self.v_bias])


class Attention(nn.Module):
    """Multi-head self-attention over all tokens; with `rms`, of normalised queries and keys."""

    ways: AttentionWays | None = None

    def __init__(self, width: int, heads: int, *, key_bias: bool = False, rms: bool = False) -> None:
        super().__init__()
        self.heads = heads
        # Over the channels of all heads together.
        self.q_norm = RMSNorm(width) if rms else None
        self.k_norm = RMSNorm(width) if rms else None
        self.qkv: nn.Module = QKV(width, key_bias=key_bias)
        self.proj: nn.Module = nn.Linear(width, width)

    def qkv_by_head(self, tokens: Tensor, rotation: Tensor | None = None, places: MaskPlaces | None = None) -> Tensor:
        """Project tokens to the queries, keys and values of each head: (B, N, D) to (B, N, 3, heads, D / heads).

        Queries and keys are turned by `rotation` (2, N, C), see `rotation_table`, if it is given. With `places`,
        `tokens` are rows, see `spread_rows`: each is projected once.
        """
        packed: Tensor = self.qkv(tokens)
        if places is not None:
            packed = spread_rows(packed, places)
        clips, count, width = *packed.shape[:2], tokens.shape[-1]
        if self.q_norm is not None and self.k_norm is not None:
            queries, keys, values = packed.chunk(3, dim=-1)
            packed = torch.cat([self.q_norm(queries), self.k_norm(keys), values], dim=-1)
        packed = packed.view(clips, count, 3, self.heads, width // self.heads)
        return packed if rotation is None else rotate(packed, rotation)

    def forward(
        self,
        tokens: Tensor,
        output_tokens: OutputTokens = None,
        rotation: Tensor | None = None,
        places: MaskPlaces | None = None,
    ) -> Tensor:
        """Attend from the tokens `output_tokens` (all if None) to all tokens: (B, N, D) to (B, K, D).

        Args:
            tokens: (B, N, D); rows with `places`.
            output_tokens: tokens whose outputs are wanted; all if None.
            rotation: see `qkv_by_head`.
            places: see `qkv_by_head`.
        """
        packed = self.qkv_by_head(tokens, rotation, places)
        last = output_tokens if isinstance(output_tokens, int) else None
        attended = attention(packed, last, self.ways)
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

    def __init__(
        self,
        width: int,
        heads: int,
        mlp_ratio: float,
        drop_path: float,
        *,
        key_bias: bool = False,
        rms: bool = False,
    ) -> None:
        super().__init__()
        self.norm1: nn.Module = RMSNorm(width) if rms else LayerNorm(width)
        self.attn = Attention(width, heads, key_bias=key_bias, rms=rms)
        self.norm2: nn.Module = AddRMSNorm(width) if rms else AddLayerNorm(width)
        self.mlp: nn.Module = Mlp(width, int(width * mlp_ratio))
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(
        self,
        tokens: Tensor,
        output_tokens: OutputTokens = None,
        rotation: Tensor | None = None,
        places: MaskPlaces | None = None,
        *,
        recompute_attention: bool = False,
    ) -> Tensor:
        """Apply the block: (B, N, D) to (B, K, D).

        Args:
            tokens: (B, N, D); with `places`, rows from which the clips have their tokens, see `spread_rows`.
            output_tokens: tokens to return, all if None. They attend to all tokens; the MLP computes only them.
            rotation: (2, N, C) of rotary positions, or None.
            places: places of the mask tokens whose rows the clips share; None if every clip has tokens of its own.
            recompute_attention: recompute the attention half in the backward pass instead of storing its activations.
        """
        arguments = (tokens, output_tokens, rotation, places)
        if recompute_attention:
            update = self.drop_path(checkpoint(self._attend, *arguments, use_reentrant=False))
        else:
            update = self.drop_path(self._attend(*arguments))
        if places is not None:
            tokens = spread_rows(tokens, places)
        tokens, normed = self.norm2(select_output_tokens(tokens, output_tokens), update)
        # A block's memory peaks in the MLP, which does not need it.
        del update
        return tokens + self.drop_path(self.mlp(normed))

    def _attend(
        self, tokens: Tensor, output_tokens: OutputTokens, rotation: Tensor | None, places: MaskPlaces | None
    ) -> Tensor:
        attended: Tensor = self.attn(self.norm1(tokens), output_tokens, rotation, places)
        return attended


class Blocks(nn.ModuleList):
    """A stack of blocks; stochastic depth grows linearly from 0 to `drop_path`."""

    def __init__(
        self,
        width: int,
        depth: int,
        heads: int,
        mlp_ratio: float = 4.0,
        drop_path: float = 0.0,
        *,
        key_bias: bool = False,
        rms: bool = False,
    ) -> None:
        rates = [drop_path * i / max(depth - 1, 1) for i in range(depth)]
        super().__init__(Block(width, heads, mlp_ratio, rate, key_bias=key_bias, rms=rms) for rate in rates)
        self.gradient_checkpointing: Checkpointing = "none"
        self.needs_whole_batch = False
        """Whether a block must get the whole batch at once, since its sequences belong to different weights."""

    def forward(
        self,
        tokens: Tensor,
        output_tokens: OutputTokens = None,
        rotation: Tensor | None = None,
        places: MaskPlaces | None = None,
        layers: Sequence[int] = (),
    ) -> Tensor:
        """Apply all blocks, (B, N, D) to (B, K, D); the last one returns only `output_tokens` (None: all tokens).

        Args:
            tokens: (B, N, D); with `places`, rows for the first block, see `spread_rows`.
            output_tokens: see `Block.forward`.
            rotation: (2, N, C) of rotary positions, if the blocks have any.
            places: see `Block.forward`.
            layers: blocks, ascending and counted from 1, whose outputs are concatenated over the channels; no later
                block is computed. The last block alone if empty.

        Returns:
            (B, K, D), or (B, K, L D) of L layers.
        """
        again, wanted = self.gradient_checkpointing if self.training else "none", layers or (len(self),)
        outputs = []
        for number, block in enumerate(islice(self, wanted[-1]), start=1):
            shared, is_last = places if number == 1 else None, number == wanted[-1]
            arguments = (tokens, output_tokens if is_last else None, rotation, shared)
            if again == "block":
                tokens = checkpoint(block, *arguments, use_reentrant=False)
            elif (
                tokens.device.type == "cpu"
                and not torch.is_grad_enabled()
                and shared is None
                and not self.needs_whole_batch
                and not _gathers(block)
            ):
                tokens = _in_chunks(block, *arguments[:3])
            else:
                tokens = block(*arguments, recompute_attention=again == "attention")
            if number in wanted:
                outputs.append(tokens if is_last else select_output_tokens(tokens, output_tokens))
        return torch.cat(outputs, dim=-1) if len(outputs) > 1 else tokens


def sequences_per_pass(tokens: int) -> int:
    """Number of sequences of N tokens that a block on a CPU computes at a time without gradients."""
    return max(_CACHED_TOKENS // tokens, 1)


def _gathers(block: nn.Module) -> bool:
    """Whether each call of a block gathers its weights from all ranks (ZeRO-3).

    Then all ranks must make the same number of calls, so a block must not be split by batch size.
    """
    return any(hasattr(parameter, "ds_id") for parameter in block.parameters())


def _in_chunks(block: nn.Module, tokens: Tensor, output_tokens: OutputTokens, rotation: Tensor | None) -> Tensor:
    """Apply a block to a few sequences at a time, so that activations between its layers stay in the CPU's cache."""
    size = sequences_per_pass(tokens.shape[1])
    if len(tokens) <= size:
        whole: Tensor = block(tokens, output_tokens, rotation)
        return whole
    parts = tokens.split(size)
    keeps = output_tokens.split(size) if isinstance(output_tokens, Tensor) else [output_tokens] * len(parts)
    return torch.cat([block(part, keep, rotation) for part, keep in zip(parts, keeps, strict=True)])


def set_gradient_checkpointing(model: nn.Module, checkpointing: Checkpointing) -> None:
    """Set which activations the backward pass of a model's blocks recomputes: none, attention or whole blocks."""
    for module in model.modules():
        if isinstance(module, Blocks):
            module.gradient_checkpointing = checkpointing
