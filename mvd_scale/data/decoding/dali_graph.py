"""DALI graph of all loaders, for the CPU and the GPU: decode, augment, crop, resize, rotate, flip, augment.

    external_source (worker processes) --> encoded video --> decoders.video --+    RandAugment -> slice -> resize
                                       |-> encoded image --> decoders.image --+--> -> rotate -> flip -> jitter -> erase
                                       '-> frames by PyAV, cut to what it needs    (once for every copy)

Nothing in the graph draws random numbers: they all come from the sampler.

Legend: B clips, C copies, T frames, H W pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from numpy.typing import NDArray
from nvidia.dali import fn, pipeline_def, types
from nvidia.dali.data_node import DataNode
from nvidia.dali.pipeline import Pipeline, do_not_convert

from mvd_scale.config.data import AugmentConfig, DataConfig, ShortSideCrop
from mvd_scale.data.decoding.backends import DaliDevice, DecodeBackend, Decoders
from mvd_scale.data.decoding.dali_augment import color_jitter, erase, rand_augment_by_dali, rand_augment_on_host
from mvd_scale.data.decoding.dali_geometry import Cut, Resampling, Sample, resize, upright
from mvd_scale.data.decoding.sample_source import VideoSource
from mvd_scale.data.manifest import Row

_TYPES: dict[Any, types.DALIDataType] = {
    np.int32: types.INT32,
    np.int64: types.INT64,
    np.uint8: types.UINT8,
    np.float32: types.FLOAT,
    np.float64: types.FLOAT64,
}


def build_pipeline(
    source: VideoSource,
    body: Callable[[Sample, DataNode], tuple[DataNode, ...]],
    *,
    frames: int,
    batch: int,
    device_id: int | None,
    threads: int,
    workers: int,
    prefetch: int,
) -> Pipeline:
    """Build the DALI graph of one rank and start its worker processes.

    One run of the graph returns the outputs of `body`, then row, label and failures, for `batch` samples.

    Args:
        source: callback that prepares single samples.
        body: function from the arrays of a sample and its decoded frames (uint8 FHWC, on the device) to outputs.
        frames: frames of a sample (T); a still image is repeated to T frames.
        batch: samples per run (B).
        device_id: index of the GPU that resizes, and decodes as `source.decoders` say; None for the CPU.
        threads: CPU threads of the graph.
        workers: number of processes that prepare samples; with 0, this process prepares them when `run` is called.
        prefetch: number of batches that are prepared in advance.
    """
    graph = _graph(
        source=source,
        body=body,
        backends=tuple(source.backends),
        length=frames,
        on_gpu=device_id is not None,
        parallel=workers > 0,
        queue_depth=prefetch,
        batch_size=batch,
        num_threads=threads,
        device_id=device_id,
        prefetch_queue_depth=prefetch,
        py_num_workers=max(workers, 1),
        py_start_method="spawn",
    )
    graph.build()
    return graph


@pipeline_def(enable_conditionals=True)  # type: ignore[untyped-decorator]
def _graph(
    source: VideoSource,
    body: Callable[[Sample, DataNode], tuple[DataNode, ...]],
    backends: tuple[DecodeBackend, ...],
    length: int,
    on_gpu: bool,
    parallel: bool,
    queue_depth: int,
) -> tuple[Any, ...]:
    sample, decoders = _read(source, parallel, queue_depth), source.decoders
    # Only decoders that the videos need become part of the graph.
    if len(backends) == 1:
        frames = _decode(sample, backends[0], decoders, length, on_gpu)
    elif len(backends) == 2:
        if sample["decoder"] == int(backends[0]):
            frames = _decode(sample, backends[0], decoders, length, on_gpu)
        else:
            frames = _decode(sample, backends[1], decoders, length, on_gpu)
    elif sample["decoder"] == int(DecodeBackend.DALI_IMAGE):
        frames = _decode(sample, DecodeBackend.DALI_IMAGE, decoders, length, on_gpu)
    elif sample["decoder"] == int(DecodeBackend.DALI_VIDEO):
        frames = _decode(sample, DecodeBackend.DALI_VIDEO, decoders, length, on_gpu)
    else:
        frames = _decode(sample, DecodeBackend.PYAV, decoders, length, on_gpu)
    return (*body(sample, frames), sample["row"], sample["label"], sample["failures"])


# `enable_conditionals` makes DALI rewrite the Python code of a graph; functions without conditionals opt out of that.
@do_not_convert  # type: ignore[untyped-decorator]
def _read(source: VideoSource, parallel: bool, queue_depth: int) -> Sample:
    fields = source.fields
    arrays = fn.external_source(
        source,
        num_outputs=len(fields),
        batch=False,
        parallel=parallel,
        prefetch_queue_depth=queue_depth if parallel else None,
        dtype=[_TYPES[field.dtype] for field in fields],
        ndim=[field.ndim for field in fields],
        layout=[field.layout for field in fields],
    )
    return {field.name: array for field, array in zip(fields, arrays, strict=True)}


@do_not_convert  # type: ignore[untyped-decorator]
def _decode(sample: Sample, backend: DecodeBackend, decoders: Decoders, length: int, on_gpu: bool) -> DataNode:
    """Decode a sample to frames on the device of the graph."""
    device: DaliDevice = "cpu"
    if backend is DecodeBackend.DALI_VIDEO:
        device = decoders.videos
        frames = decode_video(sample["encoded"], sample["frames"], device)
        if "matrix" in sample:
            frames = convert_colours(frames, sample["matrix"])
    elif backend is DecodeBackend.DALI_IMAGE:
        device = decoders.images
        frames = decode_image(sample["encoded"], length, device)
    else:
        frames = sample["decoded"]
    return frames.gpu() if on_gpu and device == "cpu" else frames


def decode_video(encoded: DataNode, frames: DataNode | list[int], device: DaliDevice) -> DataNode:
    """Decode frames of a video by DALI: uint8 (T, H, W, 3)."""
    # In the default padding mode, frames beyond the end of a truncated file are black, without an error.
    return fn.decoders.video(encoded, device=device, frames=frames, pad_mode="none")


def convert_colours(frames: DataNode, matrix: DataNode) -> DataNode:
    """Multiply the RGB of every pixel by a matrix of the sample, float32 (3, 3) on the host: uint8 (T, H, W, 3)."""
    return fn.coord_transform(frames, M=matrix, dtype=types.UINT8)


def decode_image(encoded: DataNode, length: int, device: DaliDevice) -> DataNode:
    """Decode a still image by DALI and repeat it to a clip of `length` frames: uint8 (T, H, W, 3).

    The orientation tag (EXIF) is ignored here; `data.upright_stills` applies it as the orientation of any video.
    """
    image = fn.decoders.image(encoded, device=device, output_type=types.RGB, adjust_orientation=False)
    frame = fn.expand_dims(image, axes=[0], new_axis_names="F")
    return frame if length == 1 else fn.cat(*[frame] * length, axis=0)


def training_graph_body(
    data: DataConfig, sides: Sequence[int], *, turned: bool, on_gpu: bool, threads: int
) -> Callable[[Sample, DataNode], tuple[DataNode, ...]]:
    """Body of the graph of a training loader: from a sample and its frames to pixels, visible and masked tokens.

    Args:
        data: crop, augmentation and number of copies (C).
        sides: input sides in pixels; all of them show the same crop.
        turned: whether some videos are rotated by 90 or 270 degrees.
        on_gpu: whether the device is a GPU.
        threads: CPU threads of RandAugment on the host.

    Returns:
        function that returns, on the device, for each of `sides` uint8 (T, side, side, 3), with a leading axis C if
        there are several copies; then visible, int64 (C, V), and masked, int64 (C, M).
    """
    augment, resampling = data.augment, Resampling(data.crop.interpolation, data.crop.antialias)
    whole = isinstance(data.crop, ShortSideCrop)
    pool = ThreadPoolExecutor(threads, "rand-augment")
    # Jitter and erased boxes are of the first side, and so is the cut from resized frames: the other sides are then
    # resized from the finished clip. Without these, each side is resized from the frames themselves.
    shared = whole or augment != AugmentConfig()

    def body(sample: Sample, frames: DataNode) -> tuple[DataNode, ...]:
        copies = []
        for copy in range(data.copies):
            cut: Cut | None = "last" if whole else "first"
            source = frames
            if augment.rand_augment is not None:
                if on_gpu:
                    operations = augment.rand_augment.operations
                    source = rand_augment_by_dali(sample, frames, copy=copy, operations=operations, on_gpu=True)
                else:
                    source = rand_augment_on_host(sample, frames, copy=copy, pool=pool)
                cut = "last" if whole else None
            clips = []
            for side in sides[:1] if shared else sides:
                size = sample["frame_size"][copy] if whole else (side, side)
                clips.append(
                    upright(sample, source, size, resampling, copy=copy, cut=cut, turned=turned, on_gpu=on_gpu)
                )
            if augment.color_jitter is not None:
                clips[0] = color_jitter(clips[0], sample["jitter"][copy], augment.color_jitter, on_gpu)
            if augment.erasing is not None:
                clips[0] = erase(clips[0], sample["erase"][copy], sample["noise"][copy], sides[0], on_gpu)
            if shared:
                clips += [resize(clips[0], (side, side), resampling, on_gpu=on_gpu) for side in sides[1:]]
            copies.append(clips)
        return _outputs(sample, copies, on_gpu)

    return body


@do_not_convert  # type: ignore[untyped-decorator]
def _outputs(sample: Sample, copies: list[list[DataNode]], on_gpu: bool) -> tuple[DataNode, ...]:
    pixels = [clips[0] if len(clips) == 1 else fn.stack(*clips) for clips in zip(*copies, strict=True)]
    tokens = [sample["visible"], sample["masked"]]
    return (*pixels, *(indices.gpu() if on_gpu else indices for indices in tokens))


def dali_decodes(
    encoded: NDArray[np.uint8], frames: NDArray[np.int64], video: Row, decoders: Decoders, device_id: int | None
) -> bool:
    """Whether DALI decodes the given frames of a video, at the size that the manifest states.

    A decode error ends the whole graph and does not name the clip. This function decodes one clip alone, to find it.

    Args:
        encoded: bytes of the encoded video, uint8 (bytes,).
        frames: indices of the frames in display order, int64 (T,).
        video: row of the manifest.
        decoders: decoders of the run.
        device_id: index of the GPU of the run; None for the CPU.
    """

    @pipeline_def(batch_size=1, num_threads=1, device_id=device_id)  # type: ignore[untyped-decorator]
    def one_clip() -> Any:
        data = fn.external_source(lambda: [encoded], dtype=types.UINT8, ndim=1)
        if video.still:
            return decode_image(data, 1, decoders.images)
        return decode_video(data, frames.tolist(), decoders.videos)

    try:
        (clips,) = one_clip().run()
    except RuntimeError:
        return False
    return tuple(clips[0].shape())[1:3] == video.coded_size
