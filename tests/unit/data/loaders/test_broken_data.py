"""Tests of unusual and broken videos during training: unusual videos are used, broken ones are replaced."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from mvd_scale.config.data import CenterCrop, DataConfig
from mvd_scale.config.model import ModelConfig
from mvd_scale.data.indexing.build import build_manifest
from mvd_scale.data.loaders.clip_loader import BatchPlan, ClipLoader
from mvd_scale.data.loaders.quarantine import Quarantine
from mvd_scale.data.manifest import Manifest
from mvd_scale.data.sampling.sampler import Sampler
from mvd_scale.distributed.data_rank import DataRank
from mvd_scale.errors import UserError

MODEL = ModelConfig(width=16, depth=1, heads=1, frames=4, input_size=32, patch_size=8)
DATA = DataConfig(stride=2, workers=0, crop=CenterCrop(), max_broken=1, read_timeout=20)


def encode_as(
    path: Path,
    codec: str = "libx264",
    *,
    frames: int = 30,
    size: tuple[int, int] = (32, 48),
    pixel_format: str = "yuv420p",
    times: list[int] | None = None,
) -> Path:
    height, width = size
    rows, columns = np.mgrid[0:height, 0:width]
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=25)
        stream.width, stream.height, stream.pix_fmt, stream.gop_size = width, height, pixel_format, 10
        for number in range(frames):
            picture = np.stack([np.full_like(rows, 8 * number), rows * 4, columns * 3 + number], axis=-1) % 256
            frame = av.VideoFrame.from_ndarray(picture.astype(np.uint8), format="rgb24")
            frame.pts, frame.time_base = number if times is None else times[number], Fraction(1, 25)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def turn(path: Path) -> None:
    """Set the display matrix of a video to a rotation by 90 degrees clockwise, as phones do."""
    upright = struct.pack(">9i", 1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30)
    turned = struct.pack(">9i", 0, 1 << 16, 0, -1 << 16, 0, 0, 0, 0, 1 << 30)
    data = path.read_bytes()
    at = data.index(upright, data.index(b"tkhd"))
    path.write_bytes(data[:at] + turned + data[at + 36 :])


def odd(folder: Path) -> dict[str, Path]:
    irregular = np.cumsum([1, 3, 2] * 10).tolist()
    files = {
        "10 bits": encode_as(folder / "ten.mkv", pixel_format="yuv420p10le"),
        "full colour": encode_as(folder / "full.mp4", pixel_format="yuv444p"),
        "odd size, VP9": encode_as(folder / "odd.webm", "libvpx-vp9", size=(33, 47)),
        "odd size": encode_as(folder / "odd.mkv", "libx264rgb", size=(33, 47), pixel_format="rgb24"),
        "variable rate": encode_as(folder / "variable.mp4", times=irregular),
        "variable rate, VP9": encode_as(folder / "variable.webm", "libvpx-vp9", times=irregular),
        "one frame": encode_as(folder / "one.mp4", frames=1),
        "no times": encode_as(folder / "times.avi", "mpeg4"),
        "wrong extension": encode_as(folder / "right.mp4").rename(folder / "wrong.avi"),
        "turned": encode_as(folder / "turned.mp4"),
        "turned, VP9": encode_as(folder / "turned_vp9.mp4", "libvpx-vp9"),
    }
    turn(files["turned"])
    turn(files["turned, VP9"])
    return files


def load(manifest: Manifest, clips: int, data: DataConfig = DATA, **changes: object) -> ClipLoader:
    plan = BatchPlan(clips, changes.pop("micro_batch", clips), range(changes.pop("total_steps", 1)))
    rank = DataRank(torch.device("cpu"), changes.pop("rank", 0), changes.pop("world_size", 1))
    return ClipLoader(manifest, data, MODEL, 1, plan=plan, rank=rank, **changes)


def test_odd_videos_are_shown_as_players_show_them(tmp_path):
    files = odd(tmp_path)
    manifest = build_manifest(tmp_path, workers=1)
    assert manifest.left_out == [None] * len(files)
    with load(manifest, len(files)) as loader:
        batch = next(loader)
    assert loader.substituted == 0
    sampler = Sampler(manifest, DATA, MODEL, 1)
    for k, row in enumerate(batch.video_ids.tolist()):
        plan, path = sampler.plan(0, k), manifest.path[row]
        with av.open(path) as container:
            frames = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
        if "turned" in path:
            frames = np.rot90(frames, 3, axes=(1, 2))
        y, x, h, w = plan.copies[0].crop.box
        assert h in (32, 33)
        if h == 32:
            expected = frames[plan.frames, y : y + h, x : x + w]
            assert np.abs(batch.pixels[k].numpy().astype(int) - expected).mean() < 2, path


Break = Callable[[Path], object]


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 3])


def spoil(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 4] + bytes(len(data) // 2) + data[-(len(data) // 4) :])


def another_size(path: Path) -> None:
    path.unlink()
    encode_as(path, "libvpx-vp9" if path.suffix == ".webm" else "libx264", size=(48, 32))


def hang(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


BROKEN: dict[str, Break] = {
    "truncated": cut,
    "undecodable in the middle": spoil,
    "empty": lambda path: path.write_bytes(b""),
    "missing": Path.unlink,
    "a text": lambda path: path.write_text("I am no video\n" * 100),
    "of another size": another_size,
    "a folder": lambda path: (path.unlink(), path.mkdir()),
    "a read that hangs": hang,
    "permission denied": lambda path: path.chmod(0),
}


@pytest.mark.parametrize("suffix", [".mp4", ".webm"])
@pytest.mark.parametrize("how", BROKEN)
def test_a_video_that_breaks_after_indexing_is_replaced_and_named(tmp_path, how, suffix, capfd):
    if how == "permission denied" and os.geteuid() == 0:
        pytest.skip("root may read everything")
    codec = "libvpx-vp9" if suffix == ".webm" else "libx264"
    for name in "abc":
        encode_as(tmp_path / f"{name}{suffix}", codec)
    manifest = build_manifest(tmp_path, workers=1)
    broken = tmp_path / f"b{suffix}"
    BROKEN[how](broken)
    quarantine_file = tmp_path / "quarantine.jsonl"
    data = DATA.model_copy(update={"clips_per_video": 4, "read_timeout": 0.5 if how == "a read that hangs" else 20})
    with load(manifest, 12, data, quarantine=Quarantine(quarantine_file)) as loader:
        batch = next(loader)
        assert loader.substituted >= 1
    assert set(batch.video_ids.tolist()) == {0, 2}
    assert batch.pixels.amax(dim=(1, 2, 3, 4)).min() > 0
    (line,) = [json.loads(line) for line in quarantine_file.read_text().splitlines()]
    assert (line["row"], line["path"], line["step"]) == (1, str(broken), 0)
    assert line["error"]
    if how == "a read that hangs":
        assert line["error"] == "not read within 0.5 s"

    with load(manifest, 12, data, micro_batch=2, world_size=2, rank=1) as second:
        pixels = torch.cat([half.pixels for half in second])
    assert torch.equal(pixels, batch.pixels[6:])


def test_a_size_that_changes_within_the_stream(tmp_path):
    for name in ("a", "c"):
        encode_as(tmp_path / f"{name}.mp4")
    halves = []
    for number, size in enumerate(((32, 48), (48, 32))):
        part = encode_as(tmp_path / f"{number}.ts", size=size, times=list(range(30 * number, 30 * number + 30)))
        halves.append(part.read_bytes())
        part.unlink()
    (tmp_path / "b.mpg").write_bytes(b"".join(halves))
    manifest = build_manifest(tmp_path, workers=1)
    assert manifest.frames[1] == 60
    data = DATA.model_copy(update={"clips_per_video": 10})
    sampler = Sampler(manifest, data, MODEL, 1)
    with load(manifest, 30, data) as loader:
        batch = next(loader)
    plans = [sampler.plan(0, k) for k in range(30)]
    # The two halves overlap by one or two frames.
    before = [k for k, plan in enumerate(plans) if plan.row == 1 and plan.frames.max() < 28]
    beyond = [k for k, plan in enumerate(plans) if plan.row == 1 and plan.frames.max() > 31]
    assert before
    assert beyond
    assert loader.substituted >= len(beyond)
    assert batch.pixels.shape == (30, 4, 32, 32, 3)
    assert all(batch.video_ids[k] == plans[k].row for k in before)


def test_still_images_that_are_cut_off_are_replaced(tmp_path):
    from PIL import Image

    for number in range(4):
        level = np.random.default_rng(number).integers(0, 255, (40, 60, 3)).astype(np.uint8)
        Image.fromarray(level).save(tmp_path / f"{number}.jpg")
    manifest = build_manifest(tmp_path, workers=1)
    assert manifest.codec == ["jpeg"] * 4
    cut(tmp_path / "2.jpg")
    with load(manifest, 4) as loader:
        assert set(next(loader).video_ids.tolist()) <= {0, 1, 3}
        assert loader.substituted == 1


def test_the_share_of_broken_videos_is_a_limit(tmp_path):
    for number in range(10):
        encode_as(tmp_path / f"{number}.mp4", frames=4)
    manifest = build_manifest(tmp_path, workers=1)
    (tmp_path / "3.mp4").unlink()
    enough = replace(manifest)
    with load(enough, 10, DATA.model_copy(update={"max_broken": 0.1}), total_steps=12) as loader:
        assert len(list(loader)) == 12
    with (
        load(enough, 10, DATA.model_copy(update={"max_broken": 0.09}), total_steps=12) as loader,
        pytest.raises(UserError, match=r"10 of 100 clips .* more than data.max_broken 0.09 allows"),
    ):
        list(loader)
