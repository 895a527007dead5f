"""Run by every rank of test_memory.py: steps of a small student whose allocations are all recorded.

Prints what the rank held at most, in bytes, from the second step on: optimizer states come with the first.
"""

from __future__ import annotations

import json
import sys
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile, record_function

from mvd_scale.config import Recipe
from mvd_scale.data.batch import ClipBatch
from mvd_scale.data.sampling import draw_mask
from mvd_scale.models import Student
from mvd_scale.performance.rehearsal import random_teacher
from mvd_scale.targets import MaskedDistillation, build_targets
from mvd_scale.training.engine import host_teachers, train_engine
from mvd_scale.training.optim import parameter_groups
from mvd_scale.training.ranks import Ranks, join_ranks, leave_ranks

VIDEO: dict[str, Any] = {"size": "S", "frames": 8, "input_size": 96}
IMAGE = {**VIDEO, "frames": 1, "tubelet": 1, "positions": "sincos2d", "class_token": True}
DECODER = {"width": 384, "depth": 2, "heads": 6}
STEPS = 2


def recipe(case: dict[str, Any]) -> Recipe:
    return Recipe.model_validate(
        {
            "run": {"folder": "unused"},
            "device": "cpu",
            "model": VIDEO,
            "data": {"mask": {"ratio": 0.9}},
            "targets": {
                "image": {"kind": "image_teacher", "model": IMAGE, "decoder": DECODER},
                "video": {"kind": "video_teacher", "model": VIDEO, "decoder": DECODER},
            },
            "teachers": {"sharding": case["teachers"]},
            "training": {
                "epochs": 2,
                "global_batch": case["micro"] * case["accumulation"] * case["world"],
                "micro_batch": case["micro"],
                "base_lr": 1e-4,
                "warmup_epochs": 1,
                "deepspeed": case["deepspeed"],
                "gradient_checkpointing": case["checkpointing"],
                "batch_decoders": case["batched"],
            },
        }
    )


def clips(made: Recipe, micro: int) -> ClipBatch:
    drawn = [draw_mask(np.random.default_rng(k), made.data.mask, made.model.grid) for k in range(micro)]
    visible, masked = (torch.from_numpy(np.stack(tokens)) for tokens in zip(*drawn, strict=True))
    side = made.model.input_size
    pixels = torch.randint(0, 256, (micro, made.model.frames, side, side, 3), dtype=torch.uint8)
    return ClipBatch(pixels, visible, masked, torch.zeros(micro), torch.zeros(micro))


def train(made: Recipe, ranks: Ranks) -> Any:
    targets = build_targets(made, lambda name: random_teacher(made, name))
    student = Student(made.model, {n: (made.targets[n].head_config, t.channels) for n, t in targets.items()})
    host_teachers(targets, made, ranks)
    engine = train_engine(student, parameter_groups(student, 0.05), made, ranks)
    objective, (micro, accumulation) = MaskedDistillation(targets), made.batch_split(ranks.world_size)
    for step in range(STEPS):
        with record_function(f"step {step}"):
            for _ in range(accumulation):
                loss, _ = objective(engine, clips(made, micro))
                engine.backward(loss)
                engine.step()
    return engine, targets


def held_from(profiler: profile, mark: str) -> tuple[int, int]:
    """Bytes that are held when a mark is reached, and the most from there on."""
    events = profiler.profiler.kineto_results.events()
    reached = next(event.start_ns() for event in events if event.name() == mark)
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    held = list(accumulate(change for _, change in changes))
    before = sum(moment < reached for moment, _ in changes)
    return held[before - 1], max(held[before - 1 :])


def main(case: dict[str, Any]) -> None:
    ranks = join_ranks("cpu", timeout_minutes=2)
    # From before the models are built, so that nothing is missed.
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        kept = train(recipe(case), ranks)
    _, peak = held_from(profiler, "step 1")
    del kept
    leave_ranks()
    print(json.dumps({"peak": peak}))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
