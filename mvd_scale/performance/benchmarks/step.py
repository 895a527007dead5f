"""`mvd-scale bench step`: time of an optimizer step by part, and its memory."""

from __future__ import annotations

import dataclasses
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from mvd_scale.config.training import Precision
from mvd_scale.distributed.process_group import destroy_distributed, init_distributed
from mvd_scale.performance.bench_setup import bench_recipe, bench_trainer
from mvd_scale.performance.report import SHORT, Metric, Report, this_machine
from mvd_scale.targets.build import init_teacher
from mvd_scale.utils.memory import peak_memory_gib

_WARM_UP = 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepReport(Report):
    """Report of `bench step`: means over the timed steps of rank 0."""

    kind: Literal["step"] = "step"
    recipe: str
    overrides: list[str]
    precision: str
    teacher_sharding: str
    ranks: int
    clips_per_step: int
    steps: int
    milliseconds: dict[str, float]
    """Milliseconds per step, by part."""

    milliseconds_per_step: float
    clips_per_second: float
    peak_memory_gib: float

    def setting(self) -> dict[str, Any]:
        """Return the recipe, its overrides, and the conditions of the run."""
        keys = ("recipe", "overrides", "precision", "teacher_sharding", "ranks", "clips_per_step")
        return {key: getattr(self, key) for key in keys}

    def values(self) -> Iterator[tuple[str, Metric]]:
        """Yield the times of every part and of the step, clips per second, and memory."""
        for part, spent in self.milliseconds.items():
            yield f"{part}, ms", Metric(spent, judged=spent > SHORT * self.milliseconds_per_step)
        yield "step, ms", Metric(self.milliseconds_per_step)
        yield "clips/s", Metric(self.clips_per_second, more_is_better=True)
        yield "peak memory, GiB", Metric(self.peak_memory_gib)

    def to_text(self) -> str:
        """Format as a table of parts with their shares of the step."""
        head = (
            f"{self.recipe}, {self.precision}, teachers {self.teacher_sharding}, {self.ranks} ranks, "
            f"{self.clips_per_step} clips per step, mean of {self.steps} steps\n{self.machine.title()}"
        )
        rows = [
            f"  {part:<20}{spent:>12.1f} ms{spent / self.milliseconds_per_step:>8.1%}"
            for part, spent in self.milliseconds.items()
        ]
        foot = (
            f"  {'step':<20}{self.milliseconds_per_step:>12.1f} ms{1:>8.1%}\n"
            f"  {self.clips_per_second:.3f} clips/s, peak memory {self.peak_memory_gib:.2f} GiB per rank"
        )
        return "\n".join([head, *rows, foot])


class Stopwatch:
    """`StepTimer` that sums the seconds of each part; on a GPU it synchronises at both ends of a part.

    Parts therefore do not overlap, and neither do teachers with the student: the step takes as long as without
    `teachers.prefetch`. `mvd-scale profile` times steps without synchronisation. The time of patch-embedding rows that
    several teachers share belongs to no part.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: dict[str, float] = defaultdict(float)
        self._started: dict[str, float] = {}

    def now(self) -> float:
        """Return the clock in seconds after all work of the device has finished."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Add the time of a `with` block to a part."""
        started = self.now()
        yield
        self.seconds[name] += self.now() - started

    def watch(self, name: str, module: nn.Module) -> None:
        """Add the time of a module's forward passes to a part."""
        module.register_forward_pre_hook(lambda *_: self._started.__setitem__(name, self.now()))
        module.register_forward_hook(lambda *_: self._stop(name))

    def _stop(self, name: str) -> None:
        self.seconds[name] += self.now() - self._started.pop(name)


def measure_step(
    name: str, overrides: list[str], *, precision: Precision | None = None, batch: int, steps: int
) -> StepReport:
    """Time whole optimizer steps of a recipe with teachers of random weights.

    Args:
        name: recipe, see `load_recipe`.
        precision: precision of the student; fp16 on GPUs and float32 on CPUs if None.
        overrides: dotted overrides; without `data.source` the clips of the `samples` extra are used.
        batch: clips per step over all ranks.
        steps: number of timed steps, after two warm-up steps.

    Raises:
        UserError: see `bench_recipe` and `bench_trainer`.
    """
    recipe = bench_recipe(name, overrides, precision, batch)
    ranks = init_distributed(recipe.device, recipe.training.collective_timeout_minutes)
    watch = Stopwatch(ranks.device)
    with (
        tempfile.TemporaryDirectory() as scratch,
        bench_trainer(recipe, ranks, init_teacher, steps=_WARM_UP + steps, scratch=Path(scratch)) as trainer,
    ):
        trainer.attach(watch)
        for _ in range(_WARM_UP):
            trainer.train_step()
        watch.seconds.clear()
        started = watch.now()
        for _ in range(steps):
            trainer.train_step()
        elapsed = watch.now() - started
    parts = {part: watch.seconds[part] for part in trainer.part_names if part in watch.seconds}
    parts["loss and rest"] = elapsed - sum(parts.values())
    report = StepReport(
        machine=this_machine(ranks.device),
        recipe=name,
        overrides=overrides,
        precision=recipe.training.precision,
        teacher_sharding=recipe.teachers.sharding,
        ranks=ranks.world_size,
        clips_per_step=batch,
        steps=steps,
        milliseconds={part: 1000 * seconds / steps for part, seconds in parts.items()},
        milliseconds_per_step=1000 * elapsed / steps,
        clips_per_second=batch * steps / elapsed,
        peak_memory_gib=peak_memory_gib(ranks.device),
    )
    destroy_distributed()
    return report
