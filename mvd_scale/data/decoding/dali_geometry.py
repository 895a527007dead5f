"""Geometry of decoded frames: crop, resize to the model's input side, rotate to display orientation, flip.

On a GPU, DALI's operators do this. On the CPU, DALI's operators take four times as long as torch's 8-bit resampling,
which therefore runs as a Python function in the same graph. With antialiasing, its pixels differ from PIL's by at most
one level of 255, less than those of DALI's operators do. Without it, both are within one level of the published crops.

Legend: T frames, H W pixels.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from nvidia.dali import fn, types
from nvidia.dali.data_node import DataNode
from nvidia.dali.pipeline import do_not_convert
from torch import Tensor
from torch.nn import functional

from mvd_scale.data.decoding.frame_operations import check_box

Filter = Literal["bilinear", "bicubic"]

Cut = Literal["first", "last"]
"""When the crop is cut: `first`, then it is resized; or `last`, from frames that were resized as a whole."""

Sample = dict[str, DataNode]
"""Arrays of one sample in the graph, by the names of `sample_source.FIELDS`."""


@dataclass(frozen=True)
class Resampling:
    """Filter settings for resizing frames."""

    filter: Filter

    antialias: bool
    """Whether the filter widens when it shrinks frames."""


_DALI_FILTERS = {"bilinear": types.INTERP_LINEAR, "bicubic": types.INTERP_CUBIC}


def upright(
    sample: Sample,
    frames: DataNode,
    size: DataNode | tuple[int, int],
    resampling: Resampling,
    *,
    copy: int,
    cut: Cut | None,
    turned: bool,
    on_gpu: bool,
) -> DataNode:
    """Crop, resize, rotate to display orientation and flip the frames of a clip.

    Args:
        sample: arrays of the sample: `mirror`; `anchor` and `shape` of the box with `cut`; `transpose` if `turned`.
        frames: uint8 (T, H, W, 3), layout FHWC, in coded orientation.
        size: height and width in pixels to resize to, before rotation; float32 (2,) on the host if samples differ.
        resampling: filter settings.
        copy: index of the copy of the sample.
        cut: when to crop to the box of the copy; None for no crop.
        turned: whether clips may be rotated by 90 or 270 degrees.
        on_gpu: whether the frames are on a GPU.

    Returns:
        uint8 (T, height, width, 3), the size of the box with `cut` last; transposed for a clip that is rotated by 90 or
        270 degrees.
    """
    box = [sample["anchor"][copy], sample["shape"][copy]] if cut is not None else []
    if not on_gpu:
        transpose = sample["transpose"] if turned else types.Constant(np.int32(0))
        return _on_host(frames, size, resampling, box, sample["mirror"][copy], transpose, cut_last=cut == "last")
    clip = _resize_by_dali(frames, size, resampling, box, cut_last=cut == "last")
    if turned:
        clip = _transpose_rotated(sample, clip)
    return fn.flip(clip, horizontal=sample["mirror"][copy, 0], vertical=sample["mirror"][copy, 1])


@do_not_convert  # type: ignore[untyped-decorator]
def resize(clip: DataNode, size: tuple[int, int], resampling: Resampling, *, on_gpu: bool) -> DataNode:
    """Resize a clip.

    Args:
        clip: uint8 (T, H, W, 3).
        size: height and width in pixels to resize to.
        resampling: filter settings.
        on_gpu: whether the clip is on a GPU.

    Returns:
        uint8 (T, height, width, 3).
    """
    if on_gpu:
        return _resize_by_dali(clip, size, resampling, [], cut_last=False)
    mirror, transpose = types.Constant(np.zeros(2, np.int32)), types.Constant(np.int32(0))
    return _on_host(clip, size, resampling, [], mirror, transpose, cut_last=False)


@do_not_convert  # type: ignore[untyped-decorator]
def _resize_by_dali(
    frames: DataNode, size: DataNode | tuple[int, int], resampling: Resampling, box: list[DataNode], *, cut_last: bool
) -> DataNode:
    if box and not cut_last:
        frames = fn.slice(frames, start=box[0], shape=box[1], axes=(1, 2))
    clip = fn.resize(frames, size=size, interp_type=_DALI_FILTERS[resampling.filter], antialias=resampling.antialias)
    return fn.slice(clip, start=box[0], shape=box[1], axes=(1, 2)) if cut_last else clip


def _transpose_rotated(sample: Sample, clip: DataNode) -> DataNode:
    """Transpose the clips of videos rotated by 90 or 270 degrees; the flip that follows completes the rotation."""
    if sample["transpose"] != 0:
        standing = fn.transpose(clip, perm=[0, 2, 1, 3], transpose_layout=False, output_layout="FHWC")
    else:
        standing = fn.copy(clip)
    return standing


@do_not_convert  # type: ignore[untyped-decorator]
def _on_host(
    frames: DataNode,
    size: DataNode | tuple[int, int],
    resampling: Resampling,
    box: list[DataNode],
    mirror: DataNode,
    transpose: DataNode,
    *,
    cut_last: bool,
) -> DataNode:
    if isinstance(size, tuple):
        size = types.Constant(np.array(size, np.float32))
    return fn.python_function(
        frames,
        size,
        mirror,
        transpose,
        *box,
        function=partial(resample, filter=resampling.filter, antialias=resampling.antialias, cut_last=cut_last),
        num_outputs=1,
        output_layouts="FHWC",
    )


def resample(
    frames: NDArray[np.uint8],
    size: NDArray[np.float32],
    mirror: NDArray[np.int32],
    transpose: NDArray[np.int32],
    *box: NDArray[np.int32],
    filter: Filter,
    antialias: bool,
    cut_last: bool = False,
) -> NDArray[np.uint8]:
    """Crop, resize, transpose and flip on the CPU by torch, as `upright` does on a GPU by DALI's operators.

    Args:
        frames: uint8 (T, H, W, 3).
        size: height and width in pixels to resize to, whole numbers: float32 (2,).
        mirror: whether to flip left-right and up-down: int32 (2,).
        transpose: not zero to swap height and width after resizing: int32 scalar.
        *box: (top, left) and (height, width) of the box to crop to, int32 (2,) each; none for the whole frame.
        filter: interpolation of the resizing.
        antialias: whether the filter widens when it shrinks frames.
        cut_last: whether the box lies in the resized frames, and is cut from them.

    Returns:
        uint8 (T, height, width, 3), the size of the box with `cut_last`; transposed if `transpose` is not zero.

    Raises:
        ValueError: the box reaches out of the frames: they are smaller than the manifest says.
    """
    clip: Tensor = torch.from_numpy(frames)
    if box and not cut_last:
        clip = _cut(clip, *box)
    target = [int(side) for side in size]
    if list(clip.shape[1:3]) != target:
        channels_last = clip.movedim(-1, 1)
        clip = functional.interpolate(channels_last, target, mode=filter, antialias=antialias).movedim(1, -1)
    if cut_last:
        clip = _cut(clip, *box)
    if transpose.item():
        clip = clip.transpose(1, 2)
    axes = [axis for axis, mirrored in zip((2, 1), mirror.tolist(), strict=True) if mirrored]
    if axes:
        clip = clip.flip(axes)
    pixels: NDArray[Any] = clip.contiguous().numpy()
    return pixels


def _cut(clip: Tensor, anchor: NDArray[np.int32], shape: NDArray[np.int32]) -> Tensor:
    (top, left), (height, width) = anchor.tolist(), shape.tolist()
    check_box(tuple(clip.shape), (top, left, height, width))
    return clip[:, top : top + height, left : left + width]
