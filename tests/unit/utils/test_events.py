"""Tests of the event log: whole lines, bounded size, and no exception from a file that cannot be written."""

from __future__ import annotations

from pathlib import Path

import pytest

from mvd_scale.utils import events
from mvd_scale.utils.events import EventLog, read_events


def test_events_are_read_as_they_were_written(tmp_path: Path) -> None:
    log = EventLog(tmp_path / "events.jsonl")
    log.write("start", ranks=4)
    log.write("save", step=10)
    assert [(event["event"], event.get("step")) for event in read_events(log.path)] == [("start", None), ("save", 10)]


def test_partial_last_line_is_skipped(tmp_path: Path) -> None:
    log = EventLog(tmp_path / "events.jsonl")
    log.write("start")
    with log.path.open("a") as file:
        file.write('{"event": "sa')
    log.write("save")
    assert [event["event"] for event in read_events(log.path)] == ["start", "save"]


def test_size_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(events, "MAX_BYTES", 1000)
    log = EventLog(tmp_path / "events.jsonl")
    for step in range(100):
        log.write("save", step=step)
    assert sum(file.stat().st_size for file in tmp_path.iterdir()) < 2 * 1200
    assert read_events(log.path)[-1]["step"] == 99


def test_unwritable_log_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "missing" / "events.jsonl"
    with caplog.at_level("WARNING", logger="mvd_scale"):
        EventLog(path).write("end")
    assert f"{path} cannot be written: No such file or directory" in caplog.text
