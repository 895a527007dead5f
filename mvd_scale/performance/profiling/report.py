"""Summary that `mvd-scale profile` writes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from mvd_scale.performance.report import SHORT, Metric, Report


@dataclass(frozen=True)
class PartFigures:
    """One part of a step on rank 0, mean of the profiled steps."""

    milliseconds: float
    """Milliseconds on the host; with a GPU, most of the work is only launched there."""
    device_milliseconds: float | None
    """Milliseconds of the GPU work that the part launched; None on a CPU."""
    flops: int
    """FLOPs of the model."""

    @property
    def spent(self) -> float:
        """Milliseconds on the device that computes."""
        return self.milliseconds if self.device_milliseconds is None else self.device_milliseconds


@dataclass(frozen=True)
class Operator:
    """One operator or collective on rank 0, mean of the profiled steps."""

    name: str
    calls: float
    milliseconds: float
    """Milliseconds in the operator itself, without the operators that it calls."""


@dataclass(frozen=True, kw_only=True)
class ProfileReport(Report):
    """Profile of a recipe's steps: times without the profiler, and results of the profiler."""

    kind: Literal["profile"] = "profile"
    recipe: str
    overrides: list[str]
    precision: str
    teacher_sharding: str
    ranks: int
    clips_per_step: int
    steps: int
    milliseconds_per_step: float
    """Milliseconds per step without the profiler."""
    profiled_milliseconds_per_step: float
    clips_per_second: float
    parts: dict[str, PartFigures]
    flops_per_step: int
    """FLOPs of the model per step on one rank."""
    peak_flops_per_second: float
    peak_source: str
    utilisation: float
    """Model FLOP/s of a rank divided by its peak FLOP/s, without the profiler."""
    data_wait_share: float
    communication_milliseconds: float
    """Milliseconds per step during which a collective ran, including waits for other ranks."""
    collectives: list[Operator]
    operators: list[Operator]
    peak_memory_gib: float
    """Peak memory of rank 0 in GiB: of the GPU, or of the process."""
    highest_tensors_gib: float
    """Maximum of the timeline in GiB: all tensors on a GPU; on a CPU those allocated since the profile began."""
    highest_in: str
    """Part of the step in which the maximum occurred."""
    losses: list[float]
    """Losses of rank 0: warm-up steps, steps without the profiler, steps with it."""

    def setting(self) -> dict[str, Any]:
        """Return the recipe, its overrides, and the conditions of the run."""
        keys = ("recipe", "overrides", "precision", "teacher_sharding", "ranks", "clips_per_step")
        return {key: getattr(self, key) for key in keys}

    def values(self) -> Iterator[tuple[str, Metric]]:
        """Yield the times of the parts and of the step, utilisation, communication and memory."""
        for name, part in self.parts.items():
            yield f"{name}, ms", Metric(part.spent, judged=part.spent > SHORT * self.milliseconds_per_step)
        yield "step, ms", Metric(self.milliseconds_per_step)
        yield "utilisation", Metric(self.utilisation, more_is_better=True)
        yield "communication, ms", Metric(self.communication_milliseconds, judged=self.ranks > 1)
        yield "peak memory, GiB", Metric(self.peak_memory_gib)

    def to_text(self) -> str:
        """Format as one page."""
        overhead = self.profiled_milliseconds_per_step / self.milliseconds_per_step - 1
        rate = self.flops_per_step / self.milliseconds_per_step / 1e9
        where = "tensors of the GPU" if self.machine.device != "cpu" else "tensors allocated in these steps"
        lines = [
            f"{self.recipe}, {self.precision}, teachers {self.teacher_sharding}, {self.ranks} ranks, "
            f"{self.clips_per_step} clips per step, {self.steps} steps",
            *([f"with {' '.join(self.overrides)}"] if self.overrides else []),
            self.machine.title(),
            "",
            f"step           {self.milliseconds_per_step:.1f} ms, {self.clips_per_second:.3f} clips/s; "
            f"under the profiler {self.profiled_milliseconds_per_step:.1f} ms ({overhead:+.1%})",
            f"arithmetic     {self.flops_per_step / 1e12:.4g} TFLOP per step and rank, {rate:.4g} TFLOP/s",
            f"utilisation    {self.utilisation:.1%} of {self.peak_flops_per_second / 1e12:.4g} TFLOP/s "
            f"({self.peak_source})",
            f"data wait      {self.data_wait_share:.1%} of a step",
            f"communication  {self.communication_milliseconds:.1f} ms per step, "
            f"{self.communication_milliseconds / self.profiled_milliseconds_per_step:.1%}",
            f"memory         peak {self.peak_memory_gib:.2f} GiB; {where} at most {self.highest_tensors_gib:.3f} GiB, "
            f"in: {self.highest_in}",
            "",
            *self._part_lines(),
            "",
            *_operator_lines("operator (self time)", self.operators, self.profiled_milliseconds_per_step),
        ]
        if self.collectives:
            lines += ["", *_operator_lines("collective", self.collectives, self.profiled_milliseconds_per_step)]
        return "\n".join(lines)

    def _part_lines(self) -> Iterator[str]:
        yield f"{'part':<36}{'ms':>10}{'share':>9}{'GPU ms':>10}{'GFLOP':>11}{'GFLOP/s':>11}"
        for name, part in self.parts.items():
            device = "" if part.device_milliseconds is None else f"{part.device_milliseconds:.1f}"
            work = f"{part.flops / 1e9:>11.4g}{part.flops / part.spent / 1e6:>11.4g}" if part.flops else ""
            share = part.milliseconds / self.profiled_milliseconds_per_step
            yield f"{name:<36}{part.milliseconds:>10.1f}{share:>9.1%}{device:>10}{work}".rstrip()


def _operator_lines(title: str, operators: list[Operator], step: float) -> Iterator[str]:
    yield f"{title:<36}{'ms':>10}{'share':>9}{'calls':>10}"
    for operator in operators:
        name = operator.name if len(operator.name) < 36 else f"{operator.name[:34]}…"
        yield f"{name:<36}{operator.milliseconds:>10.1f}{operator.milliseconds / step:>9.1%}{operator.calls:>10.0f}"
