"""Thumbnails of a video as `data:` URLs, for self-contained pages."""

from __future__ import annotations

import base64
import io

import numpy as np
from PIL import Image

from mvd_scale.data.decoding.pyav import decode_frames
from mvd_scale.data.manifest import Row
from mvd_scale.data.orientation import orient
from mvd_scale.data.storage import run_with_timeout

HEIGHT = 112
"""Height of a thumbnail in pixels; the width follows from the aspect ratio."""

_FRAMES = 3
_SECONDS = 30.0
_QUALITY = 82


def thumbnails(video: Row) -> list[str]:
    """Make upright thumbnails from beginning, middle and end of a video as `data:` URLs of JPEGs; one for an image.

    Raises:
        DecodeError: the video cannot be read or decoded, or not within 30 s.
    """
    places = np.unique((2 * np.arange(_FRAMES) + 1) * video.frames // (2 * _FRAMES))
    frames = run_with_timeout(_SECONDS, video.path, decode_frames, video, places)
    return [_thumbnail(Image.fromarray(orient(frame, video.rotation, video.mirrored))) for frame in frames]


def _thumbnail(picture: Image.Image) -> str:
    return data_url(picture.resize((max(HEIGHT * picture.width // picture.height, 1), HEIGHT)))


def data_url(picture: Image.Image) -> str:
    """Encode an RGB picture as the `data:` URL of a JPEG."""
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=_QUALITY)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"
