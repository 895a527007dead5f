"""Decoding of selected frames of one video by PyAV, for videos that DALI does not decode on this device.

Legend: T frames, H W pixels as coded.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from itertools import chain

import av
import numpy as np
from numpy.typing import NDArray

from mvd_scale.data.manifest import WHOLE_FILE, Row
from mvd_scale.data.sampling.crops import Box
from mvd_scale.data.storage import DecodeError, is_url, read_bytes

MAX_REORDER = 32
"""Upper bound, in packets, on the distance between a frame's decoding order and its display order; H.264 allows 16."""

_BUFFER = 2**18
"""Bytes that FFmpeg reads from memory by one call into Python."""

DecodedFrames = dict[int, NDArray[np.uint8]]
"""Decoded frames by their index in display order: uint8 (H, W, 3) each."""


def decode_frames(video: Row, frames: NDArray[np.int64], box: Box | None = None) -> NDArray[np.uint8]:
    """Decode the frames at given indices in display order.

    Decoding starts at the last keyframe before the first requested frame and ends with the last requested one. Frames
    that nobody requested and that no other frame refers to are skipped; only requested frames are converted to RGB.

    Args:
        video: row of the manifest: path, size, and the times of the frames where these are evenly spaced.
        frames: indices in display order, int64 (T,), in any order, repetitions allowed.
        box: top, left, height and width of the part of the coded frame to return; None for all of it.

    Returns:
        RGB, uint8 (T, height, width, 3), as coded (`rotation` is not applied).

    Raises:
        DecodeError: the file is missing or broken, has fewer frames than requested, or has frames of another size than
            the manifest says.
    """
    requested = set(frames.tolist())
    try:
        pictures = _seek_and_decode(video, requested) if video.pts_step else None
        if pictures is None:
            pictures = _decode_from_start(video, requested)
    except (av.FFmpegError, OSError) as error:
        raise DecodeError(video.path, str(error)) from error
    absent = requested - pictures.keys()
    if absent:
        raise DecodeError(video.path, f"frame {min(absent)} cannot be decoded")
    top, left, height, width = box or (0, 0, *video.coded_size)
    clip = np.empty((len(frames), height, width, 3), dtype=np.uint8)
    for slot, place in enumerate(frames.tolist()):
        picture = pictures[place]
        if picture.shape[:2] != video.coded_size:
            found, expected = (" x ".join(map(str, size)) for size in (picture.shape[:2], video.coded_size))
            raise DecodeError(video.path, f"frame {place} is {found}, the manifest says {expected}")
        clip[slot] = picture[top : top + height, left : left + width]
    return clip


def open_video(video: Row) -> av.container.InputContainer:
    """Open a file, a range of a shard, or a URL. All bytes of a range or of a URL are read first, by one request."""
    if video.offset == WHOLE_FILE and not is_url(video.path):
        return av.open(video.path)
    return av.open(io.BytesIO(read_bytes(video.path, video.offset, video.size).tobytes()), buffer_size=_BUFFER)


def video_stream(container: av.container.InputContainer, path: str) -> av.VideoStream:
    """First video stream of a container, set to decode with one thread: parallelism comes from the worker processes.

    Raises:
        DecodeError: the file has no video stream, or FFmpeg has no decoder for its codec.
    """
    if not container.streams.video:
        raise DecodeError(path, "no video stream")
    stream = container.streams.video[0]
    context = stream.codec_context
    if context is None:
        raise DecodeError(path, "no decoder for its codec")
    context.thread_count = 1
    if context.name == "mjpeg":
        # By default FFmpeg fills the missing part of a truncated picture without an error.
        context.options = {"err_detect": "explode"}
    return stream


def _seek_and_decode(video: Row, requested: set[int]) -> DecodedFrames | None:
    """Seek to the last keyframe before the first requested frame, by the times in the manifest, and decode from there.

    Returns None if seeking does not lead to such a keyframe; `_decode_from_start` then finds the frames.
    """
    index_by_pts = {video.first_pts + place * video.pts_step: place for place in requested}
    first = min(index_by_pts)
    with open_video(video) as container:
        stream = video_stream(container, video.path)
        target = first
        while True:
            container.seek(target, stream=stream)
            packets = container.demux(stream)
            head = next(packets, None)
            if head is None or not head.is_keyframe or head.pts is None or head.dts is None:
                return None
            if head.pts <= first:
                return _decode(stream, chain([head], packets), index_by_pts)
            if head.dts > target or target <= video.first_pts - MAX_REORDER * video.pts_step:
                return None
            # Containers seek by decoding time (dts), so that the keyframe found may be displayed (pts) after the first
            # requested frame. A seek to just before the dts of this keyframe leads to an earlier one.
            target = head.dts - 1


def _decode_from_start(video: Row, requested: set[int]) -> DecodedFrames:
    """Read packets from the start of the file, count frames in display order, and decode from the nearest keyframe."""
    with open_video(video) as container:
        stream = video_stream(container, video.path)
        # Frames may be stored up to REORDER packets after frames that are displayed later.
        packets = _demux(container, stream, max(requested) + 1 + MAX_REORDER)
        if any(packet.pts is None for packet in packets):
            return _decode_by_count(stream, packets, requested)
        times = sorted(packet.pts for packet in packets if not packet.is_discard and packet.pts is not None)
        if max(requested) >= len(times):
            raise DecodeError(
                video.path, f"frame {max(requested)} was requested, but the video has {len(times)} frames"
            )
        index_by_pts = {times[place]: place for place in requested}
        first = min(index_by_pts)
        keyframes = (n for n, packet in enumerate(packets) if packet.is_keyframe and (packet.pts or 0) <= first)
        return _decode(stream, iter(packets[max(keyframes, default=0) :]), index_by_pts)


def _demux(container: av.container.InputContainer, stream: av.VideoStream, limit: int) -> list[av.Packet]:
    """Packets of the first `limit` frames of a stream, in file order."""
    packets: list[av.Packet] = []
    shown = 0
    for packet in container.demux(stream):
        if not packet.size:
            continue
        packets.append(packet)
        shown += not packet.is_discard
        if shown == limit:
            break
    return packets


def _decode(stream: av.VideoStream, packets: Iterator[av.Packet], index_by_pts: dict[int, int]) -> DecodedFrames:
    """Decode packets from a keyframe on, until the frames of all times in `index_by_pts` are decoded.

    Args:
        stream: the stream of the packets.
        packets: packets in file order; the first one is a keyframe.
        index_by_pts: index in display order, by presentation time in ticks of the stream.
    """
    context, convert = stream.codec_context, _Converter()
    pictures: DecodedFrames = {}
    for packet in chain(packets, [None]):
        if packet is not None:
            if not packet.size or (packet.is_disposable and packet.pts not in index_by_pts):
                continue
            # A packet without the disposable mark may still hold a frame to which no other frame refers: NONREF lets
            # the decoder skip such a frame unless it is requested.
            context.skip_frame = "DEFAULT" if packet.pts in index_by_pts else "NONREF"
        for frame in context.decode(packet):
            place = index_by_pts.get(frame.pts)
            if place is not None and not frame.is_corrupt:
                pictures[place] = convert(frame)
        if len(pictures) == len(index_by_pts):
            break
    return pictures


def _decode_by_count(stream: av.VideoStream, packets: list[av.Packet], requested: set[int]) -> DecodedFrames:
    """Decode all packets and count frames in decoder output order, for containers without presentation times (AVI)."""
    context, convert = stream.codec_context, _Converter()
    pictures: DecodedFrames = {}
    count = 0
    for packet in [*packets, None]:
        for frame in context.decode(packet):
            if count in requested and not frame.is_corrupt:
                pictures[count] = convert(frame)
            count += 1
        if len(pictures) == len(requested):
            break
    return pictures


class _Converter:
    """Conversion of frames to RGB; one instance reuses its conversion context for all frames of a clip."""

    def __init__(self) -> None:
        self._reformatter = av.video.reformatter.VideoReformatter()

    def __call__(self, frame: av.VideoFrame) -> NDArray[np.uint8]:
        (plane,) = self._reformatter.reformat(frame, format="rgb24").planes
        # A view, not a copy: `decode_frames` copies the requested box of it into the clip.
        return np.ndarray((plane.height, plane.width, 3), np.uint8, plane, strides=(plane.line_size, 3, 1))
