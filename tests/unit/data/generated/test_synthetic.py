"""Tests of synthetic videos: training and test differ in objects and backgrounds; classes differ as documented."""

from __future__ import annotations

from pathlib import Path

import av
import numpy as np
import pytest

pytest.importorskip("skimage", reason="synthetic videos need the samples extra: pip install 'mvd-scale[samples]'")

from mvd_scale.data.generated import synthetic as synth
from mvd_scale.data.generated.synthetic import (
    BACKGROUNDS,
    CROSSING_FRAMES,
    DIMMED,
    DIRECTIONS,
    EIGHT_DIRECTIONS,
    FRAMES,
    SIDE,
    TEXTURES,
    Split,
    draw_video,
    split_pictures,
    write_synthetic_videos,
)
from mvd_scale.errors import UserError


@pytest.fixture(scope="module")
def pictures() -> dict[str, synth.Picture]:
    return {name: synth.load_picture(name) for name in (*TEXTURES, *sum(BACKGROUNDS.values(), ()))}


def frames(kind: synth.Kind, label: int, pictures: dict[str, synth.Picture], seed: int) -> np.ndarray:
    made_of = split_pictures("train", validated=False)
    return np.stack(draw_video(kind, label, made_of, pictures, np.random.default_rng(seed)))


def test_folders_of_classes_hold_real_videos_and_a_second_start_adds_what_is_missing(tmp_path: Path) -> None:
    out = write_synthetic_videos("motion", tmp_path, train=2, test=1)
    files = sorted(file.relative_to(out) for file in out.rglob("*.mp4"))
    assert [str(file.parent) for file in files] == [
        "test/left",
        "test/right",
        *["train/left"] * 2,
        *["train/right"] * 2,
    ]
    with av.open(str(out / files[0])) as container:
        pictures = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    assert np.shape(pictures) == (FRAMES, SIDE, SIDE, 3)
    kept = {file: (out / file).stat().st_mtime_ns for file in files}
    write_synthetic_videos("motion", tmp_path, train=3, test=1)
    assert len(list(out.rglob("*.mp4"))) == 8
    assert all((out / file).stat().st_mtime_ns == time for file, time in kept.items())
    with pytest.raises(UserError, match="holds other videos"):
        write_synthetic_videos("appearance", tmp_path, train=3, test=1)
    with pytest.raises(UserError, match=r"left/00002\.mp4"):
        write_synthetic_videos("motion", tmp_path, train=2, test=1)


def test_a_start_goes_on_after_one_that_was_killed_while_it_wrote_a_video(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Path.replace
    monkeypatch.setattr(Path, "replace", lambda partial, file: None)
    write_synthetic_videos("motion", tmp_path, train=1, test=1)
    assert len([file for file in tmp_path.rglob("*") if file.is_file()]) == 4
    monkeypatch.setattr(Path, "replace", real)
    out = write_synthetic_videos("motion", tmp_path, train=1, test=1)
    assert len(list(out.rglob("*.mp4"))) == 4
    assert not list(out.rglob("*.partial"))


def test_splits_share_no_background_and_no_part_of_a_texture() -> None:
    every = sum(BACKGROUNDS.values(), ())
    assert len(every) == len(set(every))
    assert not set(TEXTURES) & set(every)
    splits: tuple[Split, ...] = ("train", "validation", "test")
    columns = [split_pictures(split, validated=True).columns for split in splits]
    assert columns == [(0.0, 0.5), (0.5, 0.75), (0.75, 1.0)]
    assert split_pictures("test", validated=False).columns == (0.5, 1.0)


def test_validation_videos_are_others_and_are_not_added_to_tests_of_their_objects(tmp_path: Path) -> None:
    out = write_synthetic_videos("motion", tmp_path / "a", train=1, test=1, validation=1, seed=7)
    files = sorted(out.rglob("*.mp4"))
    assert {file.parent.name for file in files} == set(DIRECTIONS)
    assert {file.parents[1].name for file in files} == {"train", "validation", "test"}
    contents = {file.read_bytes() for file in files}
    assert len(contents) == len(files) == 6
    write_synthetic_videos("motion", tmp_path / "a", train=1, test=1, validation=2, seed=7)
    write_synthetic_videos("motion", tmp_path / "b", train=1, test=1)
    with pytest.raises(UserError, match=r"holds other videos, such as .*test/left/00000\.mp4"):
        write_synthetic_videos("motion", tmp_path / "b", train=1, test=1, validation=1)


@pytest.mark.parametrize("label", range(len(DIRECTIONS)))
def test_the_scene_moves_the_way_that_the_label_says(pictures: dict[str, synth.Picture], label: int) -> None:
    for seed in range(8):
        video = frames("motion", label, pictures, seed).astype(np.int32)
        # The shift that minimises the difference between the second frame and the first one.
        shifts = range(-6, 7)
        errors = [np.abs(np.roll(video[0], shift, axis=1) - video[1]).mean() for shift in shifts]
        assert (shifts[int(np.argmin(errors))] > 0) == (DIRECTIONS[label] == "right")


def test_motion_is_the_same_video_but_for_its_direction(pictures: dict[str, synth.Picture]) -> None:
    left, right = (frames("motion", label, pictures, seed=3) for label in range(2))
    assert (left[0] == right[0]).all()
    assert not (left[1] == right[1]).all()


def test_appearance_differs_in_the_object_only(pictures: dict[str, synth.Picture]) -> None:
    # The background is drawn first and is the same; the number of random draws for an object depends on its texture.
    one, other = (frames("appearance", label, pictures, seed=5)[0] for label in (0, 3))
    same = (one == other).all(axis=2)
    assert 0.3 < same.mean() < 1


@pytest.mark.parametrize("label", range(len(EIGHT_DIRECTIONS)))
def test_an_object_crosses_the_scene_in_its_direction(label: int) -> None:
    white, black = np.full((300, 300, 3), 255, np.uint8), np.zeros((300, 300, 3), np.uint8)
    pictures = dict.fromkeys(TEXTURES, white) | dict.fromkeys(sum(BACKGROUNDS.values(), ()), black)
    for seed in range(5):
        seen = frames("direction", label, pictures, seed)
        assert seen.shape == (CROSSING_FRAMES, SIDE, SIDE, 3)
        first, second = (np.argwhere(frame[..., 0] > 0).mean(0) for frame in seen[2:4])
        down, right = second - first
        # Clockwise from right, as rows count downwards; positions are whole pixels.
        turned = np.rad2deg(np.arctan2(down, right)) - 45 * label
        assert abs((turned + 180) % 360 - 180) < 8
        name = EIGHT_DIRECTIONS[label]
        assert (("right" in name) - ("left" in name), ("down" in name) - ("up" in name)) == (
            np.sign(round(right, 9)), np.sign(round(down, 9)),
        )  # fmt: skip


def test_a_crossed_scene_is_dim_and_stands_still(pictures: dict[str, synth.Picture]) -> None:
    seen = frames("object", 3, pictures, 0)
    still = (seen == seen[0]).all((0, 3))
    assert 0.1 < still.mean() < 1
    assert seen[0][still].max() <= 255 * DIMMED
    assert seen.max() > 255 * DIMMED
