"""Metrics on the terminal: a progress bar, or a log line for each reading where standard error is a file."""

from __future__ import annotations

import logging
import sys

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from mvd_scale.training.metrics.sink import MetricSink, Values, select_student, students_of

logger = logging.getLogger("mvd_scale")


class Terminal(MetricSink):
    """Progress bar or log lines on standard error.

    Args:
        start_step: number of completed optimizer steps.
        total_steps: last step of the run.
    """

    name = "the terminal"

    def __init__(self, start_step: int, total_steps: int) -> None:
        self.total_steps = total_steps
        self._bar = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[numbers]}"),
            TimeElapsedColumn(),
            TextColumn("ETA"),
            TimeRemainingColumn(),
            console=Console(file=sys.stderr),
        )
        self._task = self._bar.add_task("training", total=total_steps, completed=start_step, numbers="")

    def open(self) -> None:
        """Show the bar."""
        if self._bar.console.is_terminal:
            self._bar.start()

    def write(self, step: int, values: Values) -> None:
        """Move the bar, or log a line with the time that remains."""
        numbers = _one_line(values)
        self._bar.update(self._task, completed=step, numbers=numbers)
        if not self._bar.console.is_terminal:
            remaining = (self.total_steps - step) * values["seconds_per_step"]
            logger.info("step %d/%d  %s  ETA %s", step, self.total_steps, numbers, format_duration(remaining))

    def close(self, *, failed: bool) -> None:
        """Leave the bar as it is."""
        self._bar.stop()


def _one_line(values: Values) -> str:
    students = {f"{name}: ": select_student(values, name) for name in students_of(values)} or {"": values}
    models = "  ".join(f"{name}{_model(own)}" for name, own in students.items())
    speed = f"{values['clips_per_second']:.1f} clips/s  wait {values['data_wait_share']:.0%}"
    return f"{models}  {speed}  {values['memory_gib']:.1f} GiB"


def _model(values: Values) -> str:
    losses = "  ".join(f"{name} {value:.4f}" for name, value in values.items() if name.partition("/")[0] == "loss")
    optimizer = f"lr {values['lr']:.2e}  norm {values['grad_norm']:.2g}  scale {values['loss_scale']:g}"
    return f"{losses.replace('loss/', '')}  {optimizer}"


def format_duration(seconds: float) -> str:
    """Format a time as hours, minutes and seconds, such as `26:04:59`."""
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"
