"""The one DALI graph, on the CPU and on the GPU: decode, crop, resize, turn, flip, augment.

    external_source (worker processes) --> encoded video --> decoders.video --+
                                       |-> encoded image --> decoders.image --+--> slice -> resize -> turn -> augment
                                       '-> frames by PyAV, cut to the crop ---+      (once for every copy)

Nothing in it draws random numbers: everything random comes from the sampler.

Legend: B clips, C copies, T frames, H W pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from nvidia.dali import fn, pipeline_def, types
from nvidia.dali.data_node import DataNode
from nvidia.dali.pipeline import Pipeline, do_not_convert

from mvd_scale.config.data import DataConfig
from mvd_scale.data.augment import count_operations
from mvd_scale.data.augment_graph import erase, operate
from mvd_scale.data.geometry import Resampling, Sample, resize, upright
from mvd_scale.data.manifest import IMAGE_CODECS, Row
from mvd_scale.data.source import Decoder, VideoSource

_TYPES: dict[Any, types.DALIDataType] = {
    np.int32: types.INT32,
    np.int64: types.INT64,
    np.uint8: types.UINT8,
    np.float32: types.FLOAT,
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
    """The graph of one rank, built, its worker processes started.

    One run gives the outputs of `body`, then row, label and failures, for `batch` samples.

    Args:
        source: prepares single samples.
        body: from a sample's arrays and its decoded frames (uint8 FHWC, on the device) to outputs.
        frames: frames of a sample (a still image is repeated).
        batch: samples of a run.
        device_id: GPU to decode and resize on; None for the CPU.
        threads: threads of the graph's CPU operators.
        workers: processes that prepare samples; 0 prepares them in this process, while it waits.
        prefetch: batches prepared ahead.
    """
    graph = _graph(
        source=source,
        body=body,
        decoders=tuple(source.decoders),
        length=frames,
        on_gpu=device_id is not None,
        parallel=workers > 0,
        ahead=prefetch,
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
    decoders: tuple[Decoder, ...],
    length: int,
    on_gpu: bool,
    parallel: bool,
    ahead: int,
) -> tuple[Any, ...]:
    sample = _read(source, parallel, ahead)
    # The graph holds only what the videos need.
    if len(decoders) == 1:
        frames = _decode(sample, decoders[0], length, on_gpu)
    elif len(decoders) == 2:
        if sample["decoder"] == int(decoders[0]):
            frames = _decode(sample, decoders[0], length, on_gpu)
        else:
            frames = _decode(sample, decoders[1], length, on_gpu)
    elif sample["decoder"] == int(Decoder.DALI_IMAGE):
        frames = _decode(sample, Decoder.DALI_IMAGE, length, on_gpu)
    elif sample["decoder"] == int(Decoder.DALI_VIDEO):
        frames = _decode(sample, Decoder.DALI_VIDEO, length, on_gpu)
    else:
        frames = _decode(sample, Decoder.HOST, length, on_gpu)
    return (*body(sample, frames), sample["row"], sample["label"], sample["failures"])


# DALI rewrites the source of a graph with conditionals; what has none is kept out of that.
@do_not_convert  # type: ignore[untyped-decorator]
def _read(source: VideoSource, parallel: bool, ahead: int) -> Sample:
    fields = source.fields
    arrays = fn.external_source(
        source,
        num_outputs=len(fields),
        batch=False,
        parallel=parallel,
        prefetch_queue_depth=ahead if parallel else None,
        dtype=[_TYPES[field.dtype] for field in fields],
        ndim=[field.ndim for field in fields],
        layout=[field.layout for field in fields],
    )
    return {field.name: array for field, array in zip(fields, arrays, strict=True)}


@do_not_convert  # type: ignore[untyped-decorator]
def _decode(sample: Sample, decoder: Decoder, length: int, on_gpu: bool) -> DataNode:
    if decoder is Decoder.DALI_VIDEO:
        return decode_video(sample["encoded"], sample["frames"], on_gpu)
    if decoder is Decoder.DALI_IMAGE:
        return decode_image(sample["encoded"], length, on_gpu)
    return sample["decoded"].gpu() if on_gpu else sample["decoded"]


def decode_video(encoded: DataNode, frames: DataNode | list[int], on_gpu: bool) -> DataNode:
    """Frames of a video by DALI: uint8 (T, H, W, 3)."""
    # Without this padding mode, frames beyond the end of a truncated file are black, in silence.
    return fn.decoders.video(encoded, device="mixed" if on_gpu else "cpu", frames=frames, pad_mode="none")


def decode_image(encoded: DataNode, length: int, on_gpu: bool) -> DataNode:
    """A still image by DALI as a clip: uint8 (T, H, W, 3). Stands as coded, as in the published image recipes."""
    image = fn.decoders.image(
        encoded, device="mixed" if on_gpu else "cpu", output_type=types.RGB, adjust_orientation=False
    )
    frame = fn.expand_dims(image, axes=[0], new_axis_names="F")
    return frame if length == 1 else fn.cat(*[frame] * length, axis=0)


def clip_body(
    data: DataConfig, sides: Sequence[int], *, turned: bool, on_gpu: bool
) -> Callable[[Sample, DataNode], tuple[DataNode, ...]]:
    """Outputs of a training sample: pixels (C, T, side, side, 3) for each of `sides`, visible, masked: on the device.

    Args:
        data: crop, augmentation and number of copies.
        sides: input sides in pixels; all show the same crop.
        turned: whether clips may lie on their side.
        on_gpu: whether the device is a GPU.
    """
    operations = count_operations(data.augment)
    # Antialiased where they shrink, as the published code's filters (PIL) are.
    resampling = Resampling(data.crop.interpolation, antialias=True)

    def body(sample: Sample, frames: DataNode) -> tuple[DataNode, ...]:
        copies = []
        for copy in range(data.copies):
            cut = [
                upright(sample, frames, (side, side), resampling, copy=copy, cut=True, turned=turned, on_gpu=on_gpu)
                for side in sides
            ]
            if operations or data.augment.erasing is not None:
                clip = cut[0]
                for number in range(operations):
                    clip = operate(clip, sample["operations"][copy, number], sample["values"][copy, number], on_gpu)
                if data.augment.erasing is not None:
                    clip = erase(clip, sample["erase"][copy], sample["noise"][copy], sides[0], on_gpu)
                # Boxes and warps are in pixels of the first side: the others are made from that clip.
                others = [
                    resize(clip, (side, side), filter=data.crop.interpolation, on_gpu=on_gpu) for side in sides[1:]
                ]
                cut = [clip, *others]
            copies.append(cut)
        return _outputs(sample, copies, on_gpu)

    return body


@do_not_convert  # type: ignore[untyped-decorator]
def _outputs(sample: Sample, copies: list[list[DataNode]], on_gpu: bool) -> tuple[DataNode, ...]:
    pixels = [clips[0] if len(clips) == 1 else fn.stack(*clips) for clips in zip(*copies, strict=True)]
    tokens = [sample["visible"], sample["masked"]]
    return (*pixels, *(indices.gpu() if on_gpu else indices for indices in tokens))


def dali_decodes(encoded: NDArray[np.uint8], frames: NDArray[np.int64], video: Row, device_id: int | None) -> bool:
    """Whether DALI decodes these frames of this video, at the size that the manifest says.

    A decode error ends the graph that met it without saying which clip it was; this asks for one clip alone.
    """
    still = video.codec in IMAGE_CODECS

    @pipeline_def(batch_size=1, num_threads=1, device_id=device_id)  # type: ignore[untyped-decorator]
    def one_clip() -> Any:
        data = fn.external_source(lambda: [encoded], dtype=types.UINT8, ndim=1)
        on_gpu = device_id is not None
        return decode_image(data, 1, on_gpu) if still else decode_video(data, frames.tolist(), on_gpu)

    try:
        (clips,) = one_clip().run()
    except RuntimeError:
        return False
    return tuple(clips[0].shape())[1:3] == video.coded_size
