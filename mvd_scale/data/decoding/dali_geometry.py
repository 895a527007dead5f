"""Geometry of decoded frames: crop, resize to the model's input side, rotate to display orientation, flip.

On a GPU, DALI's operators do this. On the CPU, DALI's operators take four times as long as torch's 8-bit resampling,
which therefore runs as a Python function in the same graph. Its pixels differ from PIL's by at most one level of 255,
less than those of DALI's operators do.

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

Filter = Literal["bilinear", "bicubic"]

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
    cut: bool,
    turned: bool,
    on_gpu: bool,
) -> DataNode:
    """Crop, resize, rotate to display orientation and flip the frames of a clip.

    Args:
        sample: arrays of the sample: `mirror`; `anchor` and `shape` of the box if `cut`; `transpose` if `turned`.
        frames: uint8 (T, H, W, 3), layout FHWC, in coded orientation.
        size: height and width in pixels to resize to, before rotation; float32 (2,) on the host if samples differ.
        resampling: filter settings.
        copy: index of the copy of the sample.
        cut: whether to crop to the box of the copy first.
        turned: whether clips may be rotated by 90 or 270 degrees.
        on_gpu: whether the frames are on a GPU.

    Returns:
        uint8 (T, height, width, 3); (T, width, height, 3) for a clip that is rotated by 90 or 270 degrees.
    """
    box = [sample["anchor"][copy], sample["shape"][copy]] if cut else None
    if not on_gpu:
        transpose = sample["transpose"] if turned else types.Constant(np.int32(0))
        return _on_host(frames, size, resampling, box, sample["mirror"][copy], transpose)
    clip = _resize_by_dali(frames, size, resampling, box)
    if turned:
        clip = _transpose_rotated(sample, clip)
    return fn.flip(clip, horizontal=sample["mirror"][copy, 0], vertical=sample["mirror"][copy, 1])


@do_not_convert  # type: ignore[untyped-decorator]
def resize(clip: DataNode, size: tuple[int, int], *, filter: Filter, on_gpu: bool) -> DataNode:
    """Resize a clip, with antialiasing when it shrinks.

    Args:
        clip: uint8 (T, H, W, 3).
        size: height and width in pixels to resize to.
        filter: interpolation.
        on_gpu: whether the clip is on a GPU.

    Returns:
        uint8 (T, height, width, 3).
    """
    resampling = Resampling(filter, antialias=True)
    if on_gpu:
        return _resize_by_dali(clip, size, resampling, None)
    return _on_host(clip, size, resampling, None, types.Constant(np.zeros(2, np.int32)), types.Constant(np.int32(0)))


@do_not_convert  # type: ignore[untyped-decorator]
def _resize_by_dali(
    frames: DataNode, size: DataNode | tuple[int, int], resampling: Resampling, box: list[DataNode] | None
) -> DataNode:
    cut = frames if box is None else fn.slice(frames, start=box[0], shape=box[1], axes=(1, 2))
    return fn.resize(cut, size=size, interp_type=_DALI_FILTERS[resampling.filter], antialias=resampling.antialias)


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
    box: list[DataNode] | None,
    mirror: DataNode,
    transpose: DataNode,
) -> DataNode:
    if isinstance(size, tuple):
        size = types.Constant(np.array(size, np.float32))
    return fn.python_function(
        frames,
        size,
        mirror,
        transpose,
        *(box or []),
        function=partial(resample, filter=resampling.filter, antialias=resampling.antialias),
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
) -> NDArray[np.uint8]:
    """Crop, resize, transpose and flip on the CPU by torch, as `upright` does on a GPU by DALI's operators.

    Args:
        frames: uint8 (T, H, W, 3).
        size: height and width in pixels to resize to, whole numbers: float32 (2,).
        mirror: whether to flip left-right and up-down: int32 (2,).
        transpose: not zero to swap height and width after resizing: int32 scalar.
        *box: (top, left) and (height, width) of the box to crop first, int32 (2,) each; none for the whole frame.
        filter: interpolation of the resizing.
        antialias: whether the filter widens when it shrinks frames.

    Returns:
        uint8 (T, height, width, 3); (T, width, height, 3) if transposed.

    Raises:
        ValueError: the box reaches out of the frames: they are smaller than the manifest says.
    """
    clip: Tensor = torch.from_numpy(frames)
    if box:
        (top, left), (height, width) = (pair.tolist() for pair in box)
        if top + height > clip.shape[1] or left + width > clip.shape[2]:
            raise ValueError(
                f"frames of {clip.shape[1]} x {clip.shape[2]} pixels do not contain the box {top, left, height, width} "
                "(top, left, height, width): the manifest states another size. Index the videos again"
            )
        clip = clip[:, top : top + height, left : left + width]
    target = [int(side) for side in size]
    if list(clip.shape[1:3]) != target:
        channels_last = clip.movedim(-1, 1)
        clip = functional.interpolate(channels_last, target, mode=filter, antialias=antialias).movedim(1, -1)
    if transpose.item():
        clip = clip.transpose(1, 2)
    axes = [axis for axis, mirrored in zip((2, 1), mirror.tolist(), strict=True) if mirrored]
    if axes:
        clip = clip.flip(axes)
    pixels: NDArray[Any] = clip.contiguous().numpy()
    return pixels
