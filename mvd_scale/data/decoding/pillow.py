"""Reading by Pillow of what FFmpeg does not give: the frames of an animated WebP, and orientation tags (EXIF).

Decoding processes import this module: Pillow is only imported where it is needed, so that they start faster.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from fractions import Fraction

import av
import numpy as np

from mvd_scale.data.manifest import Row
from mvd_scale.data.storage import read_bytes

_ANIMATION = 2
"""Bit of the flags of a `VP8X` chunk that marks an animation (RFC 9649, 2.7)."""

_ORIENTATION = 274
"""Number of the EXIF tag of the orientation (EXIF 2.3, 4.6.4)."""


def is_animated_webp(video: Row) -> bool:
    """Whether a file is a WebP with several frames, by its header."""
    head = read_bytes(video.path, max(video.offset, 0), min(video.size, 21)).tobytes()
    return head[:4] == b"RIFF" and head[8:16] == b"WEBPVP8X" and len(head) > 20 and bool(head[20] & _ANIMATION)


def animated_webp_frames(video: Row, data: bytes | None = None) -> Iterator[av.VideoFrame]:
    """Decode all frames as they are displayed, with their times in milliseconds; transparency is dropped.

    Args:
        video: row of the manifest.
        data: bytes of the encoded video, if they are read already.
    """
    from PIL import Image, ImageSequence

    time = 0
    content = read_bytes(video.path, video.offset, video.size).tobytes() if data is None else data
    with Image.open(io.BytesIO(content)) as image:
        for picture in ImageSequence.Iterator(image):
            frame = av.VideoFrame.from_ndarray(np.asarray(picture.convert("RGB")), format="rgb24")
            frame.pts, frame.time_base = time, Fraction(1, 1000)
            time += int(picture.info.get("duration", 0))
            yield frame


def read_exif_orientation(video: Row) -> int:
    """Read the orientation tag of a still image: 1 to 8, and 1 if there is none."""
    from PIL import Image

    with Image.open(io.BytesIO(read_bytes(video.path, video.offset, video.size).tobytes())) as image:
        tag = image.getexif().get(_ORIENTATION, 1)
    return int(tag) if tag in range(1, 9) else 1
