"""Moving pictures: GIF and MP4."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mvd_scale.errors import UserError

Picture = NDArray[np.uint8]


def check_moving(out: Path) -> None:
    """Check that a file can be written by `write_moving`.

    Raises:
        UserError: its suffix is another than .gif or .mp4.
    """
    if out.suffix not in (".gif", ".mp4"):
        raise UserError(f"{out} has the wrong suffix: expected .gif or .mp4")


def write_moving(frames: Sequence[Picture], out: Path, *, rate: int) -> None:
    """Write a moving picture; a GIF repeats.

    Args:
        frames: uint8 (height, width, 3) each, of one size.
        out: file to write, `.gif` or `.mp4`.
        rate: frames per second.
    """
    if out.suffix == ".gif":
        from PIL import Image

        first, *rest = [Image.fromarray(frame) for frame in frames]
        first.save(out, save_all=True, append_images=rest, duration=1000 // rate, loop=0)
    else:
        _write_mp4(frames, out, rate)


def _write_mp4(frames: Sequence[Picture], out: Path, rate: int) -> None:
    import av

    with av.open(str(out), "w") as container:
        stream: Any = None
        for number, picture in enumerate(frames):
            # The codec requires even sides.
            picture = np.ascontiguousarray(picture[: picture.shape[0] // 2 * 2, : picture.shape[1] // 2 * 2])
            if stream is None:
                stream = container.add_stream("libx264", rate=rate, options={"crf": "18"})
                stream.height, stream.width, stream.pix_fmt = *picture.shape[:2], "yuv420p"
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts, frame.time_base = number, Fraction(1, rate)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
