"""Events of a run: one line of JSON for each start, resume, save, fault and end, in `events.jsonl`.

Every line has `time` (UTC, ISO 8601), `event` (a name of `EventName`), `host` and `pid`, and fields of the event.
Rank 0 writes the events of a run, the rank that finds a fault writes that, and `mvd-scale supervise` its restarts: each
line is one append, so that lines of several processes do not mix.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterable
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from mvd_scale.utils.io import append_json_line, read_metrics

EventName = Literal["start", "resume", "save", "skip", "quarantine", "fault", "restart", "end"]
"""`start`: the data are indexed, and the model is about to be built. `resume`: a checkpoint was loaded. `save`: a
checkpoint is on disk. `skip`: an optimizer step was skipped, because gradients were not finite. `quarantine`: a video
cannot be decoded. `fault`: a rank, host or link failed. `restart`: `mvd-scale supervise` starts the job again. `end`:
the run has ended, finished or not."""

MAX_BYTES = 16 * 2**20
"""Size of `events.jsonl` at which it becomes `events.jsonl.1`, which replaces an older one; about 100,000 events."""


class EventLog:
    """Writer of the events of a run. A failed write is a warning, since a full disk must not end a run by its log.

    Args:
        path: file `events.jsonl`; its folder must exist when an event is written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def write(self, event: EventName, **fields: Any) -> None:
        """Append an event.

        Args:
            event: name of the event.
            fields: values that are serialisable as JSON.
        """
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        document = {"time": now, "event": event, "host": socket.gethostname(), "pid": os.getpid(), **fields}
        with suppress(OSError):
            self._rotate()
        append_json_line(self.path, document)

    def _rotate(self) -> None:
        if self.path.exists() and self.path.stat().st_size >= MAX_BYTES:
            os.replace(self.path, self.path.with_name(f"{self.path.name}.1"))


def first_faults(events: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return one event `fault` for each start of the processes that ended by one, oldest first.

    Where rank 0 is at fault, or a link is cut, each host records the fault, once in a start.
    """
    faults: list[dict[str, Any]] = []
    hosts: set[str] = set()
    for event in events:
        name, host = event.get("event"), str(event.get("host"))
        if name == "start" or (name == "fault" and host in hosts):
            hosts = set()
        if name == "fault":
            if not hosts:
                faults.append(event)
            hosts.add(host)
    return faults


def read_events(path: Path) -> list[dict[str, Any]]:
    """Read all events, oldest first; skips a line that a killed process wrote partially. Empty without a file."""
    events: list[dict[str, Any]] = []
    for file in (path.with_name(f"{path.name}.1"), path):
        if file.is_file():
            events += read_metrics(file)
    return events
