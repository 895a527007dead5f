"""Test views of a single video, from a file or from frames in memory; equal to the views of the multi-view test.

Legend: F frames of a video, H W pixels, V views, T frames of a clip, S side of a crop.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mvd_scale.config.data import DataConfig, ViewsConfig
from mvd_scale.config.model import ModelConfig
from mvd_scale.data.decoding.backends import DecodeBackend
from mvd_scale.data.decoding.sample_source import DecoderInput
from mvd_scale.data.indexing.media_probe import probe_video
from mvd_scale.data.loaders.quarantine import Failure
from mvd_scale.data.loaders.view_loader import ViewLoader, ViewShape, ViewSource, view_items
from mvd_scale.data.manifest import Manifest, Row
from mvd_scale.data.sampling.crops import Box
from mvd_scale.data.storage import DecodeError, absolute
from mvd_scale.distributed.data_rank import DataRank

_DATA = DataConfig(workers=0, prefetch=1)


def views_of_file(path: str, views: ViewsConfig, model: ModelConfig, device: torch.device) -> Tensor:
    """Load the test views of a video file or URL: uint8 (V, T, S, S, 3) on the device.

    Raises:
        DecodeError: the file is missing, or cannot be decoded.
    """
    video = probe_video(Row(name=path, path=absolute(path)), timeout=_DATA.read_timeout)
    if video.left_out is not None:
        raise DecodeError(path, video.left_out)
    return _cut(_OneVideo, video, views, model, device)


def views_of_frames(frames: NDArray[np.uint8], views: ViewsConfig, model: ModelConfig, device: torch.device) -> Tensor:
    """Cut the test views of RGB frames in display orientation.

    Args:
        frames: uint8 (F, H, W, 3).
        views: test views.
        model: model config, which sets T and S.
        device: device of the result.

    Returns:
        uint8 (V, T, S, S, 3).
    """
    count, height, width, _ = frames.shape
    video = Row("frames", "frames", frames=count, height=height, width=width, codec="rawvideo", pixel_format="rgb24")
    data = _DATA.model_copy(update={"decoder": "host"})
    return _cut(partial(_FramesLoader, frames), video, views, model, device, data)


class _FramesSource(ViewSource):
    """View source that takes frames from memory instead of a file."""

    def __init__(self, pictures: NDArray[np.uint8], *arguments: Any, **others: Any) -> None:
        super().__init__(*arguments, **others)
        self.pictures = pictures

    def prepare(self, row: int, frames: NDArray[np.int64], box: Box | None, *, pyav_samples: bool) -> DecoderInput:
        return DecoderInput(DecodeBackend.PYAV, self.pictures[frames])


class _OneVideo(ViewLoader):
    """View loader that raises a `DecodeError` for a video that cannot be decoded, instead of logging it."""

    def _report_failure(self, failure: Failure) -> None:
        raise DecodeError(failure["path"], failure["error"])


class _FramesLoader(_OneVideo):
    """View loader of frames in memory."""

    def __init__(self, pictures: NDArray[np.uint8], *arguments: Any, **others: Any) -> None:
        # Set before the base class builds the graph, which calls `_source`.
        self._pictures = pictures
        super().__init__(*arguments, **others)

    def _source(self) -> _FramesSource:
        return _FramesSource(
            self._pictures, self._manifest, self.items, self._views, self._shape, **self._source_options
        )


def _cut(
    load: Callable[..., ViewLoader],
    video: Row,
    views: ViewsConfig,
    model: ModelConfig,
    device: torch.device,
    data: DataConfig = _DATA,
) -> Tensor:
    manifest = Manifest.from_rows([video])
    items = view_items(manifest, views, frames=model.frames)
    with load(manifest, data, views, items, shape=ViewShape.of(model), batch=1, rank=DataRank(device)) as loader:
        return next(loader).pixels[0].flatten(0, 1)
