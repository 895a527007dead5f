"""The one DALI graph, on the CPU and on the GPU: decode, crop, resize, flip.

    external_source (worker processes) --> encoded bytes --> decoders.video --+
                                       \\-> frames by PyAV, cropped -----------+--> slice -> resize -> flip -> pixels

Legend: T frames, H W pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from nvidia.dali import fn, pipeline_def, types
from nvidia.dali.data_node import DataNode
from nvidia.dali.pipeline import Pipeline, do_not_convert

from mvd_scale.data.source import FIELDS, ClipSource

_TYPES = (
    types.BOOL,
    types.UINT8,
    types.UINT8,
    types.INT32,
    types.INT32,
    types.INT32,
    types.INT32,
    types.INT64,
    types.INT64,
    types.INT64,
    types.INT64,
    types.UINT8,
)
_NDIM = (0, 1, 4, 1, 1, 1, 0, 1, 1, 0, 0, 1)
_LAYOUT = ("", "", "FHWC", "", "", "", "", "", "", "", "", "")


def build_pipeline(
    source: ClipSource,
    *,
    batch: int,
    sides: Sequence[int],
    interpolation: Literal["bilinear", "bicubic"],
    device_id: int | None,
    threads: int,
    workers: int,
    prefetch: int,
) -> Pipeline:
    """The graph of one rank, built, its worker processes started.

    One run gives `batch` clips: uint8 pixels (T, side, side, 3) per entry of `sides`, then visible, masked, label,
    all on the device, then row and failures on the host.

    Args:
        source: prepares single clips.
        batch: clips of a micro batch.
        sides: input sides to resize each crop to, in pixels.
        interpolation: filter of the resize. Both kinds are antialiased where they shrink, as the published code's
            (PIL) are.
        device_id: GPU to decode and resize on; None for the CPU.
        threads: threads of the graph's CPU operators.
        workers: processes that prepare clips; 0 prepares them in this process, while it waits.
        prefetch: batches prepared ahead.
    """
    graph = _clips(
        source=source,
        sides=tuple(sides),
        interpolation=types.INTERP_LINEAR if interpolation == "bilinear" else types.INTERP_CUBIC,
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
def _clips(
    source: ClipSource,
    sides: tuple[int, ...],
    interpolation: types.DALIInterpType,
    on_gpu: bool,
    parallel: bool,
    ahead: int,
) -> tuple[Any, ...]:
    clip = _read(source, parallel, ahead)
    if clip["by_dali"]:
        frames = _decode(clip["encoded"], clip["frames"], on_gpu)
    else:
        frames = clip["decoded"].gpu() if on_gpu else clip["decoded"]
    outputs: tuple[Any, ...] = _cut(clip, frames, sides, interpolation, on_gpu)
    return outputs


# DALI rewrites the source of a graph with conditionals; what has none is kept out of that.
@do_not_convert  # type: ignore[untyped-decorator]
def _read(source: ClipSource, parallel: bool, ahead: int) -> dict[str, DataNode]:
    arrays = fn.external_source(
        source,
        num_outputs=len(FIELDS),
        batch=False,
        parallel=parallel,
        prefetch_queue_depth=ahead if parallel else None,
        dtype=list(_TYPES),
        ndim=list(_NDIM),
        layout=list(_LAYOUT),
    )
    return dict(zip(FIELDS, arrays, strict=True))


@do_not_convert  # type: ignore[untyped-decorator]
def _decode(encoded: DataNode, frames: DataNode | list[int], on_gpu: bool) -> DataNode:
    # Without this padding mode, frames beyond the end of a truncated file are black, in silence.
    return fn.decoders.video(encoded, device="mixed" if on_gpu else "cpu", frames=frames, pad_mode="none")


@do_not_convert  # type: ignore[untyped-decorator]
def _cut(
    clip: dict[str, DataNode],
    frames: DataNode,
    sides: tuple[int, ...],
    interpolation: types.DALIInterpType,
    on_gpu: bool,
) -> tuple[DataNode, ...]:
    cropped = fn.slice(frames, start=clip["anchor"], shape=clip["shape"], axes=(1, 2))
    pixels = [
        fn.flip(
            fn.resize(cropped, size=(side, side), interp_type=interpolation, antialias=True), horizontal=clip["flip"]
        )
        for side in sides
    ]
    others = [clip["visible"], clip["masked"], clip["label"]]
    if on_gpu:
        others = [other.gpu() for other in others]
    return (*pixels, *others, clip["row"], clip["failures"])


def dali_decodes(
    encoded: NDArray[np.uint8], frames: NDArray[np.int64], size: tuple[int, int], device_id: int | None
) -> bool:
    """Whether DALI decodes these frames of this video, at this height and width.

    A decode error ends the graph that met it without saying which clip it was; this asks for one clip alone.
    """

    @pipeline_def(batch_size=1, num_threads=1, device_id=device_id)  # type: ignore[untyped-decorator]
    def one_clip() -> Any:
        return _decode(
            fn.external_source(lambda: [encoded], dtype=types.UINT8, ndim=1), frames.tolist(), device_id is not None
        )

    try:
        (clips,) = one_clip().run()
    except RuntimeError:
        return False
    return tuple(clips[0].shape())[1:3] == size
