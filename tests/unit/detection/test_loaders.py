"""Clips are cut around their key frames, and each box covers the object that it was drawn around."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from mvd_scale.config import DataConfig, ModelConfig, ShortSideCrop
from mvd_scale.data.loaders.clip_loader import BatchPlan
from mvd_scale.data.loaders.view_loader import ViewShape
from mvd_scale.data.manifest import Manifest
from mvd_scale.detection.key_frames import find_key_frames
from mvd_scale.detection.loader import DetectionBatch, KeyFrameLoader
from mvd_scale.detection.people import PersonBoxes
from mvd_scale.detection.testing import pad_to_patches
from mvd_scale.detection.whole_frames import WholeFrameLoader
from mvd_scale.distributed.data_rank import DataRank

from .conftest import START, Scene

MODEL = ModelConfig(width=16, depth=1, heads=1, frames=4, input_size=48, patch_size=8)
DATA = DataConfig(
    stride=1, workers=0, mask=None, flip=0.5, crop=ShortSideCrop(sides=(48, 72)), clips_per_video=3, max_broken=1
)
CPU = torch.device("cpu")


def collect(scene: Scene, data: DataConfig = DATA, jitter=(0, 0, 0, 0), **changes: object) -> list[DetectionBatch]:
    plan = BatchPlan(12, changes.pop("micro_batch", 12), changes.pop("steps", range(4)))
    rank = DataRank(CPU, changes.pop("rank", 0), changes.pop("world_size", 1))
    key_frames = find_key_frames(scene.truth, scene.videos, START, "key_frames")
    people = PersonBoxes.of(scene.truth, 2)
    loader = KeyFrameLoader(key_frames, people, jitter, data, MODEL, 5, plan=plan, rank=rank, **changes)
    with loader:
        return list(loader)


def assert_under(box: np.ndarray, clip: torch.Tensor) -> None:
    """The bright rectangle of every frame lies within its box, and reaches its sides."""
    for frame in clip:
        rows, columns = (frame.float().mean(-1) > 125).nonzero(as_tuple=True)
        assert len(rows), box
        seen = [int(columns.min()), int(rows.min()), int(columns.max()) + 1, int(rows.max()) + 1]
        np.testing.assert_allclose(seen, box, atol=1.6)


@pytest.mark.parametrize("copies", [1, 2])
def test_rectangles_stay_under_their_boxes_in_training(scene: Scene, copies: int) -> None:
    data = DATA.model_copy(update={"copies": copies})
    seen = 0
    for batch in collect(scene, data):
        assert batch.pixels.shape == (12, 4, 48, 48, 3)
        for number, *box in batch.boxes.tolist():
            if min(box[2] - box[0], box[3] - box[1]) > 4:
                assert_under(np.array(box), batch.pixels[int(number)])
                seen += 1
        assert batch.actions.shape == (len(batch.boxes), 2)
        assert (batch.actions.sum(1) == 1).all()
    assert seen > 30


def test_the_stream_depends_neither_on_ranks_nor_on_where_it_starts(scene: Scene) -> None:
    jitter = (0.2, 0.1, 0.1, 0.05)
    whole = collect(scene, jitter=jitter)
    later = collect(scene, jitter=jitter, steps=range(2, 4))
    ranks = [collect(scene, jitter=jitter, world_size=2, rank=rank, micro_batch=3) for rank in range(2)]
    for step in (2, 3):
        assert torch.equal(whole[step].boxes, later[step - 2].boxes)
        parts = [batch for rank in ranks for batch in rank[2 * step : 2 * step + 2]]
        boxes = torch.cat([part.boxes + torch.tensor([3 * n, 0, 0, 0, 0]) for n, part in enumerate(parts)])
        assert torch.equal(whole[step].boxes, boxes)
        assert torch.equal(whole[step].actions, torch.cat([part.actions for part in parts]))
        assert torch.equal(whole[step].pixels, torch.cat([part.pixels for part in parts]))


def test_a_substitute_brings_its_own_boxes(scene: Scene, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """All clips of one video are replaced by others: boxes still lie over rectangles, and the video is named once."""
    torn = tmp_path / "upright.mp4"
    torn.write_bytes(b"nothing")
    rows = [replace(row, path=str(torn)) if row.name == "upright.mp4" else row for row in scene.videos.rows]
    broken = Scene(scene.folder, Manifest.from_rows(rows), scene.truth)
    seen = 0
    with caplog.at_level("WARNING"):
        batches = list(collect(broken))
    for batch in batches:
        for number, *box in batch.boxes.tolist():
            if min(box[2] - box[0], box[3] - box[1]) > 4:
                assert_under(np.array(box), batch.pixels[int(number)])
                seen += 1
    assert seen > 20
    assert caplog.text.count("upright.mp4 cannot be decoded and is replaced") == 1


def test_whole_frames_of_the_test_come_once_and_as_they_are_shown(scene: Scene) -> None:
    key_frames = find_key_frames(scene.truth, scene.videos, START, "the test")
    rows = np.arange(len(key_frames))
    loader = WholeFrameLoader(key_frames, rows, DATA, shape=ViewShape(4, 48), batch=3, rank=DataRank(CPU))
    with loader:
        batches = list(loader)
    assert [row for batch in batches for row in batch.rows] == rows.tolist()
    for batch in batches:
        assert all(batch.decoded)
        for row, clip in zip(batch.rows, batch.pixels, strict=True):
            assert clip.shape == (4, 48, 72, 3)
            box = scene.truth.corners[scene.truth.frame == key_frames.numbers[row]][0]
            assert_under(box * [72, 48, 72, 48], clip)


def test_frames_are_filled_up_to_whole_patches_with_the_mean_colour() -> None:
    clip = torch.randint(0, 256, (2, 30, 40, 3), dtype=torch.uint8)
    filled = pad_to_patches(clip, 16)
    assert filled.shape == (2, 32, 48, 3)
    assert torch.equal(filled[:, :30, :40], clip)
    assert filled[0, 31, 47].tolist() == [123, 116, 103]
    assert pad_to_patches(filled, 16) is filled
