"""`tube_targets` as a Triton kernel: one program per token, which holds a tile (pixels, colours) in registers.

Legend: B clips, T frames, H W pixels, K chosen tokens, t frames of a tubelet, p side of a patch.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mvd_kernels.triton_ops.launch import Launch, block, warps
from mvd_kernels.triton_ops.tubes import token_count, tube_arguments, tube_of_program
from mvd_kernels.tubes import IMAGENET_MEAN, IMAGENET_STD, max_pixel_value

RED_MEAN, GREEN_MEAN, BLUE_MEAN = (tl.constexpr(mean) for mean in IMAGENET_MEAN)
RED_STD, GREEN_STD, BLUE_STD = (tl.constexpr(std) for std in IMAGENET_STD)


@triton.jit
def tube_targets_kernel(
    pixels,  # (B, T, H, W, 3), uint8 or floating
    tokens,  # int64 (B, K), or None
    targets,  # float32 (B K, t p p 3)
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
    white,
    NORMALIZE: tl.constexpr,
    TUBELET: tl.constexpr,
    PATCH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program, tube = tube_of_program(
        pixels, tokens, t_clip, t_place, count, s_clip, s_frame, s_row, s_column, grid_h, grid_w, TUBELET, PATCH
    )
    count_pixels: tl.constexpr = TUBELET * PATCH * PATCH
    # Triton needs tiles whose sides are powers of two: a fourth colour is masked out.
    pixel = tl.arange(0, BLOCK)[:, None]
    colour = tl.arange(0, 4)[None, :]
    inside = (pixel < count_pixels) & (colour < 3)
    frame = pixel // (PATCH * PATCH)
    row = pixel // PATCH % PATCH
    offset = frame * s_frame + row * s_row + pixel % PATCH * s_column + colour * s_colour
    value = tl.math.div_rn(tl.load(tube + offset, mask=inside, other=0).to(tl.float32), white)
    if NORMALIZE == "channel":
        centred = tl.where(inside, value - (tl.sum(value, 0) / count_pixels)[None, :], 0)
        variance = tl.sum(centred * centred, 0) / (count_pixels - 1)
        value = centred / (tl.sqrt(variance) + 1e-6)[None, :]
    elif NORMALIZE == "patch":
        mean = tl.where(colour == 0, RED_MEAN, tl.where(colour == 1, GREEN_MEAN, BLUE_MEAN))
        std = tl.where(colour == 0, RED_STD, tl.where(colour == 1, GREEN_STD, BLUE_STD))
        white_value = tl.where(inside, (value - mean) / std, 0)
        centred = tl.where(inside, white_value - tl.sum(white_value) / (3 * count_pixels), 0)
        value = centred / tl.sqrt(tl.sum(centred * centred) / (3 * count_pixels - 1) + 1e-6)
    tl.store(targets + program * 3 * count_pixels + pixel * 3 + colour, value, mask=inside)


def launch(pixels: Tensor, tokens: Tensor | None, targets: Tensor, tubelet: int, patch: int, normalize: str) -> Launch:
    """Make the launch that writes the normalised tubes to `targets`, float32 (B, K, t p p 3)."""
    arguments = tube_arguments(pixels, tokens, tubelet, patch)
    arguments |= {"targets": targets, "white": max_pixel_value(pixels)}
    size = tubelet * patch * patch
    constants = {"NORMALIZE": normalize, "TUBELET": tubelet, "PATCH": patch, "BLOCK": block(size)}
    return Launch(tube_targets_kernel, targets.shape[0] * targets.shape[1], arguments, constants, warps(4 * size))


@torch.library.custom_op("mvd_kernels::tube_targets", mutates_args=())
def _forward(pixels: Tensor, tokens: Tensor | None, tubelet: int, patch: int, normalize: str) -> Tensor:
    targets = _allocate(pixels, tokens, tubelet, patch, normalize)
    launch(pixels, tokens, targets, tubelet, patch, normalize).run()
    return targets


@_forward.register_fake
def _allocate(pixels: Tensor, tokens: Tensor | None, tubelet: int, patch: int, normalize: str) -> Tensor:
    count = token_count(pixels, tokens, tubelet, patch)
    return pixels.new_empty(pixels.shape[0], count, tubelet * patch * patch * 3, dtype=torch.float32)


def tube_targets(pixels: Tensor, tokens: Tensor | None, *, tubelet: int, patch: int, normalize: str = "none") -> Tensor:
    """See `mvd_kernels.tube_targets`."""
    return _forward(pixels, tokens, tubelet, patch, normalize)
