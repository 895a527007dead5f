from __future__ import annotations

import json
import logging
import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path

import av
import numpy as np
import psutil
import pytest
import torch

from mvd_scale.config.data import CenterCrop, DataConfig, MaskConfig
from mvd_scale.config.model import ModelConfig
from mvd_scale.data.batch import ClipBatch
from mvd_scale.data.decoding.backends import Decoders
from mvd_scale.data.decoding.dali_graph import dali_decodes
from mvd_scale.data.decoding.frame_operations import apply_operations
from mvd_scale.data.decoding.sample_source import DecodeBackend
from mvd_scale.data.indexing.build import build_manifest
from mvd_scale.data.loaders.base import MAX_READERS, thread_count, worker_count
from mvd_scale.data.loaders.clip_loader import BatchPlan, ClipLoader
from mvd_scale.data.loaders.quarantine import Quarantine
from mvd_scale.data.manifest import Manifest, Row
from mvd_scale.data.sampling.sampler import Sampler
from mvd_scale.distributed.cpu_affinity import count_own_cpus
from mvd_scale.distributed.data_rank import DataRank
from mvd_scale.errors import UserError

MODEL = ModelConfig(width=16, depth=1, heads=1, frames=4, input_size=32, patch_size=8)
DATA = DataConfig(stride=2, workers=0, flip=0.5, max_broken=1)
WIDE = {"stride": 2, "workers": 0, "clips_per_video": 3, "copies": 2, "max_broken": 1}
CPU = torch.device("cpu")


def load(manifest: Manifest, data: DataConfig = DATA, **changes: object) -> ClipLoader:
    """Create a loader of five steps on a single rank; `changes` are arguments of its plan, its rank or the loader."""
    steps = range(changes.pop("start_step", 0), changes.pop("total_steps", 5))
    plan = BatchPlan(changes.pop("global_batch", 4), changes.pop("micro_batch", 4), steps)
    rank = DataRank(CPU, changes.pop("rank", 0), changes.pop("world_size", 1))
    return ClipLoader(manifest, data, MODEL, 1, plan=plan, rank=rank, **changes)


def collect(manifest: Manifest, data: DataConfig = DATA, **changes: object) -> list[ClipBatch]:
    with load(manifest, data, **changes) as loader:
        return list(loader)


def clips(batches: list[ClipBatch]) -> dict[str, torch.Tensor]:
    names = ("pixels", "visible", "masked", "labels", "video_ids")
    return {name: torch.cat([getattr(batch, name) for batch in batches]) for name in names}


def assert_same(left: list[ClipBatch], right: list[ClipBatch]) -> None:
    first, second = clips(left), clips(right)
    for name in first:
        torch.testing.assert_close(first[name], second[name], rtol=0, atol=0, msg=lambda text, name=name: name + text)


@pytest.fixture(scope="module")
def manifest(videos: Path) -> Manifest:
    return build_manifest(videos, workers=1)


@pytest.fixture(scope="module")
def stream(manifest: Manifest) -> list[ClipBatch]:
    return collect(manifest)


def test_batches_have_the_promised_shapes(stream):
    assert len(stream) == 5
    for batch in stream:
        assert batch.pixels.shape == (4, 4, 32, 32, 3)
        assert batch.pixels.dtype == torch.uint8
        assert batch.masked.shape == (4, 2 * int(0.9 * 16))
        assert batch.visible.shape == (4, 32 - 2 * int(0.9 * 16))
        assert batch.visible.dtype == batch.masked.dtype == batch.labels.dtype == batch.video_ids.dtype == torch.int64
        assert batch.labels.tolist() == [-1] * 4


def test_batches_keep_their_values(manifest):
    with load(manifest) as loader:
        batch = next(loader)
        before = clips([batch])["pixels"].clone()
        list(loader)
    assert torch.equal(batch.pixels, before)
    assert not torch.equal(batch.pixels[0], batch.pixels[1])


def test_masks_of_students_are_those_of_loaders_of_their_own(manifest, stream):
    masks = {"half": MaskConfig(ratio=0.5), "none": None, "random": MaskConfig(kind="random")}
    plan = BatchPlan.one_batch(4)
    with ClipLoader(manifest, DATA, MODEL, 1, plan=replace(plan, masks=masks), rank=DataRank(CPU)) as loader:
        batch = next(loader)
    for name, mask in masks.items():
        data = DATA.model_copy(update={"mask": mask})
        with ClipLoader(manifest, data, MODEL, 1, plan=plan, rank=DataRank(CPU)) as loader:
            alone = next(loader)
        seen = batch.seen_by(name)
        assert not seen.own_visible
        assert_same([seen], [alone])
        assert seen.visible.is_contiguous()


@pytest.mark.parametrize("flip", [0.0, 1.0])
def test_both_codecs_in_one_batch_give_the_frames_that_were_planned(manifest, flip):
    data = DATA.model_copy(update={"crop": CenterCrop(), "flip": flip})
    model = MODEL.model_copy(update={"input_size": 48})
    sampler = Sampler(manifest, data, model, 1)
    with ClipLoader(manifest, data, model, 1, plan=BatchPlan.one_batch(10), rank=DataRank(CPU)) as loader:
        batch = next(loader)
    assert {manifest.codec[row] for row in batch.video_ids} == {"h264", "vp8"}
    for k in range(10):
        plan = sampler.plan(0, k)
        assert batch.video_ids[k] == plan.row
        assert batch.visible[k].tolist() == plan.copies[0].visible.tolist()
        assert batch.masked[k].tolist() == plan.copies[0].masked.tolist()
        with av.open(manifest.path[plan.row]) as container:
            frames = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
        expected = frames[plan.frames][:, :, 8:56]
        if flip:
            expected = expected[:, :, ::-1]
        difference = np.abs(batch.pixels[k].numpy().astype(int) - expected)
        assert difference.mean() < 1.5, manifest.codec[plan.row]


@pytest.mark.parametrize(("world_size", "micro_batch"), [(1, 1), (1, 2), (2, 2), (2, 1), (4, 1)])
def test_the_stream_is_the_same_for_any_number_of_ranks(manifest, stream, world_size, micro_batch):
    ranks = [collect(manifest, rank=r, world_size=world_size, micro_batch=micro_batch) for r in range(world_size)]
    each = 4 // world_size // micro_batch
    merged = [batch for step in range(5) for rank in ranks for batch in rank[step * each : (step + 1) * each]]
    assert_same(merged, stream)


@pytest.mark.parametrize(("world_size", "workers"), [(2, 2), (3, 0), (4, 1), (8, 0)])
def test_copies_mixtures_and_uneven_batches_over_many_ranks(manifest, world_size, workers):
    """Check a weighted mixture with copies: 48 clips per step over 1, 2, 3, 4 and 8 ranks."""
    mixed = replace(manifest, dataset=np.arange(10) % 3 // 2)
    mixture = {"a": {"source": "a"}, "b": {"source": "b", "weight": 1.5, "stride": 3}}
    data = DataConfig.model_validate({**WIDE, "mixture": mixture})
    mixed = mixed_order(mixed)
    reference = collect(mixed, data, global_batch=48, micro_batch=48, total_steps=3)
    data = data.model_copy(update={"workers": workers})
    share = 48 // world_size
    ranks = [
        collect(mixed, data, rank=r, world_size=world_size, global_batch=48, micro_batch=share, total_steps=3)
        for r in range(world_size)
    ]
    assert_same([rank[step] for step in range(3) for rank in ranks], reference)


def mixed_order(manifest: Manifest) -> Manifest:
    """Sort rows by data set, as in the manifest of a mixture."""
    rows = sorted(manifest.rows, key=lambda row: row.dataset)
    return Manifest.from_rows(rows)


AUGMENT = {"rand_augment": {"probability": 1}, "color_jitter": {}, "erasing": {"probability": 1, "area": [0.2, 0.3]}}


def test_augmented_clips_depend_on_their_place_in_the_stream_only(manifest):
    data = DataConfig.model_validate({**WIDE, "copies": 2, "augment": AUGMENT})
    plain = DataConfig.model_validate({**WIDE, "copies": 2})
    shape = {"global_batch": 8, "micro_batch": 8, "total_steps": 3}
    stream, untouched = collect(manifest, data, **shape), collect(manifest, plain, **shape)
    for batch, other in zip(stream, untouched, strict=True):
        changed = (batch.pixels != other.pixels).flatten(1).float().mean(1)
        assert (changed > 0.15).all()
        assert torch.equal(batch.masked, other.masked)
    ranks = [collect(manifest, data, rank=r, world_size=2, **shape | {"micro_batch": 2}) for r in range(2)]
    merged = [batch for step in range(3) for rank in ranks for batch in rank[2 * step : 2 * step + 2]]
    assert_same(merged, stream)
    assert_same(collect(manifest, data.model_copy(update={"workers": 1}), **shape | {"start_step": 1}), stream[1:])


@pytest.mark.parametrize("crop", ["random_resized", "short_side"])
def test_operations_come_before_the_crop(manifest, crop):
    """Each copy is the crop of whole frames on which its own operations were applied."""
    crop = {"kind": crop, "antialias": False, "interpolation": "bilinear"}
    if crop["kind"] == "short_side":
        crop["sides"] = [36, 44]
    augment = {"rand_augment": {"probability": 0.8}}
    data = DataConfig.model_validate({**WIDE, "crop": crop, "flip": 0.5, "augment": augment})
    sampler, differences = Sampler(manifest, data, MODEL, 1), []
    (batch,) = collect(manifest, data, global_batch=40, micro_batch=40, total_steps=1)
    for k in range(40):
        plan = sampler.plan(0, k // 2)
        copy, (height, width) = plan.copies[k % 2], (manifest.height[plan.row], manifest.width[plan.row])
        with av.open(manifest.path[plan.row]) as container:
            frames = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])[plan.frames]
        whole = np.tile(np.array([0, 0, height, width], np.int32), (5, 1))
        with ThreadPoolExecutor(1) as pool:
            changed = apply_operations(frames, copy.augment.operations, copy.augment.values, whole, pool=pool)
        top, left, tall, wide = copy.crop.box
        pixels = torch.from_numpy(changed).movedim(-1, 1)
        if copy.crop.frame != (height, width):
            pixels = torch.nn.functional.interpolate(pixels, copy.crop.frame, mode="bilinear")
        pixels = pixels[..., top : top + tall, left : left + wide]
        expected = torch.nn.functional.interpolate(pixels, (32, 32), mode="bilinear").movedim(1, -1)
        difference = batch.pixels[k].int() - (expected.flip(2) if copy.flip else expected).int()
        if manifest.codec[plan.row] == "h264":
            assert difference.abs().max() <= 1
        differences.append(difference.abs().float().mean())
    # DALI decodes VP9 with other rounding, which autocontrast and equalize enlarge.
    assert np.median(differences) < 1.5


def test_an_augmented_clip_looks_the_same_at_another_side(manifest):
    data = DataConfig.model_validate({**WIDE, "augment": AUGMENT})
    (batch,) = collect(manifest, data, sides=(16,), total_steps=1)
    shrunk = torch.nn.functional.avg_pool2d(batch.pixels.flatten(0, 1).permute(0, 3, 1, 2).float(), 2)
    assert (batch.at(16).flatten(0, 1).permute(0, 3, 1, 2) - shrunk).abs().mean() < 8


def test_copies_stand_side_by_side(manifest):
    data = DATA.model_copy(update={"copies": 3, "flip": 0.0})
    (batch, *_) = collect(manifest, data, global_batch=6, micro_batch=6)
    assert batch.pixels.shape == (6, 4, 32, 32, 3)
    assert batch.visible.shape[0] == batch.masked.shape[0] == batch.labels.shape[0] == 6
    assert batch.video_ids.tolist() == [batch.video_ids[0]] * 3 + [batch.video_ids[3]] * 3
    assert not torch.equal(batch.pixels[0], batch.pixels[1])
    assert not torch.equal(batch.masked[0], batch.masked[1])
    first = Sampler(manifest, data, MODEL, 1).plan(0, 0)
    assert [batch.masked[k].tolist() for k in range(3)] == [copy.masked.tolist() for copy in first.copies]


@pytest.mark.parametrize("workers", [1, 2])
def test_the_stream_is_the_same_for_any_number_of_workers(manifest, stream, workers):
    assert_same(collect(manifest, DATA.model_copy(update={"workers": workers})), stream)


@pytest.mark.parametrize("start", range(5))
def test_a_resume_continues_the_stream(manifest, stream, start):
    assert_same(collect(manifest, start_step=start), stream[start:])


def test_the_step_is_the_state(manifest):
    with load(manifest, micro_batch=2, start_step=1) as loader:
        steps = [loader.step]
        for _ in loader:
            steps.append(loader.step)
    assert steps == [1, 1, 2, 2, 3, 3, 4, 4, 5]


def test_the_same_crop_at_another_side(manifest):
    batch = collect(manifest, sides=(32, 16), total_steps=1)[0]
    assert batch.at(32) is batch.pixels
    small = batch.at(16)
    assert small.shape == (4, 4, 16, 16, 3)
    shrunk = torch.nn.functional.avg_pool2d(batch.pixels.flatten(0, 1).permute(0, 3, 1, 2).float(), 2)
    assert (small.flatten(0, 1).permute(0, 3, 1, 2) - shrunk).abs().mean() < 4


def copy_videos(videos: Path, folder: Path) -> Manifest:
    for file in videos.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return build_manifest(folder, workers=1)


@pytest.mark.parametrize("workers", [0, 1])
def test_videos_that_break_after_indexing_are_replaced_the_same_way_everywhere(
    tmp_path, videos, stream, caplog, workers
):
    manifest = copy_videos(videos, tmp_path)
    (tmp_path / "3.mp4").write_bytes((tmp_path / "3.mp4").read_bytes()[:700])
    whole = (tmp_path / "4.webm").read_bytes()
    (tmp_path / "4.webm").write_bytes(whole[:400] + bytes(len(whole) - 400))
    (tmp_path / "6.webm").unlink()
    quarantine_file = tmp_path / "quarantine.jsonl"
    data = DATA.model_copy(update={"workers": workers})
    with (
        caplog.at_level(logging.WARNING, logger="mvd_scale"),
        load(manifest, data, quarantine=Quarantine(quarantine_file)) as loader,
    ):
        got = list(loader)
        replaced = loader.substituted
    before, after = clips(stream), clips(got)
    broken = torch.isin(before["video_ids"], torch.tensor([3, 4, 6]))
    assert replaced == broken.sum() > 3
    assert torch.equal(before["pixels"][~broken], after["pixels"][~broken])
    assert not torch.isin(after["video_ids"], torch.tensor([3, 4, 6])).any()
    lines = [json.loads(line) for line in quarantine_file.read_text().splitlines()]
    assert sorted(line["row"] for line in lines) == [3, 4, 6]
    assert all(line["path"] == manifest.path[line["row"]] and line["error"] for line in lines)
    assert all(0 <= line["step"] < 5 for line in lines)
    messages = [message for message in caplog.messages if "is replaced" in message]
    assert len(messages) == 3
    found = f"found by rank 0 (host {socket.gethostname()}, pid {os.getpid()}) in 'data wait'"
    assert all(message.endswith(found) for message in messages)

    ranks = [collect(manifest, rank=r, world_size=2, micro_batch=1) for r in range(2)]
    assert_same([b for step in range(5) for rank in ranks for b in rank[step * 2 : step * 2 + 2]], got)
    assert_same(collect(manifest, start_step=3), got[3:])


def test_a_substitute_may_be_broken_too(tmp_path, videos):
    manifest = copy_videos(videos, tmp_path)
    for number in (3, 5):
        (tmp_path / f"{number}.mp4").unlink()
    for number in (2, 4, 6):
        file = tmp_path / f"{number}.webm"
        file.write_bytes(file.read_bytes()[:400] + bytes(file.stat().st_size - 400))
    with load(manifest, DATA.model_copy(update={"clips_per_video": 4})) as loader:
        got = clips(list(loader))
    assert loader.substituted > 3
    assert not torch.isin(got["video_ids"], torch.tensor([2, 3, 4, 5, 6])).any()


def test_dali_is_asked_for_the_frames_of_the_clip(tmp_path, encode):
    encoded = np.fromfile(encode(tmp_path / "a.webm", frames=60), np.uint8)
    cut = encoded[: len(encoded) // 2]
    video, turned = (Row(name="", path="", codec="vp8", height=h, width=w) for h, w in ((48, 64), (64, 48)))
    assert dali_decodes(encoded, np.array([0, 59]), video, Decoders(), None)
    assert dali_decodes(cut, np.array([0, 1]), video, Decoders(), None)
    assert not dali_decodes(cut, np.array([0, 59]), video, Decoders(), None)
    assert not dali_decodes(encoded, np.array([0, 59]), turned, Decoders(), None)


def test_a_file_replaced_by_one_of_another_size(tmp_path, videos, encode):
    manifest = copy_videos(videos, tmp_path)
    encode(tmp_path / "3.mp4", frames=40, height=32, width=32)
    encode(tmp_path / "4.webm", frames=40, height=32, width=32)
    seen = clips(collect(manifest))["video_ids"]
    assert not torch.isin(seen, torch.tensor([3, 4])).any()


def test_too_many_broken_videos_end_the_run(tmp_path, videos):
    manifest = copy_videos(videos, tmp_path)
    (tmp_path / "3.mp4").unlink()
    data = DATA.model_copy(update={"max_broken": 0.01})
    quarantine_file = tmp_path / "q.jsonl"
    with load(manifest, data, total_steps=200, quarantine=Quarantine(quarantine_file)) as loader:
        with pytest.raises(UserError, match=r"data.max_broken 0.01 .*q.jsonl"):
            list(loader)
        assert 100 <= loader.clips < 110


def test_a_clip_without_any_substitute_ends_the_run(tmp_path, videos):
    manifest = copy_videos(videos, tmp_path)
    for file in tmp_path.iterdir():
        file.unlink()
    with load(manifest) as loader, pytest.raises(UserError, match="videos in a row cannot be decoded"):
        next(loader)


@pytest.mark.parametrize(
    ("cpus", "readers", "workers", "threads"),
    [(28, False, 27, 28), (28, True, MAX_READERS, 28), (4, True, 3, 4), (1, False, 0, 1), (8, False, 7, 8)],
)
def test_workers_follow_the_cpus_of_the_rank(cpus, readers, workers, threads):
    auto, rank = DataConfig(), DataRank(CPU, world_size=64, cpus=cpus)
    assert worker_count(auto, rank, readers=readers) == workers
    assert thread_count(auto, rank) == threads
    asked = DataConfig(workers=11, threads=3)
    assert (worker_count(asked, rank, readers=readers), thread_count(asked, rank)) == (11, 3)


@pytest.mark.parametrize(
    ("backends", "readers"),
    [
        ({DecodeBackend.DALI_VIDEO: 95, DecodeBackend.PYAV: 5}, True),
        ({DecodeBackend.DALI_IMAGE: 100}, True),
        ({DecodeBackend.DALI_VIDEO: 80, DecodeBackend.PYAV: 20}, False),
    ],
)
def test_workers_read_where_the_gpu_decodes(manifest, monkeypatch, backends, readers):
    """Where PyAV decodes many videos, all CPUs are needed."""
    monkeypatch.setattr("mvd_scale.data.loaders.base.count_backends", lambda *_: Counter(backends))
    with load(manifest) as loader:
        assert not loader._workers_read(), "a CPU decodes"
        loader._decoders = Decoders(videos="mixed")
        assert loader._workers_read() == readers


def test_a_process_of_its_own_takes_all_cpus():
    assert DataRank(CPU).cpu_count == count_own_cpus()


SCRIPT = """
import sys, time
from pathlib import Path
if __name__ == "__main__":
    import torch
    from mvd_scale.config.data import DataConfig
    from mvd_scale.config.model import ModelConfig
    from mvd_scale.data.indexing.build import build_manifest
    from mvd_scale.data.loaders.clip_loader import BatchPlan, ClipLoader
    from mvd_scale.distributed.data_rank import DataRank
    model = ModelConfig(width=16, depth=1, heads=1, frames=4, input_size=32, patch_size=8)
    manifest, plan = build_manifest(Path(sys.argv[1]), workers=1), BatchPlan(4, 4, range(1000))
    loader = ClipLoader(manifest, DataConfig(workers=2), model, 1, plan=plan, rank=DataRank(torch.device("cpu")))
    next(loader)
    print("ready", flush=True)
    time.sleep(60)
"""


def children(pid: int) -> set[int]:
    return {child.pid for child in psutil.Process(pid).children(recursive=True)}


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_close_ends_the_workers(manifest):
    before = children(os.getpid())
    loader = load(manifest, DATA.model_copy(update={"workers": 2}))
    next(loader)
    started = children(os.getpid()) - before
    workers = [pid for pid in started if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    assert len(workers) == 2
    loader.close()
    deadline = time.monotonic() + 10
    while any(map(is_alive, workers)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(map(is_alive, workers))
    assert list(loader) == []


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_no_worker_outlives_its_rank(tmp_path, videos, how):
    script = tmp_path / "rank.py"
    script.write_text(textwrap.dedent(SCRIPT))
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[4])}
    with subprocess.Popen(
        [sys.executable, str(script), str(videos)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=environment,
        # A test runner in the background ignores SIGINT, which child processes inherit; a terminal does not.
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    ) as rank:
        assert rank.stdout is not None
        assert rank.stdout.readline() == b"ready\n"
        workers = children(rank.pid)
        assert len(workers) >= 2
        rank.send_signal(how)
        rank.wait(timeout=20)
    deadline = time.monotonic() + 10
    while any(map(is_alive, workers)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(map(is_alive, workers))
