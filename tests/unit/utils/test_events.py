"""Tests of the event log: whole lines, bounded size, and no exception from a file that cannot be written."""

from __future__ import annotations

import errno
import io
import os
from pathlib import Path
from typing import Any

import pytest

from mvd_scale.utils import events
from mvd_scale.utils.events import EventLog, read_events
from mvd_scale.utils.io import append_whole


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


def test_a_write_that_fails_takes_no_line_of_another_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, opened = tmp_path / "events.jsonl", Path.open

    class Failing(io.FileIO):
        def write(self, content: Any) -> int:
            with opened(path, "ab") as other:
                other.write(b'{"event": "of another"}\n')
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "open", lambda self, mode, buffering: Failing(self, mode))
    with pytest.raises(OSError, match="No space left"):
        append_whole(path, b"{}\n")
    monkeypatch.undo()
    assert path.read_text() == '{"event": "of another"}\n'
