"""`tube_rows` as a Triton kernel: one program per token, which reads and writes in the memory order of the pixels.

Legend: B clips, T frames, H W pixels, K chosen tokens, t frames of a tubelet, p side of a patch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from mvd_kernels.triton_ops.launch import Launch, block, warps
from mvd_kernels.triton_ops.tubes import token_count, tube_arguments, tube_of_program
from mvd_kernels.tubes import max_pixel_value


@triton.jit
def tube_rows_kernel(
    pixels,  # (B, T, H, W, 3), uint8 or floating
    tokens,  # int64 (B, K), or None
    rows,  # (B K, t p p 3)
    t_clip,
    t_place,
    count,
    s_clip,
    s_frame,
    s_row,
    s_column,
    s_colour,
    grid_h,
    grid_w,
    red_scale,
    green_scale,
    blue_scale,
    red_shift,
    green_shift,
    blue_shift,
    TUBELET: tl.constexpr,
    PATCH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program, tube = tube_of_program(
        pixels, tokens, t_clip, t_place, count, s_clip, s_frame, s_row, s_column, grid_h, grid_w, TUBELET, PATCH
    )
    place = tl.arange(0, BLOCK)
    values: tl.constexpr = 3 * TUBELET * PATCH * PATCH
    inside = place < values
    colour = place % 3
    column = place // 3 % PATCH
    row = place // (3 * PATCH) % PATCH
    frame = place // (3 * PATCH * PATCH)
    offset = frame * s_frame + row * s_row + column * s_column + colour * s_colour
    value = tl.load(tube + offset, mask=inside, other=0).to(tl.float32)
    scale = tl.where(colour == 0, red_scale, tl.where(colour == 1, green_scale, blue_scale))
    shift = tl.where(colour == 0, red_shift, tl.where(colour == 1, green_shift, blue_shift))
    tl.store(rows + program * values + place, (value * scale + shift).to(rows.dtype.element_ty), mask=inside)


def launch(
    pixels: Tensor,
    tokens: Tensor | None,
    rows: Tensor,
    tubelet: int,
    patch: int,
    mean: Sequence[float],
    std: Sequence[float],
) -> Launch:
    """Make the launch that writes (x / white - mean) / std, one multiply-add per value, to `rows` (B, K, t p p 3)."""
    white = max_pixel_value(pixels)
    colours = ("red", "green", "blue")
    arguments = tube_arguments(pixels, tokens, tubelet, patch)
    arguments |= {f"{colour}_scale": 1 / (white * s) for colour, s in zip(colours, std, strict=True)}
    arguments |= {f"{colour}_shift": -m / s for colour, m, s in zip(colours, mean, std, strict=True)}
    arguments["rows"] = rows
    width = rows.shape[-1]
    constants = {"TUBELET": tubelet, "PATCH": patch, "BLOCK": block(width)}
    return Launch(tube_rows_kernel, rows.shape[0] * rows.shape[1], arguments, constants, warps(width))


@torch.library.custom_op("mvd_kernels::tube_rows", mutates_args=())
def _forward(
    pixels: Tensor,
    tokens: Tensor | None,
    tubelet: int,
    patch: int,
    mean: Sequence[float],
    std: Sequence[float],
    dtype: torch.dtype,
) -> Tensor:
    rows = _allocate(pixels, tokens, tubelet, patch, mean, std, dtype)
    launch(pixels, tokens, rows, tubelet, patch, mean, std).run()
    return rows


@_forward.register_fake
def _allocate(
    pixels: Tensor,
    tokens: Tensor | None,
    tubelet: int,
    patch: int,
    mean: Sequence[float],
    std: Sequence[float],
    dtype: torch.dtype,
) -> Tensor:
    count = token_count(pixels, tokens, tubelet, patch)
    return pixels.new_empty(pixels.shape[0], count, 3 * tubelet * patch * patch, dtype=dtype)


def tube_rows(
    pixels: Tensor,
    tokens: Tensor | None,
    *,
    tubelet: int,
    patch: int,
    mean: Sequence[float],
    std: Sequence[float],
    dtype: torch.dtype,
) -> Tensor:
    """See `mvd_kernels.tube_rows`."""
    return _forward(pixels, tokens, tubelet, patch, list(mean), list(std), dtype)
