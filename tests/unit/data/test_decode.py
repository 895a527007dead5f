from __future__ import annotations

from pathlib import Path

import av
import numpy as np
import pytest

from mvd_scale.data.decode import DecodeError, decode_frames, read_bytes


def decode_all(path: Path) -> np.ndarray:
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


@pytest.mark.parametrize("suffix", [".mp4", ".webm", ".avi"])
def test_equals_sequential_decoding_from_every_start(tmp_path, encode, suffix):
    path = encode(tmp_path / f"a{suffix}", frames=33)
    reference = decode_all(path)
    assert len(reference) == 33
    for start in range(33):
        frames = np.minimum(start + 3 * np.arange(4), 32)
        np.testing.assert_array_equal(decode_frames(str(path), frames), reference[frames])


def test_the_test_video_has_b_frames(tmp_path, encode):
    with av.open(str(encode(tmp_path / "a.mp4"))) as container:
        times = [packet.pts for packet in container.demux(video=0) if packet.size]
    assert times != sorted(times)


def test_any_order_and_repetitions(tmp_path, encode):
    path = encode(tmp_path / "a.mp4", frames=33)
    frames = np.array([20, 3, 3, 32, 0, 20])
    np.testing.assert_array_equal(decode_frames(str(path), frames), decode_all(path)[frames])


@pytest.mark.parametrize("suffix", [".mp4", ".webm", ".avi"])
def test_a_stream_shorter_than_asked_for(tmp_path, encode, suffix):
    path = encode(tmp_path / f"a{suffix}", frames=12)
    with pytest.raises(DecodeError, match="frame 12"):
        decode_frames(str(path), np.array([0, 12]))


def test_broken_files(tmp_path, encode):
    path = encode(tmp_path / "cut.mp4", options={"movflags": "faststart"})
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    text = tmp_path / "text.mp4"
    text.write_text("no video")
    for broken in (path, text, tmp_path / "missing.mp4"):
        with pytest.raises(DecodeError, match=broken.name):
            decode_frames(str(broken), np.array([0, 23]))
    (tmp_path / "empty.webm").touch()
    for broken in (tmp_path / "empty.webm", tmp_path / "missing.webm"):
        with pytest.raises(DecodeError, match=broken.name):
            read_bytes(str(broken))
