"""Baseline clip loaders for comparison: four common combinations of libraries, written in the usual way.

All of them do the work of our training loader: the same clips, frames, crops, flips and masks, drawn by the same
sampler when an item is loaded, and the same arrays: pixels uint8 (B, T, S, S, 3), visible and masked tokens int64.

| way | parallel by | crop and resize |
|---|---|---|
| SPDL | threads | FFmpeg's filters, on the chosen frames alone |
| decord + PIL | processes of torch's `DataLoader` | PIL, as the published data set does |
| torchcodec + torchvision | likewise | torchvision on whole clips |
| PyAV + torchvision | likewise | likewise |

Legend: B clips, T frames, S input side, V visible, M masked.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from mvd_scale.config import DataConfig, ModelConfig
from mvd_scale.data.decoding.dali_geometry import resample
from mvd_scale.data.decoding.pyav import decode_frames
from mvd_scale.data.manifest import Manifest
from mvd_scale.data.sampling.crops import Box
from mvd_scale.data.sampling.sampler import RankShard, Sampler

Pixels = NDArray[np.uint8]
"""Pixels of a clip: uint8 (T, S, S, 3)."""

Item = tuple[Pixels, NDArray[np.int64], NDArray[np.int64]]
"""Pixels of a clip, visible int64 (V,) and masked int64 (M,)."""

Reader = Callable[["Request"], Pixels]
"""Function that reads the pixels of a clip, not flipped."""

BASELINES = ("SPDL", "decord + PIL", "torchcodec + torchvision", "PyAV + torchvision")

SPDL_AHEAD = 2
"""Batches that SPDL prepares in advance, as torch's `DataLoader` does for each worker."""


class Request(NamedTuple):
    """Clip to load."""

    path: str
    frames: list[int]
    """Frame numbers in display order, ascending."""
    fps: float
    box: Box
    """Top, left, height and width of the crop."""
    flip: bool
    side: int
    """Side in pixels of the square that the crop is resized to."""
    visible: NDArray[np.int64]
    masked: NDArray[np.int64]


class Requests:
    """Clips of the training stream by their number, as `ClipLoader` with seed 0 takes them. Picklable.

    Args:
        manifest: manifest of files whose frames are displayed as they are coded.
        data: sampling, crop and mask; one copy of every clip.
        model: frames and side of a clip.
        batch: clips of a step.
    """

    def __init__(self, manifest: Manifest, data: DataConfig, model: ModelConfig, batch: int) -> None:
        self.side = model.input_size
        self.sampler = Sampler(manifest.shared(), data, model, seed=0)
        self.shard = RankShard(self.sampler.clips, batch, rank=0, world_size=1)

    def __getitem__(self, n: int) -> Request:
        plan = self.sampler.plan(*self.shard.locate(self.shard.position(n)))
        (copy,) = plan.copies
        row = self.sampler.manifest.row(plan.row)
        frames = [int(frame) for frame in plan.frames]
        return Request(row.path, frames, row.fps, copy.crop.box, copy.flip, self.side, copy.visible, copy.masked)

    def reference(self, n: int) -> Pixels:
        """Pixels of a clip as PyAV and the CPU's geometry give them, one step after the other."""
        plan = self.sampler.plan(*self.shard.locate(self.shard.position(n)))
        (copy,) = plan.copies
        frames = decode_frames(self.sampler.manifest.row(plan.row), plan.frames, copy.crop.box)
        size, mirror = np.full(2, self.side, np.float32), np.array([copy.flip, False], np.int32)
        crop = self.sampler.data.crop
        return resample(
            frames, size, mirror, np.array(0, np.int32), filter=crop.interpolation, antialias=crop.antialias
        )


def baseline_batches(way: str, requests: Requests, *, batch: int, workers: int) -> Generator[tuple[Any, Any, Any]]:
    """Yield batches without end by one of `BASELINES`: pixels, visible, masked.

    Args:
        way: one of `BASELINES`.
        requests: the clips, in the order to load.
        batch: clips of a batch.
        workers: processes, or threads of SPDL, that load clips; 0 loads in this thread.
    """
    items = _Clips(requests, _readers()[way])
    items[0]  # a package that is missing is named by its own error, not by that of a worker
    if way == "SPDL" and workers:
        yield from _spdl_pipeline(items, batch, workers)
    else:
        yield from DataLoader(items, batch_size=batch, num_workers=workers, shuffle=False)


def _readers() -> dict[str, Reader]:
    return dict(zip(BASELINES, (_spdl, _decord_pil, _torchcodec, _pyav), strict=True))


class _Clips(Dataset[Item]):
    def __init__(self, requests: Requests, read: Reader) -> None:
        self.requests = requests
        self.read = read

    def __len__(self) -> int:
        return 1_000_000

    def __getitem__(self, n: int) -> Item:
        request = self.requests[n]
        pixels = self.read(request)
        if request.flip:
            pixels = pixels[:, :, ::-1]
        return np.ascontiguousarray(pixels), request.visible, request.masked


def _spdl_pipeline(items: _Clips, batch: int, workers: int) -> Iterator[tuple[Any, Any, Any]]:
    from spdl.pipeline import PipelineBuilder

    with ThreadPoolExecutor(workers) as executor:
        pipeline = (
            PipelineBuilder()
            .add_source(iter(range(len(items))))
            .pipe(items.__getitem__, executor=executor, concurrency=workers, output_order="input")
            .aggregate(batch)
            .pipe(_stack)
            .add_sink(SPDL_AHEAD)
            .build(num_threads=1)
        )
        with pipeline.auto_stop():
            yield from pipeline


def _stack(items: Sequence[Item]) -> tuple[Tensor, Tensor, Tensor]:
    pixels, visible, masked = (torch.from_numpy(np.stack(arrays)) for arrays in zip(*items, strict=True))
    return pixels, visible, masked


def _spdl(request: Request) -> Pixels:
    import spdl.io

    top, left, height, width = request.box
    # Half a frame before the first and behind the last one. Frames are chosen before they are cropped and resized.
    start, end = (request.frames[0] - 0.5) / request.fps, (request.frames[-1] + 0.5) / request.fps
    chosen = "+".join(f"eq(n\\,{frame - request.frames[0]})" for frame in sorted(set(request.frames)))
    filters = (
        f"trim=start={start}:end={end},select='{chosen}',crop={width}:{height}:{left}:{top}:exact=1,"
        f"scale={request.side}:{request.side}:flags=bilinear,format=rgb24"
    )
    packets = spdl.io.demux_video(request.path, timestamp=(start, end))
    pixels: Pixels = spdl.io.to_numpy(spdl.io.convert_frames(spdl.io.decode_packets(packets, filter_desc=filters)))
    return pixels[np.searchsorted(np.unique(request.frames), request.frames)]


def _decord_pil(request: Request) -> Pixels:
    from PIL import Image

    top, left, height, width = request.box
    box, side = (left, top, left + width, top + height), (request.side, request.side)
    pictures = [Image.fromarray(frame) for frame in decord_frames(request.path, request.frames)]
    return np.stack([np.asarray(picture.crop(box).resize(side, Image.Resampling.BILINEAR)) for picture in pictures])


def _torchcodec(request: Request) -> Pixels:
    from torchcodec.decoders import VideoDecoder

    return _torchvision(VideoDecoder(request.path, num_ffmpeg_threads=1).get_frames_at(request.frames).data, request)


def _pyav(request: Request) -> Pixels:
    return _torchvision(torch.from_numpy(pyav_frames(request.path, request.frames)).permute(0, 3, 1, 2), request)


def _torchvision(clip: Tensor, request: Request) -> Pixels:
    from torchvision.transforms.v2 import functional

    small = functional.resized_crop(clip, *request.box, [request.side, request.side], antialias=True)
    pixels: Pixels = small.permute(0, 2, 3, 1).numpy()
    return pixels


def decord_frames(path: str, places: Sequence[int]) -> NDArray[np.uint8]:
    """Read frames of a file by decord, opening the file for this call: uint8 (T, H, W, 3)."""
    import decord

    reader = decord.VideoReader(path, num_threads=1, ctx=decord.cpu(0))
    frames: NDArray[np.uint8] = reader.get_batch(list(places)).asnumpy()
    return frames


def pyav_frames(path: str, places: Sequence[int]) -> NDArray[np.uint8]:
    """Read frames by PyAV, decoding from the start of the file to the last frame: uint8 (T, H, W, 3).

    `places` must be ascending.
    """
    import av

    wanted, pictures = set(places), {}
    with av.open(path) as container:
        for number, frame in enumerate(container.decode(video=0)):
            if number in wanted:
                pictures[number] = frame.to_ndarray(format="rgb24")
            if number == places[-1]:
                break
    return np.stack([pictures[place] for place in places])
