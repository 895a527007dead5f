"""All ways in which a frame of a video is read: alone, at once, in strides, by the loaders, from a shard.

Each way yields pairs: the places of some frames in the video, and the numbers that the frames show.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from mvd_scale.config.data import DataConfig, ViewsConfig
from mvd_scale.config.model import ModelConfig
from mvd_scale.data.decoding.pyav import decode_frames
from mvd_scale.data.indexing.build import VideoProber, build_manifest
from mvd_scale.data.indexing.shards import shard_videos
from mvd_scale.data.indexing.transcode import TranscodeOptions
from mvd_scale.data.loaders.clip_loader import BatchPlan, ClipLoader
from mvd_scale.data.loaders.view_loader import ViewLoader, ViewShape, view_items
from mvd_scale.data.manifest import Manifest
from mvd_scale.data.sampling.eval_views import crop_corners, resized_size, view_frame_indices
from mvd_scale.data.sampling.sampler import Sampler
from mvd_scale.distributed.data_rank import DataRank
from tests.cases.barcodes import read_barcode

Read = tuple[list[int], list[int]]
"""Places of frames in display order, and the numbers that they show."""

RANK = DataRank(torch.device("cpu"))
MODEL = ModelConfig(width=16, depth=1, heads=1, frames=4, input_size=64, patch_size=8)


def index(path: Path, *, verify: bool = False) -> Manifest:
    """Index of a single file, which must be usable."""
    manifest = build_manifest(path, workers=1, prober=VideoProber(verify=verify))
    assert manifest.left_out == [None]
    return manifest


def shard(manifest: Manifest, out: Path, encoding: TranscodeOptions | None = None) -> Manifest:
    """Shard of the videos of a manifest, none of which may be lost."""
    packed = shard_videos(manifest, str(out), size=10**9, workers=1, encoding=encoding)
    assert packed.left_out == [None] * len(manifest)
    return packed


def read_all_at_once(manifest: Manifest) -> Iterator[Read]:
    """Read every frame by one call."""
    yield _decode(manifest, np.arange(manifest.frames[0]))


def read_singly(manifest: Manifest) -> Iterator[Read]:
    """Read every frame alone."""
    for place in range(manifest.frames[0]):
        yield _decode(manifest, np.array([place]))


def read_strides(manifest: Manifest) -> Iterator[Read]:
    """Read clips of several strides from several starts."""
    frames = int(manifest.frames[0])
    for stride in (2, 5, 16):
        for start in range(0, frames, max(frames // 5, 1)):
            yield _decode(manifest, np.arange(start, frames, stride)[:6])


def read_training_clips(manifest: Manifest) -> Iterator[Read]:
    """Read clips of the training loader, cropped to the whole frame."""
    aspect = float(manifest.width[0] / manifest.height[0])
    crop = {"kind": "random_resized", "area": [1, 1], "aspect": [aspect, aspect]}
    data = DataConfig.model_validate({"stride": 3, "workers": 0, "crop": crop, "clips_per_video": 6})
    sampler = Sampler(manifest, data, MODEL, 1)
    with ClipLoader(manifest, data, MODEL, 1, plan=BatchPlan(3, 3, range(2)), rank=RANK) as loader:
        for number, batch in enumerate(loader):
            for clip, pixels in enumerate(batch.pixels.numpy()):
                yield sampler.plan(0, 3 * number + clip).frames.tolist(), [read_barcode(frame) for frame in pixels]
        assert loader.substituted == 0


def read_views(manifest: Manifest) -> Iterator[Read]:
    """Read the clips of a multi-view test, each put together from two crops."""
    views = ViewsConfig(stride=2, clips=3, crops=2)
    with ViewLoader(
        manifest,
        DataConfig(workers=0),
        views,
        view_items(manifest, views, frames=MODEL.frames),
        shape=ViewShape.of(MODEL),
        batch=1,
        rank=RANK,
    ) as loader:
        batch = next(loader)
    assert batch.decoded.all()
    places = view_frame_indices(views, int(manifest.frames[0]), frames=MODEL.frames)
    for clip, crops in zip(places, batch.pixels[0].numpy(), strict=True):
        yield clip.tolist(), [read_barcode(frame) for frame in _join(crops, manifest)]


def read_shard(manifest: Manifest, out: Path) -> Iterator[Read]:
    """Read a shard that holds the bytes of the video."""
    packed = shard(manifest, out)
    yield from read_all_at_once(packed)
    yield from read_strides(packed)
    yield from read_training_clips(packed)


def _decode(manifest: Manifest, places: NDArray[np.int64]) -> Read:
    return places.tolist(), [read_barcode(frame) for frame in decode_frames(manifest.row(0), places)]


def _join(crops: NDArray[np.uint8], manifest: Manifest) -> NDArray[np.uint8]:
    """Frames of which two crops, uint8 (2, T, S, S, 3), show the two ends: uint8 (T, H, W, 3)."""
    side = MODEL.input_size
    height, width = resized_size(int(manifest.height[0]), int(manifest.width[0]), side=side)
    frames = np.zeros((crops.shape[1], height, width, 3), np.uint8)
    for crop, (top, left) in zip(crops, crop_corners(height, width, side=side, crops=2), strict=True):
        frames[:, top : top + side, left : left + side] = crop
    return frames
