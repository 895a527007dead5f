"""Properties of files that the probe finds: the stream, stills and videos, colours, torn files, hidden frames."""

from __future__ import annotations

import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from mvd_scale.cli import cli
from mvd_scale.config.data import DataConfig
from mvd_scale.data.decoding.backends import DecodeBackend, Decoders, decode_backend
from mvd_scale.data.decoding.pyav import decode_frames
from mvd_scale.data.indexing.build import load_source
from mvd_scale.data.indexing.media_probe import _hides_vp8, _hides_vp9, probe_video
from mvd_scale.data.indexing.transcode import TranscodeOptions, transcode
from mvd_scale.data.manifest import Manifest, Row
from mvd_scale.data.orientation import orient
from tests import streams
from tests.cases.barcodes import draw_barcode, read_barcode

ON_GPU = Decoders("mixed", "mixed")
"""A GPU that decodes everything."""


def probe(path: Path, **options: Any) -> Row:
    return probe_video(Row(name=path.name, path=str(path)), timeout=60, **options)


def numbers(row: Row) -> list[int]:
    return [read_barcode(frame) for frame in decode_frames(row, np.arange(row.frames))]


def write(path: Path, frames: int = 8, pixel_format: str = "yuv420p", codec: str = "libx264", **context: Any) -> Path:
    """Video of barcodes; `context` sets fields of the encoder's context."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=25)
        stream.width = stream.height = 64
        stream.pix_fmt = pixel_format
        for name, value in context.items():
            setattr(stream.codec_context, name, value)
        for number in range(frames):
            picture = av.VideoFrame.from_ndarray(draw_barcode(number), format="rgb24")
            container.mux(stream.encode(picture.reformat(format=pixel_format)))
        container.mux(stream.encode())
    return path


def two_streams(path: Path, dispositions: list[str | None], sides: list[int]) -> Path:
    """Matroska file of several video streams, the n-th of which shows n."""
    with av.open(str(path), "w") as container:
        added = [container.add_stream("libvpx", rate=25) for _ in sides]
        for stream, disposition, side in zip(added, dispositions, sides, strict=True):
            stream.width = stream.height = side
            stream.pix_fmt = "yuv420p"
            stream.disposition = av.stream.Disposition[disposition] if disposition else av.stream.Disposition(0)
        for number, (stream, side) in enumerate(zip(added, sides, strict=True)):
            for place in range(4):
                frame = av.VideoFrame.from_ndarray(draw_barcode(number, side), format="rgb24")
                frame.pts = place
                container.mux(stream.encode(frame))
        for stream in added:
            container.mux(stream.encode())
    return path


@pytest.mark.parametrize(
    ("dispositions", "sides", "chosen"),
    [
        (["default", "default"], [64, 64], 0),
        (["default", "default"], [32, 64], 1),
        ([None, "default"], [64, 32], 1),
        ([None, None, "default"], [64, 96, 32], 2),
    ],
)
def test_the_stream_is_the_one_that_a_player_chooses(
    tmp_path: Path, dispositions: list[str | None], sides: list[int], chosen: int
) -> None:
    row = probe(two_streams(tmp_path / "a.mkv", dispositions, sides))
    assert (row.stream, row.height) == (chosen, sides[chosen])
    assert numbers(row) == [chosen] * 4
    # DALI chooses by rules of its own.
    assert not row.plain
    assert decode_backend(row, Decoders()) is decode_backend(row, ON_GPU) is DecodeBackend.PYAV
    with pytest.raises(Exception, match="no video stream 7"):
        decode_frames(replace(row, stream=7), np.array([0]))


@pytest.mark.parametrize("form", ["gif", "webp", "png"])
def test_animations_are_videos(tmp_path: Path, form: str) -> None:
    pictures = [Image.fromarray(draw_barcode(number)) for number in range(9)]
    options: dict[str, Any] = {"lossless": True} if form == "webp" else {}
    pictures[0].save(tmp_path / f"a.{form}", save_all=True, append_images=pictures[1:], duration=40, **options)
    row = probe(tmp_path / f"a.{form}", verify=True)
    assert (row.left_out, row.frames, row.still) == (None, 9, False)
    assert row.duration == pytest.approx(9 * 0.04, rel=0.2)
    assert numbers(row) == list(range(9))
    transcode(row, (tmp_path / f"a.{form}").read_bytes(), TranscodeOptions(), tmp_path / "new.mp4")
    assert numbers(probe(tmp_path / "new.mp4")) == list(range(9))


@pytest.mark.parametrize("form", ["jpg", "png", "webp", "tif"])
def test_stills_stand_as_coded_unless_the_recipe_asks(tmp_path: Path, form: str) -> None:
    exif = Image.Exif()
    exif[274] = 7
    coded = Image.fromarray(draw_barcode(5)).resize((64, 48))
    coded.save(tmp_path / f"a.{form}", exif=exif)
    row = probe(tmp_path / f"a.{form}")
    assert (row.still, row.exif_orientation) == (True, 7)
    assert (row.height, row.width, row.rotation, row.mirrored) == (48, 64, 0, False)
    assert decode_backend(row, Decoders()) is DecodeBackend.DALI_IMAGE
    data = DataConfig(source=str(tmp_path), upright_stills=True)
    upright = load_source(data, tmp_path / "cache").row(0)
    assert (upright.height, upright.width, upright.rotation, upright.mirrored) == (64, 48, 270, True)
    assert Manifest.from_rows([upright]).with_upright_stills().row(0) == upright
    assert load_source(data.model_copy(update={"upright_stills": False}), tmp_path / "cache").row(0) == row


def test_videos_of_pictures_are_no_stills(tmp_path: Path) -> None:
    for codec, form in (("png", "rgb24"), ("mjpeg", "yuvj420p")):
        row = probe(write(tmp_path / f"{codec}.mov", codec=codec, pixel_format=form))
        assert (row.still, row.codec, row.frames) == (False, codec, 8)
        assert numbers(row) == list(range(8))


@pytest.mark.parametrize(
    ("context", "pixel_format", "colour", "decoder"),
    [
        ({}, "yuv420p", "bt601", DecodeBackend.DALI_VIDEO),
        ({"colorspace": 6}, "yuv420p", "bt601", DecodeBackend.DALI_VIDEO),
        ({"colorspace": 1}, "yuv420p", "bt709", DecodeBackend.DALI_VIDEO),
        ({"colorspace": 9}, "yuv420p", "bt2020", DecodeBackend.PYAV),
        ({"color_range": 2}, "yuvj420p", "bt601 full", DecodeBackend.DALI_VIDEO),
        ({"color_range": 2, "colorspace": 1}, "yuvj420p", "bt709 full", DecodeBackend.DALI_VIDEO),
    ],
)
def test_dali_gets_the_colours_that_it_knows(
    tmp_path: Path, context: dict[str, int], pixel_format: str, colour: str, decoder: DecodeBackend
) -> None:
    row = probe(write(tmp_path / "a.mp4", **context))
    assert (row.colour, row.pixel_format, row.access, row.plain) == (colour, pixel_format, "packets", True)
    assert decode_backend(row, ON_GPU) is decoder


@pytest.mark.parametrize(("in_stream", "plain"), [("on", True), ("off", False)])
def test_a_range_that_only_the_container_states_is_unknown_to_nvdec(
    tmp_path: Path, in_stream: str, plain: bool
) -> None:
    options = {"x264-params": f"fullrange={in_stream}"}
    row = probe(write(tmp_path / "a.mkv", color_range=2, options=options))
    assert (row.pixel_format, row.colour, row.plain) == ("yuvj420p", "bt601 full", plain)
    assert (decode_backend(row, ON_GPU) is DecodeBackend.DALI_VIDEO) == plain


def test_colours_that_nothing_converts_are_left_out_with_the_reason(tmp_path: Path) -> None:
    row = probe(write(tmp_path / "a.mp4", colorspace=8))
    assert row.left_out == "its colours (pixel format yuv420p, matrix 8 of ITU-T H.273) cannot be converted to RGB"


def coloured(path: Path, colorspace: int) -> Path:
    """Video of four colours by some matrix, and tagged so."""
    rows, columns = np.mgrid[0:64, 0:64]
    picture = np.stack([rows * 3, columns * 3, 255 - rows * 2], -1).astype(np.uint8)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25, options={"crf": "4"})
        stream.width, stream.height, stream.pix_fmt = 64, 32, "yuv420p"
        stream.codec_context.colorspace = colorspace
        for _ in range(4):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture[:32]), format="rgb24")
            matrix = "ITU709" if colorspace == 1 else "ITU601"
            container.mux(stream.encode(frame.reformat(format="yuv420p", dst_colorspace=matrix)))
        container.mux(stream.encode())
    return path


@pytest.mark.parametrize("colorspace", [1, 6])
@pytest.mark.parametrize("turned", [(0, False), (90, True)])
def test_encoding_anew_keeps_colours_and_orientation(tmp_path: Path, colorspace: int, turned: tuple[int, bool]) -> None:
    path = coloured(tmp_path / "a.mp4", colorspace)
    row = probe(path)
    if turned[0]:
        row = replace(row, rotation=turned[0], mirrored=turned[1], height=row.width, width=row.height)
    before = orient(decode_frames(row, np.array([0]))[0], row.rotation, row.mirrored).astype(int)
    transcode(row, path.read_bytes(), TranscodeOptions(quality=4), tmp_path / "new.mp4")
    new = probe(tmp_path / "new.mp4")
    assert (new.colour, new.rotation, new.mirrored, new.height) == ("bt601", 0, False, row.height)
    assert np.abs(decode_frames(new, np.array([0]))[0] - before).mean() < 3


def test_an_avi_is_torn_where_its_frames_end_not_where_its_index_does(tmp_path: Path) -> None:
    path = write(tmp_path / "a.avi", frames=24, codec="mpeg4")
    data = path.read_bytes()
    path.write_bytes(data[: data.rindex(b"idx1") + 20])
    row = probe(path)
    assert (row.left_out, row.frames) == (None, 24)
    path.write_bytes(data[: (data.rindex(b"movi") + data.rindex(b"idx1")) // 2])
    assert str(probe(path).left_out).startswith("truncated: ")


def test_hidden_frames_of_vp8_and_vp9(tmp_path: Path) -> None:
    assert _hides_vp8(memoryview(b"\x00")) and not _hides_vp8(memoryview(b"\x10"))  # noqa: PT018
    shown, hidden, existing = b"\x82\x00", b"\x80\x00", b"\x88\x00"
    superframe = b"\x80\x00" + b"\xc1"
    found = [_hides_vp9(memoryview(data)) for data in (shown, hidden, existing, superframe, b"\x80\x00\xc2")]
    assert found == [False, True, False, False, True]
    shown = {"vp8-hidden": [k for k in range(streams.FRAMES) if k % 9 != 5], "vp8-altref": list(range(streams.FRAMES))}
    for coding, expected in shown.items():
        row = probe(streams.write(coding, "webm", "whole", tmp_path))
        assert (row.access == "packets", row.plain) == (False, False)
        assert numbers(row) == expected


def test_wrong_marks_of_keyframes_are_found_out(tmp_path: Path) -> None:
    path = streams.write("mpeg4", "mp4", "marked", tmp_path)
    row = probe(path)
    assert (row.access, row.plain) == ("count", False)
    # If the index had believed them, decoding would not: the first frame after such a seek is no keyframe.
    believed = replace(row, access="times", first_pts=0, pts_step=512)
    for place in range(row.frames):
        assert read_barcode(decode_frames(believed, np.array([place]))[0]) == place


def test_packets_are_proof_for_the_usual_files(tmp_path: Path) -> None:
    for coding, container in (("h264", "mp4"), ("h264-b", "mp4"), ("h264-b", "mkv"), ("hevc", "mp4"), ("vp9", "webm")):
        row = probe(streams.write(coding, container, "whole", tmp_path))
        assert (row.access, row.plain) == ("packets", True), (coding, container)
    assert not probe(streams.write("hevc-open", "mp4", "whole", tmp_path)).plain
    assert probe(streams.write("av1", "mp4", "whole", tmp_path)).access == "packets"


def test_the_command_sets_stills_upright(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[274] = 6
    Image.fromarray(draw_barcode(5)).resize((64, 48)).save(tmp_path / "a.jpg", exif=exif)
    for options, size in (([], (48, 64)), (["--upright-stills"], (64, 48))):
        out = tmp_path / "m.parquet"
        arguments = ["data", "index", str(tmp_path / "a.jpg"), "--out", str(out), *options]
        CliRunner().invoke(cli, arguments, catch_exceptions=False)
        row = Manifest.load(out).row(0)
        assert (row.height, row.width) == size


def test_times_that_were_not_stored_are_not_believed(tmp_path: Path) -> None:
    # AVI keeps no times: a copy into another container has times that rise in the order of the packets.
    source = write(tmp_path / "a.avi", frames=24, max_b_frames=2)
    for name in ("copied.mkv", "copied.mp4"):
        with av.open(str(source)) as container, av.open(str(tmp_path / name), "w") as copy:
            stream = container.streams.video[0]
            target = copy.add_stream_from_template(stream, opaque=True)
            for packet in container.demux(stream):
                if packet.size:
                    packet.pts = packet.dts
                    packet.stream = target
                    copy.mux(packet)
        row = probe(tmp_path / name)
        assert (row.left_out, row.access, row.plain) == (None, "count", False)
        assert numbers(row) == list(range(24))


def test_truncated_is_said_of_no_whole_file(tmp_path: Path) -> None:
    path = write(tmp_path / "a.ts", frames=8, codec="libsvtav1")  # AV1 in MPEG-TS is a stream of an unknown kind
    assert probe(path).left_out == "no video stream"


def test_a_tile_is_not_taken_for_its_picture(tmp_path: Path) -> None:
    """A photo of a phone is a grid of tiles, each a stream of its own; here two, of which the grid is put together."""
    still = write(tmp_path / "still.avif", frames=1, codec="libsvtav1").read_bytes()
    assert probe(tmp_path / "still.avif").frames == 1
    (tmp_path / "photo.jpg").write_bytes(grid_of_tiles(still))
    assert "a picture of several tiles" in str(probe(tmp_path / "photo.jpg").left_out)


def grid_of_tiles(still: bytes) -> bytes:
    """AVIF whose picture is a grid of 1 x 2 tiles (ISO/IEC 23008-12, 6.6.2.3), each the one of a still."""

    def box(kind: bytes, *parts: bytes) -> bytes:
        content = b"".join(parts)
        return struct.pack(">I4s", 8 + len(content), kind) + content

    def versioned(kind: bytes, version: int, *parts: bytes) -> bytes:
        return box(kind, struct.pack(">I", version << 24), *parts)

    place, configured = still.index(b"mdat") + 4, still.index(b"av1C") - 4
    config = still[configured : configured + int.from_bytes(still[configured : configured + 4], "big")]
    items = [still[place:], still[place:], struct.pack(">4B2H", 0, 0, 0, 1, 128, 64)]
    kinds = [b"av01", b"av01", b"grid"]
    entries = [versioned(b"infe", 2, struct.pack(">2H", k, 0), kind, b"\0") for k, kind in enumerate(kinds, 1)]
    sizes = [versioned(b"ispe", 0, struct.pack(">2I", width, 64)) for width in (64, 128)]
    properties = versioned(
        b"ipma", 0, struct.pack(">I", 3), b"\0\1\2\x81\2", b"\0\2\2\x81\2", struct.pack(">HBB", 3, 1, 3)
    )

    def meta(start: int) -> bytes:
        ends = np.cumsum([start, *map(len, items)]).tolist()
        places = [struct.pack(">3H2I", k, 0, 1, ends[k - 1], len(item)) for k, item in enumerate(items, 1)]
        return versioned(
            b"meta",
            0,
            versioned(b"hdlr", 0, struct.pack(">I4s13x", 0, b"pict")),
            versioned(b"pitm", 0, struct.pack(">H", 3)),
            versioned(b"iloc", 0, b"\x44\0", struct.pack(">H", 3), *places),
            versioned(b"iinf", 0, struct.pack(">H", 3), *entries),
            versioned(b"iref", 0, box(b"dimg", struct.pack(">4H", 3, 2, 1, 2))),
            box(b"iprp", box(b"ipco", config, *sizes), properties),
        )

    head = box(b"ftyp", b"avif", struct.pack(">I", 0), b"avifmif1miaf")
    return head + meta(len(head) + len(meta(0)) + 8) + box(b"mdat", *items)


def test_frames_that_could_be_reordered_but_are_not(tmp_path: Path) -> None:
    # MP4 stores when each frame is decoded: the order is known without decoding.
    unused = {"x264-params": "bframes=2:b-adapt=1:b-bias=-100"}
    path = write(tmp_path / "a.mp4", frames=24, options=unused)
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        assert stream.codec_context.reorder_depth > 0
        assert (np.diff([packet.pts for packet in container.demux(stream) if packet.size]) > 0).all()
    assert probe(path).access == "packets"


@pytest.mark.parametrize("codec", ["libx264", "libx265", "libvpx-vp9", "libsvtav1", "mpeg4"])
def test_a_download_of_full_size_that_ends_in_zeros_is_truncated(tmp_path: Path, codec: str) -> None:
    path = write(tmp_path / "a.mp4", frames=24, codec=codec)
    data = bytearray(path.read_bytes())
    end = data.index(b"moov") - 4
    begin = data.index(b"mdat") + (end - data.index(b"mdat")) * 2 // 3
    path.write_bytes(data[:begin] + bytes(end - begin) + data[end:])
    assert probe(path).left_out == "truncated: its end is zeros, as of a download that was not finished"


def test_a_recording_that_ends_in_zeros_is_decoded(tmp_path: Path) -> None:
    path = write(tmp_path / "a.mkv", frames=24)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) * 2 // 3] + bytes(len(data) - len(data) * 2 // 3))
    row = probe(path)
    assert (row.left_out, row.access) == (None, "times")
    assert numbers(row) == streams.decode_all(path)
