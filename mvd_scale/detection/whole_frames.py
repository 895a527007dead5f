"""Loader of clips around key frames for the evaluation: whole frames, resized by their short side, not cropped.

Legend: B clips, T frames, H W pixels of a clip, which differ between videos.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from nvidia.dali.data_node import DataNode
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from mvd_scale.config.data import DataConfig, ViewsConfig
from mvd_scale.data.columns import share
from mvd_scale.data.decoding.dali_geometry import Sample
from mvd_scale.data.loaders.base import Outputs
from mvd_scale.data.loaders.quarantine import Quarantine
from mvd_scale.data.loaders.view_loader import ItemLoader, ViewShape, ViewSource, whole_frames
from mvd_scale.detection.key_frames import KeyFrames, frames_around
from mvd_scale.distributed.data_rank import DataRank


@dataclass(frozen=True)
class FrameBatch:
    """Batch of key frames."""

    pixels: list[Tensor]
    """uint8 (T, H, W, 3) each, on the device; black where the video could not be decoded."""

    rows: list[int]
    """Rows of the key frames, one per clip."""

    decoded: list[bool]
    """Whether the video could be decoded, one per clip."""


class WholeFrameSource(ViewSource):
    """Source whose sample n is the clip around the n-th of the given key frames."""

    def __init__(self, key_frames: KeyFrames, items: NDArray[np.int64], views: ViewsConfig, **others: Any) -> None:
        super().__init__(key_frames.manifest, items, views, **others)
        self._centres = share(centres=key_frames.centres)

    @property
    def extra_fields(self) -> set[str]:
        return {"size", "mirror"}

    def _frames(self, n: int) -> NDArray[np.int64]:
        row = int(self.items[n, 0])
        centre, available = int(self._centres["centres"][row]), int(self.videos.manifest.frames[row])
        return frames_around(centre, available, frames=self.length, stride=self.views.stride)


class WholeFrameLoader(ItemLoader[FrameBatch]):
    """Iterator over the clips around key frames, each exactly once.

    Args:
        key_frames: key frames of the evaluation.
        rows: rows of this rank's key frames, int64 (items,).
        data: numbers of workers and threads, limits, and stride between the frames of a clip.
        shape: frames of a clip (T), and length of the short side in pixels.
        batch: see `ItemLoader`.
        rank: see `ItemLoader`.
        quarantine: see `ItemLoader`.
    """

    def __init__(
        self,
        key_frames: KeyFrames,
        rows: NDArray[np.int64],
        data: DataConfig,
        *,
        shape: ViewShape,
        batch: int,
        rank: DataRank,
        quarantine: Quarantine | None = None,
    ) -> None:
        self._key_frames = key_frames
        self._views = ViewsConfig(stride=data.stride, clips=1, crops=1)
        self._shape = shape
        items = np.stack([rows, np.zeros_like(rows)], axis=1)
        super().__init__(
            key_frames.manifest,
            data,
            items,
            frames=shape.frames,
            batch=batch,
            rank=rank,
            quarantine=quarantine,
        )

    def _video(self, row: int) -> str:
        return self._manifest.name[row]

    def _source(self) -> WholeFrameSource:
        key_frames = replace(self._key_frames, manifest=self._manifest)
        return WholeFrameSource(key_frames, self.items, self._views, shape=self._shape, **self._source_options)

    def _body(self, turned: bool) -> Callable[[Sample, DataNode], tuple[DataNode, ...]]:
        on_gpu = self._device_id is not None

        def body(sample: Sample, frames: DataNode) -> tuple[DataNode, ...]:
            return (whole_frames(sample, frames, turned=turned, on_gpu=on_gpu),)

        return body

    def _collect(self, outputs: Outputs, valid: Tensor, items: NDArray[np.int64], decoded: Tensor) -> FrameBatch:
        clips = outputs[0]
        return FrameBatch([from_dlpack(clips[k]) for k in valid.tolist()], items[:, 0].tolist(), decoded.tolist())
