"""Stage (e): training steps from random pixels on one GPU, beside what `mvd-scale plan` predicts. Needs DeepSpeed.

Placement, engine, teachers and trainer are those of a run; only the loader is replaced.
"""

from __future__ import annotations

import gc
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from math import isfinite
from pathlib import Path
from unittest import mock

import torch

from mvd_kernels import attention_backend
from mvd_kernels.bench.limits import product_flops
from mvd_scale.config import Recipe
from mvd_scale.config.training import Precision
from mvd_scale.distributed.process_group import Ranks, destroy_distributed, init_distributed
from mvd_scale.errors import UserError
from mvd_scale.models import Student
from mvd_scale.models.precision import dtype_of
from mvd_scale.performance.batches import random_batches
from mvd_scale.performance.bench_setup import bench_recipe, make_trainer
from mvd_scale.performance.bringup.session import Check, LeftOut, Session
from mvd_scale.performance.planning.hardware import GIB, known_gpu
from mvd_scale.performance.planning.plan import Plan, make_cluster, make_plan
from mvd_scale.performance.planning.video_decoding import VideoFormat
from mvd_scale.targets import build_targets
from mvd_scale.targets.build import init_teacher
from mvd_scale.targets.load import teacher_input_sizes
from mvd_scale.training.trainer import Trainer
from mvd_scale.utils.logging import configure_logging
from mvd_scale.utils.memory import peak_memory_gib

_WARM_UP = 2
"""Steps after the first one, in which loss scales settle and buffers get their sizes, before the timed ones."""

_TIMED, _SECONDS = 20, 2.0
"""Largest number of timed steps, and the seconds after which no other one begins."""

_SYNCHRONIZES = "called a synchronizing CUDA operation"
"""Warning of torch in its synchronisation debug mode."""


@dataclass(frozen=True)
class StepCase:
    """A step to measure."""

    recipe: str
    micro_batch: int
    precision: Precision = "fp16"

    teachers: str = "auto"
    """`teachers.precision`."""

    sdpa: bool = False
    """Whether flash-attn is left aside although it is installed."""

    def __str__(self) -> str:
        teachers = "" if self.teachers == "auto" else f", teachers {self.teachers}"
        return f"{self.recipe}, {self.micro_batch} clips, {self.precision}{teachers}{', SDPA' if self.sdpa else ''}"

    def overrides(self) -> list[str]:
        """Return the overrides of the recipe, except those of batch and precision."""
        # One rank has nobody to share weights with.
        return ["--teachers.precision", self.teachers, "--teachers.sharding", "auto"]

    def load(self) -> Recipe:
        """Load the recipe."""
        return bench_recipe(self.recipe, self.overrides(), self.precision, self.micro_batch)


B, L, H = "distill/b_from_b", "distill/l_from_l", "distill/h_from_h"

CASES = (
    StepCase(B, 16),
    StepCase(L, 16),
    StepCase(H, 16),
    StepCase(B, 16, teachers="fp8"),
    StepCase(B, 64),
    StepCase(H, 64),
    StepCase(B, 16, "bf16"),
    StepCase(B, 16, sdpa=True),
    StepCase(L, 64),
    StepCase(B, 4),
    StepCase(L, 4),
    StepCase(H, 4),
)
"""Steps in their order of value: what does not fit into the time of the stage is left out."""

SMALL = (StepCase("quickstart/student", 4, "fp32"), StepCase("quickstart/student", 2, "bf16", sdpa=True))
"""Steps of a dry run."""

_EXPECTED = {B: 35.0, L: 45.0, H: 60.0}
"""Expected seconds of a step's check, mostly compilation, by recipe."""


def run(session: Session) -> None:
    """Make the checks of the stage."""
    configure_logging()
    setting = Setting(init_distributed(session.device, timeout_minutes=3))
    for case in SMALL if session.small else CASES:
        session.check(str(case), partial(measure, case=case, setting=setting), _EXPECTED.get(case.recipe, 10.0))
    destroy_distributed()


class Setting:
    """Device of the steps, and the measured peaks of its matrix products.

    Args:
        ranks: this process, which is the only rank.
    """

    def __init__(self, ranks: Ranks) -> None:
        self.ranks, self.device = ranks, ranks.device
        self._peaks: dict[Precision, float] = {}

    def peak(self, precision: Precision) -> float:
        """Return the FLOP/s of matrix products, which are measured once for each precision."""
        if precision not in self._peaks:
            self._peaks[precision] = product_flops(self.device, dtype_of(precision))
        return self._peaks[precision]

    @property
    def gpu(self) -> str | None:
        """Name of the GPU in the planner's table; None if it is not there."""
        gpu = known_gpu(torch.cuda.get_device_name(self.device)) if self.device.type == "cuda" else None
        return None if gpu is None else gpu.name


def measure(check: Check, case: StepCase, setting: Setting) -> None:
    """Measure a step: speed, memory, and the operations that make the host wait for the GPU."""
    device = setting.device
    backend = attention_backend(device, dtype_of(case.precision))
    if case.sdpa and device.type == "cuda" and not backend.startswith("flash"):
        raise LeftOut(f"{backend} is what the other cases use: flash-attn is not installed, or not for this GPU")
    release()
    try:
        recipe, plan = case.load(), plan_of(case, setting.gpu, backend)
        with sdpa_alone() if case.sdpa else nullcontext():
            _measure(check, recipe, plan, setting)
    except UserError as error:
        raise LeftOut(str(error)) from error


def plan_of(case: StepCase, gpu: str | None, backend: str) -> Plan:
    """Predict a step on one GPU; on an H200 if `gpu` is None, for the FLOPs.

    Raises:
        LeftOut: the step does not fit in the GPU's memory.
        UserError: not even one clip fits, or the GPU does not support a precision.
    """
    attention = "flash-attn" if backend.startswith("flash") and not case.sdpa else "sdpa"
    name = gpu or "H200"
    cluster = make_cluster(name, 1, 1, attention=attention, efficiency=None, video=VideoFormat(), videos=10_000)
    batch = str(case.micro_batch)
    words = ["--training.precision", case.precision, "--training.micro_batch", batch, "--training.global_batch", batch]
    plan = make_plan(case.recipe, [*case.overrides(), *words], cluster)
    if plan.parallel.micro < case.micro_batch:
        raise LeftOut(f"{case.micro_batch} clips do not fit in the memory of one {name}, as `mvd-scale plan` says")
    return plan


def _measure(check: Check, recipe: Recipe, plan: Plan, setting: Setting) -> None:
    device, batch = setting.device, recipe.training.global_batch
    peak = setting.peak(recipe.training.precision)
    if device.type == "cuda":
        check.figure("held before, GiB", torch.cuda.memory_allocated(device) / GIB)
    started = time.perf_counter()
    trainer = make_random_trainer(recipe, setting.ranks)
    try:
        losses = [step_loss(trainer)]
        _wait(device)
        check.figure("until the first step, s", time.perf_counter() - started)
        if device.type == "cuda":
            # Without the building of the models, whose weights are in float32 until they have their place.
            torch.cuda.reset_peak_memory_stats(device)
        losses += [step_loss(trainer) for _ in range(_WARM_UP)]
        speed = batch / time_steps(trainer, device)
        with counted_syncs(device) as syncs:
            losses.append(step_loss(trainer))
    finally:
        for model in trainer.models:
            model.engine.destroy()
    flops = speed * sum(part.forward + part.backward for part in plan.flops)
    known = setting.gpu is not None
    check.figure("clips/s", speed)
    check.figure("plan: clips/s", plan.decode_needed if known else "no such GPU")
    check.figure("TFLOP/s", flops / 1e12)
    check.figure("share of products", flops / peak)
    check.figure("peak, GiB", peak_memory_gib(device))
    check.figure("plan: peak, GiB", plan.memory.peak / GIB if known else "no such GPU")
    check.figure("waits of the host", sum(syncs.values()) if device.type == "cuda" else "no GPU")
    check.figure("most of them in", ", ".join(f"{place} ({count})" for place, count in syncs.most_common(3)))
    values = [float(loss) for loss in losses]
    check.expect(all(map(isfinite, values)), f"the losses are finite: {values}")


def make_random_trainer(recipe: Recipe, ranks: Ranks) -> Trainer:
    """Create the trainer of a recipe over random pixels, with models of random weights that are built on the device."""
    torch.manual_seed(recipe.seed)
    micro, _ = recipe.micro_batch_and_accumulation(ranks.world_size)
    with ranks.device:
        targets = build_targets(recipe, lambda name: init_teacher(recipe, name))
        student = Student.from_recipe(recipe, targets)
    batches = random_batches(recipe, micro, ranks.device, teacher_input_sizes(recipe, targets))
    return make_trainer(recipe, {"": targets}, ranks, batches, student=student)


def step_loss(trainer: Trainer) -> torch.Tensor:
    """Run a step and return its loss, float32 scalar on the device."""
    return torch.stack([micro.loss for micro in trainer.train_step()]).mean()


def time_steps(trainer: Trainer, device: torch.device) -> float:
    """Measure the seconds of a step: the mean over as many as fit into `_SECONDS`, `_TIMED` at most."""
    _wait(device)
    started = time.perf_counter()
    trainer.train_step()
    _wait(device)
    steps = min(max(int(_SECONDS / (time.perf_counter() - started)), 1), _TIMED)
    started = time.perf_counter()
    for _ in range(steps):
        trainer.train_step()
    _wait(device)
    return (time.perf_counter() - started) / steps


@contextmanager
def counted_syncs(device: torch.device) -> Iterator[Counter[str]]:
    """Count the operations in a `with` block that make the host wait for the GPU, by file and line of their call.

    Explicit waits for events and streams are not among them. The counter is filled at the end of the block.
    """
    counted: Counter[str] = Counter()
    if device.type != "cuda":
        yield counted
        return
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield counted
        finally:
            torch.cuda.set_sync_debug_mode("default")
    for warning in caught:
        if _SYNCHRONIZES in str(warning.message):
            file = Path(warning.filename)
            counted[f"{file.parent.name}/{file.name}:{warning.lineno}"] += 1


@contextmanager
def sdpa_alone() -> Iterator[None]:
    """Let attention leave flash-attn aside in a `with` block."""
    # By name: the package exports the function of the same name as the module.
    with mock.patch.object(import_module("mvd_kernels.attention"), "FLASH_ATTENTION_RELEASES", ()):
        yield


def release() -> None:
    """Free what earlier steps hold, also ones that failed: memory, and compiled programs, whose number is limited."""
    torch.compiler.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
