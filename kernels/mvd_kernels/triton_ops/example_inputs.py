"""Launches of every kernel: with the shapes of the largest published step in all dtypes (ViT-H, clips 16x224x224, tubes
2x16x16), and with the other shapes of the recipes in the dtypes in which they run on GPUs.

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
    yield from _of_recipes()


def _label(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _rows(dtype: torch.dtype) -> Iterator[ExampleLaunch]:
    yield _rows_of(_label(dtype), dtype, 2, 16)


def _rows_of(
    variant: str,
    dtype: torch.dtype,
    tubelet: int,
    patch: int,
    *,
    chosen: bool = True,
    stored: torch.dtype = torch.uint8,
) -> ExampleLaunch:
    """Rows of chosen or of all tokens, from pixels of the dtype `stored`."""
    pixels, tokens = empty(B, 16, 14 * patch, 14 * patch, 3, dtype=stored), empty(B, V, dtype=torch.int64)
    count, width = V if chosen else 16 // tubelet * 14**2, 3 * tubelet * patch**2
    rows = empty(B, count, width, dtype=dtype)
    launch = tube_rows.launch(pixels, tokens if chosen else None, rows, tubelet, patch, IMAGENET_MEAN, IMAGENET_STD)
    return ExampleLaunch(variant, launch, width * stored.itemsize + INDEX * chosen, width * dtype.itemsize)


def _targets() -> Iterator[ExampleLaunch]:
    for normalize in ("none", "channel", "patch"):
        yield _targets_of(normalize, normalize, 2, 16)


def _targets_of(variant: str, normalize: str, tubelet: int, patch: int) -> ExampleLaunch:
    pixels, tokens = empty(B, 16, 14 * patch, 14 * patch, 3, dtype=torch.uint8), empty(B, V, dtype=torch.int64)
    width = 3 * tubelet * patch**2
    launch = tube_targets.launch(pixels, tokens, empty(B, V, width), tubelet, patch, normalize)
    return ExampleLaunch(variant, launch, width + INDEX, width * FLOAT32)


def _distances(dtype: torch.dtype, distance: str = "smooth_l1") -> Iterator[ExampleLaunch]:
    masked = empty(B, M, dtype=torch.int64)
    yield from _distances_of(f"{distance} {_label(dtype)}", distance, D, dtype, dtype, norm=True, masked=masked)


def _distances_of(
    variant: str,
    distance: str,
    width: int,
    dtype: torch.dtype,
    of_features: torch.dtype,
    *,
    norm: bool,
    masked: torch.Tensor | None = None,
) -> Iterator[ExampleLaunch]:
    predictions, gradient = empty(B, M, width, dtype=dtype), empty(B, M, width, dtype=dtype)
    features = empty(B, M if masked is None else N, width, dtype=of_features)
    arguments = (predictions, features, masked, distance, norm)
    read = width * (dtype.itemsize + of_features.itemsize) + INDEX * (masked is not None)
    yield ExampleLaunch(variant, masked_distance.forward_launch(*arguments, empty(B * M)), read, FLOAT32)
    backward = masked_distance.backward_launch(*arguments, empty(()), gradient)
    yield ExampleLaunch(variant, backward, read, width * dtype.itemsize)


def _add_layer_norm(dtype: torch.dtype) -> Iterator[ExampleLaunch]:
    yield from _add_layer_norm_of(_label(dtype), D, dtype)


def _add_layer_norm_of(variant: str, width: int, dtype: torch.dtype) -> Iterator[ExampleLaunch]:
    values, affine, statistics = empty(B * N, width, dtype=dtype), empty(width, dtype=dtype), empty(2, B * N)
    row, scalars = width * dtype.itemsize, 2 * FLOAT32
    forward = add_layer_norm.forward_launch((values, values, affine, affine), values, values, statistics, 1e-6)
    yield ExampleLaunch(variant, forward, 2 * row, 2 * row + scalars)
    sums = empty(-(-B * N // add_layer_norm.PIECE), width)
    backward = add_layer_norm.backward_launch((values, affine, statistics), values, values, values, (sums, sums))
    yield ExampleLaunch(variant, backward, 3 * row + scalars, row + 2 * width * FLOAT32 / add_layer_norm.PIECE)


def _decoder(dtype: torch.dtype) -> Iterator[ExampleLaunch]:
    yield _decoder_of(_label(dtype), DECODER, dtype, torch.float32)


def _decoder_of(variant: str, width: int, dtype: torch.dtype, of_positions: torch.dtype) -> ExampleLaunch:
    launch = decoder_input.launch(
        empty(B, V, width, dtype=dtype),
        empty(width, dtype=dtype),
        empty(N, width, dtype=of_positions),
        empty(B, V, dtype=torch.int64),
        empty(B, M, dtype=torch.int64),
        empty(B, V + M, width, dtype=dtype),
    )
    row = width * dtype.itemsize
    # Only visible tokens, V of V + M, read a row of `embedded`; all masked tokens read the same mask token.
    return ExampleLaunch(variant, launch, row * V / (V + M) + width * of_positions.itemsize + INDEX, row)


def _of_recipes() -> Iterator[ExampleLaunch]:
    """Yield the other launches of the recipes; `tests/fake_cuda` requires that none is missing."""
    half, full = torch.float16, torch.float32
    for tubelet, patch, dtype, chosen in (
        (1, 8, full, True), (2, 8, full, True), (2, 8, full, False), (2, 8, half, False), (1, 14, half, True),
        (1, 14, half, False), (1, 16, half, True), (1, 16, half, False), (2, 16, half, False), (2, 16, full, False),
    ):  # fmt: skip
        variant = f"{_label(dtype)} {tubelet}x{patch}x{patch} {'chosen' if chosen else 'all'}"
        yield _rows_of(variant, dtype, tubelet, patch, chosen=chosen)
    # Fine-tuning mixes clips in float32.
    yield _rows_of("float16 2x16x16 all, from float32", half, 2, 16, chosen=False, stored=full)
    for normalize, tubelet, patch in (("patch", 1, 8), ("none", 2, 8), ("patch", 1, 14), ("patch", 1, 16)):
        yield _targets_of(f"{normalize} {tubelet}x{patch}x{patch}", normalize, tubelet, patch)
    for width, dtype in ((96, half), (96, full), (192, half), (384, half), (768, half)):
        yield from _add_layer_norm_of(f"{_label(dtype)} D {width}", width, dtype)
    for width, dtype in ((96, full), (192, half), (384, half), (640, half)):
        yield _decoder_of(f"{_label(dtype)} D {width}, positions alike", width, dtype, dtype)
    for distance, width, dtype, of_features, norm in (
        ("smooth_l1", 96, full, half, True), ("smooth_l1", 768, half, half, True),
        ("smooth_l1", 768, half, half, False), ("smooth_l1", 1280, half, half, False),
        ("smooth_l1", 768, half, full, False),
        ("l1", 768, half, half, False), ("l2", 192, full, full, False), ("l2", 384, full, full, False),
        ("l2", 768, half, half, False), ("l2", 768, half, full, False), ("l2", 1536, half, full, False),
        ("cosine", 768, half, half, False), ("cosine", 1536, half, half, False),
    ):  # fmt: skip
        variant = f"{distance} {_label(dtype)}, {_label(of_features)} D {width}{' norm' if norm else ''}"
        yield from _distances_of(variant, distance, width, dtype, of_features, norm=norm)
