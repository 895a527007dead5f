"""Seconds are converted to frames by the rate of the file, and key frames that cannot be used are named."""

from __future__ import annotations

import logging
from dataclasses import replace

import numpy as np
import pytest

from mvd_scale.data.manifest import Manifest, Row
from mvd_scale.detection.boxes import Boxes, KeyFrame
from mvd_scale.detection.key_frames import find_key_frames, frames_around
from mvd_scale.errors import UserError

MOVIE = Row(name="films/movie.mkv", path="/films/movie.mkv", frames=21_600, fps=24000 / 1001, duration=900.9)


def boxes_at(*keys: tuple[str, float]) -> Boxes:
    frames = [KeyFrame(*key) for key in keys]
    return Boxes.of(frames, [[0, 0, 1, 1]] * len(keys), [1] * len(keys), [1.0] * len(keys))


def test_a_second_is_found_by_the_rate_of_the_file() -> None:
    found = find_key_frames(boxes_at(("movie", 902), ("movie", 1798)), Manifest.from_rows([MOVIE]), 900, "key_frames")
    assert found.centres.tolist() == [round(2 * 24000 / 1001), round(898 * 24000 / 1001)]
    variable = replace(MOVIE, fps=120.0, variable_rate=True, duration=900.0)
    found = find_key_frames(boxes_at(("movie", 910)), Manifest.from_rows([variable]), 900, "key_frames")
    assert found.centres.tolist() == [240]


def test_what_cannot_be_used_is_left_out_and_named(caplog: pytest.LogCaptureFixture) -> None:
    broken = replace(MOVIE, name="broken.mp4", left_out="no frames")
    wanted = boxes_at(("movie", 902), ("broken", 902), ("gone", 902), ("gone", 903), ("movie", 2000), ("movie", 10))
    with caplog.at_level(logging.WARNING, logger="mvd_scale"):
        found = find_key_frames(wanted, Manifest.from_rows([MOVIE, broken]), 900, "key_frames")
    assert [wanted.frames[number] for number in found.numbers] == [("movie", 902)]
    assert "5 key frames are left out" in caplog.text
    for reason in (
        "gone is not among the videos (2)",
        "broken cannot be used: no frames (1)",
        "movie does not contain these seconds (2)",
    ):
        assert reason in caplog.text
    with pytest.raises(
        UserError, match="no key frame of the annotations can be used, because gone is not among the videos"
    ):
        find_key_frames(boxes_at(("gone", 902)), Manifest.from_rows([MOVIE]), 900, "key_frames")


def test_two_videos_of_one_name_are_refused() -> None:
    with pytest.raises(UserError, match=r"films/movie\.mkv and movie\.mp4 are both called movie"):
        find_key_frames(
            boxes_at(("movie", 902)), Manifest.from_rows([MOVIE, replace(MOVIE, name="movie.mp4")]), 0, "data"
        )


def test_a_clip_lies_around_its_key_frame() -> None:
    clip = frames_around(1000, 5000, frames=16, stride=4)
    assert clip.tolist() == list(range(969, 1033, 4))
    assert frames_around(3, 5000, frames=4, stride=4).tolist() == [0, 0, 4, 8]
    assert frames_around(4999, 5000, frames=4, stride=4).tolist() == [4992, 4996, 4999, 4999]
    assert np.diff(frames_around(50, 100, frames=8, stride=3)).tolist() == [3] * 7
