"""`mvd-scale bench step`: where the time of an optimizer step goes."""

from __future__ import annotations

import dataclasses
import json
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mvd_scale.config import DataConfig, MomentumTarget, Recipe, TimmTarget, load_recipe
from mvd_scale.config.target import TrainedTeacherTarget
from mvd_scale.config.training import Precision
from mvd_scale.data.index import open_source
from mvd_scale.data.loader import ClipLoader
from mvd_scale.data.samples import make_samples
from mvd_scale.errors import UserError
from mvd_scale.models import Encoder, Student
from mvd_scale.models.timm_vit import TimmViT
from mvd_scale.targets import FrozenTeacher, MaskedDistillation, Target, build_targets
from mvd_scale.targets.load import empty_average, teacher_sides
from mvd_scale.training.engine import Ranks, host_teachers, join_ranks, leave_ranks, train_engine
from mvd_scale.training.metrics import peak_memory_gib
from mvd_scale.training.momentum import moving_averages, start_averages
from mvd_scale.training.optim import parameter_groups
from mvd_scale.training.schedule import Schedule

_WARM_UP = 2


@dataclasses.dataclass(frozen=True)
class StepReport:
    """Mean of the timed steps. Parts are milliseconds of one step on rank 0."""

    recipe: str
    device: str
    precision: str
    teacher_sharding: str
    ranks: int
    threads: int
    clips_per_step: int
    steps: int
    milliseconds: dict[str, float]
    milliseconds_per_step: float
    clips_per_second: float
    peak_memory_gib: float
    torch: str

    def to_json(self) -> str:
        """All fields, one object."""
        return json.dumps(dataclasses.asdict(self), indent=2)

    def to_text(self) -> str:
        """A table of parts with their shares."""
        head = (
            f"{self.recipe} on {self.device}, {self.precision}, teachers {self.teacher_sharding}, "
            f"{self.ranks} ranks x {self.threads} threads, {self.clips_per_step} clips a step, "
            f"mean of {self.steps} steps, torch {self.torch}"
        )
        rows = [
            f"  {part:<20}{spent:>12.1f} ms{spent / self.milliseconds_per_step:>8.1%}"
            for part, spent in self.milliseconds.items()
        ]
        foot = (
            f"  {'step':<20}{self.milliseconds_per_step:>12.1f} ms{1:>8.1%}\n"
            f"  {self.clips_per_second:.3f} clips/s, peak memory {self.peak_memory_gib:.2f} GiB a rank"
        )
        return "\n".join([head, *rows, foot])


class Stopwatch:
    """Seconds by part; on a GPU each part ends with a synchronisation, so parts do not overlap while measured."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: dict[str, float] = defaultdict(float)
        self._started: dict[str, float] = {}

    def now(self) -> float:
        """Seconds, after everything asked of the device is done."""
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
        name: recipe, as for `load_recipe`.
        precision: of the student; fp16 on GPUs and float32 on CPUs if None.
        overrides: dotted overrides; without `data.source` the clips of the `samples` extra are used.
        batch: clips of a step over all ranks.
        steps: timed steps, after two that are not.
    """
    precision = precision or ("fp16" if torch.cuda.is_available() else "fp32")
    overrides = ["--training.precision", precision, "--training.micro_batch", "null", *overrides]
    recipe = load_recipe(name, [*overrides, "--training.global_batch", str(batch)])
    ranks = join_ranks(recipe.device, recipe.training.collective_timeout_minutes)
    with tempfile.TemporaryDirectory() as scratch:
        report = _measure(recipe, ranks, name, batch, steps, Path(scratch))
    leave_ranks()
    return report


def _measure(recipe: Recipe, ranks: Ranks, name: str, batch: int, steps: int, scratch: Path) -> StepReport:
    watch = Stopwatch(ranks.device)
    engine, objective = _build(recipe, ranks, watch)
    averages = moving_averages(objective.targets, engine, Schedule(recipe.training, 1, recipe.lr_batch), ranks)
    micro, accumulation = recipe.batch_split(ranks.world_size)
    loader = ClipLoader(
        open_source(with_clips(recipe.data, scratch), scratch),
        recipe.data.model_copy(update={"clips_per_video": max(batch, recipe.data.clips_per_video)}),
        recipe.model,
        recipe.seed,
        global_batch=batch,
        micro_batch=micro,
        rank=ranks.rank,
        world_size=ranks.world_size,
        device=ranks.device,
        start_step=0,
        total_steps=_WARM_UP + steps,
        sides=teacher_sides(recipe, dict(objective.targets)),
        report=None,
    )
    with loader:
        batches = iter(loader)
        for done in range(_WARM_UP + steps):
            if done == _WARM_UP:
                watch.seconds.clear()
                started = watch.now()
            for _ in range(accumulation):
                with watch.part("data wait"):
                    clips = next(batches)
                loss, _ = objective(engine, clips)
                with watch.part("backward"):
                    engine.backward(loss)
                with watch.part("optimizer"):
                    engine.step()
            for average in averages:
                with watch.part("moving average"):
                    average.update(done)
        elapsed = watch.now() - started
    order = ["data wait", *(f"{target} teacher" for target in objective.targets), "student forward"]
    parts = {
        part: watch.seconds[part]
        for part in [*order, "backward", "optimizer", "moving average"]
        if part in watch.seconds
    }
    parts["loss and rest"] = elapsed - sum(parts.values())
    return StepReport(
        recipe=name,
        device=str(ranks.device),
        precision=recipe.training.precision,
        teacher_sharding=recipe.teachers.sharding,
        ranks=ranks.world_size,
        threads=torch.get_num_threads(),
        clips_per_step=batch,
        steps=steps,
        milliseconds={part: 1000 * seconds / steps for part, seconds in parts.items()},
        milliseconds_per_step=1000 * elapsed / steps,
        clips_per_second=batch * steps / elapsed,
        peak_memory_gib=peak_memory_gib(ranks.device),
        torch=torch.__version__,
    )


def with_clips(data: DataConfig, scratch: Path) -> DataConfig:
    """The recipe's videos; without any, the clips of the `samples` extra."""
    if data.source is not None or data.mixture is not None:
        return data
    return data.model_copy(update={"source": str(make_samples(scratch / "clips"))})


def _build(recipe: Recipe, ranks: Ranks, watch: Stopwatch) -> tuple[Any, MaskedDistillation]:
    torch.manual_seed(recipe.seed)
    targets: dict[str, Target] = build_targets(recipe, lambda name: random_teacher(recipe, name))
    student = Student(
        recipe.model, {name: (recipe.targets[name].head_config, target.channels) for name, target in targets.items()}
    )
    start_averages(targets, student)
    host_teachers(targets, recipe, ranks)
    for name, target in targets.items():
        if isinstance(target, FrozenTeacher):
            watch.watch(f"{name} teacher", target.teacher)
    engine = train_engine(student, parameter_groups(student, recipe.training.weight_decay), recipe, ranks)
    watch.watch("student forward", engine)
    return engine, MaskedDistillation(targets)


def random_teacher(recipe: Recipe, name: str) -> Encoder | TimmViT:
    """The frozen model of a target by its shape alone.

    Raises:
        UserError: the recipe does not say its shape.
    """
    config = recipe.targets[name]
    if isinstance(config, TimmTarget):
        return TimmViT(config.vit, recipe.model.grid[1], final_norm=config.final_norm, pretrained=False)
    if isinstance(config, MomentumTarget):
        return empty_average(recipe)
    assert isinstance(config, TrainedTeacherTarget)
    if config.model is None:
        raise UserError(f"targets.{name}.model is missing: a benchmark builds its teachers from their shape")
    return Encoder(config.model, final_norm=False)
