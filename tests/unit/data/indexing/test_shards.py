from __future__ import annotations

import json
import os
import tarfile
from pathlib import Path

import av
import fsspec
import numpy as np
import pytest
import torch
from click.testing import CliRunner

from mvd_scale.cli import cli
from mvd_scale.config.data import DataConfig
from mvd_scale.config.model import ModelConfig
from mvd_scale.data.decoding.pyav import decode_frames
from mvd_scale.data.indexing import shards
from mvd_scale.data.indexing.build import build_manifest
from mvd_scale.data.indexing.shards import save_manifest, shard_videos
from mvd_scale.data.indexing.transcode import TranscodeOptions, encoded_size
from mvd_scale.data.loaders.clip_loader import BatchPlan, ClipLoader
from mvd_scale.data.manifest import Manifest, Row
from mvd_scale.distributed.data_rank import DataRank
from mvd_scale.errors import UserError

MODEL = ModelConfig(width=16, depth=1, heads=1, frames=4, input_size=32, patch_size=8)
DATA = DataConfig(stride=2, workers=0, flip=0.5, max_broken=1)


@pytest.fixture(scope="module")
def manifest(videos: Path) -> Manifest:
    return build_manifest(videos, workers=1)


def pack(manifest: Manifest, out: object, size: int = 10_000, **options: object) -> Manifest:
    return shard_videos(manifest, str(out), size=size, workers=1, **options)  # type: ignore[arg-type]


def stream(manifest: Manifest) -> list[torch.Tensor]:
    plan, rank = BatchPlan(5, 5, range(4)), DataRank(torch.device("cpu"))
    loader = ClipLoader(manifest, DATA, MODEL, 1, plan=plan, rank=rank)
    with loader:
        return [part for batch in loader for part in (batch.pixels, batch.visible, batch.video_ids)]


@pytest.mark.parametrize("where", ["folder", "memory://shards/set"])
def test_a_run_over_shards_sees_the_stream_of_the_files(tmp_path, manifest, where):
    out = str(tmp_path / where) if where == "folder" else where
    packed = pack(manifest, out)
    assert packed.digest == manifest.digest
    assert len(set(packed.path)) > 2
    loaded = Manifest.load(save_manifest(packed, out))
    assert loaded.rows == packed.rows
    for left, right in zip(stream(manifest), stream(loaded), strict=True):
        assert torch.equal(left, right)


def test_shards_are_plain_tar_files_of_whole_videos(tmp_path, manifest):
    packed = pack(manifest, tmp_path / "out")
    rows = iter(packed.rows)
    for shard in sorted((tmp_path / "out").glob("*.tar")):
        with tarfile.open(shard) as archive:
            members = archive.getmembers()
            assert shard.stat().st_size < 10_000 + 10240 + 1024 * len(members)
            for member in members:
                row = next(rows)
                assert (row.path, row.offset, row.size) == (str(shard), member.offset_data, member.size)
                content = archive.extractfile(member)
                assert content is not None
                assert content.read() == Path(manifest.path[int(member.name.split(".")[0])]).read_bytes()
                assert member.name.split(".")[1] == ("webm" if row.codec == "vp8" else "mp4")
    assert next(rows, None) is None


def test_labels_classes_order_and_left_out_rows_stay(tmp_path, encode):
    for name in ("b/1.mp4", "a/2.webm", "a/3.mp4"):
        encode(tmp_path / "v" / name)
    (tmp_path / "v" / "a" / "broken.mp4").write_text("no video")
    manifest = build_manifest(tmp_path / "v", workers=1)
    packed = pack(manifest, tmp_path / "out")
    assert packed.name == manifest.name
    assert packed.label.tolist() == manifest.label.tolist()
    assert packed.classes == ("a", "b")
    assert packed.left_out == manifest.left_out
    assert packed.row(2) == manifest.row(2)


def test_names_in_a_manifest_are_never_paths(tmp_path, manifest):
    bad = Manifest.from_rows([*manifest.rows[:1]])
    bad.name[0] = "../../../escape.mp4"
    pack(bad, tmp_path / "deep" / "er" / "out")
    assert sorted(os.listdir(tmp_path / "deep" / "er" / "out")) == [
        "shard-000000.json", "shard-000000.tar", "shards.json"
    ]  # fmt: skip


def test_a_killed_job_goes_on_with_the_next_shard(tmp_path, manifest):
    whole = pack(manifest, tmp_path / "out")
    kept = tmp_path / "out" / "shard-000000.tar"
    before = kept.stat().st_mtime_ns
    (tmp_path / "out" / "shard-000001.json").unlink()
    (tmp_path / "out" / "shard-000001.tar").write_bytes(b"half")
    assert pack(manifest, tmp_path / "out").rows == whole.rows
    assert kept.stat().st_mtime_ns == before
    assert (tmp_path / "out" / "shard-000001.tar").stat().st_size > 4
    with pytest.raises(UserError, match="holds shards of other videos, or made with other options"):
        pack(manifest, tmp_path / "out", size=99_000)


@pytest.mark.parametrize("where", ["folder", "memory://interrupted/set"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interrupted_shard_is_absent_and_is_written_anew(tmp_path, manifest, monkeypatch, where, error):
    out = f"{where}-{error.__name__}" if "://" in where else str(tmp_path / where)
    whole = pack(manifest, tmp_path / "whole")
    read = shards.read_bytes

    def interrupted(path: str, *place: int) -> np.ndarray:
        if path == manifest.path[5]:
            raise error
        return read(path, *place)

    with monkeypatch.context() as patched:
        patched.setattr(shards, "run_with_timeout", lambda _timeout, _path, function, *rest: function(*rest))
        patched.setattr(shards, "read_bytes", interrupted)
        with pytest.raises(error):
            pack(manifest, out)
    filesystem, folder = fsspec.core.url_to_fs(out)
    left = sorted(path.rsplit("/")[-1] for path in filesystem.find(folder))
    assert left[:2] == ["shard-000000.json", "shard-000000.tar"]
    assert len(left) % 2, "a shard without its index, or an index without its shard"
    packed = pack(manifest, out)
    assert (packed.size.tolist(), packed.offset.tolist()) == (whole.size.tolist(), whole.offset.tolist())
    last = packed.path[-1]
    assert filesystem.size(last.removeprefix("memory:/")) == Path(whole.path[-1]).stat().st_size


def test_a_torn_index_is_named(tmp_path, manifest):
    pack(manifest, tmp_path / "out")
    index = tmp_path / "out" / "shard-000001.json"
    content = index.read_bytes()
    for torn in (content[:-2], content[: content.index(b"\n", 5) + 1], b"[\n]\n"):
        index.write_bytes(torn)
        with pytest.raises(UserError, match="the index of a shard, is not whole: expected"):
            pack(manifest, tmp_path / "out")


def test_a_video_that_is_gone_is_left_out_and_named(tmp_path, videos):
    for file in videos.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    manifest = build_manifest(tmp_path, workers=1)
    (tmp_path / "3.mp4").unlink()
    packed = pack(manifest, tmp_path / "out")
    assert packed.left_out[3] == "No such file or directory"
    assert len(packed.usable) == 9


def test_a_place_that_cannot_be_written(tmp_path, manifest):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        pack(manifest, tmp_path / "file")


@pytest.mark.parametrize(
    ("size", "short_side", "expected"),
    [
        ((256, 340), None, (256, 352)),
        ((1080, 1920), None, (1088, 1920)),
        ((1080, 1920), 320, (320, 576)),
        ((240, 320), 320, (256, 320)),
        ((10, 30), None, (32, 32)),
    ],
)
def test_encoded_sizes_are_whole_blocks_of_every_codec(size, short_side, expected):
    width, height = encoded_size(Row("", "", height=size[0], width=size[1]), short_side)
    assert (height, width) == expected
    assert height % 32 == width % 32 == 0


@pytest.mark.parametrize("codec", ["h264", "vp9"])
def test_encoding_anew_keeps_every_frame_and_its_time(tmp_path, encode, codec):
    encode(tmp_path / "v" / "a.mp4", frames=40, height=128, width=192)
    encode(tmp_path / "v" / "b.webm", frames=33, height=64, width=96)
    manifest = build_manifest(tmp_path / "v", workers=1)
    packed = pack(manifest, tmp_path / "out", encoding=TranscodeOptions(codec, short_side=64, keyframes=8, quality=10))
    assert packed.left_out == [None, None]
    assert packed.frames.tolist() == manifest.frames.tolist()
    assert packed.height.tolist() == [64, 64]
    assert packed.width.tolist() == [96, 96]
    assert packed.codec == [codec] * 2
    assert max(packed.keyframe_interval) <= 8
    assert packed.fps.tolist() == manifest.fps.tolist()
    np.testing.assert_allclose(packed.duration, manifest.duration)
    frames = np.array([0, 7, 20, 32])
    for number in range(2):
        new = decode_frames(packed.row(number), frames).astype(int)
        old = decode_frames(manifest.row(number), frames).astype(int)
        if number == 0:
            old = old.reshape(4, 64, 2, 96, 2, 3).mean((2, 4))
        assert np.abs(new - old).mean() < 4
    with tarfile.open(packed.path[0]) as archive, av.open(archive.extractfile(archive.getmembers()[0])) as container:
        assert not container.streams.audio


def test_the_command(tmp_path, videos):
    build_manifest(videos, workers=1).save(tmp_path / "m.parquet")
    runner, out = CliRunner(), tmp_path / "out"
    arguments = ["data", "shard", str(tmp_path / "m.parquet"), "--out", str(out), "--size", "0.02MB", "--workers", "2"]
    result = runner.invoke(cli, arguments, catch_exceptions=False)
    assert result.output.strip() == f"{out}/manifest.parquet: 10 videos in shards"
    assert json.loads((out / "shards.json").read_text())["size"] == 20_000
    assert Manifest.load(out / "manifest.parquet").digest == Manifest.load(tmp_path / "m.parquet").digest
    assert runner.invoke(cli, [*arguments[:5], "--size", "much"]).exit_code == 2
    assert "have no effect without --encode" in runner.invoke(cli, [*arguments, "--keyframes", "4"]).output
    assert fsspec.filesystem("file").exists(str(out))
