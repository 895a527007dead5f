from __future__ import annotations

import gc
import logging
import os
import signal
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from click.testing import CliRunner

from mvd_scale.cli import cli
from mvd_scale.config.data import DataConfig
from mvd_scale.data.host_cache import cache_folder
from mvd_scale.data.indexing.build import VideoProber, build_manifest, load_source, merge
from mvd_scale.data.indexing.media_probe import probe_video
from mvd_scale.data.manifest import Manifest, Row
from mvd_scale.data.worker_pool import run_chunks
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
    assert manifest.codec == ["vp8", "h264"] * 5
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
    first = load_source(DataConfig(source=str(folder)), cache)
    written = (cache / "manifest.parquet").stat().st_mtime_ns
    assert load_source(DataConfig(source=str(folder)), cache).path == first.path
    assert (cache / "manifest.parquet").stat().st_mtime_ns == written
    assert load_source(DataConfig(source=str(cache / "manifest.parquet")), tmp_path / "unused").path == first.path

    encode(folder / "b.mp4")
    os.utime(cache / "manifest.parquet", (past + 1, past + 1))
    assert len(load_source(DataConfig(source=str(folder)), cache)) == 2

    encode(tmp_path / "other" / "c.mp4")
    for path in (tmp_path / "other", tmp_path / "other" / "c.mp4"):
        os.utime(path, (past, past))
    assert [Path(path).name for path in load_source(DataConfig(source=str(tmp_path / "other")), cache).path] == [
        "c.mp4"
    ]


def test_a_large_source_its_copy_and_the_next_start_have_one_file_of_columns(tmp_path, encode, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr("mvd_scale.data.manifest.MAPPED_FROM", 1)
    encode(tmp_path / "videos" / "a.mp4")
    past = 1_000_000_000
    for path in (tmp_path / "videos", tmp_path / "videos" / "a.mp4"):
        os.utime(path, (past, past))
    data, copy = DataConfig(source=str(tmp_path / "videos")), tmp_path / "run" / "manifest.parquet"
    built = load_source(data, tmp_path / "cache")
    built.save(copy)
    again = load_source(data, tmp_path / "cache")
    again.save(copy)
    assert built.rows == again.rows == Manifest.load(copy).rows
    assert len(list(cache_folder().glob("manifest-*.columns"))) == 1


def test_parts_put_together_are_the_whole(tmp_path, videos):
    whole = build_manifest(videos, workers=1)
    parts = [build_manifest(videos, workers=1, part=(number, 3)) for number in (1, 2, 3)]
    assert [len(part) for part in parts] == [3, 3, 4]
    for number, part in enumerate(parts):
        part.save(tmp_path / f"{number}.parquet")
    loaded = [Manifest.load(tmp_path / f"{number}.parquet") for number in (2, 0, 1)]
    assert merge(loaded).rows == whole.rows
    assert merge(loaded).source == whole.source
    with pytest.raises(UserError, match="holds only part 1/3 of the videos"):
        load_source(DataConfig(source=str(tmp_path / "0.parquet")), tmp_path)
    with pytest.raises(UserError, match="missing are 2/3"):
        merge([parts[0], parts[2]])
    with pytest.raises(UserError, match="each of 3 parts once: given are 1/3, 1/3, 2/3, 3/3"):
        merge([*parts, parts[0]])
    with pytest.raises(UserError, match="manifest 2 of those given is not a part"):
        merge([parts[0], whole])
    other = build_manifest(str(videos / "*.mp4"), workers=1, part=(3, 3))
    with pytest.raises(UserError, match="the manifests are parts of different sources"):
        merge([*parts[:2], other])


def test_classes_of_a_part_are_those_of_the_whole(tmp_path, encode):
    for name in ("a", "b", "c"):
        encode(tmp_path / name / "v.webm")
    part = build_manifest(tmp_path, workers=1, part=(3, 3))
    assert part.classes == ("a", "b", "c")
    assert part.label.tolist() == [2]


def test_an_index_goes_on_where_it_was_killed(tmp_path, videos, monkeypatch):
    journal = tmp_path / "journal"
    whole = build_manifest(videos, workers=1)

    def stop_at_the_seventh(video: Row, **options: object) -> Row:
        if video.name == "7.mp4":
            raise KeyboardInterrupt
        return probe_video(video, **options)  # type: ignore[arg-type]

    monkeypatch.setattr("mvd_scale.data.indexing.build.CHUNK", 1)
    with monkeypatch.context() as patch:
        patch.setattr("mvd_scale.data.indexing.build.probe_video", stop_at_the_seventh)
        with pytest.raises(KeyboardInterrupt):
            build_manifest(videos, workers=1, journal=journal)
    lines = journal.read_text().splitlines()
    assert len(lines) == 1 + 7
    journal.write_text("\n".join(lines[:-1]) + "\n" + lines[-1][:50])  # the last line is incomplete

    asked = []

    def remember(video: Row, **options: object) -> Row:
        asked.append(video.name)
        return probe_video(video, **options)  # type: ignore[arg-type]

    monkeypatch.setattr("mvd_scale.data.indexing.build.probe_video", remember)
    os.utime(videos / "2.webm")
    again = build_manifest(videos, workers=1, journal=journal)
    assert again.rows == whole.rows
    assert asked == ["2.webm", "6.webm", "7.mp4", "8.webm", "9.mp4"]


def test_a_large_index_is_that_of_a_small_one_and_holds_few_rows(tmp_path, videos, monkeypatch):
    """By threshold, listing, journal and rows of a large index lie on disk; of its rows, few are objects."""
    for k in range(300):
        (tmp_path / "v" / f"c{k % 3}").mkdir(parents=True, exist_ok=True)
        (tmp_path / "v" / f"c{k % 3}" / f"{k}.mp4").symlink_to(videos / "1.mp4")
    (tmp_path / "v" / "c1" / "loop").symlink_to("..")
    (tmp_path / "v" / "c0" / "notes.txt").touch()
    known = build_manifest(videos / "1.mp4", workers=1).row(0)
    asked: list[str] = []
    alive: list[int] = []

    def fake(video: Row, **options: object) -> Row:
        asked.append(video.name)
        if len(asked) % 30 == 0:
            alive.append(sum(type(thing) is Row for thing in gc.get_objects()))
        return replace(known, name=video.name, path=video.path)

    monkeypatch.setattr("mvd_scale.data.indexing.build.probe_video", fake)
    small = build_manifest(tmp_path / "v", workers=100)
    assert small.classes == ("c0", "c1", "c2")
    assert small.path == sorted(small.path)
    assert len(small) == 300
    monkeypatch.setattr("mvd_scale.data.spool.IN_MEMORY", 8)
    monkeypatch.setattr("mvd_scale.data.indexing.journal.RUN", 8)
    monkeypatch.setattr("mvd_scale.data.indexing.build._LOOKED_UP", 8)
    monkeypatch.setattr("mvd_scale.data.indexing.build.CHUNK", 4)
    monkeypatch.setattr("mvd_scale.data.manifest.MAPPED_FROM", 10)
    monkeypatch.setattr("mvd_scale.data.manifest._SPOOLED", 10)
    monkeypatch.setattr("mvd_scale.data.worker_pool.MAX_INLINE_ITEMS", 0)
    monkeypatch.setattr("mvd_scale.data.worker_pool._pool", lambda workers: ThreadPoolExecutor(workers))
    asked.clear()
    alive.clear()
    source, journal = str(tmp_path / "v"), tmp_path / "journal"
    large = build_manifest(source, workers=1, journal=journal)
    assert large.rows == small.rows
    assert large.digest == small.digest
    assert max(alive) < 60, "rows that are objects at a time"
    parts = [build_manifest(source, workers=1, journal=journal, part=(number, 7)) for number in range(1, 8)]
    assert len(asked) == 300, "the journal knows all videos"
    assert merge(parts).rows == small.rows


def test_processes_find_what_one_finds(videos, monkeypatch):
    monkeypatch.setattr("mvd_scale.data.worker_pool.MAX_INLINE_ITEMS", 0)
    monkeypatch.setattr("mvd_scale.data.indexing.build.CHUNK", 2)
    assert build_manifest(videos, workers=2).rows == build_manifest(videos, workers=1).rows


def kill_at_three(numbers: Sequence[int]) -> list[int]:
    if 3 in numbers:
        os.kill(os.getpid(), signal.SIGKILL)
    return [number * 10 for number in numbers]


def test_a_video_that_kills_its_process_kills_nothing_else(monkeypatch, pytestconfig):
    monkeypatch.syspath_prepend(pytestconfig.rootpath)  # so that a new process can import `kill_at_three`
    chunks = iter([(0, 1), (2, 3, 4), (5,), (6, 7)])
    results = dict(run_chunks(kill_at_three, chunks, 2, lambda number: -number, inline_limit=0))
    assert results == {(0, 1): [0, 10], (2, 3, 4): [20, -3, 40], (5,): [50], (6, 7): [60, 70]}


def test_a_read_that_hangs_is_given_up(tmp_path, encode):
    encode(tmp_path / "a.webm")
    os.mkfifo(tmp_path / "b.webm")
    (tmp_path / "list.txt").write_text("a.webm 0\nb.webm 0\n")
    manifest = build_manifest(tmp_path / "list.txt", workers=1, prober=VideoProber(timeout=0.5))
    assert manifest.usable.tolist() == [0]
    assert manifest.left_out[1] == "not read within 0.5 s"


def test_verifying_decodes_first_middle_and_last_frame(tmp_path, encode):
    good, bad = encode(tmp_path / "a.mp4", frames=60), encode(tmp_path / "b.mp4", frames=60)
    with av.open(str(bad)) as container:
        packets = sorted((p for p in container.demux(video=0) if p.size), key=lambda packet: packet.pts)
    data = bytearray(bad.read_bytes())
    for packet in packets[50:]:
        data[packet.pos : packet.pos + packet.size] = b"\x55" * packet.size
    bad.write_bytes(data)
    assert build_manifest(tmp_path, workers=1).left_out == [None, None]
    verified = build_manifest(tmp_path, workers=1, prober=VideoProber(verify=True))
    assert verified.left_out[0] is None
    assert verified.left_out[1] is not None
    assert str(good) == verified.path[0]


def test_mixtures_unite_classes_and_keep_their_sets_apart(tmp_path, encode, caplog):
    for name in ("k/run/a", "k/wave/b", "s/jump/c", "s/run/d", "plain/e"):
        encode(tmp_path / f"{name}.webm")
    mixture = {name: {"source": str(tmp_path / name)} for name in ("k", "s")}
    cache = tmp_path / "cache"
    mixed = load_source(DataConfig.model_validate({"mixture": mixture}), cache)
    assert mixed.dataset.tolist() == [0, 0, 1, 1]
    assert mixed.classes == ("run", "wave", "jump")
    assert mixed.label.tolist() == [0, 1, 2, 0]
    assert sorted(file.name for file in cache.iterdir()) == ["manifest_k.parquet", "manifest_s.parquet"]
    (tmp_path / "list.txt").write_text("plain/e.webm 5\n")
    mixture["plain"] = {"source": str(tmp_path / "list.txt")}
    with caplog.at_level(logging.INFO, logger="mvd_scale"):
        mixed = load_source(DataConfig.model_validate({"mixture": mixture}), cache)
    assert set(mixed.label.tolist()) == {-1}
    assert "all labels of the mixture are dropped" in caplog.text


def test_what_the_container_tells(tmp_path, encode):
    encode(tmp_path / "a.mp4", frames=33)
    row = build_manifest(tmp_path, workers=1).row(0)
    assert (row.codec, row.pixel_format, row.rotation, row.size) == (
        "h264", "yuv420p", 0, (tmp_path / "a.mp4").stat().st_size
    )  # fmt: skip
    assert row.duration == pytest.approx(33 / 25)
    assert row.pts_step > 0
    assert not row.variable_rate
    assert 1 < row.keyframe_interval <= 10


def test_the_commands(tmp_path, videos):
    out, runner = tmp_path / "m.parquet", CliRunner()
    result = runner.invoke(cli, ["data", "index", str(videos), "--out", str(out), "--workers", "1"])
    assert result.output.strip() == f"{out}: 10 videos, 0 left out"
    assert os.listdir(tmp_path) == ["m.parquet"]
    for number in (1, 2):
        part = str(tmp_path / f"{number}.parquet")
        runner.invoke(
            cli, ["data", "index", str(videos), "--out", part, "--part", f"{number}/2"], catch_exceptions=False
        )
    parts = [str(tmp_path / "1.parquet"), str(tmp_path / "2.parquet")]
    result = runner.invoke(cli, ["data", "merge", *parts, "--out", str(tmp_path / "all.parquet")])
    assert "10 videos, 0 left out" in result.output
    assert Manifest.load(tmp_path / "all.parquet").rows == Manifest.load(out).rows
    for wrong in ("0/2", "3/2", "x", "1"):
        result = runner.invoke(cli, ["data", "index", str(videos), "--out", str(out), "--part", wrong])
        assert result.exit_code == 2
        assert "not K/N" in result.output
