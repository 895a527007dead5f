"""Three plain ways of testing by several views that people use today, to compare with.

    view    every view is an item: open the video, decode to the end of its clip, resize, cut one crop
    clip    every clip is an item: the same, but all of its crops are cut of what was decoded
    whole   every view is an item, as in the published data sets: decode every frame that any clip may need, resize
            them all, keep those of one view

All give the same views as ours, in the same order; frames are read by decord where it is installed, else by PyAV.

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
from mvd_scale.data.views import clips_of, crop_corners, resized_size
from mvd_scale.performance.plain_loaders import decord_frames, pyav_frames

Way = Literal["view", "clip", "whole"]
WAYS: tuple[Way, ...] = ("view", "clip", "whole")

Reader = Callable[[str, Sequence[int]], NDArray[np.uint8]]
"""From a path and ascending places, without repetitions, to frames uint8 (places, H, W, 3)."""


def reader_name() -> str:
    """Who reads frames here."""
    return "decord" if find_spec("decord") is not None else "PyAV"


def plain_views(
    way: Way, paths: Sequence[str], frames: Sequence[int], views: ViewsConfig, *, length: int, side: int, workers: int
) -> DataLoader:
    """Videos, each as its views: uint8 (K C, T, S, S, 3).

    Args:
        way: one of `WAYS`.
        paths: files, in their order.
        frames: of each of them.
        views: which views; dense ones.
        length: T.
        side: S.
        workers: processes that load items; 0 loads them in this one.
    """
    items = _Items(way, paths, frames, views, length, side)
    return DataLoader(items, batch_size=items.per_video, num_workers=workers, collate_fn=torch.cat)


def frames_decoded(way: Way, total: int, views: ViewsConfig, *, length: int) -> int:
    """Frames that PyAV decodes for all views of a video of `total` frames; decord may start at a later keyframe."""
    clips = clips_of(views, total, frames=length)
    if way == "whole":
        return len(clips) * views.crops * (int(_listed(views, total)[-1]) + 1)
    return int((clips[:, -1] + 1).sum()) * (views.crops if way == "view" else 1)


def _listed(views: ViewsConfig, total: int) -> NDArray[np.int64]:
    """Places that dense clips are cut from, which the published data sets decode for each of them."""
    return np.arange(0, total, views.stride)


class _Items(Dataset[Tensor]):
    """Item: uint8 (1, T, S, S, 3), or (C, T, S, S, 3) by way of `clip`."""

    def __init__(
        self, way: Way, paths: Sequence[str], frames: Sequence[int], views: ViewsConfig, length: int, side: int
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
        chosen = clips_of(self.views, total, frames=self.length)[clip]
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
