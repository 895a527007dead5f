"""`add_layer_norm` as Triton kernels: one program per row forward, one program per piece of `PIECE` rows backward.

Several norms need one launch each, on their rows of the same tensors.

Legend: R rows, D channels, P pieces of rows, G norms.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mvd_kernels.triton_ops.launch import Launch, block, warps

# Rows whose gradients of weight and bias one program adds up. The partial sums are 1/32 of the rows' traffic, and the
# order of addition is the same on every GPU.
PIECE = 32


@triton.jit
def add_layer_norm_forward(
    residual,  # (R, D)
    update,  # (R, D)
    weight,  # (D,)
    bias,  # (D,)
    total,  # (R, D)
    normed,  # (R, D)
    means,  # float32 (R,)
    scales,  # float32 (R,), 1 / deviation
    r_row,
    u_row,
    width,
    eps,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    channel = tl.arange(0, BLOCK)
    inside = channel < width
    base = tl.load(residual + row * r_row + channel, mask=inside, other=0).to(tl.float32)
    step = tl.load(update + row * u_row + channel, mask=inside, other=0).to(tl.float32)
    # The norm is computed of the rounded sum, as it is stored: the backward pass reads that one.
    rounded = (base + step).to(total.dtype.element_ty)
    tl.store(total + row * width + channel, rounded, mask=inside)
    value = rounded.to(tl.float32)
    mean = tl.sum(value, 0) / width
    centred = tl.where(inside, value - mean, 0)
    scale = tl.rsqrt(tl.sum(centred * centred, 0) / width + eps)
    w = tl.load(weight + channel, mask=inside, other=0).to(tl.float32)
    b = tl.load(bias + channel, mask=inside, other=0).to(tl.float32)
    tl.store(normed + row * width + channel, (centred * scale * w + b).to(normed.dtype.element_ty), mask=inside)
    tl.store(means + row, mean)
    tl.store(scales + row, scale)


@triton.jit
def add_layer_norm_backward(
    total,  # (R, D)
    weight,  # (D,)
    means,  # float32 (R,)
    scales,  # float32 (R,)
    d_total,  # (R, D)
    d_normed,  # (R, D)
    d_input,  # (R, D), gradient of both residual and update
    d_weight,  # float32 (P, D)
    d_bias,  # float32 (P, D)
    t_row,
    n_row,
    count,
    width,
    PIECE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    piece = tl.program_id(0).to(tl.int64)
    channel = tl.arange(0, BLOCK)
    inside = channel < width
    w = tl.load(weight + channel, mask=inside, other=0).to(tl.float32)
    sum_weight = tl.zeros((BLOCK,), tl.float32)
    sum_bias = tl.zeros((BLOCK,), tl.float32)
    for row in range(piece * PIECE, tl.minimum((piece + 1) * PIECE, count)):
        scale = tl.load(scales + row)
        value = tl.load(total + row * width + channel, mask=inside, other=0).to(tl.float32)
        white = tl.where(inside, (value - tl.load(means + row)) * scale, 0)
        above = tl.load(d_normed + row * n_row + channel, mask=inside, other=0).to(tl.float32)
        sum_weight += above * white
        sum_bias += above
        inner = above * w
        slope = inner - tl.sum(inner, 0) / width - white * (tl.sum(inner * white, 0) / width)
        through = tl.load(d_total + row * t_row + channel, mask=inside, other=0).to(tl.float32)
        tl.store(d_input + row * width + channel, (through + slope * scale).to(d_input.dtype.element_ty), mask=inside)
    tl.store(d_weight + piece * width + channel, sum_weight, mask=inside)
    tl.store(d_bias + piece * width + channel, sum_bias, mask=inside)


def forward_launch(
    inputs: tuple[Tensor, Tensor, Tensor, Tensor], total: Tensor, normed: Tensor, statistics: Tensor, eps: float
) -> Launch:
    """Make the launch of the forward kernel.

    Args:
        inputs: residual (R, D), update (R, D), weight (D,), bias (D,).
        total: result (R, D), the sum.
        normed: result (R, D), the normalised sum.
        statistics: result float32 (2, R), mean and scale of every row.
        eps: added to the variance.
    """
    residual, update, weight, bias = inputs
    width = residual.shape[-1]
    arguments = {
        "residual": residual,
        "update": update,
        "weight": weight,
        "bias": bias,
        "total": total,
        "normed": normed,
        "means": statistics[0],
        "scales": statistics[1],
        "r_row": residual.stride(0),
        "u_row": update.stride(0),
        "width": width,
        "eps": eps,
    }
    return Launch(add_layer_norm_forward, residual.shape[0], arguments, {"BLOCK": block(width)}, warps(width))


def backward_launch(
    saved: tuple[Tensor, Tensor, Tensor],
    d_total: Tensor,
    d_normed: Tensor,
    d_input: Tensor,
    d_affine: tuple[Tensor, Tensor],
) -> Launch:
    """Make the launch of the backward kernel.

    Args:
        saved: sum (R, D), weight (D,) and statistics (2, R) of the forward pass.
        d_total: gradient of the sum (R, D).
        d_normed: gradient of the normalised sum (R, D).
        d_input: result (R, D), gradient of residual and of update.
        d_affine: results float32 (P, D), partial gradients of weight and of bias.
    """
    total, weight, statistics = saved
    count, width = d_input.shape
    arguments = {
        "total": total,
        "weight": weight,
        "means": statistics[0],
        "scales": statistics[1],
        "d_total": d_total,
        "d_normed": d_normed,
        "d_input": d_input,
        "d_weight": d_affine[0],
        "d_bias": d_affine[1],
        "t_row": d_total.stride(0),
        "n_row": d_normed.stride(0),
        "count": count,
        "width": width,
    }
    constants = {"PIECE": PIECE, "BLOCK": block(width)}
    return Launch(add_layer_norm_backward, triton.cdiv(count, PIECE), arguments, constants, warps(width))


def _as_rows(tensor: Tensor) -> Tensor:
    """Reshape (..., D) to (R, D) with contiguous rows; copies only if necessary."""
    flat = tensor.reshape(-1, tensor.shape[-1])
    return flat if flat.stride(-1) == 1 else flat.contiguous()


def _of_each(norms: int, statistics: Tensor, *tensors: Tensor) -> list[tuple[Tensor, ...]]:
    """Split the rows of each tensor, and last the statistics, by norm."""
    parts = [_as_rows(tensor).chunk(norms) for tensor in tensors]
    return list(zip(*parts, statistics.chunk(norms, dim=1), strict=True))


@torch.library.custom_op("mvd_kernels::add_layer_norm", mutates_args=())
def _forward(
    residual: Tensor, update: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    total, normed, statistics = _allocate(residual, update, weight, bias, eps)
    weights, biases = _as_rows(weight), _as_rows(bias)
    parts = _of_each(len(weights), statistics, residual, update, total, normed)
    for (base, step, sums, norms, noted), w, b in zip(parts, weights, biases, strict=True):
        forward_launch((base, step, w, b), sums, norms, noted, eps).run()
    return total, normed, statistics


@_forward.register_fake
def _allocate(
    residual: Tensor, update: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Allocate the sum, its norm, and the statistics float32 (2, R)."""
    count = residual.numel() // residual.shape[-1]
    statistics = residual.new_empty(2, count, dtype=torch.float32)
    return residual.new_empty(residual.shape), residual.new_empty(residual.shape), statistics


@torch.library.custom_op("mvd_kernels::add_layer_norm_backward", mutates_args=())
def _backward(
    d_total: Tensor, d_normed: Tensor, total: Tensor, weight: Tensor, statistics: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    d_input, weights = total.new_empty(total.shape), _as_rows(weight)
    parts = _of_each(len(weights), statistics, total, d_total, d_normed, d_input)
    pieces = triton.cdiv(len(parts[0][0]), PIECE)
    d_affine = total.new_empty(len(weights), 2, pieces, weights.shape[1], dtype=torch.float32)
    for (sums, d_sums, d_norms, d_rows, noted), w, d_both in zip(parts, weights, d_affine, strict=True):
        backward_launch((sums, w, noted), d_sums, d_norms, d_rows, (d_both[0], d_both[1])).run()
    d_weight, d_bias = (d_affine[:, i].sum(1).to(weight.dtype).view(weight.shape) for i in range(2))
    return d_input, d_weight, d_bias


@_backward.register_fake
def _(
    d_total: Tensor, d_normed: Tensor, total: Tensor, weight: Tensor, statistics: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return total.new_empty(total.shape), weight.new_empty(weight.shape), weight.new_empty(weight.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    total, _, statistics = output
    ctx.save_for_backward(total, inputs[2], statistics)


def _differentiate(
    ctx: Any, d_total: Tensor, d_normed: Tensor, d_statistics: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, None]:
    d_input, d_weight, d_bias = _backward(d_total, d_normed, *ctx.saved_tensors)
    return d_input, d_input, d_weight, d_bias, None


_forward.register_autograd(_differentiate, setup_context=_save)


def add_layer_norm(
    residual: Tensor, update: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """See `mvd_kernels.add_layer_norm`."""
    total, normed, _ = _forward(residual, update, weight, bias, eps)
    return total, normed
