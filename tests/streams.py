"""Generated video files whose frames say their number: codecs, orders of frames, containers, and cuts between packets.

A stream is encoded once, and its packets are written into a container after a cut. The right answer is what a decoder
puts out when it reads the file from its start, here written anew, apart from the code that is tested.
"""

from __future__ import annotations

import io
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from itertools import chain
from pathlib import Path

import av
import numpy as np
from numpy.typing import NDArray

from tests.cases.barcodes import draw_barcode, read_barcode

FRAMES, SIDE, RATE = 40, 64, 25

Packets = list[av.Packet]

ISO = frozenset({"mp4", "mov"})
_NOT_IN_MOV = frozenset({"libvpx", "libvpx-vp9", "libsvtav1", "ffv1", "wmv2", "flv"})
FORMATS = {"ts": "mpegts", "mkv": "matroska"}


@dataclass(frozen=True)
class Coding:
    """One way to encode the frames."""

    name: str
    encoder: str
    containers: tuple[str, ...]
    options: dict[str, str] = field(default_factory=dict, hash=False)
    pixel_format: str = "yuv420p"
    group: int = 12
    b_frames: int = 0
    hidden_bit: int = 0
    """Bit of the first byte of a packet that shows its frame: every ninth packet is without it."""

    copy_bit: int = 0
    """Likewise: a copy without it, of the same time, stands before every keyframe."""


_ALL = ("mp4", "mov", "mkv", "avi", "ts")
_MOST = ("mp4", "mkv", "avi", "ts")

CODINGS = {
    coding.name: coding
    for coding in (
        Coding("h264", "libx264", _ALL, {"preset": "veryfast"}),
        Coding("h264-b", "libx264", _MOST, {"preset": "veryfast", "b-pyramid": "normal"}, b_frames=3),
        Coding("h264-open", "libx264", _MOST, {"preset": "veryfast", "x264-params": "open_gop=1"}, b_frames=2),
        Coding("h264-refresh", "libx264", _MOST, {"preset": "veryfast", "x264-params": "intra-refresh=1:ref=1"}),
        Coding("h264-scenes", "libx264", _MOST, {"x264-params": "scenecut=100:min-keyint=30:ref=3"}, group=60),
        Coding("h264-fields", "libx264", _MOST, {"preset": "veryfast", "x264-params": "interlaced=1"}, b_frames=2),
        Coding("hevc", "libx265", ("mp4", "mkv", "ts"), {"x265-params": "log-level=none:open-gop=0"}, b_frames=3),
        Coding("hevc-open", "libx265", ("mp4", "mkv", "ts"), {"x265-params": "log-level=none:open-gop=1"}, b_frames=3),
        Coding("hevc-layers", "libx265", ("mp4", "mkv", "ts"), {"x265-params": "log-level=none:temporal-layers=3"}),
        Coding("mpeg4", "mpeg4", ("mp4", "mov", "mkv", "avi")),
        Coding("mpeg4-b", "mpeg4", ("mp4", "mkv", "avi"), b_frames=2),
        Coding("mpeg2", "mpeg2video", ("mkv", "ts", "mpg", "mp4")),
        Coding("mpeg2-b", "mpeg2video", ("mkv", "ts", "mpg", "mp4"), b_frames=2),
        Coding("mpeg1-b", "mpeg1video", ("mkv", "mpg"), b_frames=2),
        Coding(
            "vp8", "libvpx", ("webm", "mkv", "avi"), {"auto-alt-ref": "1", "lag-in-frames": "16", "deadline": "good"}
        ),
        Coding(
            "vp9", "libvpx-vp9", ("webm", "mp4", "mkv"), {"lag-in-frames": "16", "deadline": "good", "cpu-used": "5"}
        ),
        Coding("vp8-hidden", "libvpx", ("webm", "mkv"), {"deadline": "good"}, hidden_bit=0x10),
        Coding("vp8-altref", "libvpx", ("webm", "mkv"), {"deadline": "good"}, copy_bit=0x10),
        Coding("av1", "libsvtav1", ("mp4", "mkv", "webm"), {"preset": "10"}),
        Coding("mjpeg", "mjpeg", ("avi", "mov", "mkv"), pixel_format="yuvj420p"),
        Coding("png", "png", ("mov", "avi"), pixel_format="rgb24"),
        Coding("ffv1", "ffv1", ("mkv", "avi"), pixel_format="yuv420p"),
        Coding("wmv2", "wmv2", ("avi", "asf")),
        Coding("flv1", "flv", ("flv",)),
        Coding("gif", "gif", ("gif",), pixel_format="rgb8"),
    )
}


def _whole(packets: Packets) -> Packets:
    return packets


def _starts_amid(packets: Packets) -> Packets:
    return packets[5:]


def _lacks_some(packets: Packets) -> Packets:
    return packets[:15] + packets[18:]


def _ends_early(packets: Packets) -> Packets:
    return packets[:-7]


def _begins_late(packets: Packets) -> Packets:
    return _shift(packets, 33)


def _has_uneven_times(packets: Packets) -> Packets:
    for packet in packets:
        step = packet.duration or 1
        packet.pts += packet.pts // (7 * step) * 3 * step
        packet.dts += packet.dts // (7 * step) * 3 * step
    return packets


def _has_equal_times(packets: Packets) -> Packets:
    for packet in packets:
        packet.pts = packet.pts // (2 * packet.duration) * 2 * packet.duration
        packet.dts = min(packet.dts, packet.pts)
    return packets


def _is_marked_wrongly(packets: Packets) -> Packets:
    for number, packet in enumerate(packets):
        packet.is_keyframe |= number % 5 == 2
    return packets


def _is_cut_by_edit_list(packets: Packets) -> Packets:
    return _shift(packets, -9)


def _is_cut_amid_a_frame(packets: Packets) -> Packets:
    return _shift(packets, -0.5)


def _shift(packets: Packets, frames: float) -> Packets:
    ticks = int(frames / RATE / packets[0].time_base)
    for packet in packets:
        packet.pts += ticks
        packet.dts += ticks
    return packets


CUTS: dict[str, Callable[[Packets], Packets]] = {
    "whole": _whole,
    "amid": _starts_amid,
    "lacking": _lacks_some,
    "early": _ends_early,
    "late": _begins_late,
    "uneven": _has_uneven_times,
    "equal": _has_equal_times,
    "marked": _is_marked_wrongly,
    "edit": _is_cut_by_edit_list,
    "half": _is_cut_amid_a_frame,
    "parts": _whole,
}
"""Changes between the packets of the encoder and those in the file; `parts` swaps two parts by an edit list."""


def streams() -> Iterator[tuple[str, str, str]]:
    """All combinations of coding, container and cut that can be written."""
    for coding in CODINGS.values():
        for container in coding.containers:
            for cut in CUTS:
                if cut in ("edit", "half", "parts") and container not in ISO:
                    continue  # only these have edit lists
                if cut in ("late", "uneven", "equal") and container in ("avi", "gif", "mpg"):
                    continue  # these hold no times, or the writer demands others
                if cut == "equal" and (container not in ("mkv", "webm") or coding.b_frames):
                    continue  # the writers demand that decoding times rise and precede presentation times
                if cut == "amid" and container == "gif":
                    continue  # no decoder reads it
                yield coding.name, container, cut


def write(name: str, container: str, cut: str, folder: Path) -> Path:
    """Write one stream as a file."""
    coding = CODINGS[name]
    path = folder / f"{name}-{cut}.{container}"
    with av.open(io.BytesIO(_encode(name, "nut" if container in ("avi", "gif") else "mov"))) as source:
        stream = source.streams.video[0]
        packets = CUTS[cut]([packet for packet in source.demux(stream) if packet.size])
        if coding.hidden_bit or coding.copy_bit:
            packets = list(_with_hidden_frames(packets, coding))
        options = {"avoid_negative_ts": "disabled"} if container in ISO else {}
        with av.open(str(path), "w", format=FORMATS.get(container), options=options) as out:
            target = out.add_stream_from_template(stream, opaque=True)
            for packet in packets:
                packet.stream = target
                out.mux(packet)
    if cut == "parts":
        path.write_bytes(_swap_parts(path.read_bytes()))
    assert coding.name == name
    return path


def decode_all(path: Path) -> list[int]:
    """Numbers that all frames of a file show, decoded from its start."""
    shown: list[int] = []
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1
        for packet in chain(container.demux(stream), [None]):
            if packet is None or packet.size:
                try:
                    frames = stream.codec_context.decode(packet)
                except av.FFmpegError:
                    continue
                shown += [read_barcode(frame.to_ndarray(format="rgb24")) for frame in frames]
    return shown


@cache
def _encode(name: str, form: str) -> bytes:
    """The frames as a file of some form: MOV stores decoding times, and NUT packets in the form that AVI expects."""
    coding, out = CODINGS[name], io.BytesIO()
    form = "gif" if name == "gif" else "nut" if coding.encoder in _NOT_IN_MOV else form
    with av.open(out, "w", format=form) as container:
        stream = container.add_stream(coding.encoder, rate=RATE, options=coding.options)
        stream.width = stream.height = SIDE
        stream.pix_fmt = coding.pixel_format
        stream.gop_size = coding.group
        stream.codec_context.thread_count = 1
        stream.codec_context.max_b_frames = coding.b_frames
        for number in range(FRAMES):
            frame = av.VideoFrame.from_ndarray(_picture(number), format="rgb24")
            container.mux(stream.encode(frame.reformat(format=coding.pixel_format)))
        container.mux(stream.encode())
    return out.getvalue()


def _picture(number: int) -> NDArray[np.uint8]:
    return draw_barcode(number, SIDE)


def _with_hidden_frames(packets: Packets, coding: Coding) -> Iterator[av.Packet]:
    for number, packet in enumerate(packets):
        data = bytes(packet)
        hidden = av.Packet(bytes([data[0] & ~(coding.hidden_bit | coding.copy_bit)]) + data[1:])
        hidden.pts, hidden.dts, hidden.time_base = packet.pts, packet.dts, packet.time_base
        hidden.is_keyframe = packet.is_keyframe
        if coding.copy_bit and packet.is_keyframe and number:
            yield hidden
        yield hidden if coding.hidden_bit and number % 9 == 5 else packet


def _swap_parts(data: bytes) -> bytes:
    """Show frames 20 to 29, then 3 to 12, by an edit list of two entries in place of that of the writer."""
    begin, end = _box(data, b"moov", b"trak", b"edts")
    (scale,) = struct.unpack(">I", data[_box(data, b"moov", b"mvhd")[0] + 20 :][:4])
    media = _box(data, b"moov", b"trak", b"mdia", b"mdhd")[0]
    (ticks,) = struct.unpack(">I", data[media + 20 : media + 24])
    entries = [(10 * scale // RATE, first * ticks // RATE) for first in (20, 3)]
    table = struct.pack(">II", 0, len(entries)) + b"".join(struct.pack(">IiHH", *entry, 1, 0) for entry in entries)
    elst = struct.pack(">I4s", 8 + len(table), b"elst") + table
    edts = struct.pack(">I4s", 8 + len(elst), b"edts") + elst
    grown = len(edts) - (end - begin)
    changed = bytearray(data[:begin] + edts + data[end:])
    for names in ((b"moov",), (b"moov", b"trak")):
        start, stop = _box(data, *names)
        changed[start : start + 4] = struct.pack(">I", stop - start + grown)
    return bytes(changed)


def _box(data: bytes, *names: bytes) -> tuple[int, int]:
    """Begin and end of a box of an ISO base media file, which follows the frames: its offsets stay true."""
    begin, end = -8, len(data)
    for name in names:
        at = begin + 8
        while data[at + 4 : at + 8] != name:
            at += int.from_bytes(data[at : at + 4], "big")
            assert at < end, name
        begin, end = at, at + int.from_bytes(data[at : at + 4], "big")
    return begin, end
