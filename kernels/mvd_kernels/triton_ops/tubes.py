"""Addressing of a token's tube within its clip, which the kernels on tubes share."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from mvd_kernels.tubes import token_grid


@triton.jit
def tube_of_program(
    pixels, tokens, t_clip, t_place, count, s_clip, s_frame, s_row, s_column, grid_h, grid_w,
    TUBELET: tl.constexpr, PATCH: tl.constexpr,
):  # fmt: skip
    """Return the index of this program (int64) and the address of the first value of its tube."""
    program = tl.program_id(0).to(tl.int64)
    clip, place = program // count, program % count
    token = place
    if tokens is not None:
        token = tl.load(tokens + clip * t_clip + place * t_place)
    frame = token // (grid_h * grid_w) * TUBELET
    row = token // grid_w % grid_h * PATCH
    column = token % grid_w * PATCH
    return program, pixels + clip * s_clip + frame * s_frame + row * s_row + column * s_column


def token_count(pixels: Tensor, tokens: Tensor | None, tubelet: int, patch: int) -> int:
    """Number of chosen tokens per clip, K."""
    time, height, width = token_grid(pixels, tubelet, patch)
    return time * height * width if tokens is None else tokens.shape[1]


def tube_arguments(pixels: Tensor, tokens: Tensor | None, tubelet: int, patch: int) -> dict[str, Any]:
    """Arguments of `tube_of_program` by name, and the stride of the colours."""
    _, height, width = token_grid(pixels, tubelet, patch)
    s_clip, s_frame, s_row, s_column, s_colour = pixels.stride()
    return {
        "pixels": pixels,
        "tokens": tokens,
        "t_clip": 0 if tokens is None else tokens.stride(0),
        "t_place": 0 if tokens is None else tokens.stride(1),
        "count": token_count(pixels, tokens, tubelet, patch),
        "s_clip": s_clip,
        "s_frame": s_frame,
        "s_row": s_row,
        "s_column": s_column,
        "s_colour": s_colour,
        "grid_h": height,
        "grid_w": width,
    }
