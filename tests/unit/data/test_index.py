from __future__ import annotations

import logging
import os
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from mvd_scale.config.data import DataConfig
from mvd_scale.data.index import build_manifest, open_source
from mvd_scale.data.manifest import Manifest
from mvd_scale.errors import UserError


def write_audio(path: Path) -> None:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=16000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate, frame.time_base = 16000, Fraction(1, 16000)
        container.mux(stream.encode(frame))
        container.mux(stream.encode())


def test_a_folder_is_probed_once_per_video(videos):
    manifest = build_manifest(videos, workers=2)
    assert [Path(path).name for path in manifest.path] == [f"{k}{'.mp4' if k % 2 else '.webm'}" for k in range(10)]
    assert manifest.frames.tolist() == list(range(20, 30))
    assert manifest.codec == ["vp9", "h264"] * 5
    assert set(manifest.height) == {48}
    assert set(manifest.width) == {64}
    assert set(manifest.fps) == {25.0}
    assert set(manifest.label) == {-1}
    assert manifest.usable.tolist() == list(range(10))


@pytest.mark.parametrize("options", [{}, {"movflags": "faststart"}])
def test_bad_files_are_rows_with_a_reason(tmp_path, encode, caplog, options):
    encode(tmp_path / "good.mp4")
    whole = encode(tmp_path / "truncated.mp4", frames=60, options=options)
    whole.write_bytes(whole.read_bytes()[: whole.stat().st_size * 2 // 3])
    (tmp_path / "text.mp4").write_text("I am not a video\n" * 50)
    (tmp_path / "zero.mp4").touch()
    write_audio(tmp_path / "audio.mp4")
    lines = [f"{name}.mp4 0" for name in ("good", "truncated", "text", "zero", "audio", "missing")]
    (tmp_path / "list.txt").write_text("\n".join(lines))
    with caplog.at_level(logging.INFO, logger="mvd_scale"):
        manifest = build_manifest(tmp_path / "list.txt", workers=2)
    assert manifest.usable.tolist() == [0]
    reasons = dict(zip(lines, manifest.left_out, strict=True))
    assert "truncated" in reasons["truncated.mp4 0"]
    assert "cannot be read" in reasons["text.mp4 0"]
    assert reasons["zero.mp4 0"] == "empty file"
    assert reasons["audio.mp4 0"] == "no video stream"
    assert reasons["missing.mp4 0"] == "No such file or directory"
    assert "1 usable videos of 6" in caplog.text
    assert "5 videos" in caplog.text
    assert "truncated.mp4" in caplog.text


def test_annotations(tmp_path, encode):
    encode(tmp_path / "videos" / "with a space.mp4")
    encode(tmp_path / "videos" / "b.webm")
    file = tmp_path / "train.txt"
    file.write_text(f"with a space.mp4 5\n\n{tmp_path}/videos/b.webm -1\n")
    manifest = build_manifest(file, tmp_path / "videos", workers=1)
    assert manifest.label.tolist() == [5, -1]
    assert manifest.left_out == [None, None]
    assert all(os.path.isabs(path) for path in manifest.path)


@pytest.mark.parametrize("line", ["b.mp4", "b.mp4 dog", "b.mp4,3", "7"])
def test_a_line_without_label_is_named(tmp_path, line):
    file = tmp_path / "train.txt"
    file.write_text(f"a.mp4 1\n{line}\n")
    with pytest.raises(UserError, match=r"train.txt:2: no label"):
        build_manifest(file, workers=1)


def test_sources_without_videos(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        build_manifest(tmp_path / "nowhere", workers=1)
    with pytest.raises(UserError, match="no videos in the folder"):
        build_manifest(tmp_path, workers=1)
    (tmp_path / "empty.txt").touch()
    with pytest.raises(UserError, match="is empty"):
        build_manifest(tmp_path / "empty.txt", workers=1)
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="not a text file"):
        build_manifest(tmp_path / "bytes.txt", workers=1)
    (tmp_path / "a.mp4").touch()
    with pytest.raises(UserError, match=r"none of the 1 videos .* empty file"):
        build_manifest(tmp_path, workers=1)


def test_a_manifest_survives_its_file(tmp_path, videos):
    manifest = build_manifest(videos, workers=1)
    manifest.save(tmp_path / "new" / "m.parquet")
    loaded = Manifest.load(tmp_path / "new" / "m.parquet")
    for field in vars(manifest):
        np.testing.assert_array_equal(getattr(loaded, field), getattr(manifest, field))
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["m.parquet"]
    (tmp_path / "bad.parquet").write_text("text")
    for bad in ("bad.parquet", "none.parquet"):
        with pytest.raises(UserError, match=bad):
            Manifest.load(tmp_path / bad)


def test_a_source_is_indexed_again_only_when_it_changes(tmp_path, encode, monkeypatch):
    folder, cache = tmp_path / "videos", tmp_path / "cache"
    encode(folder / "a.mp4")
    past = 1_000_000_000
    for path in (folder, folder / "a.mp4"):
        os.utime(path, (past, past))
    first = open_source(DataConfig(source=str(folder)), cache)
    written = (cache / "manifest.parquet").stat().st_mtime_ns
    assert open_source(DataConfig(source=str(folder)), cache).path == first.path
    assert (cache / "manifest.parquet").stat().st_mtime_ns == written
    assert open_source(DataConfig(source=str(cache / "manifest.parquet")), tmp_path / "unused").path == first.path

    encode(folder / "b.mp4")
    os.utime(cache / "manifest.parquet", (past + 1, past + 1))
    assert len(open_source(DataConfig(source=str(folder)), cache)) == 2

    encode(tmp_path / "other" / "c.mp4")
    for path in (tmp_path / "other", tmp_path / "other" / "c.mp4"):
        os.utime(path, (past, past))
    assert [Path(path).name for path in open_source(DataConfig(source=str(tmp_path / "other")), cache).path] == [
        "c.mp4"
    ]
