"""`mvd-scale bench endurance`: memory, open files and keys in the store over many steps and saves of a tiny run."""

from __future__ import annotations

import dataclasses
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import psutil
import torch

from mvd_scale.distributed.health.watchdog import Watchdog
from mvd_scale.distributed.process_group import Ranks, destroy_distributed, init_distributed, run_on_rank0
from mvd_scale.performance.bench_setup import bench_recipe, bench_trainer
from mvd_scale.performance.benchmarks.watching_cost import time_watching
from mvd_scale.performance.report import Metric, Report, this_machine
from mvd_scale.run_dir import RunFolder
from mvd_scale.targets.build import init_teacher
from mvd_scale.training.callbacks import Callback, CallbackList
from mvd_scale.training.checkpointing.checkpointer import Checkpointer, SavedModel
from mvd_scale.training.metrics.writer import MetricWriter
from mvd_scale.utils.events import EventLog

_SAMPLES = 200
"""Samples of a run."""

FIGURES = {"memory": "MiB", "files": "open files", "threads": "threads", "keys": "keys in the store"}
"""Unit of each figure."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class EnduranceReport(Report):
    """Memory and handles of rank 0 after some steps: it holds most, the store of the job among it."""

    kind: Literal["endurance"] = "endurance"
    recipe: str
    overrides: list[str]
    ranks: int
    saves: int
    steps: list[int]
    """Steps after which samples were taken, ascending."""

    samples: dict[str, list[float]]
    """Figures after these steps, by name: see `FIGURES`."""

    step_seconds: float
    """Seconds of a step, saves and readings included."""

    watching: dict[str, float]
    """Seconds per step of what watches the run, by part, measured by itself; see `time_watching`."""

    def growth(self, name: str) -> float:
        """Growth of a figure in the second half of the run, by a line through it, per 1000 steps."""
        half = len(self.steps) // 2
        slope, _ = np.polyfit(self.steps[half:], self.samples[name][half:], 1)
        return 1000 * float(slope)

    def setting(self) -> dict[str, Any]:
        """Return recipe, overrides, and numbers of ranks, steps and saves."""
        return {key: getattr(self, key) for key in ("recipe", "overrides", "ranks", "saves")} | {"last": self.steps[-1]}

    def values(self) -> Iterator[tuple[str, Metric]]:
        """Yield the largest value of each figure, and its growth, which is not judged: it may be near 0."""
        for name, unit in FIGURES.items():
            yield f"{name}, {unit}", Metric(max(self.samples[name]))
            yield f"{name}: growth in 1000 steps", Metric(self.growth(name), judged=False)
        yield "watching: share of a step", Metric(sum(self.watching.values()) / self.step_seconds, judged=False)

    def to_text(self) -> str:
        """Format as a table, one line per figure."""
        lines = [
            self.title(),
            self.machine.title(),
            f"  {'':<20}{'after first':>12}{'last':>10}{'most':>10}{'per 1000':>10}",
        ]
        for name, unit in FIGURES.items():
            values = self.samples[name]
            numbers = (values[0], values[-1], max(values), self.growth(name))
            lines.append(f"  {unit:<20}" + "".join(f"{number:>12.1f}" for number in numbers))
        parts = ", ".join(f"{name} {1e6 * seconds:.1f}" for name, seconds in self.watching.items())
        share = sum(self.watching.values()) / self.step_seconds
        lines.append(
            f"  watching takes {share:.3%} of a step of {1000 * self.step_seconds:.0f} ms; microseconds: {parts}"
        )
        return "\n".join(lines)

    def title(self) -> str:
        """Describe the measurement in one line."""
        return f"{self.recipe}, rank 0 of {self.ranks}, {self.steps[-1]} steps, {self.saves} saves"


class _Sampler(Callback):
    """Callback that samples the process; runs after the save of the step before."""

    def __init__(self, ranks: Ranks, steps: int) -> None:
        self.interval = max(steps // _SAMPLES, 1)
        self.store = ranks.store
        self.process = psutil.Process()
        self.steps: list[int] = []
        self.samples: dict[str, list[float]] = {name: [] for name in FIGURES}

    def on_step_end(self, engine: Any, step: int, writer: MetricWriter) -> None:
        """Sample memory, files, threads and keys."""
        self.steps.append(step)
        figures = {
            "memory": self.process.memory_info().rss / 2**20,
            "files": self.process.num_fds(),
            "threads": self.process.num_threads(),
            "keys": self.store.num_keys(),
        }
        for name, value in figures.items():
            self.samples[name].append(float(value))


def measure_endurance(name: str, overrides: list[str], *, steps: int, saves: int) -> EnduranceReport:
    """Train with random teachers, readings and saves as a run does. All ranks of the job call it.

    Args:
        name: recipe, see `load_recipe`.
        overrides: dotted overrides; without `data.source` the clips of the `samples` extra are used.
        steps: optimizer steps.
        saves: checkpoints, at equal distances.

    Raises:
        UserError: see `bench_recipe` and `bench_trainer`.
    """
    fixed = ["--training.epochs", str(steps), "--checkpoints.every_steps", str(max(steps // saves, 1))]
    rarely = ["--checkpoints.every_epochs", "null", "--checkpoints.every_minutes", "null"]
    ranks = init_distributed("auto", timeout_minutes=10)
    recipe = bench_recipe(name, [*fixed, *rarely, *overrides], None, 2 * ranks.world_size)
    scratch = Path(run_on_rank0(ranks, "folder of the run", tempfile.mkdtemp))
    sampler = _Sampler(ranks, steps)
    try:
        folder, own = RunFolder(scratch), scratch / f"rank {ranks.rank}"
        own.mkdir()
        with (
            Watchdog(ranks, folder.faults, EventLog(folder.events), recipe.training.hang_minutes),
            bench_trainer(recipe, ranks, init_teacher, steps=steps, scratch=own) as trainer,
            Checkpointer(
                [SavedModel(folder.of_student(model.name), recipe, model) for model in trainer.models], recipe, ranks, 1
            ) as checkpointer,
        ):
            started = time.perf_counter()
            trainer.train(folder, checkpointer, CallbackList([(trainer.models[0], [sampler])]))
            step_seconds = (time.perf_counter() - started) / steps
        watching = time_watching(ranks, own, step_seconds=step_seconds, steps_per_event=steps / saves)
        torch.distributed.barrier()
    finally:
        if ranks.is_main:
            shutil.rmtree(scratch)
    report = EnduranceReport(
        machine=this_machine(ranks.device),
        recipe=name,
        overrides=overrides,
        ranks=ranks.world_size,
        saves=saves,
        steps=sampler.steps,
        samples=sampler.samples,
        step_seconds=step_seconds,
        watching=watching,
    )
    destroy_distributed()
    return report


def plot_endurance(report: EnduranceReport, out: Path) -> None:
    """Plot memory, open files and keys over the steps (PNG).

    Args:
        report: the measurement.
        out: file to write.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    names = ("memory", "files", "keys")
    for axis, name, colour in zip(figure.subplots(1, 3), names, ("#4c78a8", "#f58518", "#54a24b"), strict=True):
        axis.plot(report.steps, report.samples[name], color=colour, linewidth=1.1)
        axis.set(xlabel="steps", title=FIGURES[name])
        axis.set_ylim(0, 1.15 * max(report.samples[name]))
        axis.grid(color="#e4e4e4", linewidth=0.6)
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"{report.title()}\n{report.machine.title()}", fontsize=9)
    figure.savefig(out, dpi=110)
