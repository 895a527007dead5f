"""Metrics as JSON lines: `metrics.jsonl`, one line for each reading."""

from __future__ import annotations

import json
import math
from collections import deque
from pathlib import Path

from mvd_scale.run_dir import RunFolder
from mvd_scale.training.metrics.sink import MetricSink, Values, select_student
from mvd_scale.utils.io import append_whole, truncate_metrics, write_atomic

MAX_BYTES = 64 * 2**20
"""Size of the file at which every second reading is removed from it, about 140,000 readings."""

_MAX_PENDING = 10_000
"""Readings that wait for a disk that is full; about 5 MB."""


class JsonLines(MetricSink):
    """File of JSON lines. Readings that could not be written follow when the disk can be written again.

    Args:
        path: file; lines after `start_step` are removed on opening.
        start_step: number of completed optimizer steps.
    """

    def __init__(self, path: Path, start_step: int) -> None:
        self.path = path
        self.name = path.name
        self.start_step = start_step
        self._truncated = False
        self._pending: deque[str] = deque(maxlen=_MAX_PENDING)

    def open(self) -> None:
        """Remove the readings that a killed run made after its checkpoint."""
        truncate_metrics(self.path, self.start_step)
        self._truncated = True

    def write(self, step: int, values: Values) -> None:
        """Append a line, and those before it that could not be written."""
        # JSON cannot represent infinity, the gradient norm of a step that overflowed.
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
        self._pending.append(json.dumps({"step": step, **finite}) + "\n")
        if not self._truncated:
            self.open()
        size = append_whole(self.path, "".join(self._pending).encode())
        self._pending.clear()
        if size > MAX_BYTES:
            self._thin()

    def close(self, *, failed: bool) -> None:
        """Do nothing: the file is closed after each reading."""

    def _thin(self) -> None:
        """Remove every second reading, and keep the first and the last one."""
        lines = self.path.read_text(encoding="utf-8").splitlines(keepends=True)
        write_atomic(self.path, "".join([*lines[:-1:2], lines[-1]]))


class StudentJsonLines(JsonLines):
    """File of the metrics of one of several students in its own run folder, under the names that a run alone has.

    Args:
        folder: folder of the run of all students.
        student: name of the student.
        start_step: number of completed optimizer steps.
    """

    def __init__(self, folder: RunFolder, student: str, start_step: int) -> None:
        super().__init__(folder.of_student(student).metrics, start_step)
        self.name = str(self.path.relative_to(folder.path))
        self._student = student

    def write(self, step: int, values: Values) -> None:
        """Append a line of the student's metrics, and of those that all students share."""
        super().write(step, select_student(values, self._student))
