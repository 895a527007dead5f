"""Probe of one video: properties from its packets, and where these prove too little from its frames.

The number of frames, their order and their times are what a decoder puts out. Reading the packets proves these only for
some containers and codecs and by some signs, see `_are_frames`; any other file is decoded once, whole, here. A bad file
never raises an exception.
"""

from __future__ import annotations

import os
import stat
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from fractions import Fraction
from itertools import pairwise
from typing import NamedTuple

import av
import numpy as np
from av.error import InvalidDataError
from av.sidedata.sidedata import Type as SideDataType

from mvd_scale.data.decoding.pillow import is_animated_webp, read_exif_orientation
from mvd_scale.data.decoding.pyav import (
    RgbConverter,
    choose_stream,
    decode_frames,
    displayed_frames,
    is_clean_start,
    is_picture_format,
    open_video,
    video_stream,
)
from mvd_scale.data.manifest import WHOLE_FILE, Row
from mvd_scale.data.orientation import Orientation, orientation_of_matrix
from mvd_scale.data.storage import DecodeError, filesystem_of, is_url, read_bytes, run_with_timeout

STILL_CODECS = {"mjpeg": "jpeg", "png": "png", "bmp": "bmp", "webp": "webp", "tiff": "tiff"}
"""Names of still image codecs in a manifest, by FFmpeg's name."""

PROVEN_CODECS = frozenset({"h264", "hevc", "vp8", "vp9", "av1"})
"""Codecs of which a packet is one displayed frame, unless there are the signs of `_are_frames`. In MPEG-4 part 2, a
packet may hold two frames, or a frame that repeats the one before (packed B-frames)."""

SEEKABLE_FORMATS = frozenset({"mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm"})
"""Containers, by FFmpeg's name, that store the time of every frame and have an index. In AVI, FFmpeg invents times from
the number of the chunk; in MPEG-TS and others, times after a seek may differ from those of reading from the start."""

_NEVER_BLANK = PROVEN_CODECS | {"mpeg1video", "mpeg2video", "mpeg4", "mjpeg", "png"}
"""Codecs whose packets begin with a mark, or with a length, that is not zero."""

_BLANK = bytes(8)

_WITH_BOTH_TIMES = "mov,mp4,m4a,3gp,3g2,mj2"
"""Container that stores when a frame is decoded and when it is displayed; Matroska stores the latter alone."""

_MATRICES = {0: "rgb", 1: "bt709", 2: "bt601", 4: "fcc", 5: "bt601", 6: "bt601", 7: "smpte240m", 9: "bt2020"}
"""Matrices that FFmpeg converts, by their number in ITU-T H.273; 2 is unspecified, for which FFmpeg takes BT.601."""

_WITH_INDEX = frozenset({"mov,mp4,m4a,3gp,3g2,mj2", "avi"})
"""Containers, by FFmpeg's name, whose last packet is complete; recordings in other ones end anywhere."""

_LUMA_FORMATS = frozenset({"yuv420p", "yuvj420p", "yuv422p", "yuvj422p", "yuv444p", "yuvj444p", "nv12", "gray"})
"""Pixel formats whose first plane is luma, a byte per pixel."""

_FULL_RANGE, _PROGRESSIVE = 2, 1
"""FFmpeg's numbers of the full range, and of frames that are not fields."""


def probe_video(video: Row, *, timeout: float, verify: bool = False) -> Row:
    """Complete a row of which only name, path and label are known.

    Every packet is read, because the headers of a truncated file may still state its full length. The first keyframe
    is decoded, because orientation, pixel format and colours are known only from a decoded frame. Where packets prove
    too little, the whole file is decoded, up to twice; this may take as long as the video lasts in addition.

    Args:
        video: row with name, path and label, and with offset and size for a video in a shard. A row that is left out
            already is returned unchanged.
        timeout: seconds after which the video counts as unreadable.
        verify: also decode the first, the middle and the last frame by the way in which training decodes them.

    Returns:
        the complete row, or the given row with the reason in `left_out`.
    """
    if video.left_out is not None:
        return video
    try:
        row, packets = run_with_timeout(timeout, video.path, _probe, video)
        if packets is not None:
            row = run_with_timeout(timeout + row.duration, video.path, _probe_by_decoding, row, packets)
        if verify:
            places = np.unique([0, row.frames // 2, row.frames - 1])
            run_with_timeout(timeout + row.duration, video.path, decode_frames, row, places)
        return row
    except DecodeError as error:
        return replace(video, left_out=error.reason)
    except OSError as error:
        return replace(video, left_out=error.strerror or str(error))
    except (av.FFmpegError, UnicodeDecodeError, ValueError) as error:
        return replace(video, left_out=f"cannot be read as a video: {error}")


@dataclass
class _Packets:
    """Packets of one stream, in file order, without those of no bytes."""

    format: str
    """FFmpeg's name of the container."""

    reorders: bool
    """Whether frames are stored in another order than they are displayed in."""

    times: list[int | None] = field(default_factory=list)
    """Presentation time of each, in ticks."""

    keys: list[bool] = field(default_factory=list)
    """Whether each is a keyframe."""

    discarded: set[int] = field(default_factory=set)
    """Places of those that an edit list hides."""

    delayed: bool = False
    """Whether the container stores that some are displayed later than they are decoded."""

    hidden: int = 0
    """Number of those that do not hold exactly one displayed frame."""

    empty: int = 0
    """Number of packets of no bytes."""

    blank: bool = False
    """Whether the last one begins with zeros, as no coded frame does: an unfinished download of full size."""

    ends_in_zeros: bool = False
    """Whether the last one ends with zeros."""

    corrupt: bool = False
    """Whether the last one is incomplete."""

    torn: str = ""
    """Error at which reading ended, if it did not end at the end of the file."""

    first_key: av.Packet | None = None

    @property
    def shown_times(self) -> list[int | None]:
        """Presentation times of the packets that no edit list hides."""
        return [time for place, time in enumerate(self.times) if place not in self.discarded]


class _Timing(NamedTuple):
    """Times of the frames of a video."""

    first: int = 0
    """Time of the first frame in ticks."""

    step: int = 0
    """Ticks from each frame to the next; 0 if they differ."""

    variable: bool = False
    """Whether the frame rate is variable, which rounding of the times does not count as."""


def _probe(video: Row) -> tuple[Row, _Packets | None]:
    """Row of a video by its packets and its first keyframe; and the packets, if they prove too little."""
    if video.offset == WHOLE_FILE:
        video = replace(video, size=_size(video.path))
    with open_video(video) as container:
        if not container.streams.video and not container.streams.audio and container.format.name in _WITH_INDEX:
            raise DecodeError(video.path, "truncated: its index is missing")
        stream = choose_stream(container, video.path)
        if stream.disposition & av.stream.Disposition.dependent:
            raise DecodeError(video.path, "a picture of several tiles (HEIC, AVIF): convert it, for example to JPEG")
        packets = _read(container, stream)
        if not packets.times:
            raise DecodeError(video.path, "no frames")
        timing = _timing(packets.times)
        row = _row_of_packets(video, container, stream, packets, timing)
        if _is_torn(row, stream, packets):
            raise DecodeError(video.path, _torn_at(stream, packets))
        if not row.still and not _are_frames(stream, packets, timing):
            return row, packets
        picture = _first_picture(stream, packets)
        if picture is not None:
            return _with_picture(row, picture), None
        if row.still:
            raise DecodeError(video.path, "its first frame cannot be decoded")
        return row, packets


def _row_of_packets(
    video: Row,
    container: av.container.InputContainer,
    stream: av.VideoStream,
    packets: _Packets,
    timing: _Timing,
) -> Row:
    context, count = stream.codec_context, len(packets.times)
    still = None
    if is_picture_format(packets.format) and count == 1 and not (context.name == "webp" and is_animated_webp(video)):
        still = STILL_CODECS.get(context.name)
    rate = float(stream.average_rate or 0)
    known = [time for time in packets.times if time is not None]
    span = max(known) - min(known) if known else 0
    return replace(
        video,
        frames=count,
        fps=rate,
        variable_rate=timing.variable,
        duration=_duration(span, count, stream.time_base, rate),
        still=still is not None,
        stream=stream.index,
        codec=still or context.codec.canonical_name,
        keyframe_interval=_keyframe_interval(packets.times, packets.keys),
        first_pts=timing.first,
        pts_step=timing.step,
        plain=len(container.streams.video) == 1 and _has_closed_groups(packets) and _states_range(stream, packets),
    )


def _read(container: av.container.InputContainer, stream: av.VideoStream) -> _Packets:
    context = stream.codec_context
    packets = _Packets(container.format.name, context.reorder_depth > 0)
    hides = _HIDING.get(context.codec.canonical_name)
    times, keys = packets.times, packets.keys
    undecided = packets.reorders and packets.format == _WITH_BOTH_TIMES
    last: av.Packet | None = None
    try:
        for packet in container.demux(stream):
            if not packet.size:
                packets.empty += 1
                continue
            key = packet.is_keyframe
            if key and packets.first_key is None:
                packets.first_key = packet
            if packet.is_discard:
                packets.discarded.add(len(times))
            packets.corrupt = packet.is_corrupt
            if undecided and packet.pts != packet.dts:
                packets.delayed, undecided = True, False
            times.append(packet.pts)
            keys.append(key)
            last = packet
            if hides is not None and hides(memoryview(packet)):
                packets.hidden += 1
    except av.FFmpegError as error:
        packets.torn = str(error)
    if last is not None and context.codec.canonical_name in _NEVER_BLANK:
        # The end of a recording may lie amid a packet.
        packets.ends_in_zeros = bytes(memoryview(last)[-len(_BLANK) :]) == _BLANK
        packets.blank = bytes(memoryview(last)[: len(_BLANK)]) == _BLANK
    return packets


def _hides_vp8(data: memoryview) -> bool:
    """Whether a VP8 packet holds a frame that is not displayed: `show_frame` of the frame tag (RFC 6386, 9.1)."""
    return not data[0] >> 4 & 1


def _hides_vp9(data: memoryview) -> bool:
    """Whether a VP9 packet is not known to hold exactly one displayed frame (VP9 specification, 6.2 and annex B).

    A superframe of two frames is a hidden frame and a displayed one.
    """
    marker = data[-1]
    if marker & 0xE0 == 0xC0:
        return marker & 7 != 1
    header = data[0]
    if header >> 4 & 3 == 3:  # profile 3 has a reserved bit before the others
        return not header >> 2 & 1 and not header & 1
    return not header >> 3 & 1 and not header >> 1 & 1


_HIDING: dict[str, Callable[[memoryview], bool]] = {"vp8": _hides_vp8, "vp9": _hides_vp9}
"""Tests of a packet for frames that are not displayed. A packet of AV1 in these containers displays one frame."""


def _are_frames(stream: av.VideoStream, packets: _Packets, timing: _Timing) -> bool:
    """Whether the packets of a container that stores times prove that each of them is one displayed frame.

    They do if the codec is one of `PROVEN_CODECS`, nothing is hidden, missing, empty or incomplete, the first packet is
    a keyframe and is displayed first (no frames that lack their references), times are distinct and evenly spaced (no
    packets were dropped), frames are not fields, and the decoder knows how many frames it must hold back to order them:
    none where the times rise in the order in which frames are stored, unless the container tells that they need no
    reordering.
    """
    context, times = stream.codec_context, packets.times
    if packets.format not in SEEKABLE_FORMATS or context.codec.canonical_name not in PROVEN_CODECS:
        return False
    # The demuxer returns one packet of no bytes at the end of the file.
    if packets.hidden or packets.discarded or packets.ends_in_zeros:
        return False
    if packets.empty > 1 or stream.frames not in (0, len(times)):
        return False
    if timing.variable or None in times or times[0] != timing.first or not packets.keys[0]:
        return False
    if len(set(times)) < len(times) or (context.name == "h264" and context.field_order > _PROGRESSIVE):
        return False
    # Times that rise as frames are stored, though the decoder reorders them, may be invented: AVI keeps none to copy.
    reordering, depth = _reordering(times), context.reorder_depth
    invented = depth > 0 == reordering and len(times) > 1 and not packets.delayed
    return reordering <= depth and not invented


def _reordering(times: list[int | None]) -> int:
    """Largest number of packets by which a frame is displayed earlier than it is stored."""
    known = np.array(times)
    if (known[1:] > known[:-1]).all():
        return 0
    rank = np.argsort(np.argsort(known))
    return int((np.arange(len(known)) - rank).max())


def _has_closed_groups(packets: _Packets) -> bool:
    """Whether every packet is displayed, and none that is stored after a keyframe is displayed before it."""
    times = packets.times
    if packets.hidden or packets.discarded or None in times or len(set(times)) < len(times) or not packets.keys[0]:
        return False
    known, keys = np.array(times), np.array(packets.keys)
    newest_key = np.maximum.accumulate(np.where(keys, known, known.min()))
    return bool((known >= newest_key).all())


def _states_range(stream: av.VideoStream, packets: _Packets) -> bool:
    """Whether a stream of full range states it itself: NVDEC does not read the tags of the container."""
    context = stream.codec_context
    if context.color_range != _FULL_RANGE or packets.first_key is None:
        return True
    alone = av.CodecContext.create(context.name, "r")
    alone.extradata = context.extradata
    try:
        pictures = alone.decode(packets.first_key) or alone.decode(None)
    except av.FFmpegError:
        return False
    return bool(pictures) and pictures[0].color_range == _FULL_RANGE


def _is_torn(row: Row, stream: av.VideoStream, packets: _Packets) -> bool:
    """Whether the file ends before its last packet: then a decoder cannot read it to its end."""
    if packets.torn or ((packets.corrupt or packets.blank) and packets.format in _WITH_INDEX):
        return True
    if len(packets.times) >= stream.frames:
        return False
    # The header counts more frames than there are packets. An edit list hides frames, and AVI counts chunks of no
    # bytes: the file is only torn if the list of its frames reaches beyond its end.
    if packets.format == "avi":
        return _end_of_avi_frames(row) > row.size
    return max((entry.pos + entry.size for entry in stream.index_entries), default=0) > row.size > 0


def _torn_at(stream: av.VideoStream, packets: _Packets) -> str:
    """Reason that a torn file is left out."""
    if packets.blank:
        return "truncated: its end is zeros, as of a download that was not finished"
    count = f"truncated: {len(packets.times)} frames readable"
    return f"{count} of {stream.frames}" if stream.frames else count


def _end_of_avi_frames(row: Row) -> int:
    """Place of the first byte after the chunk `movi`, which holds the frames of an AVI; 0 if there is none."""
    place = 12  # after the head of the outermost chunk
    while place + 12 <= row.size:
        head = read_bytes(row.path, max(row.offset, 0) + place, 12).tobytes()
        end = place + 8 + int.from_bytes(head[4:8], "little")
        if head[8:] == b"movi":
            return end
        place = end + end % 2
    return 0


def _probe_by_decoding(row: Row, packets: _Packets) -> Row:
    """Complete the row of a video by decoding all of it."""
    times: list[int | None] = []
    keys: list[bool] = []
    prints: list[int] = []
    first: av.VideoFrame | None = None
    for frame in displayed_frames(row):
        first = first or frame
        times.append(frame.pts)
        keys.append(bool(frame.key_frame))
        prints.append(_fingerprint(frame))
    if first is None:
        known = any(packets.keys)
        raise DecodeError(row.path, "no frame can be decoded" if known else "no keyframe: nothing can be decoded")
    row = _with_picture(row, first)
    row = replace(row, frames=len(times), keyframe_interval=_keyframe_interval([None] * len(keys), keys))
    rising = [time for time in times if time is not None]
    if len(rising) == len(times) and all(earlier < later for earlier, later in pairwise(rising)):
        return _with_times(row, packets, dict(zip(rising, prints, strict=True)), first.time_base)
    duration = _duration(0, len(times), None, row.fps)
    return replace(row, access="count", first_pts=0, pts_step=0, variable_rate=False, duration=duration, plain=False)


def _with_times(row: Row, packets: _Packets, prints: dict[int, int], tick: Fraction | None) -> Row:
    """Row of a decoded video whose frames have rising times.

    A seek by them is safe in containers that store times; elsewhere only if frames are stored in the order in which
    they are displayed. Without a seek, times serve if they are those of the packets, which are read from the start. In
    either case, every keyframe must be a start from which the same frames are decoded.

    Args:
        row: row of the video.
        packets: its packets.
        prints: fingerprint of each frame by its time, ascending.
        tick: unit of the times in seconds.
    """
    times = list(prints)
    timing, shown = _timing(list(times)), packets.shown_times
    seekable = packets.format in SEEKABLE_FORMATS or (packets.format == "avi" and not packets.reorders)
    by_step = seekable and bool(timing.step)
    by_times = None not in shown and sorted(set(shown)) == times  # type: ignore[type-var]
    by_count = not (by_step or by_times) or not _are_clean_starts(row, prints)
    span = times[-1] - times[0]
    measured = float((len(times) - 1) / (span * tick)) if span and tick else row.fps
    return replace(
        row,
        access="count" if by_count else "times",
        first_pts=timing.first,
        pts_step=timing.step if by_step and not by_count else 0,
        variable_rate=timing.variable,
        # The container's rate may count frames that are not displayed.
        fps=row.fps if abs(row.fps - measured) <= 0.02 * measured else measured,
        duration=_duration(span, len(times), tick, row.fps),
        plain=row.plain and by_times and seekable and not by_count,
    )


def _fingerprint(frame: av.VideoFrame) -> int:
    """Checksum of a frame's pixels: of its luma, or of its RGB where luma is no plane of bytes."""
    if frame.format.name in _LUMA_FORMATS:
        plane = frame.planes[0]
        luma = np.ndarray((plane.height, plane.width), np.uint8, plane, strides=(plane.line_size, 1))
        return zlib.crc32(luma.tobytes())
    return zlib.crc32(RgbConverter()(frame).pixels.tobytes())


def _are_clean_starts(row: Row, prints: dict[int, int]) -> bool:
    """Whether decoding from every keyframe gives the frames that decoding from the start of the file gives.

    They differ where a keyframe is none (a wrong mark, a gradual refresh), and where frames refer to lost ones. The
    packets are read once: each keyframe begins a decoder of its own, which is also fed the frames that are stored after
    the next keyframe but displayed before it. Two decoders, used by turns, are enough for that.
    """
    found: dict[int, int] = {}
    with open_video(row) as container, open_video(row) as other:
        stream = video_stream(container, row)
        runs = _Run(stream.codec_context), _Run(video_stream(other, row).codec_context)
        newest, older = runs
        for packet in container.demux(stream):
            if not packet.size:
                continue
            if packet.is_keyframe and newest.fed:
                older.close(found)
                newest, older = older, newest
                newest.begin(packet)
            newest.feed(packet, found)
            if older.open:
                older.feed(packet, found) if newest.leads(packet) else older.close(found)
        for run in runs:
            run.close(found)
    return all(run.clean for run in runs) and found == prints


class _Run:
    """Decoding from one keyframe on, or from the start of the file."""

    def __init__(self, context: av.VideoCodecContext) -> None:
        self.context = context
        self.head: av.Packet | None = None
        self.fed = self.open = self.started = False
        self.clean = True

    def begin(self, head: av.Packet) -> None:
        """Begin anew at a keyframe."""
        if self.fed:
            self.context.flush_buffers()
        self.head, self.started = head, False

    def leads(self, packet: av.Packet) -> bool:
        """Whether a packet is the keyframe, or is displayed before it; such frames refer to earlier ones."""
        head = self.head
        if head is None or head.pts is None or packet.pts is None:
            return False
        return bool(packet.pts <= head.pts)

    def feed(self, packet: av.Packet | None, found: dict[int, int]) -> None:
        """Decode a packet, or what remains, and record the fingerprints of the frames by their times."""
        self.fed = self.open = True
        try:
            frames = self.context.decode(packet)
        except av.FFmpegError:
            return
        for frame in frames:
            self.clean &= self.started or self.head is None or is_clean_start(frame, self.head)
            self.started = True
            if self.head is not None and frame.pts is not None and frame.pts < self.head.pts:
                continue  # displayed before the keyframe: nobody looks for it from here
            value = _fingerprint(frame)
            self.clean &= found.setdefault(frame.pts, value) == value

    def close(self, found: dict[int, int]) -> None:
        """Decode what remains."""
        if self.open:
            self.feed(None, found)
        self.open = False


def _size(path: str) -> int:
    if is_url(path):
        filesystem, inner = filesystem_of(path)
        return int(filesystem.size(inner) or 0)
    status = os.stat(path)
    if stat.S_ISREG(status.st_mode) and not status.st_size:
        raise DecodeError(path, "empty file")
    return status.st_size


def _timing(times: list[int | None]) -> _Timing:
    known = sorted(time for time in times if time is not None)
    if len(known) < len(times):
        return _Timing()
    steps = [later - earlier for earlier, later in pairwise(known)]
    if not steps:
        return _Timing(known[0])
    # Containers round times to ticks (milliseconds in Matroska), so that steps differ by one tick at a constant rate:
    # the rate is variable only if a step differs from the median by more than one tick and more than 10 %.
    usual = sorted(steps)[len(steps) // 2]
    variable = any(abs(step - usual) > max(1, usual // 10) for step in steps)
    return _Timing(known[0], usual if min(steps) == max(steps) else 0, variable)


def _duration(span: int, frames: int, tick: Fraction | None, rate: float) -> float:
    """Duration in seconds of frames whose times lie `span` ticks apart, or by the rate if that is unknown."""
    if span and tick is not None:
        return float(span * tick) * frames / (frames - 1)
    return frames / rate if rate else 0.0


def _keyframe_interval(times: list[int | None], keys: list[bool]) -> int:
    known = [time for time in times if time is not None]
    if len(known) == len(keys):
        keys = [key for _, key in sorted(zip(known, keys, strict=True))]
    places = [place for place, key in enumerate(keys) if key]
    return max((later - earlier for earlier, later in pairwise([*places, len(keys)])), default=0)


def _first_picture(stream: av.VideoStream, packets: _Packets) -> av.VideoFrame | None:
    """Decode the first keyframe alone; None if it cannot be displayed without the packets after it."""
    context = stream.codec_context
    try:
        pictures = context.decode(packets.first_key) or context.decode(None)
    except InvalidDataError:
        return None
    return pictures[0] if pictures else None


def _with_picture(row: Row, picture: av.VideoFrame) -> Row:
    """Row with what only a decoded frame tells: size, orientation, pixel format and colours."""
    orientation = Orientation() if row.still else _orientation(row, picture)
    turned = orientation.rotation % 180 != 0
    return replace(
        row,
        height=picture.width if turned else picture.height,
        width=picture.height if turned else picture.width,
        rotation=orientation.rotation,
        mirrored=orientation.mirrored,
        exif_orientation=read_exif_orientation(row) if row.still and _states_orientation(picture) else 1,
        pixel_format=picture.format.name,
        colour=_colour(row, picture),
    )


def _orientation(row: Row, picture: av.VideoFrame) -> Orientation:
    try:
        matrices = [data for data in picture.side_data if data.type is SideDataType.DISPLAYMATRIX]
    except ValueError:  # PyAV fails on side data of a kind that it does not know
        matrices = []
    turned: Orientation | None = Orientation(picture.rotation % 360)
    if matrices:
        turned = orientation_of_matrix(np.frombuffer(bytes(matrices[0]), np.int32))
    if turned is None or turned.rotation % 90:
        raise DecodeError(row.path, f"is rotated by {picture.rotation % 360} degrees: expected a multiple of 90")
    return turned


def _states_orientation(picture: av.VideoFrame) -> bool:
    """Whether a still image may have an orientation tag."""
    try:
        return bool(picture.rotation) or any(data.type is SideDataType.DISPLAYMATRIX for data in picture.side_data)
    except ValueError:  # PyAV fails on side data of a kind that it does not know, such as EXIF
        return True


def _colour(row: Row, picture: av.VideoFrame) -> str:
    """Name of the matrix and range by which a frame is converted to RGB.

    Raises:
        DecodeError: FFmpeg cannot convert it.
    """
    kind = (picture.format.name, picture.colorspace, picture.color_range)
    if kind not in _CONVERTIBLE:
        try:
            RgbConverter()(picture)
        except (av.FFmpegError, OSError, ValueError) as error:
            raise DecodeError(
                row.path,
                f"its colours (pixel format {kind[0]}, matrix {kind[1]} of ITU-T H.273) cannot be converted to RGB",
            ) from error
        _CONVERTIBLE.add(kind)
    full = picture.color_range == _FULL_RANGE or picture.format.name.startswith("yuvj")
    return _MATRICES.get(int(picture.colorspace), f"matrix {int(picture.colorspace)}") + " full" * full


_CONVERTIBLE: set[tuple[str, int, int]] = set()
"""Pixel format, matrix and range of frames that this process has converted to RGB already."""
