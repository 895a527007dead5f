"""Interface of the destinations of metrics."""

from __future__ import annotations

from abc import ABC, abstractmethod

import numpy as np
from numpy.typing import NDArray

Values = dict[str, float]
"""Metrics of one reading by name, such as `loss` and `loss/video`; of several students `students/NAME/loss`."""

_STUDENTS = "students/"


def students_of(values: Values) -> list[str]:
    """List the students that a reading has metrics of, in their order; empty if the run has one model."""
    names = (name.split("/")[1] for name in values if name.startswith(_STUDENTS))
    return list(dict.fromkeys(names))


def select_student(values: Values, student: str) -> Values:
    """Select the metrics of a student, under the names of a run alone, and those that all students share."""
    own = f"{_STUDENTS}{student}/"
    return {
        name.removeprefix(own): value
        for name, value in values.items()
        if name.startswith(own) or not name.startswith(_STUDENTS)
    }


class MetricSink(ABC):
    """Destination of the metrics of a run. Only rank 0 has any.

    Methods may raise any exception: `MetricWriter` makes a warning of it, and calls them again. Only a `UserError` of
    `open` ends the run.
    """

    name: str
    """Name for warnings: a file of the run folder, or a service."""

    @abstractmethod
    def open(self) -> None:
        """Begin to write, before the first step.

        Raises:
            UserError: the sink was asked for and cannot be used here.
        """

    @abstractmethod
    def write(self, step: int, values: Values) -> None:
        """Write the metrics that were read after `step` optimizer steps."""

    def show(self, step: int, name: str, value: float | NDArray[np.uint8]) -> None:  # noqa: B027 - most show nothing
        """Write a number or an image uint8 (H, W, 3) of a callback; may be called from another thread."""

    @abstractmethod
    def close(self, *, failed: bool) -> None:
        """End writing.

        Args:
            failed: whether the run ended before its last step, by an error or a stop signal.
        """
