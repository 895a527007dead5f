"""Transcoding of a video, frame by frame, so that clips of it decode quickly: small frames, many keyframes."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import av
import numpy as np

from mvd_scale.data.decoding.pyav import video_stream
from mvd_scale.data.manifest import Row

Codec = Literal["h264", "hevc", "vp9", "av1"]

_ENCODERS = {"h264": "libx264", "hevc": "libx265", "vp9": "libvpx-vp9", "av1": "libsvtav1"}
_QUALITY: dict[str, int] = {"h264": 20, "hevc": 22, "vp9": 28, "av1": 28}
"""Default constant rate factor of each codec, at which the loss is hard to see."""


@dataclass(frozen=True)
class TranscodeOptions:
    """Parameters of transcoding."""

    codec: Codec = "h264"
    short_side: int | None = None
    """Short side of the result in pixels; smaller videos keep their size. None keeps the size of all videos."""

    keyframes: int = 16
    """Frames from one keyframe to the next."""

    quality: int | None = None
    """Constant rate factor, lower is better; the default of the codec if None."""

    @property
    def suffix(self) -> str:
        """Suffix of the file that holds the transcoded video."""
        return ".webm" if self.codec == "vp9" else ".mp4"


def transcode(video: Row, data: bytes, encoding: TranscodeOptions, out: Path) -> None:
    """Transcode a video: every frame at its time, in display orientation, as 8-bit 4:2:0, without sound.

    Args:
        video: row of the video in the manifest.
        data: bytes of the encoded video.
        encoding: codec, size, keyframe interval and quality.
        out: file to write, with the suffix `encoding.suffix`.

    Raises:
        ValueError, OSError: the video cannot be decoded or encoded (PyAV's errors are subclasses of these).
    """
    width, height = _size(video, encoding.short_side)
    with (
        av.open(io.BytesIO(data)) as source,
        av.open(str(out), "w", options={"movflags": "faststart"} if out.suffix == ".mp4" else {}) as result,
    ):
        stream = video_stream(source, video.path)
        encoder = result.add_stream(
            _ENCODERS[encoding.codec], rate=stream.average_rate or 25, options=_options(encoding)
        )
        encoder.width, encoder.height, encoder.pix_fmt = width, height, "yuv420p"
        encoder.gop_size = encoding.keyframes
        encoder.codec_context.thread_count = 1
        if stream.time_base is not None:
            encoder.time_base = encoder.codec_context.time_base = stream.time_base
        for frame in source.decode(stream):
            upright = _turn(frame, video.rotation) if video.rotation else frame
            shrunk = upright.reformat(width=width, height=height, format="yuv420p", interpolation="AREA")
            shrunk.pts, shrunk.time_base = frame.pts, frame.time_base
            shrunk.pict_type = av.video.frame.PictureType.NONE
            result.mux(encoder.encode(shrunk))
        result.mux(encoder.encode())


def _size(video: Row, short_side: int | None) -> tuple[int, int]:
    """Width and height of the result in pixels, even numbers as 4:2:0 requires."""
    scale = min(1.0, short_side / min(video.height, video.width)) if short_side else 1.0
    return max(2, round(video.width * scale / 2) * 2), max(2, round(video.height * scale / 2) * 2)


def _turn(frame: av.VideoFrame, rotation: int) -> av.VideoFrame:
    picture = np.ascontiguousarray(np.rot90(frame.to_ndarray(format="rgb24"), rotation // 90))
    return av.VideoFrame.from_ndarray(picture, format="rgb24")


def _options(encoding: TranscodeOptions) -> dict[str, str]:
    quality = str(encoding.quality if encoding.quality is not None else _QUALITY[encoding.codec])
    if encoding.codec == "h264":
        # Keyframes at the given interval only, and closed groups of pictures, so that every keyframe is a seek point.
        return {"crf": quality, "preset": "medium", "x264-params": "scenecut=0:open_gop=0"}
    if encoding.codec == "hevc":
        return {"crf": quality, "preset": "medium", "x265-params": "scenecut=0:open-gop=0:log-level=error"}
    if encoding.codec == "vp9":
        return {"crf": quality, "b": "0", "deadline": "good", "cpu-used": "4"}
    return {"crf": quality, "preset": "8"}
