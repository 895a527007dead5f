"""Small test videos whose frames encode their number: frame n has brightness 3n plus a horizontal ramp."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
import pytest

Encode = Callable[..., Path]

CODECS = {".mp4": "libx264", ".webm": "libvpx", ".avi": "mpeg4"}


@pytest.fixture(scope="session")
def encode() -> Encode:
    """Write a video of `frames` frames; the suffix chooses the codec."""

    def write(path: Path, frames: int = 24, height: int = 48, width: int = 64, options: dict[str, str] | None = None):
        path.parent.mkdir(parents=True, exist_ok=True)
        rows, columns = np.mgrid[0:height, 0:width]
        with av.open(str(path), "w", options=options or {}) as container:
            stream = container.add_stream(CODECS[path.suffix], rate=25)
            stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
            stream.gop_size = 10
            if path.suffix == ".mp4":
                stream.options = {"preset": "veryfast", "bf": "2", "b-pyramid": "none"}
                stream.codec_context.max_b_frames = 2
            if path.suffix == ".webm":
                stream.options = {"deadline": "realtime", "cpu-used": "8"}
            for number in range(frames):
                level = np.full_like(rows, 3 * number)
                picture = np.stack([level, rows * 2, columns + number], axis=-1) % 256
                container.mux(stream.encode(av.VideoFrame.from_ndarray(picture.astype(np.uint8), format="rgb24")))
            container.mux(stream.encode())
        return path

    return write


@pytest.fixture(scope="session")
def videos(tmp_path_factory: pytest.TempPathFactory, encode: Encode) -> Path:
    """Folder of ten valid videos, alternately H.264 and VP8."""
    folder = tmp_path_factory.mktemp("videos")
    for number in range(10):
        encode(folder / f"{number}{'.mp4' if number % 2 else '.webm'}", frames=20 + number)
    return folder
