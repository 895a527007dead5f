"""Baseline loaders of evaluation views for comparison: three ways in common use.

    view    an item is a view: open the video, decode to the end of the clip, resize, cut one crop
    clip    an item is a clip: the same, but all crops of the clip are cut from the decoded frames
    whole   an item is a view, as in the published data sets: decode every frame that any clip may need, resize all of
            them, keep those of one view

All yield the same views as our loader in the same order. Frames are read by decord if it is installed, else by PyAV.

Legend: K clips in time, C crops, T frames of a clip, S side of a crop.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.v2 import functional

from mvd_scale.config.data import ViewsConfig
from mvd_scale.data.sampling.eval_views import crop_corners, resized_size, view_frame_indices
from mvd_scale.performance.benchmarks.data.baselines.loaders import decord_frames, pyav_frames

Baseline = Literal["view", "clip", "whole"]
BASELINES: tuple[Baseline, ...] = ("view", "clip", "whole")

Reader = Callable[[str, Sequence[int]], NDArray[np.uint8]]
"""Function from a path and ascending distinct frame numbers to frames uint8 (numbers, H, W, 3)."""


def reader_name() -> str:
    """Name of the library that reads frames here: decord or PyAV."""
    return "decord" if find_spec("decord") is not None else "PyAV"


def baseline_views(
    way: Baseline,
    paths: Sequence[str],
    frames: Sequence[int],
    views: ViewsConfig,
    *,
    length: int,
    side: int,
    workers: int,
) -> DataLoader:
    """Make a loader that yields the views of one video after the other: uint8 (K C, T, S, S, 3).

    Args:
        way: one of `BASELINES`.
        paths: video files, in the order to load.
        frames: number of frames of each file.
        views: the views, with dense sampling.
        length: frames of a clip, T.
        side: side of a crop in pixels, S.
        workers: worker processes; 0 loads in this process.
    """
    items = _Items(way, paths, frames, views, length, side)
    return DataLoader(items, batch_size=items.per_video, num_workers=workers, collate_fn=torch.cat)


def frames_decoded(way: Baseline, total: int, views: ViewsConfig, *, length: int) -> int:
    """Number of frames that PyAV decodes for all views of a video of `total` frames.

    decord may decode fewer, because it can start at a later key frame.
    """
    clips = view_frame_indices(views, total, frames=length)
    if way == "whole":
        return len(clips) * views.crops * (int(_listed(views, total)[-1]) + 1)
    return int((clips[:, -1] + 1).sum()) * (views.crops if way == "view" else 1)


def _listed(views: ViewsConfig, total: int) -> NDArray[np.int64]:
    """Frame numbers that dense clips are cut from; the published data sets decode all of them for each view."""
    return np.arange(0, total, views.stride)


class _Items(Dataset[Tensor]):
    """Data set with items uint8 (1, T, S, S, 3), or (C, T, S, S, 3) if `way` is `clip`."""

    def __init__(
        self, way: Baseline, paths: Sequence[str], frames: Sequence[int], views: ViewsConfig, length: int, side: int
    ) -> None:
        self.way = way
        self.paths = paths
        self.frames = frames
        self.views = views
        self.length = length
        self.side = side
        self.per_video = views.clips * (1 if way == "clip" else views.crops)
        self.read: Reader = decord_frames if reader_name() == "decord" else pyav_frames

    def __len__(self) -> int:
        return len(self.paths) * self.per_video

    def __getitem__(self, item: int) -> Tensor:
        video, view = divmod(item, self.per_video)
        clip, crop = (view, None) if self.way == "clip" else divmod(view, self.views.crops)
        total = self.frames[video]
        chosen = view_frame_indices(self.views, total, frames=self.length)[clip]
        places = _listed(self.views, total) if self.way == "whole" else np.unique(chosen)
        read = torch.from_numpy(self.read(self.paths[video], places.tolist())).permute(0, 3, 1, 2)
        height, width = resized_size(*read.shape[2:], side=self.side)
        small = functional.resize(read, [height, width], antialias=False)
        small = small[torch.from_numpy(np.searchsorted(places, chosen))].permute(0, 2, 3, 1)
        corners = crop_corners(height, width, side=self.side, crops=self.views.crops)
        cut = [
            small[:, y : y + self.side, x : x + self.side] for y, x in (corners if crop is None else [corners[crop]])
        ]
        return torch.stack(cut)
