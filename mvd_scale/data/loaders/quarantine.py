"""Quarantine: the record of the videos that cannot be decoded, one line of JSON for each."""

from __future__ import annotations

from pathlib import Path
from typing import TypedDict

from mvd_scale.utils.events import EventLog
from mvd_scale.utils.io import append_json_line, read_metrics


class Failure(TypedDict):
    """Record of a video that could not be decoded: row of the manifest, path, and reason."""

    row: int
    path: str
    error: str


class Quarantine:
    """File of the videos that could not be decoded. Each row of the manifest stands there once, over all starts.

    Args:
        path: file of JSON lines (row, path, error, step), to which several processes may append.
        events: event log of the run; None if there is no run.
    """

    def __init__(self, path: Path, events: EventLog | None = None) -> None:
        self.path = path
        self._events = events

    def add(self, failure: Failure, step: int) -> None:
        """List a video, unless it is listed; a full disk is a warning.

        Args:
            failure: the video and the reason.
            step: progress of the loader.
        """
        # Read again each time, which is rare: other ranks list videos too.
        lines = read_metrics(self.path) if self.path.is_file() else []
        if any(line["row"] == failure["row"] for line in lines):
            return
        if not append_json_line(self.path, {**failure, "step": step}):
            return
        if self._events is not None:
            video, reason = failure["path"], failure["error"]
            self._events.write("quarantine", video=video, row=failure["row"], reason=reason, step=step)
