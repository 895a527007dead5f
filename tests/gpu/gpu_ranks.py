"""Run by every rank that `conftest.launch` starts: trains a tiny student on the device and writes down what happened.

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
    seen: dict[str, Any] = {"sum over ranks": sum_over_ranks(ranks)}
    for stage in ("zero1", "zero2", "zero3"):
        seen[f"fp32, {stage}"] = Run(ranks, stage, "fp32").losses()
    if device == "cuda":
        for stage in ("zero1", "zero2", "zero3"):
            seen[f"ahead, {stage}"] = Run(ranks, stage, "fp32").losses(ahead=True)
            seen[f"fp16, {stage}"] = Run(ranks, stage, "fp16").losses()
            seen[f"overflow, {stage}"] = Run(ranks, stage, "fp16").overflows()
        seen["sharded teachers"] = sharded_teachers(ranks, "fp16")
    Path(out, f"rank{ranks.rank}.json").write_text(json.dumps(seen))
    destroy_distributed()


class Run:
    """A tiny student with two teachers and a pixel branch."""

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
        """The micro batches of this rank."""
        micro, accumulation = self.recipe.micro_batch_and_accumulation(self.ranks.world_size)
        for step in steps:
            for turn in range(accumulation):
                first = (self.ranks.rank * accumulation + turn) * micro
                yield clips(step, first, micro, self.ranks.device, poisoned=poisoned)

    def trainer(self, batches: Iterator[ClipBatch], begin: BatchStarter | None = None) -> Trainer:
        """Makes steps of some micro batches."""
        return Trainer(
            self.model, TeacherPrefetcher(BatchLoader(batches), begin), self.schedule, self.recipe, self.ranks
        )

    def step(self, trainer: Trainer) -> float:
        """The loss of one optimizer step, mean over all ranks."""
        total = torch.stack([micro.loss for micro in trainer.train_step()]).mean()
        torch.distributed.all_reduce(total)
        return float(total) / self.ranks.world_size

    def losses(self, *, ahead: bool = False) -> list[float]:
        """Of some steps, with teachers at their place or ahead."""
        begin = None
        if ahead:
            begin = make_prefetcher(MaskedDistillation(self.targets), self.placement, self.ranks.device)
            assert begin is not None
        trainer = self.trainer(self.batches(range(STEPS)), begin)
        return [self.step(trainer) for _ in range(STEPS)]

    def overflows(self) -> dict[str, Any]:
        """What the loss scale and the weights do when gradients are not finite, and afterwards."""
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
        """A number that changes with any weight."""
        return float(sum(full.double().abs().sum() for _, full in full_parameters(self.engine)))


def sharded_teachers(ranks: Ranks, precision: str) -> dict[str, dict[str, float]]:
    """Features of sharded teachers beside those of the same ones whole and in float32 on the CPU."""
    made = placed(recipe("zero2", precision, "zero3", GLOBAL_BATCH), precision)
    here = build_targets(made, teacher)
    place_teachers(here, make_placement(made, here, ranks), ranks)
    seen = {}
    for name, whole in build_targets(made, teacher).items():
        sharded = here[name]
        if not isinstance(whole, FrozenTeacher) or not isinstance(sharded, FrozenTeacher):
            continue
        got = sharded.raw_features(clips(0, 0, GLOBAL_BATCH, ranks.device)).float().cpu()
        wanted = whole.raw_features(clips(0, 0, GLOBAL_BATCH, torch.device("cpu")))
        seen[name] = {
            "cosine": float(torch.nn.functional.cosine_similarity(got, wanted, dim=-1).min()),
            "error": float((got - wanted).norm() / wanted.norm()),
            "held": held_at_rest(sharded.teacher),
            "whole": sum(p.numel() for p in whole.teacher.parameters()),
        }
    return seen


def placed(made: Recipe, precision: str) -> Recipe:
    """For whichever device the ranks have joined on, teachers in the student's precision, decoders as on GPUs."""
    teachers = made.teachers.model_copy(update={"precision": precision})
    training = made.training.model_copy(update={"batch_decoders": "auto"})
    return made.model_copy(update={"device": "auto", "teachers": teachers, "training": training})


def clips(step: int, first: int, count: int, device: torch.device, *, poisoned: bool = False) -> ClipBatch:
    return global_batch(step, poisoned=poisoned).map(lambda tensor: tensor[first : first + count].to(device))


def sum_over_ranks(ranks: Ranks) -> float:
    value = torch.full((1000,), float(ranks.rank + 1), device=ranks.device)
    torch.distributed.all_reduce(value)
    return float(value.mean())


if __name__ == "__main__":
    main(*sys.argv[1:])
