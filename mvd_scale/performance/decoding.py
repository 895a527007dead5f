"""How many clips a second NVDEC can decode."""

from __future__ import annotations

from dataclasses import dataclass

from mvd_scale.config.data import DataConfig
from mvd_scale.config.model import ModelConfig
from mvd_scale.performance.hardware import Gpu

FULL_HD = 1920 * 1080

SMALL_FRAMES = 4.0
"""How many times more frames/s than at 1920x1080 an engine decodes at most, however small they are: an assumption."""


@dataclass(frozen=True)
class Video:
    """What the videos are like."""

    height: int = 320
    """Short side in pixels; Kinetics-400 as it is prepared."""

    keyframes: int = 250
    """Frames from one key frame to the next; x264's default."""

    @property
    def pixels(self) -> int:
        """Of a frame of 4:3."""
        return self.height**2 * 4 // 3


def decoded_frames(data: DataConfig, model: ModelConfig, video: Video) -> float:
    """Frames decoded for one clip: its span, and on average half of the way from one key frame to the next."""
    return (model.frames - 1) * data.stride + 1 + (video.keyframes - 1) / 2


def decoded_clips(gpu: Gpu, data: DataConfig, model: ModelConfig, video: Video) -> float:
    """Clips/s that the engines of one GPU decode, all copies counted."""
    frames = gpu.decoded * min(FULL_HD / video.pixels, SMALL_FRAMES)
    return frames / decoded_frames(data, model, video) * data.copies
