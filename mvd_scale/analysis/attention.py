"""Attention of an encoder, computed beside its forward pass, whose kernels keep no scores.

`last`: the last block's attention, averaged over heads. `rollout`: attention of all blocks multiplied (Abnar and
Zuidema, "Quantifying Attention Flow in Transformers", 2020, Sec. 3): in each block the mean over heads is averaged with
the identity, which stands for the residual connection. Of both, the row of the class token is taken, or the mean over
the rows of all tokens where there is no class token.

Legend: V sequences, N tokens with the class token, P patches of a sequence, D width, H heads, C channels of a head.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mvd_scale.models import Encoder
from mvd_scale.models.blocks import Attention


@dataclass(frozen=True)
class Look:
    """Features and attention of sequences."""

    features: Tensor
    """Output of the last block, or of the final norm if the encoder has one, without a class token: (V, P, D)."""

    last: Tensor
    """Attention of the last block to each patch, float32 (V, P); in a model without class token the sum is 1."""

    rollout: Tensor
    """Attention rollout to each patch, float32 (V, P)."""


@torch.inference_mode()
def look(encoder: Encoder, pixels: Tensor) -> Look:
    """Encode sequences and compute their attention.

    Args:
        encoder: encoder in inference mode.
        pixels: uint8 (V, T, H, W, 3).
    """
    extra = int(encoder.config.class_token)
    with _inputs_of_attention(encoder) as inputs:
        features = encoder(pixels)[:, extra:]
    rollout: Tensor | None = None
    for attention, calls in zip(_attention_modules(encoder), inputs, strict=True):
        scores = mean_attention(attention, torch.cat([tokens for tokens, _ in calls]), calls[0][1])
        with_residual = (scores + torch.eye(scores.shape[1], device=scores.device)) / 2
        rollout = with_residual if rollout is None else with_residual @ rollout
    assert rollout is not None
    return Look(features, _to_patches(scores, extra), _to_patches(rollout, extra))


def mean_attention(attention: Attention, tokens: Tensor, rotation: Tensor | None = None) -> Tensor:
    """Compute the softmax of the scores, averaged over heads: (V, N, D) to float32 (V, N, N); rows are queries.

    `rotation` holds rotary positions, see `Attention.qkv_by_head`.
    """
    query, key, _ = attention.qkv_by_head(tokens, rotation).float().unbind(2)
    # One head after the other: all heads of ViT-H would take 160 MB of scores.
    total = sum(
        torch.softmax(query[:, :, head] @ key[:, :, head].mT * query.shape[-1] ** -0.5, dim=-1)
        for head in range(attention.heads)
    )
    assert isinstance(total, Tensor)
    return total / attention.heads


def _attention_modules(encoder: Encoder) -> list[Attention]:
    return [module for module in encoder.blocks.modules() if isinstance(module, Attention)]


@contextmanager
def _inputs_of_attention(encoder: Encoder) -> Iterator[list[list[tuple[Tensor, Tensor | None]]]]:
    """Collect tokens and rotation of each block's attention; a block may be called for a few sequences at a time."""
    inputs: list[list[tuple[Tensor, Tensor | None]]] = [[] for _ in encoder.blocks]

    def keep(number: int) -> Any:
        def hook(_: torch.nn.Module, arguments: tuple[Any, ...]) -> None:
            tokens, output_tokens, rotation, places = arguments
            # A selection of queries would change the mean over them; encoders share no rows between clips.
            assert output_tokens is None
            assert places is None
            inputs[number].append((tokens, rotation))

        return hook

    modules = _attention_modules(encoder)
    handles = [module.register_forward_pre_hook(keep(number)) for number, module in enumerate(modules)]
    try:
        yield inputs
    finally:
        for handle in handles:
            handle.remove()


def _to_patches(attention: Tensor, extra: int) -> Tensor:
    """Reduce attention (V, N, N) to the class token's, or the mean over queries, to each patch: (V, P)."""
    return attention[:, 0, 1:] if extra else attention.mean(1)
