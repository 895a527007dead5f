"""Probe of one video: properties from its container and its first frame; a bad file never raises an exception."""

from __future__ import annotations

import os
import stat
from dataclasses import replace
from itertools import pairwise

import av
import numpy as np

from mvd_scale.data.decoding.pyav import decode_frames, open_video, video_stream
from mvd_scale.data.manifest import WHOLE_FILE, Row
from mvd_scale.data.storage import DecodeError, filesystem_of, is_url, run_with_timeout

STILL_CODECS = {"mjpeg": "jpeg", "png": "png", "bmp": "bmp", "webp": "webp", "tiff": "tiff"}
"""Names of still image codecs in a manifest, by FFmpeg's name."""


def probe_video(video: Row, *, timeout: float, verify: bool = False) -> Row:
    """Complete a row of which only name, path and label are known.

    Every packet is read, because the headers of a truncated file may still state its full length. The first keyframe
    is decoded, because the rotation and the pixel format are known only from a decoded frame.

    Args:
        video: row with name, path and label, and with offset and size for a video in a shard. A row that is left out
            already is returned unchanged.
        timeout: seconds after which the video counts as unreadable.
        verify: also decode the first, the middle and the last frame.

    Returns:
        the complete row, or the given row with the reason in `left_out`.
    """
    if video.left_out is not None:
        return video
    try:
        return run_with_timeout(timeout, video.path, _probe, video, verify)
    except DecodeError as error:
        return replace(video, left_out=error.reason)
    except OSError as error:
        return replace(video, left_out=error.strerror or str(error))
    except (av.FFmpegError, UnicodeDecodeError, ValueError) as error:
        return replace(video, left_out=f"cannot be read as a video: {error}")


def _probe(video: Row, verify: bool) -> Row:
    if video.offset == WHOLE_FILE:
        video = replace(video, size=_size(video.path))
    with open_video(video) as container:
        if not container.streams.video:
            audio = bool(container.streams.audio)
            raise DecodeError(video.path, "no video stream" if audio else "truncated: its index is missing")
        stream = video_stream(container, video.path)
        context = stream.codec_context
        name = container.format.name
        still = STILL_CODECS.get(context.name) if name == "image2" or name.endswith("_pipe") else None
        times: list[int | None] = []
        keys: list[bool] = []
        count, first_key, corrupt = 0, None, False
        for packet in container.demux(stream):
            if packet.size:
                count += 1
                corrupt, key = packet.is_corrupt, packet.is_keyframe
                if key and first_key is None:
                    first_key = packet
                if not packet.is_discard:
                    times.append(packet.pts)
                    keys.append(key)
        if not times:
            raise DecodeError(video.path, "no frames")
        if corrupt or count < stream.frames:
            raise DecodeError(video.path, f"truncated: {count} frames readable of {stream.frames}")
        if first_key is None:
            raise DecodeError(video.path, "no keyframe: nothing can be decoded")
        first_pts, pts_step, variable = _timing(times)
        rotation, pixel_format = _first_picture(video, stream, first_key)
        turned = rotation % 180 != 0
        rate = float(stream.average_rate or 0)
        row = replace(
            video,
            frames=len(times),
            fps=rate,
            variable_rate=variable,
            duration=_duration(stream, times, rate),
            height=context.width if turned else context.height,
            width=context.height if turned else context.width,
            rotation=rotation,
            codec=still or context.codec.canonical_name,
            pixel_format=pixel_format,
            keyframe_interval=_keyframe_interval(times, keys),
            first_pts=first_pts,
            pts_step=pts_step,
        )
    if verify:
        decode_frames(row, np.unique([0, row.frames // 2, row.frames - 1]))
    return row


def _size(path: str) -> int:
    if is_url(path):
        filesystem, inner = filesystem_of(path)
        return int(filesystem.size(inner) or 0)
    status = os.stat(path)
    if stat.S_ISREG(status.st_mode) and not status.st_size:
        raise DecodeError(path, "empty file")
    return status.st_size


def _timing(times: list[int | None]) -> tuple[int, int, bool]:
    """Presentation times of a stream, in ticks.

    Returns:
        time of the first frame; ticks from each frame to the next, or 0 if they differ or are unknown; whether the
        frame rate is variable, which rounding of the times does not count as.
    """
    known = sorted(time for time in times if time is not None)
    if len(known) < len(times):
        return 0, 0, False
    steps = [later - earlier for earlier, later in pairwise(known)]
    if not steps:
        return known[0], 0, False
    # Containers round times to ticks (milliseconds in Matroska), so that steps differ by one tick at a constant rate:
    # the rate is variable only if a step differs from the median by more than one tick and more than 10 %.
    usual = sorted(steps)[len(steps) // 2]
    variable = any(abs(step - usual) > max(1, usual // 10) for step in steps)
    return known[0], usual if min(steps) == max(steps) else 0, variable


def _duration(stream: av.VideoStream, times: list[int | None], rate: float) -> float:
    known = [time for time in times if time is not None]
    if len(known) > 1 and stream.time_base is not None:
        span = float((max(known) - min(known)) * stream.time_base)
        return span * len(times) / (len(times) - 1)
    return len(times) / rate if rate else 0.0


def _keyframe_interval(times: list[int | None], keys: list[bool]) -> int:
    known = [time for time in times if time is not None]
    if len(known) == len(keys):
        keys = [key for _, key in sorted(zip(known, keys, strict=True))]
    places = [place for place, key in enumerate(keys) if key]
    return max((later - earlier for earlier, later in pairwise([*places, len(keys)])), default=0)


def _first_picture(video: Row, stream: av.VideoStream, key: av.Packet) -> tuple[int, str]:
    """Decode the first keyframe: rotation in degrees counterclockwise, and FFmpeg's name of the pixel format."""
    context = stream.codec_context
    pictures = context.decode(key) or context.decode(None)
    if not pictures:
        raise DecodeError(video.path, "its first frame cannot be decoded")
    rotation = pictures[0].rotation % 360
    if rotation % 90:
        raise DecodeError(video.path, f"is rotated by {rotation} degrees: expected a multiple of 90")
    return rotation, pictures[0].format.name
