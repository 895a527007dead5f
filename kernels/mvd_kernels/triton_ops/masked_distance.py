"""`masked_distance` as Triton kernels: one program per masked token, which holds its row in registers.

Legend: B clips, N tokens, M masked tokens, D channels.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mvd_kernels.triton_ops.launch import Launch, block, rows, warps

# Terms that torch's cosine similarity and the target norm of the published code add to a denominator.
COSINE_EPS = tl.constexpr(1e-8)
NORM_EPS = tl.constexpr(1e-6)


@triton.jit
def _read(
    predictions, p_clip, p_token, features, f_clip, f_token, masked, m_clip, m_token, count, width,
    NORM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Read the prediction and the feature of this program's token in float32; zero beyond the width."""
    row = tl.program_id(0).to(tl.int64)
    clip, place = row // count, row % count
    token = place
    if masked is not None:
        token = tl.load(masked + clip * m_clip + place * m_token)
    channel = tl.arange(0, BLOCK)
    inside = channel < width
    guess = tl.load(predictions + clip * p_clip + place * p_token + channel, mask=inside, other=0).to(tl.float32)
    truth = tl.load(features + clip * f_clip + token * f_token + channel, mask=inside, other=0).to(tl.float32)
    if NORM:
        centred = tl.where(inside, truth - tl.sum(truth, 0) / width, 0)
        truth = centred * tl.rsqrt(tl.sum(centred * centred, 0) / width + NORM_EPS)
    return row, channel, inside, guess, truth


@triton.jit
def masked_distance_forward(
    predictions,  # (B, M, D)
    features,  # (B, N, D)
    masked,  # int64 (B, M), or None
    sums,  # float32 (B M,)
    count,
    width,
    p_clip,
    p_token,
    f_clip,
    f_token,
    m_clip,
    m_token,
    DISTANCE: tl.constexpr,
    NORM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row, _, _, guess, truth = _read(
        predictions, p_clip, p_token, features, f_clip, f_token, masked, m_clip, m_token, count, width, NORM, BLOCK
    )
    if DISTANCE == "cosine":
        norms = tl.maximum(tl.sqrt(tl.sum(guess * guess, 0)), COSINE_EPS)
        norms *= tl.maximum(tl.sqrt(tl.sum(truth * truth, 0)), COSINE_EPS)
        total = 1 - tl.sum(guess * truth, 0) / norms
    else:
        gap = tl.abs(guess - truth)
        if DISTANCE == "l2":
            gap = gap * gap
        elif DISTANCE == "smooth_l1":
            gap = tl.where(gap < 1, 0.5 * gap * gap, gap - 0.5)
        total = tl.sum(gap, 0)
    tl.store(sums + row, total)


@triton.jit
def masked_distance_backward(
    predictions,  # (B, M, D)
    features,  # (B, N, D)
    masked,  # int64 (B, M), or None
    upstream,  # float32 scalar
    gradient,  # (B M, D)
    count,
    width,
    p_clip,
    p_token,
    f_clip,
    f_token,
    m_clip,
    m_token,
    factor,
    DISTANCE: tl.constexpr,
    NORM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row, channel, inside, guess, truth = _read(
        predictions, p_clip, p_token, features, f_clip, f_token, masked, m_clip, m_token, count, width, NORM, BLOCK
    )
    if DISTANCE == "cosine":
        length = tl.sqrt(tl.sum(guess * guess, 0))
        scale = 1 / (tl.maximum(length, COSINE_EPS) * tl.maximum(tl.sqrt(tl.sum(truth * truth, 0)), COSINE_EPS))
        # Where the length of a prediction is clamped to COSINE_EPS, it is a constant without gradient.
        turn = tl.where(length > COSINE_EPS, tl.sum(guess * truth, 0) / (length * length), 0)
        slope = (turn * guess - truth) * scale
    else:
        gap = guess - truth
        if DISTANCE == "l2":
            slope = 2 * gap
        else:
            slope = tl.where(gap > 0, 1.0, tl.where(gap < 0, -1.0, 0.0))
            if DISTANCE == "smooth_l1":
                slope = tl.where(tl.abs(gap) < 1, gap, slope)
    slope *= tl.load(upstream) * factor
    tl.store(gradient + row * width + channel, slope.to(gradient.dtype.element_ty), mask=inside)


def _arguments(predictions: Tensor, features: Tensor, masked: Tensor | None) -> dict[str, Any]:
    _, count, width = predictions.shape
    return {
        "predictions": predictions,
        "features": features,
        "masked": masked,
        "count": count,
        "width": width,
        "p_clip": predictions.stride(0),
        "p_token": predictions.stride(1),
        "f_clip": features.stride(0),
        "f_token": features.stride(1),
        "m_clip": 0 if masked is None else masked.stride(0),
        "m_token": 0 if masked is None else masked.stride(1),
    }


def forward_launch(
    predictions: Tensor, features: Tensor, masked: Tensor | None, distance: str, norm: bool, sums: Tensor
) -> Launch:
    """Make the launch that writes the sum of distances of each token to `sums`, float32 (B M,)."""
    width = predictions.shape[-1]
    arguments = {**_arguments(predictions, features, masked), "sums": sums}
    constants = {"DISTANCE": distance, "NORM": norm, "BLOCK": block(width)}
    return Launch(masked_distance_forward, sums.numel(), arguments, constants, warps(width))


def backward_launch(
    predictions: Tensor,
    features: Tensor,
    masked: Tensor | None,
    distance: str,
    norm: bool,
    upstream: Tensor,
    gradient: Tensor,
) -> Launch:
    """Make the launch that computes the gradient of the predictions (B, M, D) from `upstream`, the gradient of the mean
    (float32 scalar)."""
    clips, count, width = predictions.shape
    arguments = {
        **_arguments(predictions, features, masked),
        "upstream": upstream,
        "gradient": gradient,
        "factor": 1 / _terms(predictions, distance),
    }
    constants = {"DISTANCE": distance, "NORM": norm, "BLOCK": block(width)}
    return Launch(masked_distance_backward, clips * count, arguments, constants, warps(width))


def _terms(predictions: Tensor, distance: str) -> int:
    """Number of terms of the mean: tokens for the cosine, values for the other distances."""
    return predictions[..., 0].numel() if distance == "cosine" else predictions.numel()


@torch.library.custom_op("mvd_kernels::masked_distance", mutates_args=())
def _forward(predictions: Tensor, features: Tensor, masked: Tensor | None, distance: str, norm: bool) -> Tensor:
    # One sum per token, then their sum: atomic additions would have another order in each run.
    sums = predictions.new_empty(predictions.shape[0] * predictions.shape[1], dtype=torch.float32)
    forward_launch(rows(predictions), rows(features), masked, distance, norm, sums).run()
    return sums.sum() / _terms(predictions, distance)


@_forward.register_fake
def _(predictions: Tensor, features: Tensor, masked: Tensor | None, distance: str, norm: bool) -> Tensor:
    return predictions.new_empty((), dtype=torch.float32)


@torch.library.custom_op("mvd_kernels::masked_distance_backward", mutates_args=())
def _backward(
    upstream: Tensor, predictions: Tensor, features: Tensor, masked: Tensor | None, distance: str, norm: bool
) -> Tensor:
    gradient = predictions.new_empty(predictions.shape)
    backward_launch(rows(predictions), rows(features), masked, distance, norm, upstream, gradient).run()
    return gradient


@_backward.register_fake
def _(
    upstream: Tensor, predictions: Tensor, features: Tensor, masked: Tensor | None, distance: str, norm: bool
) -> Tensor:
    return predictions.new_empty(predictions.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    predictions, features, masked, ctx.distance, ctx.norm = inputs
    ctx.save_for_backward(predictions, features, masked)


def _differentiate(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None, None, None]:
    return _backward(upstream, *ctx.saved_tensors, ctx.distance, ctx.norm), None, None, None, None


_forward.register_autograd(_differentiate, setup_context=_save)


def masked_distance(
    predictions: Tensor, features: Tensor, masked: Tensor | None, *, distance: str, norm: bool = False
) -> Tensor:
    """See `mvd_kernels.masked_distance`."""
    return _forward(predictions, features.detach(), masked, distance, norm)
