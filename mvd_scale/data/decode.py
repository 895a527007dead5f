"""Chosen frames of one video by PyAV, for the codecs that DALI does not decode on this device."""

from __future__ import annotations

import av
import numpy as np
from numpy.typing import NDArray

from mvd_scale.data.storage import DecodeError

REORDER = 32
"""Packets that may come between a frame's place in the file and its place on the screen; H.264 allows 16."""


def decode_frames(path: str, frames: NDArray[np.int64]) -> NDArray[np.uint8]:
    """The frames at given places in display order.

    Only the packets from the keyframe before the first frame to the last frame are decoded, and of these not the
    ones that neither are asked for nor serve as a reference; only frames asked for are converted to RGB.

    Args:
        path: a video file.
        frames: int64 (T,), any order, repetitions allowed.

    Returns:
        uint8 (T, H, W, 3), RGB, as coded (rotation metadata is not applied).

    Raises:
        DecodeError: the file is missing, broken, shorter than asked for, or changes its size within the clip.
    """
    try:
        with av.open(path) as container:
            if not container.streams.video:
                raise DecodeError(path, "no video stream")
            stream = container.streams.video[0]
            # One thread: clips are decoded side by side by the workers, and dropping packets needs the frame order.
            stream.codec_context.thread_count = 1
            packets = _demux(container, stream, int(frames.max()) + 1 + REORDER)
            if any(packet.pts is None for packet in packets):
                pictures = _decode_counting(stream, packets, frames)
            else:
                pictures = _decode_by_time(path, stream, packets, frames)
    except (av.FFmpegError, OSError) as error:
        raise DecodeError(path, str(error)) from error
    absent = [int(place) for place in frames if int(place) not in pictures]
    if absent:
        raise DecodeError(path, f"frame {absent[0]} cannot be decoded")
    first = pictures[int(frames[0])]
    clip = np.empty((len(frames), *first.shape), dtype=np.uint8)
    for slot, place in enumerate(frames):
        picture = pictures[int(place)]
        if picture.shape != first.shape:
            raise DecodeError(path, f"picture size changes from {first.shape[:2]} to {picture.shape[:2]}")
        clip[slot] = picture
    return clip


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


def _decode_by_time(
    path: str, stream: av.VideoStream, packets: list[av.Packet], frames: NDArray[np.int64]
) -> dict[int, NDArray[np.uint8]]:
    times = sorted(packet.pts for packet in packets if not packet.is_discard and packet.pts is not None)
    if int(frames.max()) >= len(times):
        raise DecodeError(path, f"frame {int(frames.max())} was asked for, there are {len(times)}")
    place_of = {times[place]: int(place) for place in set(frames.tolist())}
    first = min(place_of)
    start = max((n for n, packet in enumerate(packets) if packet.is_keyframe and (packet.pts or 0) <= first), default=0)
    context, reformatter = stream.codec_context, av.video.reformatter.VideoReformatter()
    pictures: dict[int, NDArray[np.uint8]] = {}
    for packet in [*packets[start:], None]:
        if packet is not None:
            context.skip_frame = "DEFAULT" if packet.pts in place_of else "NONREF"
        for frame in context.decode(packet):
            place = place_of.get(frame.pts)
            if place is not None:
                pictures[place] = reformatter.reformat(frame, format="rgb24").to_ndarray()
        if len(pictures) == len(place_of):
            break
    return pictures


def _decode_counting(
    stream: av.VideoStream, packets: list[av.Packet], frames: NDArray[np.int64]
) -> dict[int, NDArray[np.uint8]]:
    """For containers without presentation times (AVI): frames in the order in which they leave the decoder."""
    wanted, context, reformatter = set(frames.tolist()), stream.codec_context, av.video.reformatter.VideoReformatter()
    pictures: dict[int, NDArray[np.uint8]] = {}
    count = 0
    for packet in [*packets, None]:
        for frame in context.decode(packet):
            if count in wanted:
                pictures[count] = reformatter.reformat(frame, format="rgb24").to_ndarray()
            count += 1
        if len(pictures) == len(wanted):
            break
    return pictures
