"""Chosen frames of one video by PyAV, for what DALI does not decode on this device.

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
from mvd_scale.data.sampling import Box
from mvd_scale.data.storage import DecodeError, is_url, read_bytes

REORDER = 32
"""Packets that may come between a frame's place in the file and its place on the screen; H.264 allows 16."""

_BUFFER = 2**18
"""Bytes that a decoder takes at a time from memory; each time costs a call."""

Pictures = dict[int, NDArray[np.uint8]]
"""Frames by their place in display order, uint8 (H, W, 3)."""


def decode_frames(video: Row, frames: NDArray[np.int64], box: Box | None = None) -> NDArray[np.uint8]:
    """The frames at given places in display order.

    Only the packets from the keyframe before the first frame to the last frame are decoded, and of these not the
    ones that neither are asked for nor serve as a reference; only frames asked for are converted to RGB.

    Args:
        video: where it lies, its size, and the times of its frames if these are evenly spaced.
        frames: int64 (T,), any order, repetitions allowed.
        box: top, left, height and width of the part of the coded frame to return; None for all of it.

    Returns:
        uint8 (T, height, width, 3), RGB, as coded (`rotation` is not applied).

    Raises:
        DecodeError: the file is missing, broken, shorter than asked for, or of another size than the manifest says.
    """
    wanted = set(frames.tolist())
    try:
        pictures = _seek_and_decode(video, wanted) if video.pts_step else None
        if pictures is None:
            pictures = _decode_from_start(video, wanted)
    except (av.FFmpegError, OSError) as error:
        raise DecodeError(video.path, str(error)) from error
    absent = wanted - pictures.keys()
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
    """Open a file, a part of a shard or a URL; of the latter two all bytes are read, by one request."""
    if video.offset == WHOLE_FILE and not is_url(video.path):
        return av.open(video.path)
    return av.open(io.BytesIO(read_bytes(video.path, video.offset, video.size).tobytes()), buffer_size=_BUFFER)


def video_stream(container: av.container.InputContainer, path: str) -> av.VideoStream:
    """The first video stream, to be decoded by one thread: clips are decoded side by side by the workers."""
    if not container.streams.video:
        raise DecodeError(path, "no video stream")
    stream = container.streams.video[0]
    context = stream.codec_context
    if context is None:
        raise DecodeError(path, "no decoder for its codec")
    context.thread_count = 1
    if context.name == "mjpeg":
        # Without this, what is missing of a picture is made up, in silence.
        context.options = {"err_detect": "explode"}
    return stream


def _seek_and_decode(video: Row, wanted: set[int]) -> Pictures | None:
    """By the times that the manifest tells; None if seeking does not lead to a keyframe before the first frame."""
    place_of = {video.first_pts + place * video.pts_step: place for place in wanted}
    first = min(place_of)
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
                return _decode(stream, chain([head], packets), place_of)
            if head.dts > target or target <= video.first_pts - REORDER * video.pts_step:
                return None
            # Containers seek by decoding time: the keyframe found may be shown after the frame that is looked for.
            target = head.dts - 1


def _decode_from_start(video: Row, wanted: set[int]) -> Pictures:
    with open_video(video) as container:
        stream = video_stream(container, video.path)
        packets = _demux(container, stream, max(wanted) + 1 + REORDER)
        if any(packet.pts is None for packet in packets):
            return _decode_counting(stream, packets, wanted)
        times = sorted(packet.pts for packet in packets if not packet.is_discard and packet.pts is not None)
        if max(wanted) >= len(times):
            raise DecodeError(video.path, f"frame {max(wanted)} was asked for, there are {len(times)}")
        place_of = {times[place]: place for place in wanted}
        first = min(place_of)
        keyframes = (n for n, packet in enumerate(packets) if packet.is_keyframe and (packet.pts or 0) <= first)
        return _decode(stream, iter(packets[max(keyframes, default=0) :]), place_of)


def _demux(container: av.container.InputContainer, stream: av.VideoStream, limit: int) -> list[av.Packet]:
    """The first packets of a stream, in file order, up to `limit` frames."""
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


def _decode(stream: av.VideoStream, packets: Iterator[av.Packet], place_of: dict[int, int]) -> Pictures:
    """Decode from a keyframe until the frames of all these times have come."""
    context, convert = stream.codec_context, _Converter()
    pictures: Pictures = {}
    for packet in chain(packets, [None]):
        if packet is not None:
            if not packet.size or (packet.is_disposable and packet.pts not in place_of):
                continue
            # Of a packet that is not marked disposable the decoder itself sees whether anything refers to it.
            context.skip_frame = "DEFAULT" if packet.pts in place_of else "NONREF"
        for frame in context.decode(packet):
            place = place_of.get(frame.pts)
            if place is not None and not frame.is_corrupt:
                pictures[place] = convert(frame)
        if len(pictures) == len(place_of):
            break
    return pictures


def _decode_counting(stream: av.VideoStream, packets: list[av.Packet], wanted: set[int]) -> Pictures:
    """For containers without presentation times (AVI): frames in the order in which they leave the decoder."""
    context, convert = stream.codec_context, _Converter()
    pictures: Pictures = {}
    count = 0
    for packet in [*packets, None]:
        for frame in context.decode(packet):
            if count in wanted and not frame.is_corrupt:
                pictures[count] = convert(frame)
            count += 1
        if len(pictures) == len(wanted):
            break
    return pictures


class _Converter:
    """Frames to RGB, with one conversion table for all frames of a clip."""

    def __init__(self) -> None:
        self._reformatter = av.video.reformatter.VideoReformatter()

    def __call__(self, frame: av.VideoFrame) -> NDArray[np.uint8]:
        (plane,) = self._reformatter.reformat(frame, format="rgb24").planes
        # Not copied: what is needed of it goes straight into the clip.
        return np.ndarray((plane.height, plane.width, 3), np.uint8, plane, strides=(plane.line_size, 3, 1))
