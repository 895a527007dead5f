"""Metrics as a text file for the textfile collector of Prometheus' node exporter.

The format is Prometheus' text exposition format 0.0.4. The collector reads each file whole, so that it is renamed into
place, and takes no times of samples: `mvd_scale_reading_timestamp_seconds` tells how old the numbers are.
"""

from __future__ import annotations

import hashlib
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from mvd_scale.errors import UserError
from mvd_scale.run_dir import RunFolder
from mvd_scale.training.checkpointing.folders import checkpoint_folder, saved_steps
from mvd_scale.training.metrics.sink import MetricSink, Values
from mvd_scale.utils.events import first_faults, read_events
from mvd_scale.utils.io import write_atomic


class Metric(NamedTuple):
    """Name and description of an exported metric."""

    name: str
    help: str
    scale: float = 1.0
    """Factor from the unit of the reading to that of Prometheus."""


_READINGS = {
    "loss": Metric("loss", "Loss, the mean since the last reading."),
    "lr": Metric("learning_rate", "Learning rate."),
    "weight_decay": Metric("weight_decay", "Weight decay."),
    "grad_norm": Metric("gradient_norm", "Global norm of the gradients before clipping."),
    "loss_scale": Metric("loss_scale", "Scale of the loss in fp16."),
    "skipped_steps": Metric("skipped_steps", "Optimizer steps that were skipped since the start of the processes."),
    "clips_per_second": Metric("clips_per_second", "Clips of all ranks per second."),
    "seconds_per_step": Metric("step_seconds", "Seconds per optimizer step."),
    "data_wait_share": Metric("data_wait_ratio", "Share of the time that the slowest rank waited for data, 0 to 1."),
    "memory_gib": Metric("memory_bytes", "Peak memory of the largest rank in bytes.", 2.0**30),
    "clips_replaced": Metric("clips_replaced", "Clips that were replaced since the start of the processes."),
}
"""Exported metrics by the name of the reading."""

_PART = Metric("loss_part", "Terms of the loss, the mean since the last reading.")


class PrometheusFile(MetricSink):
    """File of the latest reading, with the folder of the run as the label `run`.

    Args:
        path: file that ends in `.prom`, or a folder, see `prom_file`.
        folder: folder of the run.
        total_steps: last step of the run.

    Raises:
        UserError: see `prom_file`.
    """

    def __init__(self, path: Path, folder: RunFolder, total_steps: int) -> None:
        self.folder = folder
        self.path = prom_file(path, folder.path)
        self.name = str(self.path)
        self.total_steps = total_steps
        self._restarts = self._faults = 0
        self._last: tuple[int, Values] | None = None

    def open(self) -> None:
        """Count the restarts and faults of the run, to which its own processes add none that they survive."""
        events = read_events(self.folder.events)
        self._restarts = sum(event.get("event") == "restart" for event in events)
        self._faults = len(first_faults(events))

    def write(self, step: int, values: Values) -> None:
        """Write all metrics."""
        self._last = step, values
        self._write(running=True)

    def close(self, *, failed: bool) -> None:
        """Write that the run has ended."""
        if self._last is not None:
            self._write(running=False)

    def _write(self, *, running: bool) -> None:
        assert self._last is not None
        step, values = self._last
        samples = {**_of_reading(values), **self._of_run(step, running)}
        write_atomic(self.path, render(samples, str(self.folder.path)))

    def _of_run(self, step: int, running: bool) -> dict[Metric, float]:
        samples = {
            Metric("running", "1 while the run writes this file, 0 after its end."): float(running),
            Metric("step", "Optimizer steps that are done."): float(step),
            Metric("last_step", "Optimizer steps after which the run ends."): float(self.total_steps),
            Metric("reading_timestamp_seconds", "Time of the reading since the epoch."): time.time(),
            Metric("restarts", "Restarts by mvd-scale supervise."): float(self._restarts),
            Metric("faults", "Faults of ranks, hosts and links."): float(self._faults),
        }
        if saved := saved_steps(self.folder.checkpoints):
            written = checkpoint_folder(self.folder.checkpoints, saved[-1]).stat().st_mtime
            samples[Metric("checkpoint_step", "Step of the newest checkpoint.")] = float(saved[-1])
            samples[Metric("checkpoint_timestamp_seconds", "Time of the newest checkpoint since the epoch.")] = written
        return samples


def prom_file(path: Path, run: Path) -> Path:
    """Path of the file for a run.

    In a folder its name tells runs apart whose folders have the same name.

    Args:
        path: value of `logging.prometheus`.
        run: folder of the run.

    Raises:
        UserError: the textfile collector would not read it.
    """
    if path.is_dir():
        place = hashlib.sha256(str(run.resolve()).encode()).hexdigest()[:8]
        return path / f"mvd_scale_{re.sub(r'[^A-Za-z0-9_-]', '_', run.name)}_{place}.prom"
    if path.suffix != ".prom" or not path.parent.is_dir():
        raise UserError(
            f"logging.prometheus {path}: expected an existing folder, the one of node exporter's "
            "--collector.textfile.directory, or a file that ends in .prom in one"
        )
    return path


def render(samples: Mapping[Metric, float | Mapping[str, float]], run: str) -> str:
    """Format samples in the text format.

    Args:
        samples: value of each metric, or its values by the label `part`.
        run: value of the label `run`.
    """
    lines = []
    for metric, value in samples.items():
        name = f"mvd_scale_{metric.name}"
        lines += [f"# HELP {name} {_escape(metric.help, quotes=False)}", f"# TYPE {name} gauge"]
        for part, number in value.items() if isinstance(value, Mapping) else [(None, value)]:
            labels = f'run="{_escape(run)}"' + ("" if part is None else f',part="{_escape(part)}"')
            lines.append(f"{name}{{{labels}}} {_number(number)}")
    return "\n".join(lines) + "\n"


def _of_reading(values: Values) -> dict[Metric, float | dict[str, float]]:
    samples: dict[Metric, float | dict[str, float]] = {
        metric: values[name] * metric.scale for name, metric in _READINGS.items() if name in values
    }
    parts = {name.removeprefix("loss/"): value for name, value in values.items() if name.startswith("loss/")}
    return samples | ({_PART: parts} if parts else {})


def _escape(text: str, *, quotes: bool = True) -> str:
    escaped = text.replace("\\", "\\\\").replace("\n", "\\n")
    return escaped.replace('"', '\\"') if quotes else escaped


def _number(value: float) -> str:
    return repr(float(value)).replace("inf", "Inf").replace("nan", "NaN")
