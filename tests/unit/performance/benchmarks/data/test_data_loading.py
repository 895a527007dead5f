from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from mvd_scale.cli import cli
from mvd_scale.data.generated.sample_clips import write_sample_clips
from mvd_scale.performance.benchmarks.data import data_loading
from mvd_scale.performance.benchmarks.data.baselines.ffmpeg import link_libraries
from mvd_scale.performance.benchmarks.data.baselines.loaders import BASELINES, baseline_batches
from mvd_scale.performance.benchmarks.data.data_loading import BATCH, check_batch
from mvd_scale.performance.benchmarks.data.turns import Contest, Turn
from mvd_scale.performance.benchmarks.data.videos import load_or_index_videos


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sample_clips(tmp_path_factory.mktemp("clips"))


@pytest.fixture(scope="module")
def requests(clips: Path) -> data_loading.Requests:
    return data_loading._requests(load_or_index_videos(str(clips)))


@pytest.mark.parametrize("way", BASELINES)
def test_each_baseline_gives_the_clips_of_our_loader(requests, way):
    try:
        batch = next(baseline_batches(way, requests, batch=BATCH, workers=0))
    except (ImportError, OSError, RuntimeError, AttributeError) as error:
        # A package, or FFmpeg's libraries for it, are missing; PyAV brings its own.
        if way == "PyAV + torchvision":
            raise
        pytest.skip(f"{way}: {error}")
    check_batch(requests, batch)


def test_our_loader_passes_the_check_and_other_frames_crops_and_masks_do_not(clips, requests):
    manifest = load_or_index_videos(str(clips))
    pixels, visible, masked = next(data_loading._our_batches(manifest, 0))
    check_batch(requests, (pixels, visible, masked))
    with pytest.raises(ValueError, match="other frames or crops"):
        check_batch(requests, (pixels.roll(1, dims=1), visible, masked))
    with pytest.raises(ValueError, match="other masks"):
        check_batch(requests, (pixels, visible.roll(1, dims=0), masked))
    with pytest.raises(ValueError, match="expected uint8"):
        check_batch(requests, (pixels.float(), visible, masked))


def test_the_lead_is_the_median_of_the_ratios_within_rounds():
    # The machine is half as fast in the second round and a third as fast in the third one.
    ours, theirs = ([Turn(count, seconds, 1.0) for seconds in (1.0, 2.0, 3.0)] for count in (20, 10))
    contest = Contest({data_loading.OURS: ours, "SPDL": [theirs[0], Turn(10, 1.0, 1.0), theirs[2]]})
    names = {name: ("files", name) for name in contest.turns}
    first, second = data_loading._speeds("h264", 1, names, contest)
    assert (first.lead, second.lead) == (None, 2.0)
    assert first.clips_per_second == 10 * BATCH


def test_where_ours_fails_on_files_the_stages_are_told_without_the_rest(clips, tmp_path, monkeypatch):
    shards = data_loading.LoaderSpeed("given", "shards", 0, data_loading.OURS, 1.0, 0.5)
    spdl = data_loading.LoaderSpeed("given", "files", 0, "SPDL", 1.0, 0.5)
    monkeypatch.setattr(data_loading, "_measure_set", lambda *_: ([shards, spdl], {"mvd-scale": "OSError: torn"}))
    monkeypatch.setattr(data_loading, "run_in_subprocess", lambda work, videos, requests, loader: (videos, loader))
    report = data_loading.measure_data(
        str(clips), tmp_path, workers=[0], rounds=1, seconds=0.1, large=False, say=lambda line: None
    )
    assert report.stages == [("given", 0.0)]
    assert report.absent == {"mvd-scale, given, 0 workers": "OSError: torn"}


def test_a_loader_that_fails_on_one_set_is_named_with_that_set(clips, tmp_path, monkeypatch):
    def measure(videos: str, sources: object, workers: int, *_: object) -> tuple[list[object], dict[str, str]]:
        return [], {"SPDL": "OSError: torn"} if (videos, workers) == ("vp9", 2) else {}

    made = {videos: {"files": load_or_index_videos(str(clips))} for videos in ("h264", "vp9")}
    monkeypatch.setattr(data_loading, "_made_sets", lambda *_: made)
    monkeypatch.setattr(data_loading, "_measure_set", measure)
    monkeypatch.setattr(data_loading, "run_in_subprocess", lambda work, videos, requests, loader: (videos, loader))
    report = data_loading.measure_data(
        None, tmp_path, workers=[1, 2], rounds=1, seconds=0.1, large=False, say=lambda line: None
    )
    assert report.absent == {"SPDL, vp9, 2 workers": "OSError: torn"}


def test_a_library_with_a_hash_in_its_name_is_linked_by_its_usual_name(tmp_path):
    libraries = tmp_path / "av.libs"
    libraries.mkdir()
    for name in ("libavcodec-5e6b81c2.so.62.28.102", "libswscale-88e9f973.so.9.5.102", "libx264-d6533a8d.so.165"):
        (libraries / name).touch()
    links = link_libraries(libraries, tmp_path / "links")
    assert {link.name: link.resolve().name for link in links.iterdir()} == {
        "libavcodec.so.62": "libavcodec-5e6b81c2.so.62.28.102",
        "libswscale.so.9": "libswscale-88e9f973.so.9.5.102",
    }


def test_figures_of_every_way_that_is_there(clips):
    arguments = ["bench", "data", str(clips), "--workers", "0", "--rounds", "1", "--seconds", "0.1", "--json"]
    result = CliRunner().invoke(cli, arguments, catch_exceptions=False)
    report = json.loads(result.stdout)
    absent = {name.removesuffix(", given, 0 workers") for name in report["absent"]}
    assert {figure["way"] for figure in report["figures"]} | absent == {"mvd-scale", *BASELINES}
    assert all(figure["clips_per_second"] > 0 and figure["cpu_seconds_per_clip"] > 0 for figure in report["figures"])
    assert all(reason and "\n" not in reason for reason in report["absent"].values())
    (stages,) = report["stages"]
    assert min(stages["open"], stages["seek"], stages["decode"], stages["convert"], stages["resize"]) > 0
    assert stages["decode"] > stages["seek"]


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
        (["data", "--memory", "80", "--rounds", "8"], "--rounds cannot be combined with --memory"),
        (["step", "--methods", "all", "--recipe", "distill/b_from_b"], "--recipe cannot be combined with --methods"),
    ],
)
def test_options_that_would_do_nothing_are_refused(words: list[str], said: str) -> None:
    result = CliRunner().invoke(cli, ["bench", *words])
    assert result.exit_code == 2
    assert said in result.output
