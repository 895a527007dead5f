"""How decoded frames come to the model's side: cut, resized, turned as shown, mirrored.

On a GPU by DALI's operators. On the CPU, where these take four times as long, by torch's 8-bit resampling as a function
in the same graph: it gives PIL's pixels to within one level of 255, and is nearer to them than DALI's operators.

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
"""The arrays of a source, by the names of its fields."""


@dataclass(frozen=True)
class Resampling:
    """How frames are resized."""

    filter: Filter

    antialias: bool
    """Whether the filter widens where it shrinks."""


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
    """Frames as shown and flipped, at a given size.

    Args:
        sample: with `mirror` of the copy; `anchor` and `shape` of its box if it is cut; `transpose` if `turned`.
        frames: uint8 (T, H, W, 3), layout FHWC, as coded.
        size: height and width in pixels to resize to, before turning; float32 (2,) on the host where samples differ.
        resampling: how to resize.
        copy: which copy of the sample.
        cut: whether to cut the copy's box out first.
        turned: whether clips may lie on their side.
        on_gpu: whether the frames are on a GPU.
    """
    box = [sample["anchor"][copy], sample["shape"][copy]] if cut else None
    if not on_gpu:
        transpose = sample["transpose"] if turned else types.Constant(np.int32(0))
        return _on_host(frames, size, resampling, box, sample["mirror"][copy], transpose)
    clip = _resize_by_dali(frames, size, resampling, box)
    if turned:
        clip = _stand_up(sample, clip)
    return fn.flip(clip, horizontal=sample["mirror"][copy, 0], vertical=sample["mirror"][copy, 1])


@do_not_convert  # type: ignore[untyped-decorator]
def resize(clip: DataNode, size: tuple[int, int], *, filter: Filter, on_gpu: bool) -> DataNode:
    """A clip at another size, antialiased where it shrinks."""
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


def _stand_up(sample: Sample, clip: DataNode) -> DataNode:
    """Transpose the clips whose video is to be turned by a quarter; mirroring does the rest."""
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
    """The same as DALI's operators, on arrays.

    Args:
        frames: uint8 (T, H, W, 3).
        size: height and width to resize to, whole numbers.
        mirror: left-right, up-down.
        transpose: swaps height and width after resizing if not zero.
        *box: top and left, height and width to cut out first; none for the whole frame.
        filter: of resizing.
        antialias: whether the filter widens where it shrinks.

    Returns:
        uint8 (T, height, width, 3); (T, width, height, 3) if transposed.

    Raises:
        ValueError: the box reaches out of the frames, which are not of the size that the manifest says.
    """
    clip: Tensor = torch.from_numpy(frames)
    if box:
        (top, left), (height, width) = (pair.tolist() for pair in box)
        if top + height > clip.shape[1] or left + width > clip.shape[2]:
            raise ValueError(
                f"frames of {clip.shape[1]} x {clip.shape[2]} end within the box {top, left, height, width}"
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
