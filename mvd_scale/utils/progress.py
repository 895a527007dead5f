"""Progress of a long job: a bar on a terminal, or a log line every ten seconds."""

from __future__ import annotations

import logging
import sys
import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

_LINE_SECONDS = 10.0
"""Seconds from one log line to the next."""

log = logging.getLogger("mvd_scale")


class ProgressReporter:
    """Progress display of a job of `total` items.

    Args:
        what: name of the items and of what is done to them, such as "videos probed".
        total: number of items.
    """

    def __init__(self, what: str, total: int) -> None:
        self.what = what
        self.total = total
        self.done = 0
        self._started = self._last_logged = time.monotonic()
        self._bar: Progress | None = None
        if sys.stderr.isatty():
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            self._bar = Progress(*columns, console=Console(stderr=True))
            self._task = self._bar.add_task(what, total=total)

    def add(self, count: int) -> None:
        """Record that `count` more items are done."""
        self.done += count
        now = time.monotonic()
        if self._bar is not None:
            self._bar.update(self._task, completed=self.done)
        elif now - self._last_logged > _LINE_SECONDS:
            self._last_logged = now
            rate = self.done / (now - self._started)
            log.info("%d of %d %s, %.0f per second", self.done, self.total, self.what, rate)

    def __enter__(self) -> Self:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
