"""Metrics as event files of TensorBoard."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mvd_scale.training.metrics.sink import MetricSink, Values

MAX_READINGS = 100_000
"""Readings of a run that are written, about 65 MB; of a run with more, every second, third ... one is."""

_RETRY_SECONDS = 600.0
"""Seconds from a failure to the next attempt, which makes another file."""


class TensorBoard(MetricSink):
    """Event files in a folder, one for each start of a run.

    Args:
        folder: folder of the files.
        start_step: number of completed optimizer steps; TensorBoard hides later ones of earlier files.
        readings: number of readings of the whole run.
    """

    def __init__(self, folder: Path, start_step: int, readings: int) -> None:
        self.folder = folder
        self.name = f"{folder.name}/"
        self._purge_step: int | None = start_step + 1
        self._stride = -(-readings // MAX_READINGS)
        self._readings = 0
        self._writer: Any = None
        self._failure: tuple[Exception, float] | None = None

    def open(self) -> None:
        """Create an event file."""
        self._add(lambda writer: None)

    def write(self, step: int, values: Values) -> None:
        """Write one scalar for each metric."""
        self._readings += 1
        if self._readings % self._stride == 0:
            self._add(lambda writer: [writer.add_scalar(name, value, step) for name, value in values.items()])

    def show(self, step: int, name: str, value: float | NDArray[np.uint8]) -> None:
        """Write a scalar or an image."""
        if isinstance(value, float):
            self._add(lambda writer: writer.add_scalar(name, value, step))
        else:
            self._add(lambda writer: writer.add_image(name, value, step, dataformats="HWC"))

    def close(self, *, failed: bool) -> None:
        """Flush and close the event file."""
        if self._writer is not None:
            self._writer.close()

    def _add(self, add: Callable[[Any], object]) -> None:
        """Call methods of the writer; after a failure, which a writer does not survive, of another one.

        Raises:
            Exception: the failure, also while the next attempt is not due yet.
        """
        if self._failure is not None:
            error, since = self._failure
            if time.monotonic() - since < _RETRY_SECONDS:
                raise error
        try:
            if self._writer is None:
                self._writer = self._create()
            add(self._writer)
            self._failure = None
        except Exception as error:
            self._failure = error, time.monotonic()
            writer, self._writer = self._writer, None
            if writer is not None:
                with suppress(Exception):
                    writer.close()
            raise

    def _create(self) -> Any:
        from torch.utils.tensorboard import SummaryWriter

        writer = SummaryWriter(str(self.folder), purge_step=self._purge_step)
        self._purge_step = None
        return writer
