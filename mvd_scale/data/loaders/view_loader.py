"""Loader of the test views of all videos; each video is decoded once for all of its views (published evaluation).

Legend: B videos, K clips in time, C crops, T frames of a clip, S side of a crop.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from typing import Any, Generic, Self, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from nvidia.dali import fn
from nvidia.dali.data_node import DataNode
from nvidia.dali.pipeline import Pipeline, do_not_convert
from torch import Tensor

from mvd_scale.config.data import DataConfig, ViewsConfig
from mvd_scale.config.model import ModelConfig
from mvd_scale.data.batch import ViewBatch
from mvd_scale.data.columns import share
from mvd_scale.data.decoding.backends import DecodeBackend
from mvd_scale.data.decoding.dali_geometry import Resampling, Sample, upright
from mvd_scale.data.decoding.dali_graph import build_pipeline
from mvd_scale.data.decoding.sample_source import Arrays, DecoderInput, VideoSource, flip_axes
from mvd_scale.data.loaders.base import DaliLoader, Outputs, as_tensor
from mvd_scale.data.loaders.quarantine import Failure, Quarantine
from mvd_scale.data.manifest import Manifest, Row
from mvd_scale.data.sampling.eval_views import crop_corners, resized_size, view_frame_indices
from mvd_scale.data.storage import DecodeError
from mvd_scale.distributed.data_rank import DataRank

_AS_OPENCV = Resampling("bilinear", antialias=False)
"""The published evaluation resizes by OpenCV, which does not antialias."""

_PADDING = -1
"""Value of `row` for samples that pad the last batch."""


def view_items(manifest: Manifest, views: ViewsConfig, *, frames: int) -> NDArray[np.int64]:
    """List the items to load: one per usable video, or, for sliding clips, one per group of `views.clips` clips.

    Args:
        manifest: manifest of the videos.
        views: test views.
        frames: frames of a clip (T).

    Returns:
        row of the manifest and index of the first clip of each item: int64 (items, 2).
    """
    usable = manifest.usable
    if views.sampling != "sliding":
        return np.stack([usable, np.zeros_like(usable)], axis=1)
    clips = (len(view_frame_indices(views, int(manifest.frames[row]), frames=frames)) for row in usable)
    groups = -(-np.fromiter(clips, np.int64, len(usable)) // views.clips)
    # Items of all videos are numbered; less the items of the videos before, each has its place within its video.
    places = np.arange(groups.sum(), dtype=np.int64) - np.repeat(groups.cumsum() - groups, groups)
    return np.stack([np.repeat(usable, groups), places * views.clips], axis=1)


@dataclass(frozen=True)
class ViewShape:
    """Shape of a view."""

    frames: int
    """Frames of a clip (T)."""

    side: int
    """Side of a crop in pixels (S); for views that are not cropped, the length of the short side."""

    @classmethod
    def of(cls, model: ModelConfig) -> ViewShape:
        """Return the view shape that a model expects."""
        return cls(model.frames, model.input_size)


class ViewSource(VideoSource):
    """Source of test views: sample n is item n; samples after the last item are black and pad the last batch."""

    def __init__(
        self, manifest: Manifest, items: NDArray[np.int64], views: ViewsConfig, shape: ViewShape, **others: Any
    ) -> None:
        super().__init__(manifest, **others)
        self._items = share(items=items)
        self.views = views
        self.length = shape.frames
        self.side = shape.side

    @property
    def items(self) -> NDArray[np.int64]:
        """Row of the manifest and index of the first clip of each item: int64 (items, 2)."""
        return self._items["items"]

    @property
    def extra_fields(self) -> set[str]:
        return {"anchor", "size", "mirror", "inverse"}

    def sample(self, n: int) -> Arrays:
        if n >= len(self.items):
            shape = Row(name="", path="", height=self.side, width=self.side)
            return self._arrays(shape, np.zeros(self.views.clips * self.length, np.int64), None, _PADDING, [])
        row, video, order = int(self.items[n, 0]), self.videos[int(self.items[n, 0])], self._frames(n)
        try:
            media = self._media(row, n)
        except DecodeError as error:
            return self._arrays(video, order, None, row, [self.videos.failure(row, error)])
        return self._arrays(video, order, media, row, [])

    def dali_input(self, n: int) -> tuple[NDArray[np.uint8], NDArray[np.int64], Row] | None:
        if n >= len(self.items):
            return None
        row = int(self.items[n, 0])
        try:
            media = self._media(row, n)
        except DecodeError:
            return None
        return (
            (media.data, np.sort(self._frames(n)), self.videos[row])
            if media.decoder is not DecodeBackend.PYAV
            else None
        )

    def _frames(self, n: int) -> NDArray[np.int64]:
        """Frame numbers of all clips of an item, one clip after the other: int64 (K T,)."""
        row, first = self.items[n]
        clips = view_frame_indices(self.views, int(self.videos.manifest.frames[row]), frames=self.length)
        # The last group of sliding clips of a video may be incomplete: its last clip is repeated.
        return clips[np.minimum(first + np.arange(self.views.clips), len(clips) - 1)].ravel()

    def _media(self, row: int, n: int) -> DecoderInput:
        return self.prepare(row, np.sort(self._frames(n)), None, pyav_samples=n in self.pyav_samples)

    def _arrays(
        self,
        video: Row,
        frames: NDArray[np.int64],
        media: DecoderInput | None,
        row: int,
        failures: list[dict[str, object]],
    ) -> Arrays:
        if media is None:
            media = DecoderInput(DecodeBackend.PYAV, np.zeros((len(frames), *video.coded_size, 3), np.uint8))
        height, width = resized_size(video.height, video.width, side=self.side)
        corners = crop_corners(height, width, side=self.side, crops=self.views.crops)
        views = product(range(self.views.clips), corners)
        # Decoders return frames in ascending order: `order` sorts them, and `inverse` restores the order of the clips.
        order = np.argsort(frames, kind="stable")
        return self.decoding(media, frames[order], row, failures) | {
            "transpose": np.array(video.rotation % 180 != 0, dtype=np.int32),
            "mirror": np.array([flip_axes(False, video)], dtype=np.int32),
            "size": np.array((width, height) if video.rotation % 180 else (height, width), dtype=np.float32),
            "anchor": np.array([(clip * self.length, *corner) for clip, corner in views], dtype=np.int32),
            "inverse": np.argsort(order, kind="stable").astype(np.int32),
        }


Batch = TypeVar("Batch")


class ItemLoader(DaliLoader, Generic[Batch]):
    """Base class of test loaders: iterator over items, each of them exactly once.

    A video that cannot be decoded is returned as black frames and marked as not decoded; the evaluation decides how it
    counts.

    Args:
        manifest: manifest of the videos.
        data: numbers of workers and threads, and time limit of the decoding.
        items: items of this rank: row of the manifest and index of the first clip, int64 (items, 2).
        frames: frames of one item.
        batch: items per batch; the last batch may have fewer.
        rank: rank that the loader serves: device of the batches, and CPUs for workers and threads.
        quarantine: record of the videos that could not be decoded; None for none.
    """

    _failure_suffix = ""

    def __init__(
        self,
        manifest: Manifest,
        data: DataConfig,
        items: NDArray[np.int64],
        *,
        frames: int,
        batch: int,
        rank: DataRank,
        quarantine: Quarantine | None = None,
    ) -> None:
        self.items = items
        self._frames = frames
        samples = range(math.ceil(len(items) / batch) * batch)
        super().__init__(manifest, data, batch=batch, samples=samples, rank=rank, quarantine=quarantine)

    def __len__(self) -> int:
        return len(self.items)

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Batch:
        first = self.step
        outputs = self.run()
        # Samples that pad the last batch come last.
        valid = (self.rows != _PADDING).nonzero().squeeze(1)
        decoded = ~torch.tensor(self._failed)[valid]
        return self._collect(outputs, valid, self.items[first : first + len(valid)], decoded)

    @abstractmethod
    def _collect(self, outputs: Outputs, valid: Tensor, items: NDArray[np.int64], decoded: Tensor) -> Batch:
        """Build a batch from the outputs of the graph.

        Args:
            outputs: outputs of the body, padded to the batch size.
            valid: indices of the samples that are not padding, int64 (B,): the first B ones.
            items: items of these samples, int64 (B, 2).
            decoded: whether their videos could be decoded, bool (B,).
        """

    @abstractmethod
    def _body(self, turned: bool) -> Callable[[Sample, DataNode], tuple[DataNode, ...]]:
        """Return the body of the graph: a function from the arrays of a sample and its decoded frames to outputs.

        Args:
            turned: whether some videos are rotated by 90 or 270 degrees.
        """

    def _count_failures(self, rows: list[int], failures: list[list[Failure]]) -> None:
        self.clips += len(rows) - rows.count(_PADDING)
        self._failed = [bool(failed) for failed in failures]
        self.substituted += sum(self._failed)
        for failed in failures:
            for failure in failed:
                self._report_failure(failure)

    @property
    def _sample_frames(self) -> int:
        return self._frames

    def _key(self, n: int) -> int:
        return n

    def _step_of(self, n: int) -> int:
        return n // self._batch

    @property
    def _source_options(self) -> dict[str, Any]:
        """Arguments that the loader passes to every sample source."""
        return {
            "first": self._next,
            "end": self._end,
            "decoders": self._decoders,
            "pyav_samples": self._pyav_samples,
            "timeout": self._data.read_timeout,
            "threads": self._decoder_threads,
        }

    def _build(self) -> Pipeline:
        source = self._source()
        return build_pipeline(
            source,
            self._body(source.turned),
            frames=self._frames,
            batch=self._batch,
            device_id=self._device_id,
            threads=self._threads,
            workers=self._workers,
            prefetch=self._data.prefetch,
        )


class ViewLoader(ItemLoader[ViewBatch]):
    """Iterator over the test views of videos, each of them exactly once.

    Args:
        manifest: manifest of the videos.
        data: numbers of workers and threads, and time limit of the decoding.
        views: test views.
        items: items of this rank, a part of `view_items`.
        shape: frames and side of a view.
        batch: see `ItemLoader`.
        rank: see `ItemLoader`.
        quarantine: see `ItemLoader`.
    """

    def __init__(
        self,
        manifest: Manifest,
        data: DataConfig,
        views: ViewsConfig,
        items: NDArray[np.int64],
        *,
        shape: ViewShape,
        batch: int,
        rank: DataRank,
        quarantine: Quarantine | None = None,
    ) -> None:
        self._views = views
        self._shape = shape
        super().__init__(
            manifest,
            data,
            items,
            frames=views.clips * shape.frames,
            batch=batch,
            rank=rank,
            quarantine=quarantine,
        )

    def _collect(self, outputs: Outputs, valid: Tensor, items: NDArray[np.int64], decoded: Tensor) -> ViewBatch:
        (views,) = outputs
        return ViewBatch(
            pixels=as_tensor(views)[: len(valid)].unflatten(1, (self._views.clips, self._views.crops)),
            labels=self.labels[valid].to(self._device, non_blocking=True),
            video_ids=self.rows[valid],
            first_clips=torch.from_numpy(items[:, 1]),
            decoded=decoded,
        )

    def _source(self) -> ViewSource:
        return ViewSource(self._manifest, self.items, self._views, self._shape, **self._source_options)

    def _body(self, turned: bool) -> Callable[[Sample, DataNode], tuple[DataNode, ...]]:
        length, side, on_gpu = self._shape.frames, self._shape.side, self._device_id is not None
        views = self._views.clips * self._views.crops

        def body(sample: Sample, frames: DataNode) -> tuple[DataNode, ...]:
            whole = whole_frames(sample, frames, turned=turned, on_gpu=on_gpu)
            return _cut(sample, whole, views, (length, side, side))

        return body


def whole_frames(sample: Sample, frames: DataNode, *, turned: bool, on_gpu: bool) -> DataNode:
    """Resize whole frames, without a crop, and rotate them to display orientation."""
    return upright(sample, frames, sample["size"], _AS_OPENCV, copy=0, cut=None, turned=turned, on_gpu=on_gpu)


@do_not_convert  # type: ignore[untyped-decorator]
def _cut(sample: Sample, frames: DataNode, views: int, shape: tuple[int, int, int]) -> tuple[DataNode, ...]:
    clips = fn.sequence_rearrange(frames, new_order=sample["inverse"])
    cut = [fn.slice(clips, start=sample["anchor"][view], shape=shape, axes=(0, 1, 2)) for view in range(views)]
    return (fn.stack(*cut),)
