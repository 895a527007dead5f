from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import av
import fsspec
import numpy as np
import pytest

from mvd_scale.data.decoding import pyav
from mvd_scale.data.decoding.pyav import decode_frames
from mvd_scale.data.manifest import Row
from mvd_scale.data.storage import DecodeError, read_bytes
from mvd_scale.performance.benchmarks.data.videos import generate_videos


def decode_all(path: Path) -> np.ndarray:
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def row_of(path: Path, *, timed: bool = True) -> Row:
    """Row of a test video as the index writes it, with or without the times of its frames."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        packets = [packet for packet in container.demux(stream) if packet.size]
        size = {"height": stream.codec_context.height, "width": stream.codec_context.width}
    if not timed or any(packet.pts is None for packet in packets):
        return Row(name=path.name, path=str(path), **size)
    times = sorted(packet.pts for packet in packets)
    return Row(name=path.name, path=str(path), first_pts=times[0], pts_step=times[1] - times[0], **size)


@pytest.mark.parametrize("timed", [True, False])
@pytest.mark.parametrize("suffix", [".mp4", ".webm", ".avi"])
def test_equals_sequential_decoding_from_every_start(tmp_path, encode, suffix, timed):
    path = encode(tmp_path / f"a{suffix}", frames=33)
    reference, video = decode_all(path), row_of(path, timed=timed)
    assert len(reference) == 33
    for start in range(33):
        frames = np.minimum(start + 3 * np.arange(4), 32)
        np.testing.assert_array_equal(decode_frames(video, frames), reference[frames])


def test_the_test_video_has_b_frames_and_several_keyframes(tmp_path, encode):
    with av.open(str(encode(tmp_path / "a.mp4", frames=33))) as container:
        packets = [packet for packet in container.demux(video=0) if packet.size]
    times = [packet.pts for packet in packets]
    assert times != sorted(times)
    assert sum(packet.is_keyframe for packet in packets) == 4


@pytest.mark.parametrize("timed", [True, False])
def test_any_order_and_repetitions(tmp_path, encode, timed):
    path = encode(tmp_path / "a.mp4", frames=33)
    frames = np.array([20, 3, 3, 32, 0, 20])
    np.testing.assert_array_equal(decode_frames(row_of(path, timed=timed), frames), decode_all(path)[frames])


@pytest.mark.parametrize("timed", [True, False])
def test_what_lies_before_the_keyframe_is_not_decoded(tmp_path, encode, timed):
    path = encode(tmp_path / "a.mp4", frames=60)
    reference, video = decode_all(path), row_of(path, timed=timed)
    with av.open(str(path)) as container:
        spoilt = [packet for packet in container.demux(video=0) if packet.size and packet.pts < packet.duration * 25]
    data = bytearray(path.read_bytes())
    for packet in spoilt:
        data[packet.pos : packet.pos + packet.size] = b"\x55" * packet.size
    path.write_bytes(data)
    frames = np.array([31, 33, 59])
    np.testing.assert_array_equal(decode_frames(video, frames), reference[frames])
    with pytest.raises(DecodeError):
        decode_frames(video, np.array([5, 8]))


@pytest.mark.parametrize("suffix", [".mp4", ".webm", ".avi"])
def test_a_part_of_a_shard_and_a_url_give_the_same_frames(tmp_path, encode, suffix):
    path = encode(tmp_path / f"a{suffix}", frames=33)
    video, data, frames = row_of(path), path.read_bytes(), np.array([4, 20, 32])
    expected = decode_frames(video, frames)
    (tmp_path / "shard").write_bytes(b"before" + data + b"after")
    fsspec.filesystem("memory").pipe_file("/videos/a", data)
    fsspec.filesystem("memory").pipe_file("/videos/shard", b"before" + data + b"after")
    where = vars(video)
    for place in (
        {"path": str(tmp_path / "shard"), "offset": 6, "size": len(data)},
        {"path": "memory://videos/a"},
        {"path": "memory://videos/shard", "offset": 6, "size": len(data)},
    ):
        np.testing.assert_array_equal(decode_frames(Row(**(where | place)), frames), expected)


@pytest.mark.parametrize("suffix", [".mp4", ".webm", ".avi"])
def test_a_stream_shorter_than_asked_for(tmp_path, encode, suffix):
    path = encode(tmp_path / f"a{suffix}", frames=12)
    with pytest.raises(DecodeError, match="frame 12"):
        decode_frames(row_of(path), np.array([0, 12]))


def test_another_size_than_the_manifest_says(tmp_path, encode):
    video = row_of(encode(tmp_path / "a.mp4"))
    with pytest.raises(DecodeError, match="frame 3 is 48 x 64, the manifest says 64 x 48"):
        decode_frames(Row(**(vars(video) | {"height": 64, "width": 48})), np.array([3]))
    turned = Row(**(vars(video) | {"height": 64, "width": 48, "rotation": 90}))
    assert decode_frames(turned, np.array([3])).shape == (1, 48, 64, 3)


def test_broken_files(tmp_path, encode):
    path = encode(tmp_path / "cut.mp4", options={"movflags": "faststart"})
    cut = row_of(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    text = tmp_path / "text.mp4"
    text.write_text("no video")
    videos = [cut, *(Row(name="", path=str(file)) for file in (text, tmp_path / "missing.mp4"))]
    for broken in videos:
        with pytest.raises(DecodeError, match=Path(broken.path).name):
            decode_frames(broken, np.array([0, 23]))
    (tmp_path / "empty.webm").touch()
    for file in (tmp_path / "empty.webm", tmp_path / "missing.webm"):
        with pytest.raises(DecodeError, match=file.name):
            read_bytes(str(file))
    (tmp_path / "shard").write_bytes(b"12345")
    with pytest.raises(DecodeError, match="ends 2 bytes before the end of the video"):
        read_bytes(str(tmp_path / "shard"), 3, 4)
    with pytest.raises(DecodeError, match="memory://nowhere"):
        read_bytes("memory://nowhere/a.mp4")


@pytest.mark.parametrize("access", ["packets", "count"])
def test_threads_do_not_change_the_frames_of_vp9_or_what_is_said_of_a_broken_file(tmp_path, monkeypatch, access):
    video = replace(generate_videos(tmp_path, "libvpx-vp9", (64, 48), 1).row(0), access=access)
    path, counts = Path(video.path), []
    set_up = pyav._set_up
    monkeypatch.setattr(pyav, "_set_up", lambda stream, threads=1: (counts.append(threads), set_up(stream, threads))[1])
    for frames in (np.array([0, 3, 9]), np.array([140, 160, 161, 299])):
        np.testing.assert_array_equal(decode_frames(video, frames, threads=3), decode_frames(video, frames))
    assert set(counts) == ({1, 3} if access == "packets" else {1})
    data = bytearray(path.read_bytes())
    data[len(data) // 2 : len(data) // 2 + 2000] = b"\x55" * 2000
    path.write_bytes(data)
    for frames in (np.array([0, 3, 9]), np.array([140, 160, 161, 299])):
        assert _outcome(video, frames, 3) == _outcome(video, frames, 1)


def _outcome(video: Row, frames: np.ndarray, threads: int) -> bytes | str:
    try:
        return decode_frames(video, frames, threads=threads).tobytes()
    except DecodeError as error:
        return str(error)


@pytest.mark.parametrize("suffix", [".mp4", ".webm", ".avi"])
def test_a_box_is_the_same_part_of_whole_frames(tmp_path, encode, suffix):
    video = row_of(encode(tmp_path / f"a{suffix}", frames=33))
    frames, (top, left, height, width) = np.array([4, 8, 8, 30]), (3, 5, 31, 17)
    whole = decode_frames(video, frames)
    part = decode_frames(video, frames, (top, left, height, width))
    np.testing.assert_array_equal(part, whole[:, top : top + height, left : left + width])
