"""Measurement of the roofline: in each round a step, a step under the profiler, and the machine's rates.

The speed of a machine that others use drifts. Step and rates of a round are measured within a minute or two, and the
report is of the round whose share of the limit is the median: all its figures are of the same minutes and add up.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function

from mvd_scale.config import Recipe
from mvd_scale.config.training import Precision
from mvd_scale.distributed.process_group import Ranks, destroy_distributed, init_distributed
from mvd_scale.errors import UserError
from mvd_scale.models import Student
from mvd_scale.models.precision import dtype_of
from mvd_scale.performance.bench_setup import bench_recipe, bench_trainer
from mvd_scale.performance.planning.workload import build_workload
from mvd_scale.performance.profiling.attribution import GRADIENTS, Place, attribute
from mvd_scale.performance.profiling.profile import Annotations
from mvd_scale.performance.profiling.trace import STEP, read_events
from mvd_scale.performance.report import this_machine
from mvd_scale.performance.roofline.calls import Call
from mvd_scale.performance.roofline.rates import Rate, RateMeter
from mvd_scale.performance.roofline.report import RooflineReport, make_rates, make_rows
from mvd_scale.performance.roofline.work import OPTIMIZER, Computing, Conditions, Work, step_work
from mvd_scale.targets.build import init_teacher
from mvd_scale.training.placement import teacher_precision
from mvd_scale.training.trainer import Trainer

_WARM_UP = 2


@dataclass(frozen=True)
class Round:
    """Measurements of one round on one rank."""

    plain: float
    """Seconds of a step without the profiler."""

    profiled: float
    """Seconds of a step under the profiler."""

    measured: Mapping[Place, float]
    """Seconds of that step by place."""

    rates: Mapping[Call, Rate]

    def limit(self, work: list[Work]) -> float:
        """Seconds of the work at the rates of this round."""
        return sum(one.count * self.rates[one.call].seconds for one in work)

    def share(self, work: list[Work]) -> float:
        """Share of the limit that the step without the profiler reaches."""
        return self.limit(work) / self.plain


def measure_roofline(
    name: str, overrides: list[str], *, precision: Precision | None = None, batch: int, rounds: int
) -> RooflineReport:
    """Compare the time of a recipe's step with its work at the rates of this machine. All ranks call it.

    Teachers have random weights and, on a GPU, run before the student and not beside it, so that times add up.

    Args:
        name: recipe, see `load_recipe`.
        overrides: dotted overrides; without `data.source` the clips of the `samples` extra are used.
        precision: precision of the student; fp16 on GPUs and float32 on CPUs if None.
        batch: clips per step over all ranks.
        rounds: number of rounds, each of two steps; two steps come before.

    Raises:
        UserError: the recipe has several students; see also `bench_recipe` and `bench_trainer`.
    """
    recipe = bench_recipe(name, overrides, precision, batch)
    if recipe.students:
        raise UserError(
            f"a roofline is that of one student, but {name} has students {', '.join(recipe.students)}: choose the "
            "recipe of one of them"
        )
    ranks = init_distributed(recipe.device, recipe.training.collective_timeout_minutes)
    workload, steps = build_workload(recipe), _WARM_UP + 2 * rounds
    with (
        tempfile.TemporaryDirectory() as scratch,
        bench_trainer(recipe, ranks, init_teacher, steps=steps, scratch=Path(scratch), prefetch=False) as trainer,
    ):
        groups = part_groups(trainer.models[0].engine.module)
        places = _annotate(trainer, groups)
        for _ in range(_WARM_UP):
            trainer.train_step()
        work = step_work(workload, _conditions(recipe, trainer, groups))
        meter = RateMeter((one.call for one in work), ranks.device)
        done = [_round(trainer, places, meter, Path(scratch)) for _ in range(rounds)]
    report = _report(name, overrides, recipe, ranks, work, done)
    destroy_distributed()
    return report


def part_groups(student: Student) -> dict[str, tuple[nn.Module, tuple[str, ...]]]:
    """List the parts of a student: for each name its module, and the names of the planner's parts that it computes."""
    groups: dict[str, tuple[nn.Module, tuple[str, ...]]] = {"encoder": (student.encoder, ("encoder",))}
    batched = set()
    for group in student.grouped_decoders:
        names = [name for name, _ in group.decoders]  # type: ignore[union-attr]
        groups[f"{' and '.join(names)} decoders"] = (group, tuple(f"{name} decoder" for name in names))
        batched.update(names)
    for name, decoder in student.decoders.items():
        if name not in batched:
            groups[f"{name} decoder"] = (decoder, (f"{name} decoder",))
    return groups | {f"{name} head": (head, (f"{name} head",)) for name, head in student.heads.items()}


def median_round(rounds: Sequence[Round], work: list[Work]) -> Round:
    """Return the round whose share of the limit is the median; the lower one of two."""
    shares = [one.share(work) for one in rounds]
    return rounds[shares.index(statistics.median_low(shares))]


def _annotate(trainer: Trainer, groups: Mapping[str, tuple[nn.Module, tuple[str, ...]]]) -> dict[str, Place]:
    """Attach annotations of all parts to the trainer, and return the place of each annotation."""
    annotations = Annotations()
    trainer.attach(annotations)
    for name, (module, _) in groups.items():
        annotations.watch(name, module)
    passes = ["student forward", *groups, *(f"{name} teacher" for name in trainer.models[0].objective.teachers)]
    return {
        "data wait": Place("data wait", "", "rest"),
        "backward": GRADIENTS,
        "optimizer": OPTIMIZER,
        "moving average": Place("moving average", "", "memory"),
        **{name: Place(name, "forward", "rest") for name in passes},
    }


def _conditions(
    recipe: Recipe, trainer: Trainer, groups: Mapping[str, tuple[nn.Module, tuple[str, ...]]]
) -> Conditions:
    kind = trainer.ranks.device.type
    eight_bit = teacher_precision(recipe, kind).value in ("int8", "fp8")  # type: ignore[arg-type]

    def computing(teacher: nn.Module) -> Computing:
        parameters = list(teacher.parameters())
        return Computing(
            dtype=parameters[0].dtype,
            eight_bit=eight_bit,
            activation_apart=not (eight_bit and kind == "cpu"),
            # Blocks of sharded teachers compute the whole batch, see `Blocks.forward`.
            in_passes=kind == "cpu" and not any(hasattr(parameter, "ds_id") for parameter in parameters),
        )

    return Conditions(
        clips=len(trainer.batch.pixels),
        student=Computing(dtype_of(recipe.training.precision)),
        teachers={f"{name} teacher": computing(model) for name, model in trainer.models[0].objective.teachers.items()},
        groups={name: members for name, (_, members) in groups.items()},
        accumulation=trainer.accumulation,
        ranks=trainer.ranks.world_size,
    )


def _round(trainer: Trainer, places: Mapping[str, Place], meter: RateMeter, scratch: Path) -> Round:
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if meter.device.type == "cuda" else [])]
    plain = _timed_step(trainer)
    with profile(activities=activities) as profiler:
        profiled = _timed_step(trainer)
    path = scratch / f"trace_rank{trainer.ranks.rank}.json.gz"
    profiler.export_chrome_trace(str(path))
    measured = attribute(read_events(path), places, profiled)
    # Ranks of one machine contend for its cores and memory here as in a step.
    torch.distributed.barrier()
    rates = meter.round()
    torch.distributed.barrier()
    return Round(plain, profiled, measured, rates)


def _timed_step(trainer: Trainer) -> float:
    started = _now(trainer.ranks.device)
    with record_function(STEP):
        trainer.train_step()
    return _now(trainer.ranks.device) - started


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _report(
    name: str, overrides: list[str], recipe: Recipe, ranks: Ranks, work: list[Work], done: list[Round]
) -> RooflineReport:
    chosen = median_round(done, work)
    return RooflineReport(
        machine=this_machine(ranks.device),
        recipe=name,
        overrides=overrides,
        precision=recipe.training.precision,
        teacher_precision=teacher_precision(recipe, ranks.device.type).value,  # type: ignore[arg-type]
        teacher_sharding=recipe.teachers.sharding,
        ranks=ranks.world_size,
        clips_per_step=recipe.training.global_batch,
        milliseconds_per_step=1000 * chosen.plain,
        profiled_milliseconds=1000 * chosen.profiled,
        limit_milliseconds=1000 * chosen.limit(work),
        share=chosen.share(work),
        shares=[one.share(work) for one in done],
        rows=make_rows(work, chosen.rates, chosen.measured),
        rates=make_rates(work, chosen.rates),
    )
