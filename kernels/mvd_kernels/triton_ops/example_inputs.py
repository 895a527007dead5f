"""Launches of every kernel with the shapes of the largest published step: ViT-H, clips 16x224x224, tubes 2x16x16.

Legend: B clips, N tokens, V visible, M masked, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch

from mvd_kernels.triton_ops import add_layer_norm, decoder_input, masked_distance, tube_rows, tube_targets
from mvd_kernels.triton_ops.launch import Launch
from mvd_kernels.tubes import IMAGENET_MEAN, IMAGENET_STD

FLOATING = (torch.float32, torch.float16, torch.bfloat16)
B, N, V, M, D = 2, 1568, 160, 1408, 1280
DECODER = 640
TUBE = 3 * 2 * 16 * 16
INDEX = 8  # bytes of a token's index, int64
FLOAT32 = 4

# Tensors without memory: compilation of a launch needs only their shapes, strides and dtypes.
empty = partial(torch.empty, device="meta")


@dataclass(frozen=True)
class ExampleLaunch:
    """A launch of a kernel, and its least possible memory traffic per row (token).

    Attributes:
        variant: dtype or option that distinguishes it from other launches of the same kernel.
        launch: the kernel and its arguments, on the meta device.
        read: bytes read per row, without weights that all programs share, which stay in the cache.
        written: bytes written per row.
    """

    variant: str
    launch: Launch
    read: float
    written: float

    @property
    def name(self) -> str:
        """Name of kernel and variant."""
        return f"{self.launch.kernel.__name__} {self.variant}"


def example_launches() -> Iterator[ExampleLaunch]:
    """Yield all kernels in all dtypes; options that do not depend on the dtype in one dtype only."""
    makers: tuple[Callable[[torch.dtype], Iterator[ExampleLaunch]], ...] = (
        _rows,
        _distances,
        _add_layer_norm,
        _decoder,
    )
    for make in makers:
        for dtype in FLOATING:
            yield from make(dtype)
    yield from _targets()
    for distance in ("l1", "l2", "cosine"):
        yield from _distances(torch.bfloat16, distance)


def _label(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _clip_and_tokens() -> tuple[torch.Tensor, torch.Tensor]:
    return empty(B, 16, 224, 224, 3, dtype=torch.uint8), empty(B, V, dtype=torch.int64)


def _rows(dtype: torch.dtype) -> Iterator[ExampleLaunch]:
    pixels, tokens = _clip_and_tokens()
    launch = tube_rows.launch(pixels, tokens, empty(B, V, TUBE, dtype=dtype), 2, 16, IMAGENET_MEAN, IMAGENET_STD)
    yield ExampleLaunch(_label(dtype), launch, TUBE + INDEX, TUBE * dtype.itemsize)


def _targets() -> Iterator[ExampleLaunch]:
    pixels, tokens = _clip_and_tokens()
    for normalize in ("none", "channel", "patch"):
        launch = tube_targets.launch(pixels, tokens, empty(B, V, TUBE), 2, 16, normalize)
        yield ExampleLaunch(normalize, launch, TUBE + INDEX, TUBE * FLOAT32)


def _distances(dtype: torch.dtype, distance: str = "smooth_l1") -> Iterator[ExampleLaunch]:
    predictions, gradient = empty(B, M, D, dtype=dtype), empty(B, M, D, dtype=dtype)
    arguments = (predictions, empty(B, N, D, dtype=dtype), empty(B, M, dtype=torch.int64), distance, True)
    variant, row = f"{distance} {_label(dtype)}", D * dtype.itemsize
    forward = masked_distance.forward_launch(*arguments, empty(B * M))
    yield ExampleLaunch(variant, forward, 2 * row + INDEX, FLOAT32)
    backward = masked_distance.backward_launch(*arguments, empty(()), gradient)
    yield ExampleLaunch(variant, backward, 2 * row + INDEX, row)


def _add_layer_norm(dtype: torch.dtype) -> Iterator[ExampleLaunch]:
    values, affine, statistics = empty(B * N, D, dtype=dtype), empty(D, dtype=dtype), empty(2, B * N)
    row, scalars = D * dtype.itemsize, 2 * FLOAT32
    forward = add_layer_norm.forward_launch((values, values, affine, affine), values, values, statistics, 1e-6)
    yield ExampleLaunch(_label(dtype), forward, 2 * row, 2 * row + scalars)
    sums = empty(-(-B * N // add_layer_norm.PIECE), D)
    backward = add_layer_norm.backward_launch((values, affine, statistics), values, values, values, (sums, sums))
    yield ExampleLaunch(_label(dtype), backward, 3 * row + scalars, row + 2 * D * FLOAT32 / add_layer_norm.PIECE)


def _decoder(dtype: torch.dtype) -> Iterator[ExampleLaunch]:
    launch = decoder_input.launch(
        empty(B, V, DECODER, dtype=dtype),
        empty(DECODER, dtype=dtype),
        empty(N, DECODER),
        empty(B, V, dtype=torch.int64),
        empty(B, M, dtype=torch.int64),
        empty(B, V + M, DECODER, dtype=dtype),
    )
    row = DECODER * dtype.itemsize
    # Only visible tokens, V of V + M, read a row of `embedded`; all masked tokens read the same mask token.
    yield ExampleLaunch(_label(dtype), launch, row * V / (V + M) + DECODER * FLOAT32 + INDEX, row)
