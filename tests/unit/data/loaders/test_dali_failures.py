"""Tests of videos that DALI fails to decode though PyAV decodes them: few new graphs, the same clips everywhere."""

from __future__ import annotations

import json
import logging
import threading
from collections import defaultdict
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed import HashStore

from mvd_scale.config.data import CenterCrop, DataConfig
from mvd_scale.config.model import ModelConfig
from mvd_scale.data.decoding import dali_graph
from mvd_scale.data.decoding.backends import DaliDevice, VideoKind
from mvd_scale.data.indexing.build import build_manifest
from mvd_scale.data.loaders.clip_loader import BatchPlan, ClipLoader
from mvd_scale.data.loaders.dali_failures import FAILURES_FILE, HORIZON, LIMIT, WINDOW, DaliFailures
from mvd_scale.data.loaders.quarantine import Quarantine
from mvd_scale.data.manifest import Manifest
from mvd_scale.distributed.data_rank import DataRank
from mvd_scale.distributed.exchange import StoreExchange

MODEL = ModelConfig(width=16, depth=1, heads=1, frames=2, input_size=32, patch_size=8)
DATA = DataConfig(stride=2, workers=0, crop=CenterCrop(), max_broken=1, clips_per_video=30)
KIND, OTHER = VideoKind("vp8", "yuv420p", 64), VideoKind("vp8", "yuv420p", 128)
STEPS = 6 * WINDOW
CLIPS = 4
"""Clips of a step."""


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory, encode: Any) -> Manifest:
    """VP9 of two kinds: six videos of up to 64 pixels, and two of up to 128."""
    folder = tmp_path_factory.mktemp("vp8")
    for number in range(8):
        size = {"height": 64, "width": 96} if number > 5 else {}
        encode(folder / f"{number}.webm", frames=12, **size)
    return build_manifest(folder, workers=1)


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch, manifest: Manifest) -> list[str]:
    """Let DALI fail to decode the videos whose paths are in the returned list; files are told apart by their sizes."""
    broken: list[str] = []
    decode = dali_graph.decode_video

    def decode_or_fail(encoded: Any, frames: Any, device: DaliDevice) -> Any:
        # Frames beyond the end of a video are an error.
        beyond = sum(encoded.shape()[0] == Path(path).stat().st_size for path in broken) if broken else 0
        if isinstance(frames, list):
            frames = dali_graph.types.Constant(frames, dtype=dali_graph.types.INT32)
        return decode(encoded, dali_graph.fn.cast(frames + 1000 * beyond, dtype=dali_graph.types.INT32), device)

    monkeypatch.setattr(dali_graph, "decode_video", decode_or_fail)
    return broken


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Steps at which loaders have built a graph."""
    built: list[int] = []
    build = ClipLoader._build

    def counted(loader: ClipLoader) -> Any:
        built.append(loader.step)
        return build(loader)

    monkeypatch.setattr(ClipLoader, "_build", counted)
    return built


def load(manifest: Manifest, folder: Path, rank: DataRank | None = None, start: int = 0, **options: Any) -> ClipLoader:
    rank = rank or DataRank(torch.device("cpu"))
    plan = BatchPlan(CLIPS, options.pop("micro", CLIPS // rank.world_size), range(start, options.pop("end", STEPS)))
    folder.mkdir(exist_ok=True)
    return ClipLoader(
        manifest, DATA, MODEL, 1, plan=plan, rank=rank, quarantine=Quarantine(folder / "quarantine.jsonl"), **options
    )


def of_kind(manifest: Manifest, kind: VideoKind) -> list[str]:
    return [row.path for row in manifest.rows if VideoKind.of(row) == kind]


def test_a_kind_that_dali_does_not_decode_costs_few_graphs(
    manifest: Manifest, tmp_path: Path, failing: list[str], graphs: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    failing += of_kind(manifest, KIND)
    with load(manifest, tmp_path) as loader, caplog.at_level(logging.WARNING, "mvd_scale"):
        batches = list(loader)
        assert loader.substituted == 0
        assert loader._decoders.by_pyav == {KIND}
    assert len(batches) == STEPS
    # The first two windows need a graph for every three batches at most, the last one a graph without the kind.
    assert max(graphs) == 2 * WINDOW
    assert len(graphs) <= 1 + 2 * WINDOW / 3 + 2
    (warning,) = caplog.messages
    assert "vp8, yuv420p, up to 64 pixels" in warning
    assert not (tmp_path / "quarantine.jsonl").exists()


def test_single_videos_do_not_take_their_kind_to_pyav(
    manifest: Manifest, tmp_path: Path, failing: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mvd_scale.data.loaders.dali_failures.LIMIT", 1000)
    failing += of_kind(manifest, KIND)[:1]
    with load(manifest, tmp_path) as loader:
        assert len(list(loader)) == STEPS
        assert loader._decoders.by_pyav == frozenset()
    lines = [json.loads(line) for line in (tmp_path / FAILURES_FILE).read_text().splitlines()]
    assert len({line["clip"] for line in lines}) == len(lines) > 1


def test_broken_videos_are_no_failures_of_dali(manifest: Manifest, tmp_path: Path, encode: Any) -> None:
    folder = tmp_path / "v"
    for number in range(4):
        encode(folder / f"{number}.webm", frames=12)
    whole = build_manifest(folder, workers=1)
    for number in range(2):
        path = folder / f"{number}.webm"
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 3])
    with load(whole, tmp_path / "run", end=2) as loader:
        assert len(list(loader)) == 2
        assert loader.substituted > 0
    assert not (tmp_path / "run" / FAILURES_FILE).exists()


class Board:
    """Exchange among loaders of one process, which run by turns; reading before all have written is an error."""

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size
        self.posts: dict[str, list[list[str]]] = defaultdict(list)

    def post(self, name: str, lines: list[str]) -> None:
        self.posts[name].append(lines)

    def collect(self, name: str) -> list[str]:
        assert len(self.posts[name]) == self.world_size, "a rank would wait here"
        return [line for lines in self.posts[name] for line in lines]


def run_ranks(manifest: Manifest, folder: Path, world_size: int, start: int = 0) -> torch.Tensor:
    """Pixels of all clips in their order, loaded by several ranks that go step by step."""
    board = Board(world_size)
    ranks = [DataRank(torch.device("cpu"), rank, world_size, open_exchange=lambda: board) for rank in range(world_size)]
    loaders = [load(manifest, folder, rank, start) for rank in ranks]
    steps = [torch.cat([next(loader).pixels for loader in loaders]) for _ in range(start, STEPS)]
    for loader in loaders:
        loader.close()
    return torch.stack(steps)


def test_all_ranks_change_at_the_same_step_and_a_resume_goes_on_with_it(
    manifest: Manifest, tmp_path: Path, failing: list[str], graphs: list[int]
) -> None:
    failing += of_kind(manifest, KIND)[:3]
    alone = run_ranks(manifest, tmp_path / "one", 1)
    changed = max(graphs)
    assert changed % WINDOW == 0
    assert torch.equal(run_ranks(manifest, tmp_path / "two", 2), alone)
    failures = (tmp_path / "two" / FAILURES_FILE).read_text()
    # From amid a window before the change, and from a step after it, on other numbers of ranks.
    for start, world_size in ((changed - 2, 1), (changed + 1, 4)):
        graphs.clear()
        assert torch.equal(run_ranks(manifest, tmp_path / "two", world_size, start), alone[start:])
        if start > changed:
            assert graphs == [start] * world_size
    assert set((tmp_path / "two" / FAILURES_FILE).read_text().splitlines()) >= set(failures.splitlines())


def failures_at(steps: list[int], step: int, kind: VideoKind = KIND) -> frozenset[VideoKind]:
    record = DaliFailures("cpu", 0)
    for clip, failed in enumerate(steps):
        record.add(clip, failed, kind)
    record.advance(step)
    return record.kinds()


def test_a_kind_changes_two_windows_after_its_last_failure() -> None:
    many = [5] * LIMIT
    assert failures_at(many, 3 * WINDOW - 1) == frozenset()
    assert failures_at(many, 3 * WINDOW) == failures_at(many, 1000 * WINDOW) == {KIND}
    assert failures_at(many[1:], 1000) == frozenset()
    assert failures_at([0, HORIZON, *[2 * HORIZON] * (LIMIT - 2)], 1000) == frozenset()
    spread = [HORIZON - 1, *[0] * (LIMIT - 1)]
    assert failures_at(spread, 1000) == {KIND}


def test_failures_on_another_device_do_not_count(tmp_path: Path) -> None:
    file = tmp_path / FAILURES_FILE
    record = DaliFailures("mixed", 0, file)
    for clip in range(LIMIT):
        record.add(clip, 0, OTHER)
    for device, expected in (("mixed", {OTHER}), ("cpu", set())):
        read = DaliFailures(device, 4 * WINDOW, file)  # type: ignore[arg-type]
        read.advance(4 * WINDOW)
        assert read.kinds() == expected


def test_the_store_gives_every_rank_all_lines() -> None:
    store, found = HashStore(), {}

    def rank(number: int) -> None:
        for _ in range(2):  # a second exchange does not see the first one's lines
            exchange = StoreExchange(store, number, 3, timedelta(seconds=60))
            exchange.post("window 0", [f"line of {number}"] if number else [])
            exchange.post("window 1", [])
            found[number] = exchange.collect("window 0"), exchange.collect("window 1")

    threads = [threading.Thread(target=rank, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == dict.fromkeys(range(3), (["line of 1", "line of 2"], []))
