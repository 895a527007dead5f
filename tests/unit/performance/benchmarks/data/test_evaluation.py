from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import av
import numpy as np
import pytest
import torch
from click.testing import CliRunner

from mvd_scale.cli import cli
from mvd_scale.config.data import DataConfig, ViewsConfig
from mvd_scale.data.decoding import pyav as decode
from mvd_scale.data.generated.sample_clips import write_sample_clips
from mvd_scale.data.indexing.build import build_manifest
from mvd_scale.data.loaders.view_loader import ViewLoader, ViewShape, view_items
from mvd_scale.data.manifest import Manifest, Row
from mvd_scale.data.sampling.eval_views import view_frame_indices
from mvd_scale.distributed.data_rank import DataRank
from mvd_scale.performance.benchmarks.data.baselines import loaders as baseline_loaders
from mvd_scale.performance.benchmarks.data.baselines import views as baseline_view_loaders
from mvd_scale.performance.benchmarks.data.baselines.views import BASELINES, Baseline, baseline_views, frames_decoded
from mvd_scale.performance.benchmarks.data.evaluation import EvalReport, EvalSpeed
from mvd_scale.performance.report import Machine

VIEWS = ViewsConfig(stride=3, clips=3, crops=2)
T, SIDE = 4, 64


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    """Two H.264 videos."""
    clips = write_sample_clips(tmp_path_factory.mktemp("clips"))
    return build_manifest([str(clips / name) for name in ("bikes_00.mp4", "bikes_10.mp4")], workers=1)


@pytest.mark.parametrize("way", BASELINES)
def test_every_plain_way_gives_the_views_that_ours_gives(manifest: Manifest, way: Baseline) -> None:
    plain = iter(baseline_views(way, manifest.path, manifest.frames.tolist(), VIEWS, length=T, side=SIDE, workers=0))
    items = view_items(manifest, VIEWS, frames=T)
    options = {"shape": ViewShape(T, SIDE), "batch": 2, "rank": DataRank(torch.device("cpu"))}
    with ViewLoader(manifest, DataConfig(workers=0), VIEWS, items, **options) as loader:
        (ours,) = list(loader)
    for pixels in ours.pixels:
        views = next(plain)
        assert views.dtype == torch.uint8
        assert views.shape == (6, T, SIDE, SIDE, 3)
        # Rounding apart.
        assert (pixels.flatten(0, 1).int() - views.int()).abs().max() <= 2


def counted(packets: Iterator[av.VideoFrame], count: list[int]) -> Iterator[av.VideoFrame]:
    for frame in packets:
        count[0] += 1
        yield frame


@pytest.mark.parametrize("way", BASELINES)
def test_the_frames_that_are_told_are_those_that_are_decoded(
    manifest: Manifest, way: Baseline, monkeypatch: pytest.MonkeyPatch
) -> None:
    count, path, total = [0], manifest.path[0], int(manifest.frames[0])
    opened = av.open

    class Counting:
        def __init__(self, path: str) -> None:
            self.container = opened(path)

        def __enter__(self) -> Counting:
            return self

        def __exit__(self, *_: object) -> None:
            self.container.close()

        def decode(self, **which: int) -> Iterator[av.VideoFrame]:
            return counted(self.container.decode(**which), count)

    monkeypatch.setattr(baseline_view_loaders, "decord_frames", baseline_loaders.pyav_frames)
    monkeypatch.setattr(av, "open", Counting)
    next(iter(baseline_views(way, [path], [total], VIEWS, length=T, side=SIDE, workers=0)))
    assert count[0] == frames_decoded(way, total, VIEWS, length=T)


def test_ours_decodes_a_video_once_for_all_views(manifest: Manifest, monkeypatch: pytest.MonkeyPatch) -> None:
    count, plainly = [0], decode._decode

    def counting(video: Row, stream: Any, *others: Any, **options: Any) -> Any:
        class Context:
            skip_frame = "DEFAULT"

            def __getattr__(self, name: str) -> Any:
                return getattr(stream.codec_context, name)

            def decode(self, packet: av.Packet | None) -> list[av.VideoFrame]:
                stream.codec_context.skip_frame = self.skip_frame
                frames = stream.codec_context.decode(packet)
                count[0] += len(frames)
                return frames

        return plainly(video, SimpleNamespace(codec_context=Context()), *others, **options)

    monkeypatch.setattr(decode, "_decode", counting)
    places = view_frame_indices(VIEWS, int(manifest.frames[0]), frames=T)
    decode.decode_frames(manifest.row(0), np.sort(places.ravel()))
    assert len(np.unique(places)) <= count[0] <= places.max() + 1


def test_the_last_column_is_ours_over_theirs() -> None:
    figures = [
        EvalSpeed("data", "mvd-scale", 6.0, 0.2, 300),
        EvalSpeed("data", "view by view", 1.5, 0.9, 2700),
        EvalSpeed("test", "mvd-scale", 0.2, 9.0, 300),
        EvalSpeed("test", "view by view", 0.1, 10.0, 2700),
    ]
    report = EvalReport(
        machine=Machine("cpu", "A CPU", 2, 2, {"av": "1"}),
        figures=figures,
        source=None,
        size="S",
        videos=12,
        workers=2,
        precision="int8",
        plain_precision="fp32",
        views="5 x 3 dense views",
        reader="PyAV",
    )
    assert [line.split()[-1] for line in report.to_text().splitlines()[-4:]] == ["300", "4.00x", "300", "2.00x"]
    assert json.loads(report.to_json())["figures"][1]["frames_decoded"] == 2700


@pytest.mark.slow
def test_every_way_is_timed(tmp_path: Path) -> None:
    clips = write_sample_clips(tmp_path / "clips")
    arguments = ["bench", "eval", str(clips / "bikes_*.mp4"), "--videos", "1", "--workers", "0", "--size", "none"]
    result = CliRunner().invoke(cli, [*arguments, "--json"], catch_exceptions=False)
    report = json.loads(result.stdout)
    assert [figure["way"] for figure in report["figures"]] == [
        "mvd-scale", "view by view", "clip by clip", "view by view, all frames",
    ]  # fmt: skip
    assert all(figure["videos_per_second"] > 0 and figure["cpu_seconds_per_video"] > 0 for figure in report["figures"])
    ours, *plain = (figure["frames_decoded"] for figure in report["figures"])
    assert all(ours < frames for frames in plain)


def test_a_source_of_shards_is_refused(tmp_path: Path, manifest: Manifest) -> None:
    packed = replace(manifest, offset=np.zeros(len(manifest), np.int64))
    packed.save(tmp_path / "packed.parquet")
    result = CliRunner().invoke(cli, ["bench", "eval", str(tmp_path / "packed.parquet")])
    assert result.exit_code != 0
    assert "in a file of its own" in str(result.exception)
