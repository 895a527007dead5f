"""Program of the ranks that `conftest.launch` starts: trains a tiny student on the device and writes results as JSON.

torchrun --standalone --nproc_per_node N -m tests.gpu.gpu_ranks DEVICE OUT
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from mvd_scale.config import Recipe
from mvd_scale.data.batch import ClipBatch
from mvd_scale.distributed.process_group import Ranks, destroy_distributed, init_distributed
from mvd_scale.models import Student
from mvd_scale.targets import FrozenTeacher, MaskedDistillation, build_targets
from mvd_scale.training.capabilities import make_placement
from mvd_scale.training.deepspeed_engine import full_parameters
from mvd_scale.training.distillation import distillation_model
from mvd_scale.training.lr_schedule import Schedule
from mvd_scale.training.teachers.place import place_teachers
from mvd_scale.training.teachers.prefetch import BatchStarter, TeacherPrefetcher, make_prefetcher
from mvd_scale.training.trainer import Trainer

from ..batches import BatchLoader
from ..distributed.zero_ranks import GLOBAL_BATCH, global_batch, held_at_rest, recipe, teacher

STEPS, POISONED = 6, 3


def main(device: str, out: str) -> None:
    ranks = init_distributed(device, timeout_minutes=3)
    results: dict[str, Any] = {"sum over ranks": sum_over_ranks(ranks)}
    for stage in ("zero1", "zero2", "zero3"):
        results[f"fp32, {stage}"] = Run(ranks, stage, "fp32").losses()
    if device == "cuda":
        for stage in ("zero1", "zero2", "zero3"):
            results[f"ahead, {stage}"] = Run(ranks, stage, "fp32").losses(ahead=True)
            results[f"fp16, {stage}"] = Run(ranks, stage, "fp16").losses()
            results[f"overflow, {stage}"] = Run(ranks, stage, "fp16").overflows()
        results["sharded teachers"] = sharded_teachers(ranks, "fp16")
    Path(out, f"rank{ranks.rank}.json").write_text(json.dumps(results))
    destroy_distributed()


class Run:
    """Training of a tiny student with two teachers and a pixel target."""

    def __init__(self, ranks: Ranks, stage: str, precision: str) -> None:
        self.ranks = ranks
        self.recipe = placed(recipe(stage, precision, "zero3", GLOBAL_BATCH // 2), precision)
        self.targets = build_targets(self.recipe, teacher)
        torch.manual_seed(0)
        student = Student.from_recipe(self.recipe, self.targets)
        self.schedule = Schedule(self.recipe.training, 1, self.recipe.lr_batch)
        self.placement = make_placement(self.recipe, self.targets, ranks)
        self.model = distillation_model(student, self.targets, self.recipe, self.placement, ranks, self.schedule)
        self.engine = self.model.engine

    def batches(self, steps: Iterable[int], *, poisoned: bool = False) -> Iterator[ClipBatch]:
        """Yield the micro batches of this rank for some steps; poisoned ones give gradients that are not finite."""
        micro, accumulation = self.recipe.micro_batch_and_accumulation(self.ranks.world_size)
        for step in steps:
            for turn in range(accumulation):
                first = (self.ranks.rank * accumulation + turn) * micro
                yield clips(step, first, micro, self.ranks.device, poisoned=poisoned)

    def trainer(self, batches: Iterator[ClipBatch], begin: BatchStarter | None = None) -> Trainer:
        """Create a trainer that takes its micro batches from `batches`."""
        return Trainer(
            self.model, TeacherPrefetcher(BatchLoader(batches), begin), self.schedule, self.recipe, self.ranks
        )

    def step(self, trainer: Trainer) -> float:
        """Run one optimizer step and return its loss, averaged over all ranks."""
        total = torch.stack([micro.loss for micro in trainer.train_step()]).mean()
        torch.distributed.all_reduce(total)
        return float(total) / self.ranks.world_size

    def losses(self, *, ahead: bool = False) -> list[float]:
        """Run `STEPS` steps and return their losses; with `ahead`, teachers compute features one batch in advance."""
        begin = None
        if ahead:
            begin = make_prefetcher(MaskedDistillation(self.targets), self.placement, self.ranks.device)
            assert begin is not None
        trainer = self.trainer(self.batches(range(STEPS)), begin)
        return [self.step(trainer) for _ in range(STEPS)]

    def overflows(self) -> dict[str, Any]:
        """Run steps with gradients that are not finite, and one finite step; return loss scales and weight changes."""
        poisoned = range(2, 2 + POISONED)
        trainer = self.trainer(
            chain(self.batches(range(2)), self.batches(poisoned, poisoned=True), self.batches([poisoned.stop]))
        )
        self.step(trainer)
        self.step(trainer)
        scales, before = [float(self.engine.optimizer.loss_scale)], self.weights()
        for _ in poisoned:
            self.step(trainer)
            scales.append(float(self.engine.optimizer.loss_scale))
        skipped, during = self.engine.skipped_steps, self.weights()
        loss = self.step(trainer)
        return {
            "scales": scales,
            "skipped": skipped,
            "moved by overflows": before != during,
            "moves afterwards": self.weights() != during,
            "loss afterwards": loss,
        }

    def weights(self) -> float:
        """Sum the absolute values of all weights, a number that changes with any weight."""
        return float(sum(full.double().abs().sum() for _, full in full_parameters(self.engine)))


def sharded_teachers(ranks: Ranks, precision: str) -> dict[str, dict[str, float]]:
    """Compare features of sharded teachers with those of the same teachers, unsharded and in float32 on the CPU."""
    config = placed(recipe("zero2", precision, "zero3", GLOBAL_BATCH), precision)
    sharded_targets = build_targets(config, teacher)
    place_teachers(sharded_targets, make_placement(config, sharded_targets, ranks), ranks)
    results = {}
    for name, whole in build_targets(config, teacher).items():
        sharded = sharded_targets[name]
        if not isinstance(whole, FrozenTeacher) or not isinstance(sharded, FrozenTeacher):
            continue
        features = sharded.raw_features(clips(0, 0, GLOBAL_BATCH, ranks.device)).float().cpu()
        expected = whole.raw_features(clips(0, 0, GLOBAL_BATCH, torch.device("cpu")))
        results[name] = {
            "cosine": float(torch.nn.functional.cosine_similarity(features, expected, dim=-1).min()),
            "error": float((features - expected).norm() / expected.norm()),
            "held": held_at_rest(sharded.teacher),
            "whole": sum(p.numel() for p in whole.teacher.parameters()),
        }
    return results


def placed(base: Recipe, precision: str) -> Recipe:
    """Copy a recipe with automatic device and decoder batching, and with teachers in the student's precision."""
    teachers = base.teachers.model_copy(update={"precision": precision})
    training = base.training.model_copy(update={"batch_decoders": "auto"})
    return base.model_copy(update={"device": "auto", "teachers": teachers, "training": training})


def clips(step: int, first: int, count: int, device: torch.device, *, poisoned: bool = False) -> ClipBatch:
    return global_batch(step, poisoned=poisoned).map(lambda tensor: tensor[first : first + count].to(device))


def sum_over_ranks(ranks: Ranks) -> float:
    value = torch.full((1000,), float(ranks.rank + 1), device=ranks.device)
    torch.distributed.all_reduce(value)
    return float(value.mean())


if __name__ == "__main__":
    main(*sys.argv[1:])
