"""Run by every rank of test_memory.py: steps of a small student whose allocations are all recorded.

Prints what the rank held at most, in bytes, from the second step on: optimizer states come with the first. With
`fake`, this process is rank 0 of so many ranks whose collectives do nothing: shards have their sizes, but values
that other ranks would send are those that were in the memory.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from itertools import accumulate, count
from typing import Any

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile, record_function
from torch.testing._internal.distributed import fake_pg

from mvd_scale.config import Recipe
from mvd_scale.data.batch import ClipBatch
from mvd_scale.data.sampling.masks import draw_mask
from mvd_scale.distributed.process_group import Ranks, destroy_distributed, init_distributed
from mvd_scale.performance.batches import BatchLoader
from mvd_scale.performance.bench_setup import bench_targets, make_trainer
from mvd_scale.targets.build import init_teacher
from mvd_scale.training import capabilities

VIDEO: dict[str, Any] = {"size": "S", "frames": 8, "input_size": 96}
IMAGE = {**VIDEO, "frames": 1, "tubelet": 1, "positions": "sincos2d", "class_token": True}
DECODER = {"width": 384, "depth": 2, "heads": 6}
STEPS = 2


def fake_ranks(world: int) -> Ranks:
    """Initialise torch's fake process group: this process is rank 0, and the only one that exists."""
    ranks = replace(init_distributed("cpu", timeout_minutes=2), world_size=world)
    torch.distributed.destroy_process_group()
    torch.distributed.init_process_group("fake", store=fake_pg.FakeStore(), rank=0, world_size=world)
    hosts = {f"host {host}": list(range(8 * host, 8 * host + 8)) for host in range(world // 8)}
    capabilities.ranks_by_host = lambda _: hosts  # type: ignore[assignment]
    return ranks


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
            "students": case["students"],
        }
    )


def clips(made: Recipe, micro: int) -> ClipBatch:
    drawn = [draw_mask(np.random.default_rng(k), made.data.mask, made.model.grid) for k in range(micro)]
    visible, masked = (torch.from_numpy(np.stack(tokens)) for tokens in zip(*drawn, strict=True))
    side = made.model.input_size
    pixels = torch.randint(0, 256, (micro, made.model.frames, side, side, 3), dtype=torch.uint8)
    return ClipBatch(pixels, visible, masked, torch.zeros(micro), torch.zeros(micro))


def train(made: Recipe, ranks: Ranks) -> Any:
    micro, _ = made.micro_batch_and_accumulation(ranks.world_size)
    batches = BatchLoader(clips(made, micro) for _ in count())
    trainer = make_trainer(made, bench_targets(made, init_teacher), ranks, batches)
    for step in range(STEPS):
        with record_function(f"step {step}"):
            trainer.train_step()
    return trainer


def held_from(profiler: profile, mark: str) -> tuple[int, int]:
    """Bytes that are held when a mark is reached, and the most from there on."""
    events = profiler.profiler.kineto_results.events()
    reached = next(event.start_ns() for event in events if event.name() == mark)
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    held = list(accumulate(change for _, change in changes))
    before = sum(moment < reached for moment, _ in changes)
    return held[before - 1], max(held[before - 1 :])


def main(case: dict[str, Any]) -> None:
    ranks = fake_ranks(case["world"]) if case["fake"] else init_distributed("cpu", timeout_minutes=2)
    # From before the models are built, so that nothing is missed.
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        trainer = train(recipe(case), ranks)
    _, peak = held_from(profiler, "step 1")
    del trainer
    destroy_distributed()
    print(json.dumps({"peak": peak}))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
