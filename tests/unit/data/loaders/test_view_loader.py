from __future__ import annotations

import json
import tracemalloc
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from torch.nn.functional import interpolate

from mvd_scale.config.data import DataConfig, ViewsConfig
from mvd_scale.data.batch import ViewBatch
from mvd_scale.data.indexing.build import build_manifest
from mvd_scale.data.loaders.quarantine import Quarantine
from mvd_scale.data.loaders.view_loader import ViewLoader, ViewShape, view_items
from mvd_scale.data.manifest import Manifest, Row
from mvd_scale.data.sampling.eval_views import crop_corners, resized_size, sliding_views, view_frame_indices
from mvd_scale.distributed.data_rank import DataRank

DATA = DataConfig(workers=0)
DENSE = ViewsConfig(stride=2, clips=3)
UNIFORM = ViewsConfig(sampling="uniform", clips=2)
CPU = torch.device("cpu")
T, SIDE = 4, 32


@pytest.fixture(scope="module")
def manifest(videos: Path) -> Manifest:
    return build_manifest(videos, workers=1)


def load(manifest: Manifest, views: ViewsConfig = DENSE, data: DataConfig = DATA, **changes: object) -> ViewLoader:
    rank = DataRank(CPU, changes.pop("rank", 0), changes.pop("world_size", 1))
    items = view_items(manifest, views, frames=T)[rank.rank :: rank.world_size][changes.pop("start", 0) :]
    options = {"shape": ViewShape(T, SIDE), "batch": 4, "rank": rank} | changes
    return ViewLoader(manifest, data, views, items, **options)


def collect(manifest: Manifest, views: ViewsConfig = DENSE, **changes: object) -> list[ViewBatch]:
    with load(manifest, views, **changes) as loader:
        return list(loader)


def plainly(path: str, views: ViewsConfig) -> torch.Tensor:
    """Reference: decode and resize all frames, and cut each view separately: uint8 (K, C, T, S, S, 3)."""
    with av.open(path) as container:
        frames = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
    size = resized_size(*frames.shape[1:3], side=SIDE)
    small = interpolate(torch.from_numpy(frames).permute(0, 3, 1, 2).float(), size=size, mode="bilinear")
    clips = view_frame_indices(views, len(frames), frames=T)
    corners = crop_corners(*size, side=SIDE, crops=views.crops)
    cut = [torch.stack([small[clip][:, :, y : y + SIDE, x : x + SIDE] for y, x in corners]) for clip in clips]
    return torch.stack(cut).permute(0, 1, 2, 4, 5, 3)


@pytest.mark.parametrize("videos", [0, 7, 300])
def test_sliding_items_are_those_of_each_video_in_turn_and_take_little_memory(videos):
    made = [
        Row(name=f"{k}", path=f"/{k}", frames=250 + k % 7, left_out="broken" if k % 5 == 0 else None)
        for k in range(videos)
    ]
    listed, views = Manifest.from_rows(made), ViewsConfig(sampling="sliding", stride=2, every=1, clips=3, crops=1)
    assert len(listed.usable) == videos - len(range(0, videos, 5))
    tracemalloc.start()
    try:
        items = view_items(listed, views, frames=T)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert items.dtype == np.int64
    assert items.tolist() == [
        [k, first]
        for k, row in enumerate(made)
        if row.left_out is None
        for first in range(0, len(view_frame_indices(views, row.frames, frames=T)), 3)
    ]
    assert peak < 70 * len(items) + 100_000


@pytest.mark.parametrize("views", [DENSE, UNIFORM, ViewsConfig(stride=9, clips=5, crops=1)], ids=str)
def test_views_are_those_of_the_video_decoded_and_resized_whole(manifest, views):
    batches = collect(manifest, views)
    assert [len(batch.pixels) for batch in batches] == [4, 4, 2]
    for batch in batches:
        assert batch.pixels.dtype == torch.uint8
        assert batch.decoded.all()
        for pixels, row in zip(batch.pixels, batch.video_ids, strict=True):
            expected = plainly(manifest.path[row], views)
            assert pixels.shape == expected.shape == (views.clips, views.crops, T, SIDE, SIDE, 3)
            difference = (pixels - expected).abs()
            assert difference.mean() < 1.5, manifest.path[row]
            if manifest.codec[row] == "h264":  # the same decoder: only rounding differs
                assert difference.max() <= 1


@pytest.mark.parametrize("world_size", [1, 2, 3, 7, 12])
def test_every_video_comes_once_whatever_the_ranks(manifest, world_size):
    rows = [
        row
        for rank in range(world_size)
        for batch in collect(manifest, rank=rank, world_size=world_size, batch=2)
        for row in batch.video_ids.tolist()
    ]
    assert sorted(rows) == list(range(10))


def test_a_rank_goes_on_where_it_was(manifest):
    whole, rest = collect(manifest, batch=1), collect(manifest, batch=1, start=7)
    assert [batch.video_ids.item() for batch in rest] == [7, 8, 9]
    for left, right in zip(whole[7:], rest, strict=True):
        assert torch.equal(left.pixels, right.pixels)


def test_workers_change_nothing(manifest):
    alone = collect(manifest)
    helped = collect(manifest, data=DATA.model_copy(update={"workers": 2}))
    for left, right in zip(alone, helped, strict=True):
        assert torch.equal(left.pixels, right.pixels)


def test_a_video_that_cannot_be_decoded_is_marked_and_named_never_dropped(tmp_path, videos):
    for file in videos.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    manifest = build_manifest(tmp_path, workers=1)
    (tmp_path / "3.mp4").unlink()
    whole = (tmp_path / "4.webm").read_bytes()
    (tmp_path / "4.webm").write_bytes(whole[:400] + bytes(len(whole) - 400))
    quarantine_file = tmp_path / "quarantine.jsonl"
    batches = collect(manifest, quarantine=Quarantine(quarantine_file))
    assert torch.cat([batch.video_ids for batch in batches]).tolist() == list(range(10))
    decoded = torch.cat([batch.decoded for batch in batches])
    assert decoded.tolist() == [row not in (3, 4) for row in range(10)]
    pixels = torch.cat([batch.pixels for batch in batches])
    assert pixels[3:5].max() == 0
    assert pixels[5].max() > 0
    assert [json.loads(line)["row"] for line in quarantine_file.read_text().splitlines()] == [3, 4]


def test_sliding_clips_cover_the_video_whatever_their_groups(manifest):
    views = ViewsConfig(sampling="sliding", stride=2, every=5, clips=3, crops=1)
    together, apart = (
        collect(manifest, views.model_copy(update={"clips": clips}), data=DataConfig(workers=0)) for clips in (3, 1)
    )
    seen = {}
    for batch in together:
        for pixels, row, first in zip(batch.pixels, batch.video_ids.tolist(), batch.first_clips.tolist(), strict=True):
            for clip, cut in enumerate(pixels):
                seen[row, first + clip] = cut
    count = 0
    for batch in apart:
        for pixels, row, first in zip(batch.pixels, batch.video_ids.tolist(), batch.first_clips.tolist(), strict=True):
            assert torch.equal(pixels[0], seen[row, first])
            count += 1
    assert count == sum(len(view_frame_indices(views, int(manifest.frames[row]), frames=T)) for row in range(10))


@pytest.mark.parametrize(("total", "starts"), [(5, [0]), (8, [0]), (9, [0, 3]), (11, [0, 3]), (12, [0, 3, 6])])
def test_the_last_sliding_clip_reaches_the_end(total, starts):
    clips = sliding_views(total, frames=4, stride=2, every=3)
    assert clips[:, 0].tolist() == starts
    assert clips.max() <= total - 1
    assert clips[-1, 0] + 8 >= total


def test_a_single_view_lies_in_the_middle():
    assert crop_corners(32, 100, side=32, crops=1) == [(0, 34)]
    (clip,) = view_frame_indices(ViewsConfig(stride=2, clips=1), 20, frames=4)
    assert clip.tolist() == [6, 8, 10, 12]


def test_the_distance_of_starts_belongs_to_sliding_clips():
    with pytest.raises(ValueError, match="with sampling sliding only"):
        ViewsConfig(every=4)
    with pytest.raises(ValueError, match="with sampling sliding only"):
        ViewsConfig(sampling="sliding")
