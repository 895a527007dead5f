"""A video that cannot be decoded is listed once, however often a run starts."""

from __future__ import annotations

from pathlib import Path

import pytest

from mvd_scale.data.loaders.quarantine import Failure, Quarantine
from mvd_scale.utils.events import EventLog, read_events
from mvd_scale.utils.io import read_metrics


def failure(row: int) -> Failure:
    return {"row": row, "path": f"{row}.mp4", "error": "truncated"}


def test_each_video_is_listed_once_over_all_starts(tmp_path: Path) -> None:
    path, log = tmp_path / "quarantine.jsonl", EventLog(tmp_path / "events.jsonl")
    for start, rows in enumerate([[3, 4, 3], [3, 5]]):
        quarantine = Quarantine(path, log)
        for row in rows:
            quarantine.add(failure(row), step=start)
        with path.open("a") as file:
            # A process that was killed while it wrote.
            file.write('{"row": 9' if start == 0 else "")
    lines = read_metrics(path)
    assert lines == [{**failure(row), "step": step} for row, step in [(3, 0), (4, 0), (5, 1)]]
    events = read_events(log.path)
    assert [(event["event"], event["video"], event["reason"]) for event in events] == [
        ("quarantine", name, "truncated") for name in ("3.mp4", "4.mp4", "5.mp4")
    ]


def test_a_video_that_another_rank_has_listed_is_listed_once(tmp_path: Path) -> None:
    ranks = [Quarantine(tmp_path / "quarantine.jsonl") for _ in range(2)]
    for row, rank in [(1, 0), (2, 1), (1, 1), (2, 0)]:
        ranks[rank].add(failure(row), step=0)
    assert [line["row"] for line in read_metrics(tmp_path / "quarantine.jsonl")] == [1, 2]


def test_a_full_disk_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    quarantine = Quarantine(tmp_path / "missing" / "quarantine.jsonl")
    with caplog.at_level("WARNING", logger="mvd_scale"):
        quarantine.add(failure(1), step=0)
    assert "quarantine.jsonl cannot be written: No such file or directory" in caplog.text
    quarantine.path.parent.mkdir()
    quarantine.add(failure(1), step=0)
    assert quarantine.path.is_file()
