"""The ranks of a stage get the devices that the user made visible; a file system without locks will do."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from mvd_scale.pipelines import runner
from mvd_scale.pipelines.runner import device_ids, exclusive_lock


@pytest.mark.parametrize(
    ("visible", "ranks", "expected"),
    [
        (None, 2, ["0", "1"]),
        ("", 2, ["0", "1"]),
        ("2,3", 2, ["2", "3"]),
        ("2,3,5", 2, ["2", "3"]),
        ("7", 1, ["7"]),
        # More ranks than visible GPUs: each rank that finds none says so itself.
        ("7", 2, ["0", "1"]),
    ],
)
def test_ranks_of_a_stage_take_the_visible_devices(
    visible: str | None, ranks: int, expected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert device_ids(ranks) == expected


def test_a_pipeline_runs_on_a_file_system_without_locks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(runner.fcntl, "flock", refuse)
    with caplog.at_level("WARNING", logger="mvd_scale"), exclusive_lock(tmp_path / "pipeline") as descriptor:
        assert descriptor >= 0
    assert "has no locks (No locks available)" in caplog.text
