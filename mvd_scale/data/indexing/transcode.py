"""Transcoding of a video, frame by frame, so that clips of it decode quickly: small frames, many keyframes."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Literal

import av
import numpy as np
from numpy.typing import NDArray

from mvd_scale.data.decoding.pyav import RgbConverter, displayed_frames
from mvd_scale.data.manifest import Row
from mvd_scale.data.orientation import orient
from mvd_scale.utils.scheduling import leave_real_time

Codec = Literal["h264", "hevc", "vp9", "av1"]

_ENCODERS = {"h264": "libx264", "hevc": "libx265", "vp9": "libvpx-vp9", "av1": "libsvtav1"}
_QUALITY: dict[str, int] = {"h264": 20, "hevc": 22, "vp9": 28, "av1": 28}
"""Default constant rate factor of each codec, at which the loss is hard to see."""

_BT601 = frozenset({2, 5, 6})
"""Matrices that FFmpeg takes for BT.601, by their number in ITU-T H.273: without a tag, 625 lines, 525 lines."""

_SMPTE170M, _LIMITED = 6, 1
"""FFmpeg's numbers of the matrix of 525 lines, and of the limited range of samples."""


MULTIPLE = 32
"""Sides of the result are multiples of this number of pixels: whole blocks of every codec (16 in H.264, 32 for pairs of
fields, up to 32 in HEVC), so that the coded frame is the displayed one. DALI then uses an NVDEC decoder for many
videos; else it makes one for each clip."""


@dataclass(frozen=True)
class TranscodeOptions:
    """Parameters of transcoding."""

    codec: Codec = "h264"
    short_side: int | None = None
    """Short side of the result in pixels; smaller videos keep their size. None keeps the size of all videos. Both sides
    are then rounded to multiples of `MULTIPLE`."""

    keyframes: int = 16
    """Frames from one keyframe to the next."""

    quality: int | None = None
    """Constant rate factor, lower is better; the default of the codec if None."""

    @property
    def suffix(self) -> str:
        """Suffix of the file that holds the transcoded video."""
        return ".webm" if self.codec == "vp9" else ".mp4"


def transcode(video: Row, data: bytes, encoding: TranscodeOptions, out: Path) -> None:
    """Transcode a video: every displayed frame, numbered anew, in display orientation, as 8-bit 4:2:0, without sound.

    The frames of the result have equal durations, by the average rate of the video, so that each is found by its time.
    Their colours are tagged BT.601, limited range, which every decoder honours.

    Args:
        video: row of the video in the manifest.
        data: bytes of the encoded video.
        encoding: codec, size, keyframe interval and quality.
        out: file to write, with the suffix `encoding.suffix`.

    Raises:
        ValueError, OSError: the video cannot be decoded or encoded (PyAV's errors are subclasses of these).
    """
    width, height = encoded_size(video, encoding.short_side)
    rate = Fraction(video.fps).limit_denominator(100_000) or Fraction(25)
    with av.open(str(out), "w", options={"movflags": "faststart"} if out.suffix == ".mp4" else {}) as result:
        encoder = result.add_stream(_ENCODERS[encoding.codec], rate=rate, options=_options(encoding))
        encoder.width, encoder.height, encoder.pix_fmt = width, height, "yuv420p"
        encoder.gop_size = encoding.keyframes
        context = encoder.codec_context
        context.thread_count = 1
        context.colorspace, context.color_range = _SMPTE170M, _LIMITED
        convert = RgbConverter()
        for number, frame in enumerate(displayed_frames(video, data)):
            upright = frame if _is_upright(frame, video) else _turn(convert(frame).pixels, video)
            shrunk = upright.reformat(width=width, height=height, format="yuv420p", interpolation="AREA")
            shrunk.colorspace, shrunk.color_range = _SMPTE170M, _LIMITED
            shrunk.pts, shrunk.time_base = number, 1 / rate
            shrunk.pict_type = av.video.frame.PictureType.NONE
            result.mux(encoder.encode(shrunk))
            if number == 0:
                # The first frame opens the encoder.
                leave_real_time()
        result.mux(encoder.encode())


def encoded_size(video: Row, short_side: int | None) -> tuple[int, int]:
    """Width and height of a transcoded video in pixels, multiples of `MULTIPLE`.

    Args:
        video: row of the video in the manifest.
        short_side: see `TranscodeOptions.short_side`.
    """
    scale = min(1.0, short_side / min(video.height, video.width)) if short_side else 1.0
    width, height = (max(1, round(side * scale / MULTIPLE)) * MULTIPLE for side in (video.width, video.height))
    return width, height


def _is_upright(frame: av.VideoFrame, video: Row) -> bool:
    """Whether a frame needs only a resize: it stands as it is displayed, and its colours are those of the result."""
    turned = video.rotation or video.mirrored
    return (
        not turned and frame.format.name == "yuv420p" and frame.colorspace in _BT601 and frame.color_range <= _LIMITED
    )


def _turn(picture: NDArray[np.uint8], video: Row) -> av.VideoFrame:
    upright = orient(picture, video.rotation, video.mirrored)
    return av.VideoFrame.from_ndarray(np.ascontiguousarray(upright), format="rgb24")


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
