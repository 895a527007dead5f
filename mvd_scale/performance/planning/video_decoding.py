"""Prediction of the clips per second that NVDEC can decode, and of the GPU memory that decoding takes.

Sizes follow the sources of DALI 2.4 (`frames_decoder_gpu.cc`, `video_decoder_base.h`); none were measured.
"""

from __future__ import annotations

from dataclasses import dataclass

from mvd_scale.config.data import DataConfig, VideoDecoder
from mvd_scale.config.model import ModelConfig
from mvd_scale.performance.planning.hardware import Gpu
from mvd_scale.performance.planning.memory import Bytes
from mvd_scale.utils.nvdec import is_whole

FULL_HD = 1920 * 1080

SMALL_FRAMES = 4.0
"""Largest speed-up of an engine for small frames over 1920x1080, in frames/s: an assumption."""

CREATION = 0.06
"""Seconds to make an NVDEC decoder: 50 to 70 ms on an H100 (meta-pytorch/torchcodec, pull request 1176). That each
engine makes one at a time is an assumption."""

POOL = 8
"""RGB frames that DALI allocates for each clip of a batch, to put frames in order (`num_decode_surfaces_`)."""

OUTPUTS = 2
"""Batches of whole decoded clips that exist at once, while the next one is decoded and the last one is cropped: an
assumption."""

SURFACES = 12
"""YUV frames of an NVDEC decoder, references and outputs, each of 1.5 bytes per pixel: an assumption."""

CACHED = 100
"""NVDEC decoders that DALI keeps at most (`CACHE_SIZE_LIMIT`)."""


@dataclass(frozen=True)
class VideoFormat:
    """Properties of the videos that decoding depends on."""

    height: int = 320
    """Short side in pixels; 320 as in the usual preparation of Kinetics-400."""

    keyframes: int = 250
    """Frames from one key frame to the next; 250 is x264's default."""

    frames: int = 300
    """Frames of a video: 10 seconds at 30 Hz, as on Kinetics-400. Only clips that span whole videos depend on it."""

    long_side: int | None = None
    """Long side in pixels; None for an aspect ratio of 4:3."""

    @property
    def width(self) -> int:
        """Long side in pixels, an even number."""
        return self.long_side or round(self.height * 4 / 6) * 2

    @property
    def pixels(self) -> int:
        """Pixels of a frame."""
        return self.height * self.width

    @property
    def is_whole(self) -> bool:
        """Whether DALI uses an NVDEC decoder for several clips."""
        return is_whole(self.height, self.width)


def decoded_frames(data: DataConfig, model: ModelConfig, video: VideoFormat) -> float:
    """Mean number of frames decoded per clip: its span, plus half of the distance between key frames.

    A clip that spans its whole video (`segments`, `whole_segments`) starts near the first frame, which is a key frame.
    """
    if data.spans_whole_videos:
        return float(video.frames)
    return (model.frames - 1) * data.stride + 1 + (video.keyframes - 1) / 2


def decoded_clips(gpu: Gpu, data: DataConfig, model: ModelConfig, video: VideoFormat) -> float:
    """Clips/s that the NVDEC engines of one GPU decode; copies of a clip count separately."""
    rate = gpu.decoded / gpu.decoders * min(FULL_HD / video.pixels, SMALL_FRAMES)
    seconds = decoded_frames(data, model, video) / rate + (0 if video.is_whole else CREATION)
    return gpu.decoders / seconds * data.copies


def decoding_memory(
    data: DataConfig, model: ModelConfig, video: VideoFormat, micro: int, decoder: VideoDecoder
) -> Bytes:
    """Predict the GPU memory of a rank's data loader before the crop, in bytes by part.

    DALI keeps the memory that it has used, so that it counts in every phase of a step.

    Args:
        data: number of copies of a clip.
        model: number of frames of a clip.
        video: format of the videos.
        micro: clips of a batch, copies included.
        decoder: where videos are decoded.
    """
    clips, picture = micro // data.copies, 3 * video.pixels
    parts = {"decoded clips": OUTPUTS * clips * model.frames * picture}
    if decoder == "nvdec" and model.frames > 1:
        # Decoders that are used again exist once per clip that is decoded at a time, at most once per clip of a batch.
        kept = min(clips, CACHED) if video.is_whole else CACHED
        parts["frames of DALI's decoders"] = POOL * clips * picture
        parts["surfaces of NVDEC"] = kept * SURFACES * video.pixels * 3 // 2
    return parts
