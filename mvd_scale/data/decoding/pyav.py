"""Decoding of selected frames of one video by PyAV, for videos that DALI does not decode on this device.

The frames of a video are what the decoder puts out when it reads the file from its start, in that order. The index has
found out by which way a frame of that order can be reached (`Row.access`, `Row.pts_step`):

| way | where | steps |
|---|---|---|
| by step | times that rise evenly | seek to the keyframe before the first frame, decode, find frames by their times |
| by times | times that rise unevenly | read the packets from the start for the times, decode from that keyframe |
| by count | times that cannot be relied on | decode from the start, count frames |

A frame is only returned if its time or its number says that it is the right one. A start amid a file counts as clean
only if the first frame out of the decoder is the keyframe it began with; otherwise decoding begins again at an earlier
keyframe, and at last at the start of the file.

Legend: T frames, H W pixels as coded.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from itertools import chain
from typing import NamedTuple

import av
import numpy as np
from numpy.typing import NDArray

from mvd_scale.data.decoding.pillow import animated_webp_frames
from mvd_scale.data.manifest import WHOLE_FILE, Row
from mvd_scale.data.sampling.crops import Box
from mvd_scale.data.storage import DecodeError, is_url, read_bytes

MAX_REORDER = 32
"""Upper bound, in packets, on the distance between a frame's decoding order and its display order; H.264 allows 16."""

MAX_STARTS = 4
"""Keyframes that are tried as the start of decoding before the start of the file."""

SKIPPABLE_DECODERS = frozenset({"h264", "hevc", "vp8", "mpeg1video", "mpeg2video", "mpeg4"})
"""Decoders of FFmpeg for which `skip_frame` NONREF leaves out exactly the packet it is set for, and nothing that
another frame needs. These decoders read it again for every packet:

| decoder | NONREF leaves out |
|---|---|
| h264 | slices with `nal_ref_idc` 0: no other frame refers to them |
| hevc | sub-layer non-reference pictures: a frame of a higher temporal layer may refer to them, see `_may_skip` |
| vp8 | frames that refresh no reference buffer |
| mpeg1video, mpeg2video, mpeg4 | B-pictures, which no frame refers to in these formats |

All others decode every frame: libdav1d (AV1) reads `skip_frame` once, when it is opened, and then never puts out a
frame that nothing refers to, though it is displayed; vp9 ignores it."""

THREADED_DECODERS = frozenset({"vp9"})
"""Codecs of which several threads decode a frame each, where a rank has more threads than workers: every frame is
decoded, so that they take longest. The frames are the same."""

PICTURE_DISPOSITIONS = av.stream.Disposition.attached_pic | av.stream.Disposition.timed_thumbnails
"""Marks of streams that are cover pictures and thumbnails, not videos."""

_BUFFER = 2**18
"""Bytes that FFmpeg reads from memory by one call into Python."""


class Picture(NamedTuple):
    """A decoded frame, or a box of it."""

    pixels: NDArray[np.uint8]
    """RGB: uint8 (height, width, 3)."""

    size: tuple[int, int]
    """Height and width of the whole frame."""


DecodedFrames = dict[int, Picture]
"""Decoded frames by their index in display order."""


def decode_frames(video: Row, frames: NDArray[np.int64], box: Box | None = None, threads: int = 1) -> NDArray[np.uint8]:
    """Decode the frames at given indices in display order.

    Decoding starts at the last keyframe before the first requested frame and ends with the last requested one. Frames
    that nobody requested and that no other frame refers to are skipped; only requested frames are converted to RGB.

    Args:
        video: row of the manifest: path, size, stream, and how its frames are found.
        frames: indices in display order, int64 (T,), in any order, repetitions allowed.
        box: top, left, height and width of the part of the coded frame to return; None for all of it.
        threads: threads of `THREADED_DECODERS`, which do not change the frames; others have one.

    Returns:
        RGB by the matrix and range of the stream's tags, uint8 (T, height, width, 3), as coded (`rotation` and
        `mirrored` are not applied).

    Raises:
        DecodeError: the file is missing or broken, has fewer frames than requested, or has frames of another size than
            the manifest says.
    """
    requested = set(frames.tolist())
    threads = threads if video.codec in THREADED_DECODERS else 1
    try:
        pictures = _decode_requested(video, requested, RgbConverter(box), threads)
    except (av.FFmpegError, OSError) as error:
        if threads > 1:
            # Frames that were ready may be lost with the error of a packet after them.
            return decode_frames(video, frames, box)
        raise DecodeError(video.path, str(error)) from error
    absent = requested - pictures.keys()
    if absent and threads > 1:
        return decode_frames(video, frames, box)
    if absent:
        raise DecodeError(video.path, f"frame {min(absent)} cannot be decoded")
    for place, picture in pictures.items():
        if picture.size != video.coded_size:
            found, expected = (" x ".join(map(str, size)) for size in (picture.size, video.coded_size))
            raise DecodeError(video.path, f"frame {place} is {found}, the manifest says {expected}")
    return np.stack([pictures[place].pixels for place in frames.tolist()])


def open_video(video: Row, data: bytes | None = None) -> av.container.InputContainer:
    """Open a file, a range of a shard, or a URL. All bytes of a range or of a URL are read first, by one request.

    Args:
        video: row of the manifest.
        data: bytes of the encoded video, if they are read already.
    """
    if data is None:
        if video.offset == WHOLE_FILE and not is_url(video.path):
            return av.open(video.path)
        data = read_bytes(video.path, video.offset, video.size).tobytes()
    return av.open(io.BytesIO(data), buffer_size=_BUFFER)


def choose_stream(container: av.container.InputContainer, path: str) -> av.VideoStream:
    """Video stream that a player would choose: no cover picture, by default one marked so, then the largest.

    Raises:
        DecodeError: the file has no video stream, or FFmpeg has no decoder for its codec.
    """
    streams = [stream for stream in container.streams.video if not stream.disposition & PICTURE_DISPOSITIONS]
    if not streams:
        raise DecodeError(path, "no video stream")
    decodable = [stream for stream in streams if stream.codec_context is not None]
    if not decodable:
        raise DecodeError(path, "no decoder for its codec")
    return _set_up(max(decodable, key=_preference))


def video_stream(container: av.container.InputContainer, video: Row, threads: int = 1) -> av.VideoStream:
    """Stream of a container that the manifest names, set to decode with the given number of threads.

    Raises:
        DecodeError: the file has no such stream, or FFmpeg has no decoder for its codec.
    """
    streams = [stream for stream in container.streams.video if stream.index == video.stream]
    if not streams:
        raise DecodeError(video.path, f"no video stream {video.stream}" if video.stream else "no video stream")
    if streams[0].codec_context is None:
        raise DecodeError(video.path, "no decoder for its codec")
    return _set_up(streams[0], threads)


def displayed_frames(video: Row, data: bytes | None = None) -> Iterator[av.VideoFrame]:
    """Decode a whole video from its start: the frames that a player shows, in their order.

    As players do, it goes on after a packet that cannot be decoded: a recording that begins between keyframes has such
    packets, and what follows them is displayed.

    Args:
        video: row of the manifest: path, codec and stream.
        data: bytes of the encoded video, if they are read already.
    """
    if video.codec == "webp" and not video.still:
        yield from animated_webp_frames(video, data)
        return
    with open_video(video, data) as container:
        stream = video_stream(container, video)
        context = stream.codec_context
        for packet in chain(container.demux(stream), [None]):
            # A packet of no bytes shows nothing; the decoder would take it for the end of the stream.
            if packet is not None and not packet.size:
                continue
            try:
                yield from context.decode(packet)
            except av.FFmpegError:
                continue


def is_picture_format(name: str) -> bool:
    """Whether FFmpeg's name of a container is one of single pictures, or of pictures one after the other."""
    return name == "image2" or name.endswith("_pipe")


def is_clean_start(frame: av.VideoFrame, head: av.Packet | None) -> bool:
    """Whether the first frame out of the decoder is the keyframe of the first packet.

    It is not after a gradual refresh (a recovery point), where an open group of pictures has leading frames, and where
    an edit list hides the keyframe.
    """
    return head is not None and bool(frame.key_frame) and frame.pts == head.pts


def _preference(stream: av.VideoStream) -> tuple[bool, int]:
    context = stream.codec_context
    return bool(stream.disposition & av.stream.Disposition.default), context.width * context.height


def _set_up(stream: av.VideoStream, threads: int = 1) -> av.VideoStream:
    context = stream.codec_context
    context.thread_count = threads  # one: parallelism comes from the worker processes
    if threads > 1:
        context.thread_type = "FRAME"
    if context.name == "mjpeg" and is_picture_format(stream.container.format.name):
        # By default FFmpeg fills the missing part of a truncated picture without an error.
        context.options = {"err_detect": "explode"}
    return stream


def _decode_requested(video: Row, requested: set[int], convert: RgbConverter, threads: int) -> DecodedFrames:
    if video.access == "count":
        return _decode_by_count(video, requested, convert)
    if video.pts_step:
        index_by_pts = {video.first_pts + place * video.pts_step: place for place in requested}
        pictures = _seek_and_decode(video, index_by_pts, convert, threads)
        if pictures is not None:
            return pictures
    return _decode_from_start(video, requested, convert, threads)


def _seek_and_decode(
    video: Row, index_by_pts: dict[int, int], convert: RgbConverter, threads: int
) -> DecodedFrames | None:
    """Seek to the last keyframe before the first requested frame, by the times in the manifest, and decode from there.

    Returns None if no seek leads to a keyframe from which all frames are found; `_decode_from_start` then finds them.
    """
    target = first = min(index_by_pts)
    with open_video(video) as container:
        stream = video_stream(container, video, threads)
        for _ in range(MAX_STARTS):
            try:
                container.seek(target, stream=stream)
            except av.FFmpegError:
                return None
            packets = container.demux(stream)
            head = next(packets, None)
            if head is None or not head.is_keyframe or head.pts is None or head.dts is None:
                return None
            if head.pts <= first:
                pictures = _decode(video, stream, chain([head], packets), index_by_pts, convert)
                if pictures is not None:
                    return pictures
            if head.dts > target or target <= video.first_pts - MAX_REORDER * video.pts_step:
                return None
            # Containers seek by decoding time (dts), so that the keyframe found may be displayed (pts) after the first
            # requested frame. A seek to just before the dts of this keyframe leads to an earlier one.
            target = head.dts - 1
    return None


def _decode_from_start(video: Row, requested: set[int], convert: RgbConverter, threads: int) -> DecodedFrames:
    """Read packets from the start of the file, find the times of the frames, and decode from the nearest keyframe."""
    with open_video(video) as container:
        stream = video_stream(container, video, threads)
        packets = _demux(container, stream, video, max(requested))
        if any(packet.pts is None for packet in packets):
            return _decode_by_count(video, requested, convert)
        index_by_pts = _index_by_pts(video, packets, requested)
        first = min(index_by_pts)
        keyframes = [n for n, packet in enumerate(packets) if n and packet.is_keyframe and (packet.pts or 0) <= first]
        for start in keyframes[: -MAX_STARTS - 1 : -1]:
            pictures = _decode(video, stream, iter(packets[start:]), index_by_pts, convert)
            if pictures is not None:
                return pictures
            stream.codec_context.flush_buffers()
        return _decode(video, stream, iter(packets), index_by_pts, convert, from_start=True) or {}


def _index_by_pts(video: Row, packets: list[av.Packet], requested: set[int]) -> dict[int, int]:
    if video.pts_step:
        return {video.first_pts + place * video.pts_step: place for place in requested}
    # A packet that shows nothing has the time of the frame after it.
    times = sorted({packet.pts for packet in packets if not packet.is_discard and packet.pts is not None})
    if max(requested) >= len(times):
        raise DecodeError(video.path, f"frame {max(requested)} was requested, but the video has {len(times)} frames")
    return {times[place]: place for place in requested}


def _demux(container: av.container.InputContainer, stream: av.VideoStream, video: Row, last: int) -> list[av.Packet]:
    """Packets of a stream in file order, up to those that the frame `last` may need."""
    packets: list[av.Packet] = []
    counted: set[int | None] = set()
    # Frames may be stored up to REORDER packets after frames that are displayed later.
    limit = MAX_REORDER if video.pts_step else last + 1 + MAX_REORDER
    end = video.first_pts + last * video.pts_step
    for packet in container.demux(stream):
        if not packet.size:
            continue
        packets.append(packet)
        if not packet.is_discard and (not video.pts_step or packet.pts is None or packet.pts > end):
            counted.add(packet.pts)
        if len(counted) == limit:
            break
    return packets


def _decode(
    video: Row,
    stream: av.VideoStream,
    packets: Iterator[av.Packet],
    index_by_pts: dict[int, int],
    convert: RgbConverter,
    *,
    from_start: bool = False,
) -> DecodedFrames | None:
    """Decode packets until the frames of all times in `index_by_pts` are decoded.

    Args:
        video: row of the manifest.
        stream: the stream of the packets.
        packets: packets in file order; the first one is a keyframe, or the first of the file.
        index_by_pts: index in display order, by presentation time in ticks of the stream.
        convert: conversion of the requested frames.
        from_start: whether the first packet is the first of the file.

    Returns:
        the frames; from a keyframe amid the file None if the start is not clean, or a frame is not found.
    """
    context = stream.codec_context
    skips = not from_start and _may_skip(video, context)  # the last resort must not depend on what was skipped
    context.skip_frame = "DEFAULT"
    pictures: DecodedFrames = {}
    head: av.Packet | None = None
    started = False
    # Where each packet is a frame, the decoder needs none after the last requested one: it is drained instead of being
    # fed until its order of display has come that far.
    drains, unread = video.access == "packets" and not from_start, set(index_by_pts)
    for packet in chain(packets, [None]):
        if packet is not None:
            if not packet.size:
                continue
            if skips:
                wanted = packet.pts in index_by_pts or head is None
                context.skip_frame = "DEFAULT" if wanted else "NONREF"
            head = head or packet
            if packet.pts is not None:
                unread.discard(packet.pts)
        try:
            frames = context.decode(packet)
            if drains and not unread and packet is not None:
                frames += context.decode(None)
        except av.FFmpegError:
            # The index has seen what such packets do to the frames after them only where it has decoded them.
            if started and video.access == "packets":
                raise
            if not started and not from_start:
                return None
            frames = []  # between the keyframes at which a recording began, see `displayed_frames`
        for frame in frames:
            if not started and not from_start and not is_clean_start(frame, head):
                return None
            started = True
            place = index_by_pts.get(frame.pts)
            # The index has counted frames that are displayed damaged only where it has decoded them.
            if place is not None and not (frame.is_corrupt and video.access == "packets"):
                pictures[place] = convert(frame)
        if len(pictures) == len(index_by_pts):
            return pictures
        if drains and not unread:
            return None
    return pictures if from_start else None


def _may_skip(video: Row, context: av.VideoCodecContext) -> bool:
    """Whether `skip_frame` may be set, see `SKIPPABLE_DECODERS`.

    It may not where packets were lost: the decoder then shows copies of the frame before, whichever was decoded.
    """
    if video.access != "packets" or context.name != "hevc":
        return video.access == "packets" and context.name in SKIPPABLE_DECODERS
    # Byte 21 of `hvcC` (ISO/IEC 14496-15, 8.3.3.1) states the number of temporal layers: 1 is a stream without layers.
    header = bytes(context.extradata or b"")
    return len(header) > 21 and header[0] == 1 and header[21] >> 3 & 7 == 1


def _decode_by_count(video: Row, requested: set[int], convert: RgbConverter) -> DecodedFrames:
    """Decode all packets and count frames in decoder output order."""
    pictures: DecodedFrames = {}
    for count, frame in enumerate(displayed_frames(video)):
        if count in requested:
            pictures[count] = convert(frame)
        if len(pictures) == len(requested):
            break
    return pictures


class RgbConverter:
    """Conversion of frames to RGB; one instance reuses its conversion context for all frames of a clip.

    FFmpeg's `swscale` takes matrix and range from the tags of each frame; without tags the matrix is BT.601.

    Args:
        box: top, left, height and width of the part of a frame to keep; None for all of it.
    """

    def __init__(self, box: Box | None = None) -> None:
        self._box = box
        self._reformatter = av.video.reformatter.VideoReformatter()

    def __call__(self, frame: av.VideoFrame) -> Picture:
        # By default PyAV starts as many threads as there are CPUs for each clip: they take longer than the work.
        (plane,) = self._reformatter.reformat(frame, format="rgb24", threads=1).planes
        pixels = np.ndarray((plane.height, plane.width, 3), np.uint8, plane, strides=(plane.line_size, 3, 1))
        size = plane.height, plane.width
        if self._box is None:
            return Picture(pixels, size)
        top, left, height, width = self._box
        # A copy, so that the next frame is converted in the memory of this one: new memory costs page faults.
        return Picture(pixels[top : top + height, left : left + width].copy(), size)
