"""Tests of the check of /dev/shm before DALI starts its workers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from mvd_scale.config.data import DataConfig
from mvd_scale.config.model import ModelConfig
from mvd_scale.data.decoding.backends import Decoders
from mvd_scale.data.indexing.build import build_manifest
from mvd_scale.data.loaders import base, shared_memory
from mvd_scale.data.loaders.clip_loader import BatchPlan, ClipLoader
from mvd_scale.data.loaders.shared_memory import bytes_per_sample, check_shared_memory
from mvd_scale.data.manifest import Manifest, Row
from mvd_scale.distributed.data_rank import DataRank
from mvd_scale.errors import UserError
from mvd_scale.utils.env_report import collect_capabilities

MODEL = ModelConfig(width=16, depth=1, heads=1, frames=4, input_size=32, patch_size=8)


def test_a_sample_is_the_bytes_of_a_video_or_its_decoded_frames() -> None:
    size = {"height": 100, "width": 200, "pixel_format": "yuv420p", "size": 5000}
    rows = Manifest.from_rows([Row("a", "a", codec="vp8", **size), Row("b", "b", codec="h264", **size)])  # type: ignore[arg-type]
    assert bytes_per_sample(rows, Decoders(), 16, 0.5) == (5000 + 3 * 16 * 0.5 * 100 * 200) / 2
    assert bytes_per_sample(rows, Decoders("mixed", "mixed"), 16, 0.5) == 5000


def test_too_little_shared_memory_is_an_error_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_memory, "free_bytes", lambda: 64_000_000)
    need = {"batch": 8, "prefetch": 2, "ranks": 1}
    check_shared_memory(1e6, workers=2, **need)
    check_shared_memory(100e6, workers=0, **need)
    with pytest.raises(UserError, match=r"/dev/shm has 64 MB free, .* of the 4 ranks .* need 128 MB: 4 batches of 8"):
        check_shared_memory(1e6, workers=2, **(need | {"ranks": 4}))
    with pytest.raises(UserError, match=r"--shm-size=1g` or `--ipc=host`, or set data.workers to 0"):
        check_shared_memory(3e6, workers=2, **need)


def test_the_check_comes_before_the_workers(monkeypatch: pytest.MonkeyPatch, videos: Path) -> None:
    manifest, started = build_manifest(videos, workers=1), []
    monkeypatch.setattr(shared_memory, "free_bytes", lambda: 1000)
    monkeypatch.setattr("mvd_scale.data.loaders.clip_loader.build_pipeline", lambda *_, **__: started.append(1))
    plan, rank = BatchPlan.one_batch(4), DataRank(torch.device("cpu"))

    def load(workers: int) -> Any:
        return ClipLoader(manifest, DataConfig(stride=2, workers=workers), MODEL, 1, plan=plan, rank=rank)

    with pytest.raises(UserError, match="/dev/shm has 0 MB free"):
        load(2)
    assert not started
    load(0)
    assert started
    assert base.check_shared_memory is check_shared_memory


def test_env_tells_the_size_of_shared_memory() -> None:
    (row,) = [row for row in collect_capabilities() if row.name == "/dev/shm"]
    assert row.on
    assert "GiB free" in row.detail
