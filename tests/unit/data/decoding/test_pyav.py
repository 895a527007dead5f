from __future__ import annotations

from pathlib import Path

import av
import fsspec
import numpy as np
import pytest

from mvd_scale.data.decoding.pyav import decode_frames
from mvd_scale.data.manifest import Row
from mvd_scale.data.storage import DecodeError, read_bytes


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
