"""`mvd-scale profile`: training steps of a recipe under torch's profiler, and a summary of one page."""

from __future__ import annotations

import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile, record_function

from mvd_scale.config.training import Precision
from mvd_scale.distributed.process_group import Ranks, destroy_distributed, init_distributed
from mvd_scale.performance.bench_setup import bench_recipe, bench_trainer
from mvd_scale.performance.profiling.flops import count_flops, module_table, peak_flops
from mvd_scale.performance.profiling.memory_plot import plot_memory
from mvd_scale.performance.profiling.report import Operator, PartFigures, ProfileReport
from mvd_scale.performance.profiling.trace import STEP, Span, Trace, covered_seconds, read_trace
from mvd_scale.performance.report import this_machine
from mvd_scale.targets.build import load_or_init_teacher
from mvd_scale.training.metrics.meter import MicroBatchMetrics
from mvd_scale.training.trainer import Trainer
from mvd_scale.utils.memory import peak_memory_gib

_WARM_UP = 2
_OPERATORS = 15
"""Number of operators in the summary."""


class Annotations:
    """`StepTimer` that marks parts in a trace, without synchronisation of the device, which would change the timing."""

    def __init__(self) -> None:
        self._open: dict[str, Any] = {}

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Mark the body of a `with` statement as a part."""
        with record_function(name):
            yield

    def watch(self, name: str, module: nn.Module) -> None:
        """Mark every forward pass of a module as a part."""
        module.register_forward_pre_hook(lambda *_: self._begin(name))
        module.register_forward_hook(lambda *_: self._end(name))

    def _begin(self, name: str) -> None:
        self._open[name] = record_function(name)
        self._open[name].__enter__()

    def _end(self, name: str) -> None:
        self._open.pop(name).__exit__(None, None, None)


def profile_recipe(
    name: str, overrides: list[str], out: Path, *, precision: Precision | None = None, batch: int, steps: int
) -> ProfileReport:
    """Profile a recipe's steps on all ranks; every rank writes its trace, rank 0 writes all other files.

    Speed and utilisation are measured first, on the same number of steps without the profiler.

    Args:
        name: recipe, see `load_recipe`.
        overrides: dotted overrides; teachers without a checkpoint have random weights, and without `data.source` the
            clips of the `samples` extra are used.
        out: folder for `trace.json.gz` (and `trace_rank1.json.gz` ...), `memory.png`, `modules.txt` (of several
            students `modules_NAME.txt`), `summary.json` and `summary.txt`.
        precision: precision of the student; fp16 on GPUs and float32 on CPUs if None.
        batch: clips per step over all ranks.
        steps: number of profiled steps.

    Raises:
        UserError: see `bench_trainer`.
    """
    recipe = bench_recipe(name, overrides, precision, batch)
    ranks = init_distributed(recipe.device, recipe.training.collective_timeout_minutes)
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        total = _WARM_UP + 2 * steps
        with bench_trainer(recipe, ranks, load_or_init_teacher, steps=total, scratch=Path(scratch)) as trainer:
            trainer.attach(Annotations())
            losses = [_mean_loss(trainer.train_step()) for _ in range(_WARM_UP)]
            plain = _timed(trainer, steps, losses)
            with _profiler(ranks) as profiler:
                profiled = _timed(trainer, steps, losses)
            peak_memory = peak_memory_gib(ranks.device)
            # After all measurements, because the tables patch functions of torch; eager, because they cannot see the
            # modules inside compiled blocks.
            for model in trainer.models:
                file = f"modules_{model.name}.txt" if model.name else "modules.txt"
                table = module_table(model.engine.module, out / file, write=ranks.is_main)
                with torch.compiler.set_stance("force_eager"), table, torch.no_grad():
                    model.objective(model.engine, trainer.batch)
    path = out / ("trace.json.gz" if ranks.is_main else f"trace_rank{ranks.rank}.json.gz")
    profiler.export_chrome_trace(str(path))
    trace = read_trace(path, trainer.part_names)
    flops = {part: count * trainer.accumulation for part, count in count_flops(recipe, trainer.batch).items()}
    torch.distributed.barrier()
    peak = peak_flops(ranks.device, recipe.training.precision)
    highest = max(trace.memory, key=lambda sample: sample[1], default=(0.0, 0))
    report = ProfileReport(
        machine=this_machine(ranks.device),
        recipe=name,
        overrides=overrides,
        precision=recipe.training.precision,
        teacher_sharding=recipe.teachers.sharding,
        ranks=ranks.world_size,
        clips_per_step=batch,
        steps=steps,
        milliseconds_per_step=1000 * plain / steps,
        profiled_milliseconds_per_step=1000 * profiled / steps,
        clips_per_second=batch * steps / plain,
        parts=_parts(trace, trainer.part_names, flops, profiled, steps),
        flops_per_step=sum(flops.values()),
        peak_flops_per_second=peak.flops_per_second,
        peak_source=peak.source,
        utilisation=sum(flops.values()) * steps / plain / peak.flops_per_second,
        data_wait_share=trace.seconds_of("data wait") / profiled,
        communication_milliseconds=1000 * covered_seconds(trace.communication) / steps,
        collectives=_collectives(trace.communication, steps),
        operators=_operators(profiler, {STEP, *trainer.part_names}, steps),
        peak_memory_gib=peak_memory,
        highest_tensors_gib=highest[1] / 2**30,
        highest_in=trace.part_at(highest[0]),
        losses=torch.stack(losses).tolist(),
    )
    if ranks.is_main:
        _write(report, trace, out)
    destroy_distributed()
    return report


def _profiler(ranks: Ranks) -> profile:
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if ranks.device.type == "cuda" else [])]
    return profile(activities=activities, profile_memory=True, record_shapes=True)


def _timed(trainer: Trainer, steps: int, losses: list[Tensor]) -> float:
    """Run steps and append their losses; return the seconds from the end of all earlier work to the end of theirs."""
    started = _now(trainer.ranks)
    for _ in range(steps):
        with record_function(STEP):
            losses.append(_mean_loss(trainer.train_step()))
    return _now(trainer.ranks) - started


def _mean_loss(step: list[MicroBatchMetrics]) -> Tensor:
    """Average the loss over this rank's micro batches of a step: float32 scalar on the device."""
    return torch.stack([micro.loss for micro in step]).mean()


def _now(ranks: Ranks) -> float:
    if ranks.device.type == "cuda":
        torch.cuda.synchronize(ranks.device)
    return time.perf_counter()


def _parts(trace: Trace, names: list[str], flops: dict[str, int], elapsed: float, steps: int) -> dict[str, PartFigures]:
    seen = {span.name for span in trace.parts}
    on_gpu = bool(trace.device_seconds)
    parts = {
        name: PartFigures(
            milliseconds=1000 * trace.seconds_of(name) / steps,
            device_milliseconds=1000 * trace.device_seconds.get(name, 0.0) / steps if on_gpu else None,
            flops=flops.get(name, 0),
        )
        for name in names
        if name in seen
    }
    rest = 1000 * elapsed / steps - sum(part.milliseconds for part in parts.values())
    return parts | {"loss and rest": PartFigures(rest, None, 0)}


def _collectives(spans: list[Span], steps: int) -> list[Operator]:
    by_name: dict[str, list[Span]] = defaultdict(list)
    for span in spans:
        by_name[span.name].append(span)
    operators = [
        Operator(name, len(same) / steps, 1000 * sum(span.seconds for span in same) / steps)
        for name, same in by_name.items()
    ]
    return sorted(operators, key=lambda operator: -operator.milliseconds)


def _operators(profiler: profile, annotations: set[str], steps: int) -> list[Operator]:
    """List the operators that take most time on the device, without annotations, collectives and bare kernels."""
    on_gpu = ProfilerActivity.CUDA in profiler.activities
    operators = []
    for average in profiler.key_averages():
        microseconds = average.self_device_time_total if on_gpu else average.self_cpu_time_total
        # Entries of the GPU are kernels, whose time the operator that launched them includes already.
        on_host = average.device_type.name == "CPU"
        if on_host and average.key not in annotations and not average.key.startswith(("gloo:", "nccl:")):
            operators.append(Operator(average.key, average.count / steps, microseconds / 1000 / steps))
    return sorted(operators, key=lambda operator: -operator.milliseconds)[:_OPERATORS]


def _write(report: ProfileReport, trace: Trace, out: Path) -> None:
    (out / "summary.json").write_text(report.to_json() + "\n", encoding="utf-8")
    (out / "summary.txt").write_text(report.to_text() + "\n", encoding="utf-8")
    label = "tensors on the GPU" if report.machine.device != "cpu" else "tensors allocated in these steps"
    title = f"{report.recipe}, {report.precision}, {report.clips_per_step} clips on {report.ranks} ranks: rank 0"
    plot_memory(trace, title, label, out / "memory.png")
