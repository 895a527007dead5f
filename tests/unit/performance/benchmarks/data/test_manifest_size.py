"""The benchmark of manifests: paths that differ and exist, and one line for each start."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from mvd_scale.cli import cli
from mvd_scale.data import worker_pool
from mvd_scale.data.manifest import Manifest
from mvd_scale.performance.benchmarks.data import manifest_size
from mvd_scale.performance.benchmarks.data.manifest_size import make_manifest


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measure in this process: a new one would take seconds to start."""

    def call(work: Callable[..., Any], *arguments: Any) -> Any:
        return work(*arguments)

    monkeypatch.setattr(manifest_size, "run_in_subprocess", call)
    # Restored afterwards, with what the benchmark sets.
    monkeypatch.setenv("TMPDIR", tempfile.gettempdir())
    monkeypatch.setattr(tempfile, "tempdir", None)


def test_each_row_has_a_path_of_its_own_that_leads_to_a_video(tmp_path):
    rows = Manifest.load(make_manifest(tmp_path, 50)).rows
    assert len({row.path for row in rows}) == len({row.name for row in rows}) == 50
    assert len({os.path.realpath(row.path) for row in rows}) == 4
    assert all(Path(row.path).is_file() for row in rows)
    assert {row.codec for row in rows} == {"h264", "vp9"}
    assert len({row.duration for row in rows}) > 40


def test_starts_and_commands_are_told_beside_those_of_few_rows(tmp_path, here, monkeypatch):
    monkeypatch.setattr(worker_pool, "MAX_INLINE_ITEMS", 10_000)
    monkeypatch.setattr(manifest_size, "MOST_ROWS", {"index": 0, "shard": 0})
    arguments = ["bench", "manifest", "--rows", "2000", "--workers", "0", "--work", str(tmp_path)]
    text = CliRunner().invoke(cli, arguments, catch_exceptions=False).output
    starts = [line.split()[:3] for line in text.splitlines() if " first " in line or " later " in line]
    assert [start for start in starts if start[0] != "rows"] == [
        [rows, start, "0"] for rows in ("1000", "2000") for start in ("first", "later")
    ]
    assert "Parquet MiB" in text
    commands = [line.split()[:2] for line in text.partition(" command ")[2].splitlines()[1:]]
    assert commands == [[rows, name] for rows in ("1000", "2000") for name in ("merge", "stats", "shard,")]


def test_what_is_measured_has_the_rows_of_the_manifest(tmp_path, monkeypatch):
    monkeypatch.setattr(worker_pool, "MAX_INLINE_ITEMS", 10_000)
    path = make_manifest(tmp_path, 50)
    manifest_size._index(path, tmp_path)
    made, index = Manifest.load(path), Manifest.load(tmp_path / "index.parquet")
    assert index.path == sorted(made.path)
    assert sorted(index.codec) == sorted(made.codec)
    manifest_size._shard(path, tmp_path)
    assert Manifest.load(tmp_path / "manifest.parquet").digest == made.digest
