from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from mvd_scale.cli import cli
from mvd_scale.data.generated.sample_clips import write_sample_clips
from mvd_scale.performance.benchmarks.baselines.loaders import (
    BASELINES,
    FRAMES,
    SIDE,
    baseline_loader,
    unavailable_reason,
)


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sample_clips(tmp_path_factory.mktemp("clips"))


@pytest.mark.parametrize("way", BASELINES)
def test_each_plain_way_gives_what_the_published_data_set_gives(clips, way):
    video = str(clips / "bikes_00.mp4")
    reason = unavailable_reason(way, video)
    if reason is not None:
        pytest.skip(f"{way}: {reason}")
    pixels, mask = next(iter(baseline_loader(way, [video], [50], batch=2, workers=0)))
    assert pixels.shape == (2, 3, FRAMES, SIDE, SIDE)
    assert pixels.dtype == torch.float32
    assert abs(pixels.mean()) < 2.5
    assert mask.shape == (2, 1568)
    assert set(mask.sum(1).tolist()) == {8 * int(0.9 * 196)}


def test_figures_of_every_way_that_is_there(clips):
    arguments = ["bench", "data", str(clips), "--workers", "0", "--clips", "8", "--json"]
    result = CliRunner().invoke(cli, arguments, catch_exceptions=False)
    report = json.loads(result.stdout)
    assert {figure["way"] for figure in report["figures"]} | set(report["absent"]) == {"mvd-scale", *BASELINES}
    assert all(figure["clips_per_second"] > 0 and figure["cpu_seconds_per_clip"] > 0 for figure in report["figures"])


def test_memory_is_told_ten_times(clips):
    arguments = ["bench", "data", str(clips), "--memory", "160"]
    lines = CliRunner().invoke(cli, arguments, catch_exceptions=False).stdout.splitlines()
    assert len(lines) == 10
    assert np.all([float(line.split()[2]) > 50 for line in lines])


def test_a_wrong_list_of_workers():
    result = CliRunner().invoke(cli, ["bench", "data", "--workers", "a"])
    assert result.exit_code == 2
    assert "such as 1,2,4" in result.output


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["data", "--memory", "80", "--json"], "--json cannot be combined with --memory"),
        (["data", "--memory", "80", "--clips", "8"], "--clips cannot be combined with --memory"),
        (["step", "--methods", "all", "--recipe", "distill/b_from_b"], "--recipe cannot be combined with --methods"),
    ],
)
def test_options_that_would_do_nothing_are_refused(words: list[str], said: str) -> None:
    result = CliRunner().invoke(cli, ["bench", *words])
    assert result.exit_code == 2
    assert said in result.output
