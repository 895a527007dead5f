"""Program of the ranks of stage (d): trains a tiny student on the device and appends a JSON line for each job.

python -m mvd_scale.performance.bringup.checks.zero_ranks DEVICE FOLDER JOB...    # `rank_group` starts it on every rank
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from mvd_scale.config import Recipe
from mvd_scale.data.batch import ClipBatch
from mvd_scale.distributed.process_group import Ranks, destroy_distributed, init_distributed
from mvd_scale.performance.batches import BatchLoader
from mvd_scale.performance.bench_setup import make_trainer
from mvd_scale.performance.bringup.checks.tiny import (
    GLOBAL_BATCH,
    global_batch,
    held_at_rest,
    tiny_recipe,
    tiny_teacher,
)
from mvd_scale.targets import FrozenTeacher, build_targets
from mvd_scale.training.capabilities import make_placement
from mvd_scale.training.deepspeed_engine import full_parameters
from mvd_scale.training.teachers.place import place_teachers
from mvd_scale.training.trainer import Trainer
from mvd_scale.utils.logging import configure_logging

STAGES = ("zero1", "zero2", "zero3")
STEPS, POISONED = 6, 3

Job = Callable[[Ranks], Any]
"""Function whose result, serialisable as JSON, a rank writes down."""


def jobs() -> dict[str, Job]:
    """Return all jobs by name, in their order of value."""
    made: dict[str, Job] = {"sum over ranks": sum_over_ranks}
    made |= {f"fp32, {stage}": partial(losses, stage=stage, precision="fp32") for stage in STAGES}
    made |= {f"fp16, {stage}": partial(losses, stage=stage, precision="fp16") for stage in STAGES}
    made |= {"sharded teachers": partial(sharded_teachers, precision="fp16")}
    made |= {f"overflow, {stage}": partial(overflows, stage=stage) for stage in STAGES}
    made |= {f"ahead, {stage}": partial(losses, stage=stage, precision="fp32", ahead=True) for stage in STAGES}
    return made


def jobs_of(device: str) -> list[str]:
    """Return the names of the jobs that a device can do: a CPU computes neither in fp16 nor beside the student."""
    return [name for name in jobs() if device == "cuda" or name.startswith(("sum", "fp32"))]


def main(device: str, folder: str, *names: str) -> None:
    """Do the jobs of some names on this rank."""
    configure_logging()
    ranks = init_distributed(device, timeout_minutes=3)
    with Path(folder, f"rank{ranks.rank}.jsonl").open("a", encoding="utf-8") as file:
        for name in names:
            file.write(json.dumps({"job": name, "result": jobs()[name](ranks)}) + "\n")
            file.flush()
    destroy_distributed()


def losses(ranks: Ranks, stage: str, precision: str, *, ahead: bool = False) -> list[float]:
    """Run `STEPS` steps and return their losses; with `ahead`, teachers compute features one batch in advance."""
    run = TinyRun(ranks, stage, precision)
    trainer = run.trainer(range(STEPS), ahead=ahead)
    return [run.step(trainer) for _ in range(STEPS)]


def overflows(ranks: Ranks, stage: str) -> dict[str, Any]:
    """Run steps with gradients that are not finite, and one finite step; return loss scales and weight changes."""
    run, poisoned = TinyRun(ranks, stage, "fp16"), range(2, 2 + POISONED)
    trainer = run.trainer(range(poisoned.stop + 1), poisoned)
    (model,) = trainer.models
    engine = model.engine
    run.step(trainer)
    run.step(trainer)
    scales, before = [float(engine.optimizer.loss_scale)], weights(engine)
    for _ in poisoned:
        run.step(trainer)
        scales.append(float(engine.optimizer.loss_scale))
    skipped, during = engine.skipped_steps, weights(engine)
    loss = run.step(trainer)
    return {
        "scales": scales,
        "skipped": skipped,
        "moved by overflows": before != during,
        "moves afterwards": weights(engine) != during,
        "loss afterwards": loss,
    }


def sharded_teachers(ranks: Ranks, precision: str) -> dict[str, dict[str, float]]:
    """Compare features of sharded teachers with those of the same teachers, unsharded and in float32 on the CPU."""
    config = placed(tiny_recipe("zero2", precision, "zero3", GLOBAL_BATCH), precision)
    sharded_targets = build_targets(config, tiny_teacher)
    place_teachers(sharded_targets, make_placement(config, sharded_targets, ranks), ranks)
    results = {}
    for name, whole in build_targets(config, tiny_teacher).items():
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


def sum_over_ranks(ranks: Ranks) -> float:
    """Sum rank + 1 over all ranks."""
    value = torch.full((1000,), float(ranks.rank + 1), device=ranks.device)
    torch.distributed.all_reduce(value)
    return float(value.mean())


class TinyRun:
    """Training of a tiny student with two teachers and a pixel target.

    Args:
        ranks: this process among all.
        stage: DeepSpeed file of the student.
        precision: precision of student and teachers.
    """

    def __init__(self, ranks: Ranks, stage: str, precision: str) -> None:
        self.ranks = ranks
        self.recipe = placed(tiny_recipe(stage, precision, "zero3", _micro_batch(ranks)), precision)

    def trainer(self, steps: Iterable[int], poisoned: range = range(0), *, ahead: bool = False) -> Trainer:
        """Create a trainer over the micro batches of this rank for some steps, of which some are poisoned."""
        targets = build_targets(self.recipe, tiny_teacher)
        torch.manual_seed(0)
        batches = chain.from_iterable(self._batches(step, poisoned=step in poisoned) for step in steps)
        return make_trainer(self.recipe, {"": targets}, self.ranks, BatchLoader(batches), prefetch=ahead)

    def step(self, trainer: Trainer) -> float:
        """Run one optimizer step and return its loss, averaged over all ranks."""
        total = torch.stack([micro.loss for micro in trainer.train_step()]).mean()
        torch.distributed.all_reduce(total)
        return float(total) / self.ranks.world_size

    def _batches(self, step: int, *, poisoned: bool) -> Iterator[ClipBatch]:
        micro, accumulation = self.recipe.micro_batch_and_accumulation(self.ranks.world_size)
        for turn in range(accumulation):
            first = (self.ranks.rank * accumulation + turn) * micro
            yield clips(step, first, micro, self.ranks.device, poisoned=poisoned)


def placed(base: Recipe, precision: str) -> Recipe:
    """Copy a recipe with automatic device and decoder batching, and with teachers in the student's precision."""
    teachers = base.teachers.model_copy(update={"precision": precision})
    training = base.training.model_copy(update={"batch_decoders": "auto"})
    return base.model_copy(update={"device": "auto", "teachers": teachers, "training": training})


def clips(step: int, first: int, count: int, device: torch.device, *, poisoned: bool = False) -> ClipBatch:
    """Return a part of a global batch on a device."""
    return global_batch(step, poisoned=poisoned).map(lambda tensor: tensor[first : first + count].to(device))


def weights(engine: Any) -> float:
    """Sum the absolute values of all weights, a number that changes with any weight. All ranks call it."""
    return float(sum(full.double().abs().sum() for _, full in full_parameters(engine)))


def _micro_batch(ranks: Ranks) -> int:
    """Clips of a micro batch: two micro batches a step, as far as the clips of a step suffice."""
    return max(GLOBAL_BATCH // 2 // ranks.world_size, 1)


if __name__ == "__main__":
    main(*sys.argv[1:])
