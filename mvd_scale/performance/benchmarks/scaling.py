"""`mvd-scale bench growth`: growth of a step's time and memory with tokens, frames, batch and depth."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np

from mvd_scale.config import Recipe
from mvd_scale.config.target import TrainedTeacherTarget
from mvd_scale.config.training import Precision
from mvd_scale.distributed.process_group import init_distributed
from mvd_scale.errors import UserError
from mvd_scale.performance.bench_setup import bench_recipe
from mvd_scale.performance.benchmarks.step import StepReport, measure_step
from mvd_scale.performance.benchmarks.timing import run_in_subprocess
from mvd_scale.performance.report import Metric, Report
from mvd_scale.utils.memory import peak_memory_gib

logger = logging.getLogger("mvd_scale")

Quantity = Literal["tokens", "frames", "batch", "depth"]
UNITS: dict[Quantity, str] = {"tokens": "tokens of a frame", "frames": "frames", "batch": "clips", "depth": "blocks"}
"""Unit of each quantity; the number of blocks applies to the encoder and to every trained teacher."""


@dataclasses.dataclass(frozen=True)
class Point:
    """Cost of a step at one value of a quantity."""

    count: int
    seconds: float
    """Seconds per step."""

    gib: float
    """Peak memory of a rank in GiB, without the memory that the process used before it built the model."""


@dataclasses.dataclass(frozen=True)
class PowerLaw:
    """Power law: cost = factor * count ** power."""

    power: float
    factor: float

    @classmethod
    def of(cls, counts: Sequence[float], costs: Sequence[float]) -> PowerLaw:
        """Fit by least squares on the logarithms."""
        power, offset = np.polyfit(np.log(counts), np.log(costs), 1)
        return cls(float(power), math.exp(offset))

    def at(self, count: float) -> float:
        """Evaluate the cost at a count."""
        return self.factor * count**self.power


@dataclasses.dataclass(frozen=True, kw_only=True)
class GrowthReport(Report):
    """Measured points of each quantity, while the other quantities have the recipe's values."""

    kind: Literal["growth"] = "growth"
    recipe: str
    overrides: list[str]
    precision: str
    steps: int
    base: dict[Quantity, int]
    """Values of the quantities in the recipe, which hold while another one varies."""

    points: dict[Quantity, list[Point]]

    def time(self, quantity: Quantity) -> PowerLaw:
        """Fit the growth of the seconds per step."""
        points = self.points[quantity]
        return PowerLaw.of([point.count for point in points], [point.seconds for point in points])

    def memory(self, quantity: Quantity) -> PowerLaw:
        """Fit the growth of peak memory in GiB."""
        points = self.points[quantity]
        return PowerLaw.of([point.count for point in points], [point.gib for point in points])

    def setting(self) -> dict[str, Any]:
        """Return the recipe, its overrides, and the values that were measured."""
        counts = {quantity: [point.count for point in points] for quantity, points in self.points.items()}
        return {key: getattr(self, key) for key in ("recipe", "overrides", "precision", "base")} | counts

    def values(self) -> Iterator[tuple[str, Metric]]:
        """Yield time and memory of every point, and the powers, which are not judged."""
        for quantity, points in self.points.items():
            for point in points:
                yield f"{quantity} {point.count}: step, s", Metric(point.seconds)
                yield f"{quantity} {point.count}: peak memory, GiB", Metric(point.gib)
            yield f"{quantity}: power of time", Metric(self.time(quantity).power, judged=False)
            yield f"{quantity}: power of memory", Metric(self.memory(quantity).power, judged=False)

    def to_text(self) -> str:
        """Format as a table, one line per point, with the powers below each quantity."""
        lines = [self.title(), self.machine.title(), f"  {'':<26}{'s per step':>12}{'peak GiB':>10}"]
        for quantity, points in self.points.items():
            lines += [
                f"  {f'{UNITS[quantity]} {point.count}':<26}{point.seconds:>12.3f}{point.gib:>10.3f}"
                for point in points
            ]
            time, memory = self.time(quantity).power, self.memory(quantity).power
            lines.append(f"  {f'power of {quantity}':<26}{time:>12.2f}{memory:>10.2f}")
        return "\n".join(lines)

    def title(self) -> str:
        """Describe the measurement in one line."""
        base = ", ".join(f"{UNITS[quantity]} {count}" for quantity, count in self.base.items())
        return f"{self.recipe}, {self.precision}; {base} unless varied; mean of {self.steps} steps"


def measure_growth(
    name: str,
    overrides: list[str],
    numbers: Mapping[Quantity, Sequence[int]],
    *,
    precision: Precision | None,
    batch: int,
    steps: int,
) -> GrowthReport:
    """Time whole steps of a distillation with teachers of random weights, each point in a separate process.

    Args:
        name: recipe, see `load_recipe`.
        overrides: dotted overrides; without `data.source` the clips of the `samples` extra are used.
        numbers: at least two values of each quantity that varies; for `tokens`, sides of the student's input in pixels.
        precision: precision of the student; fp16 on GPUs and float32 on CPUs if None.
        batch: clips per step while the batch does not vary.
        steps: timed steps per point, after two warm-up steps.

    Raises:
        UserError: no quantity varies or one has a single value, or a value does not fit the models.
    """
    recipe = bench_recipe(name, overrides, precision, batch)
    base = _counts(recipe)
    cases: dict[Quantity, dict[int, _Case]] = {}
    # All points are checked before the first is measured.
    for quantity, given in numbers.items():
        for number in sorted(given):
            case = _case(recipe, quantity, number)
            changed = bench_recipe(name, [*overrides, *case.overrides], precision, case.batch)
            count = _counts(changed)[quantity]
            cases.setdefault(quantity, {})[count] = _Case((), batch) if count == base[quantity] else case
    if not cases:
        raise UserError("nothing varies: give values of at least one of tokens, frames, batch and depth")
    for quantity, by_count in cases.items():
        if len(by_count) < 2:
            raise UserError(f"{quantity} has a single point: its power needs at least two different values")

    costs: dict[_Case, tuple[StepReport, float]] = {}
    for quantity, by_count in cases.items():
        for count, case in by_count.items():
            if case not in costs:
                logger.info("%s %d", UNITS[quantity], count)
                costs[case] = run_in_subprocess(
                    _cost, name, [*overrides, *case.overrides], precision, case.batch, steps
                )
    return GrowthReport(
        machine=next(iter(costs.values()))[0].machine,
        recipe=name,
        overrides=overrides,
        precision=recipe.training.precision,
        steps=steps,
        base=base,
        points={
            quantity: [_point(count, *costs[case]) for count, case in by_count.items()]
            for quantity, by_count in cases.items()
        },
    )


@dataclasses.dataclass(frozen=True)
class _Case:
    """Settings of a step to measure; steps of equal settings are measured once."""

    overrides: tuple[str, ...]
    """Dotted overrides in addition to the user's."""

    batch: int


def _counts(recipe: Recipe) -> dict[Quantity, int]:
    assert recipe.model.depth is not None
    return {
        "tokens": recipe.model.grid[1] * recipe.model.grid[2],
        "frames": recipe.model.frames,
        "batch": recipe.training.global_batch,
        "depth": recipe.model.depth,
    }


def _case(recipe: Recipe, quantity: Quantity, number: int) -> _Case:
    """Create the overrides that give one quantity another value."""
    if quantity == "batch":
        return _Case((), number)
    models = {"model": recipe.model}
    for name, target in recipe.targets.items():
        if isinstance(target, TrainedTeacherTarget) and target.model is not None:
            models[f"targets.{name}.model"] = target.model
    overrides: list[str] = []
    for key, model in models.items():
        if quantity == "tokens":
            # A teacher with another patch size gets the input size that gives the student's token grid.
            side = number if key == "model" else number // recipe.model.patch_size * model.patch_size
            overrides += [f"--{key}.input_size", str(side)]
        elif quantity == "depth":
            shape = {"size": "null", "width": model.width, "heads": model.heads, "depth": number}
            overrides += [word for field, value in shape.items() for word in (f"--{key}.{field}", str(value))]
        elif model.frames > 1:
            overrides += [f"--{key}.frames", str(number)]
    return _Case(tuple(overrides), recipe.training.global_batch)


def _cost(
    name: str, overrides: list[str], precision: Precision | None, batch: int, steps: int
) -> tuple[StepReport, float]:
    """Measure a step in this process, and the memory in GiB that the process held before."""
    recipe = bench_recipe(name, overrides, precision, batch)
    ranks = init_distributed(recipe.device, recipe.training.collective_timeout_minutes)
    held = peak_memory_gib(ranks.device)
    return measure_step(name, overrides, precision=precision, batch=batch, steps=steps), held


def _point(count: int, step: StepReport, held: float) -> Point:
    return Point(count, step.milliseconds_per_step / 1000, step.peak_memory_gib - held)
