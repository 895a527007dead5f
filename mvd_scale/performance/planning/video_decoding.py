"""Prediction of the clips per second that NVDEC can decode."""

from __future__ import annotations

from dataclasses import dataclass

from mvd_scale.config.data import DataConfig
from mvd_scale.config.model import ModelConfig
from mvd_scale.performance.planning.hardware import Gpu

FULL_HD = 1920 * 1080

SMALL_FRAMES = 4.0
"""Largest speed-up of an engine for small frames over 1920x1080, in frames/s: an assumption."""


@dataclass(frozen=True)
class VideoFormat:
    """Properties of the videos that decoding depends on."""

    height: int = 320
    """Short side in pixels; 320 as in the usual preparation of Kinetics-400."""

    keyframes: int = 250
    """Frames from one key frame to the next; 250 is x264's default."""

    frames: int = 300
    """Frames of a video: 10 seconds at 30 Hz, as on Kinetics-400. Only clips that span whole videos depend on it."""

    @property
    def pixels(self) -> int:
        """Pixels of a frame of aspect ratio 4:3."""
        return self.height**2 * 4 // 3


def decoded_frames(data: DataConfig, model: ModelConfig, video: VideoFormat) -> float:
    """Mean number of frames decoded per clip: its span, plus half of the distance between key frames.

    A clip that spans its whole video (`segments`, `whole_segments`) starts near the first frame, which is a key frame.
    """
    if data.spans_whole_videos:
        return float(video.frames)
    return (model.frames - 1) * data.stride + 1 + (video.keyframes - 1) / 2


def decoded_clips(gpu: Gpu, data: DataConfig, model: ModelConfig, video: VideoFormat) -> float:
    """Clips/s that the NVDEC engines of one GPU decode; copies of a clip count separately."""
    frames = gpu.decoded * min(FULL_HD / video.pixels, SMALL_FRAMES)
    return frames / decoded_frames(data, model, video) * data.copies
