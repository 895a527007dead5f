from __future__ import annotations

import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.random import default_rng

from mvd_scale.config.data import CenterCrop, CornerCrop, DataConfig, MaskConfig, RandomResizedCrop, ShortSideCrop
from mvd_scale.config.model import ModelConfig
from mvd_scale.data.manifest import Manifest, Row
from mvd_scale.data.sampling.crops import corner_crop, draw_crop
from mvd_scale.data.sampling.frames import (
    dense_frames,
    draw_frames,
    segment_frames,
    whole_segment_frames,
    window_frames,
)
from mvd_scale.data.sampling.masks import draw_mask, running_cell_mask
from mvd_scale.data.sampling.permutation import draw_permutation
from mvd_scale.data.sampling.sampler import RankShard, Sampler, epoch_order, round_order, steps_per_epoch
from mvd_scale.errors import UserError

MODEL = ModelConfig(width=16, depth=1, heads=1, frames=4, input_size=32, patch_size=8)


def make_manifest(videos: int, left_out: tuple[int, ...] = ()) -> Manifest:
    return Manifest.from_rows(
        [
            Row(
                name=f"{k}.mp4",
                path=f"/{k}.mp4",
                frames=10 + k,
                height=48,
                width=64,
                codec="h264",
                left_out="broken" if k in left_out else None,
            )
            for k in range(videos)
        ]
    )


def make_mixture(*videos: int) -> Manifest:
    return Manifest.from_rows(
        [
            Row(name=f"{part}/{k}", path=f"/{part}/{k}", frames=100, height=48, width=64, dataset=part)
            for part, count in enumerate(videos)
            for k in range(count)
        ]
    )


def make_sampler(videos: int = 7, seed: int = 3, **data: object) -> Sampler:
    return Sampler(make_manifest(videos), DataConfig.model_validate({"stride": 2, **data}), MODEL, seed)


def as_tuple(sampler: Sampler, epoch: int, i: int, attempt: int = 0) -> tuple[object, ...]:
    plan = sampler.plan(epoch, i, attempt)
    copies = [(copy.crop, copy.flip, copy.visible.tolist(), copy.masked.tolist()) for copy in plan.copies]
    return (plan.row, plan.frames.tolist(), copies)


@given(
    seed=st.integers(0, 1000),
    ratio=st.floats(0.05, 0.95),
    grid=st.tuples(st.integers(1, 8), st.integers(1, 14), st.integers(1, 14)),
)
def test_a_tube_mask_hides_the_same_patches_in_every_slice_and_always_as_many(seed, ratio, grid):
    time, height, width = grid
    visible, masked = draw_mask(default_rng(seed), MaskConfig(ratio=ratio), grid)
    assert len(masked) == time * int(ratio * height * width)
    assert sorted([*visible, *masked]) == list(range(time * height * width))
    assert (np.diff(visible) > 0).all()
    assert (np.diff(masked) > 0).all()
    assert visible.dtype == masked.dtype == np.int64
    slices = masked.reshape(time, len(masked) // time) - np.arange(time)[:, None] * height * width
    assert (slices == slices[0]).all()


@given(
    seed=st.integers(0, 1000),
    share=st.sampled_from([0.25, 0.5, 0.75]),
    grid=st.tuples(st.sampled_from([4, 8]), st.integers(1, 14), st.integers(1, 14)),
)
def test_running_cells_take_the_same_share_of_every_tube(seed, share, grid):
    time, height, width = grid
    whole = draw_mask(default_rng(seed), MaskConfig(ratio=0.7), grid)
    visible, decoded = draw_mask(default_rng(seed), MaskConfig(ratio=0.7, decode_ratio=share), grid)
    assert visible.tolist() == whole[0].tolist()
    assert set(decoded) <= set(whole[1])
    assert len(decoded) == share * len(whole[1])
    taken = running_cell_mask(default_rng(seed), share, (time, height, width)).reshape(time, height, width)
    assert (taken.sum(0) == share * time).all()
    if height > 1 and width > 1:
        assert (taken[:, :2, :2].sum((1, 2)) == 4 * share).all()  # of every cell, in every slice
        assert (taken[1] != taken[0]).any()


def test_without_a_mask_all_tokens_are_visible():
    visible, masked = draw_mask(default_rng(0), None, (2, 3, 3))
    assert visible.tolist() == list(range(18))
    assert masked.shape == (0,)


@given(seed=st.integers(0, 1000), ratio=st.floats(0.05, 0.95))
def test_a_random_mask_always_hides_as_many(seed, ratio):
    visible, masked = draw_mask(default_rng(seed), MaskConfig(kind="random", ratio=ratio), (4, 5, 5))
    assert len(masked) == int(ratio * 100)
    assert sorted([*visible, *masked]) == list(range(100))
    assert (np.diff(visible) > 0).all()
    assert (np.diff(masked) > 0).all()


@given(seed=st.integers(0, 100), available=st.integers(1, 200), frames=st.integers(1, 16), stride=st.integers(1, 5))
def test_frames_lie_inside_the_video(seed, available, frames, stride):
    places = dense_frames(default_rng(seed), available, frames, stride)
    assert places.shape == (frames,)
    assert places.dtype == np.int64
    assert places.min() >= 0
    assert places.max() < available
    assert set(np.diff(places)) <= {0, stride}


@given(
    seed=st.integers(0, 100),
    rule=st.sampled_from(["dense", "window", "segments", "whole_segments"]),
    available=st.integers(1, 200),
    frames=st.integers(1, 16),
    stride=st.integers(1, 5),
)
def test_every_rule_stays_inside_the_video_and_goes_forward(seed, rule, available, frames, stride):
    places = draw_frames(default_rng(seed), rule, available, frames, stride)
    assert places.shape == (frames,)
    assert places.dtype == np.int64
    assert places.min() >= 0
    assert places.max() < available
    assert (np.diff(places) >= 0).all()


@pytest.mark.parametrize("available", [1, 3, 15, 16, 40, 63, 64, 65, 66, 300])
def test_windows_follow_the_published_rule(available):
    def published(rng: np.random.Generator) -> list[int]:  # the rule of VideoMAE's Kinetics loader
        length = 16 * 4
        if available <= length:
            index = np.linspace(0, available, num=available // 4)
            index = np.concatenate((index, np.ones(16 - available // 4) * available))
            return np.clip(index, 0, available - 1).astype(np.int64).tolist()
        end = int(rng.integers(length, available))
        return np.clip(np.linspace(end - length, end, num=16), end - length, end - 1).astype(np.int64).tolist()

    for seed in range(50):
        assert window_frames(default_rng(seed), available, 16, 4).tolist() == published(default_rng(seed))


@pytest.mark.parametrize("available", [1, 2, 5, 15, 16, 17, 45, 200])
def test_segments_reach_from_the_first_frame_to_the_last(available):
    clips = np.stack([segment_frames(default_rng(seed), available, 16) for seed in range(400)])
    assert clips[:, 0].min() == 0
    assert clips[:, -1].max() == available - 1
    borders = [round((available - 1) / 16 * i) for i in range(17)]
    for part in range(16):
        assert set(clips[:, part]) == set(range(borders[part], borders[part + 1] + 1))


def test_whole_segments_take_any_frame_of_every_part_of_whole_frames():
    clips = np.stack([whole_segment_frames(default_rng(seed), 35, 8) for seed in range(400)])
    for part in range(8):
        assert set(clips[:, part]) == set(range(part * 4, part * 4 + 4))
    assert whole_segment_frames(default_rng(0), 7, 8).tolist() == [0] * 8


@pytest.mark.parametrize("rule", ["segments", "whole_segments"])
def test_the_clips_of_a_rule_are_those_of_its_function(rule):
    function = {"segments": segment_frames, "whole_segments": whole_segment_frames}[rule]
    for seed in range(20):
        drawn = draw_frames(default_rng(seed), rule, 45, 16, 4)
        assert drawn.tolist() == function(default_rng(seed), 45, 16).tolist()


@pytest.mark.parametrize("available", [1, 2, 3, 10, 63, 64, 65, 100])
@pytest.mark.parametrize("stride", [1, 2, 4])
def test_frames_follow_the_published_rule(available, stride):
    def published(start: int) -> list[int]:  # one-based `offset`, as in TSN's loader
        offset, places = start + 1, []
        for _ in range(16):
            places.append(offset - 1)
            if offset + stride < available:
                offset += stride
        return places

    starts = range(max(available - 16 * stride + 1, 1))
    seen = [dense_frames(default_rng(seed), available, 16, stride).tolist() for seed in range(300)]
    assert {clip[0] for clip in seen} <= set(starts)
    assert len({clip[0] for clip in seen}) > min(len(starts), 20) * 0.9
    assert all(clip == published(clip[0]) for clip in seen)


@given(
    seed=st.integers(0, 1000),
    height=st.integers(8, 400),
    width=st.integers(8, 400),
    crop=st.sampled_from([CornerCrop(), RandomResizedCrop(), CenterCrop()]),
)
def test_the_crop_lies_inside_the_frame(seed, height, width, crop):
    plan = draw_crop(default_rng(seed), crop, height, width, 224)
    assert plan.frame == (height, width)
    y, x, h, w = plan.box
    assert y >= 0
    assert x >= 0
    assert h > 0
    assert w > 0
    assert y + h <= height
    assert x + w <= width


@given(seed=st.integers(0, 1000), height=st.integers(60, 400), width=st.integers(60, 400))
def test_a_short_side_crop_is_cut_from_the_resized_frame_at_the_published_places(seed, height, width):
    """VideoMAE's code for AVA resizes the short side, rounds the other one down, and never takes the last position."""
    plan = draw_crop(default_rng(seed), ShortSideCrop(sides=(230, 260)), height, width, 224)
    short = min(plan.frame)
    assert 230 <= short <= 260
    upright = width < height
    assert plan.frame == ((int(short * height / width), short) if upright else (short, int(short * width / height)))
    top, left, *size = plan.box
    assert size == [224, 224]
    assert 0 <= top < max(plan.frame[0] - 224, 1)
    assert 0 <= left < max(plan.frame[1] - 224, 1)


def test_corner_crop_draws_every_published_size_and_place_and_no_other():
    boxes = {corner_crop(default_rng(seed), (1, 0.875, 0.75, 0.66), 256, 340, 224) for seed in range(6000)}
    sides = [256, 224, 192, 168]
    pairs = {(h, w) for i, h in enumerate(sides) for j, w in enumerate(sides) if abs(i - j) <= 1}
    assert {box[2:] for box in boxes} == pairs
    down, right = (256 - 168) // 4, (340 - 168) // 4
    quarters = [(0, 0), (0, 4), (4, 0), (4, 4), (2, 2), (2, 0), (2, 4), (4, 2), (0, 2), (1, 1), (1, 3), (3, 1), (3, 3)]
    places = {(box[0], box[1]) for box in boxes if box[2:] == (168, 168)}
    assert places == {(down * row, right * column) for row, column in quarters}


def test_an_epoch_visits_every_video_as_often_as_asked():
    sampler = make_sampler(videos=7, clips_per_video=3)
    rows = [sampler.plan(0, i).row for i in range(sampler.clips)]
    assert sorted(rows) == sorted(list(range(7)) * 3)


def mix(manifest: Manifest, weights: list[float], **data: object) -> Sampler:
    mixture = {f"part{k}": {"source": "x", "weight": weight} for k, weight in enumerate(weights)}
    return Sampler(manifest, DataConfig.model_validate({"stride": 2, "mixture": mixture, **data}), MODEL, 3)


def count_rows(sampler: Sampler, epochs: int) -> list[int]:
    rows = [sampler.plan(epoch, i).row for epoch in range(epochs) for i in range(sampler.clips)]
    return np.bincount(rows, minlength=len(sampler.rows)).tolist()


def test_a_mixture_visits_every_set_as_often_as_its_weight_says():
    sampler = mix(make_mixture(6, 4), [1, 3])
    assert sampler.clips == 6 + 12
    assert count_rows(sampler, 1) == [1] * 6 + [3] * 4


def test_a_set_of_which_an_epoch_sees_a_part_is_gone_through_in_turn():
    sampler = mix(make_mixture(3, 10), [1, 0.4])
    assert sampler.clips == 3 + 4
    for epochs in (5, 10):
        assert count_rows(sampler, epochs) == [epochs] * 3 + [epochs * 4 // 10] * 10
    rounds = [[sampler.plan(e, i).row for e in range(k, k + 5) for i in range(7)] for k in (0, 5)]
    assert rounds[0] != rounds[1]
    for epoch in range(10):
        rows = [sampler.plan(epoch, i).row for i in range(7)]
        assert len(set(rows)) == 7 or epoch % 5 == 2  # a round may end, and the next begin, within an epoch


def test_a_mixture_of_one_set_is_that_set():
    alone, mixed = make_sampler(videos=7), mix(make_manifest(7), [1.0])
    assert [as_tuple(alone, 1, i) for i in range(7)] == [as_tuple(mixed, 1, i) for i in range(7)]


@pytest.mark.parametrize("videos", [(3, 4), (0, 7)])
def test_the_manifest_of_a_mixture_is_one_set_where_it_is_the_source(videos):
    mixed = Sampler(make_mixture(*videos), DataConfig(stride=2), MODEL, 3)
    alone = Sampler(make_mixture(7), DataConfig(stride=2), MODEL, 3)
    assert mixed.clips == alone.clips == 7
    assert [as_tuple(mixed, 1, i) for i in range(7)] == [as_tuple(alone, 1, i) for i in range(7)]
    assert steps_per_epoch(mixed.manifest, mixed.data, 3) == 2


def test_a_set_of_a_mixture_may_have_a_rate_of_its_own():
    mixture = {"fast": {"source": "x"}, "slow": {"source": "y", "stride": 5}}
    sampler = Sampler(make_mixture(3, 3), DataConfig.model_validate({"stride": 2, "mixture": mixture}), MODEL, 3)
    for i in range(6):
        plan = sampler.plan(0, i)
        assert set(np.diff(plan.frames)) == {2 if plan.row < 3 else 5}


def test_no_order_of_an_epoch_of_many_sets_is_drawn_twice(monkeypatch):
    drawn = []

    def draw(key: tuple[int, ...], count: int) -> object:
        drawn.append((key, count))
        return draw_permutation(key, count)

    monkeypatch.setattr("mvd_scale.data.sampling.sampler.draw_permutation", draw)
    round_order.cache_clear()
    epoch_order.cache_clear()
    mixed = mix(make_mixture(*[5] * 10), [0.8] * 10)
    assert len({mixed.plan(1, i).row for i in range(mixed.clips)}) > 20
    # The order of the epoch, and for each set the end of its first round and the start of the second.
    assert len(drawn) == len(set(drawn)) == 1 + 10 * 2


def test_copies_share_their_frames_and_nothing_else():
    one, three = make_sampler(flip=0.5), make_sampler(flip=0.5, copies=3)
    for i in range(7):
        plan = three.plan(0, i)
        assert plan.frames.tolist() == one.plan(0, i).frames.tolist()
        assert plan.copies[0].crop == one.plan(0, i).copies[0].crop
        assert len({str(copy.masked) for copy in plan.copies}) == 3
    assert len({copy.crop for i in range(7) for copy in three.plan(0, i).copies}) > 10
    assert steps_per_epoch(make_manifest(7), DataConfig(copies=3), 6) == 3


def test_left_out_videos_are_never_drawn():
    sampler = Sampler(make_manifest(5, left_out=(1, 3)), DataConfig(), MODEL, 0)
    assert sorted(sampler.plan(0, i).row for i in range(sampler.clips)) == [0, 2, 4]
    assert {sampler.plan(0, 0, attempt).row for attempt in range(1, 50)} == {0, 2, 4}


def test_epochs_seeds_and_clips_differ():
    sampler = make_sampler()
    assert [sampler.plan(0, i).row for i in range(7)] != [sampler.plan(1, i).row for i in range(7)]
    plans = {str(as_tuple(sampler, epoch, i, attempt)) for epoch in range(3) for i in range(7) for attempt in range(2)}
    assert len(plans) == 42
    assert as_tuple(sampler, 0, 0) != as_tuple(make_sampler(seed=4), 0, 0)


def test_a_plan_depends_on_its_key_only():
    sampler = make_sampler()
    expected = [as_tuple(sampler, 1, i) for i in range(7)]
    copy = pickle.loads(pickle.dumps(make_sampler()))
    assert [as_tuple(copy, 1, i) for i in reversed(range(7))] == expected[::-1]


def test_the_stream_is_the_one_of_earlier_releases():
    """Check fixed draws of the sampler: if these values change, no earlier run can resume."""
    plan = make_sampler(flip=0.5).plan(2, 3)
    copy = plan.copies[0]
    assert (plan.row, plan.frames.tolist(), copy.crop.box, copy.flip) == (0, [0, 2, 4, 6], (6, 16, 36, 32), False)
    assert copy.visible[:4].tolist() == [1, 14, 17, 30]


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 6, 12])
def test_ranks_share_out_one_stream(world_size):
    clips, batch, steps = 31, 12, 7
    single = RankShard(clips, batch, 0, 1)
    ranks = [RankShard(clips, batch, rank, world_size) for rank in range(world_size)]
    stream = [
        share.position(step * share.clips_per_step + k)
        for step in range(steps)
        for share in ranks
        for k in range(share.clips_per_step)
    ]
    assert stream == [single.position(n) for n in range(steps * batch)] == list(range(steps * batch))


def test_an_epoch_drops_what_does_not_fill_a_global_batch():
    share = RankShard(clips=31, global_batch=12, rank=0, world_size=1)
    assert [share.locate(p) for p in (0, 23, 24, 47, 48)] == [(0, 0), (0, 23), (1, 0), (1, 23), (2, 0)]
    assert steps_per_epoch(make_manifest(31), DataConfig(), 12) == 2


def test_too_few_clips_for_a_batch():
    with pytest.raises(UserError, match=r"data.clips_per_video to 3 or more"):
        steps_per_epoch(make_manifest(5), DataConfig(), 12)


@pytest.mark.parametrize("mask", [{"ratio": 0.5}, {"kind": "random"}, {"decode_ratio": 0.5}])
def test_a_further_mask_is_that_of_a_stream_of_its_own_and_changes_nothing_else(mask):
    plain, other = make_sampler(copies=2, flip=0.5), make_sampler(copies=2, flip=0.5, mask=mask)
    masks = (other.data.mask, None)
    both = Sampler(plain.manifest, plain.data, MODEL, plain.seed, masks)
    for i in range(plain.clips):
        first, second, joined = (sampler.plan(1, i) for sampler in (plain, other, both))
        assert (joined.row, joined.frames.tolist()) == (first.row, first.frames.tolist())
        for one, two, three in zip(first.copies, second.copies, joined.copies, strict=True):
            assert (three.crop, three.flip) == (one.crop, one.flip) == (two.crop, two.flip)
            assert three.visible.tolist() == [*one.visible, *two.visible, *range(32)]
            assert three.masked.tolist() == [*one.masked, *two.masked]


def test_a_mask_of_another_ratio_leaves_the_augmentation_as_it_is():
    augment = {"color_jitter": {}, "erasing": {}}
    few, many = (make_sampler(augment=augment, mask={"ratio": ratio}) for ratio in (0.5, 0.9))
    for i in range(few.clips):
        one, other = few.plan(0, i).copies[0].augment, many.plan(0, i).copies[0].augment
        assert one.jitter.tolist() == other.jitter.tolist()
        assert one.erase == other.erase
