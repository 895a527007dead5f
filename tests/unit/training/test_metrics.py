"""Readings on disk remain readable after the process was killed."""

from __future__ import annotations

from pathlib import Path

import torch

from mvd_scale.distributed.process_group import Ranks
from mvd_scale.training.metrics import MetricWriter
from mvd_scale.utils.io import read_metrics

VALUES = {
    "loss": 1.0,
    "lr": 1e-3,
    "grad_norm": float("inf"),
    "loss_scale": 1.0,
    "clips_per_second": 2.0,
    "data_wait_share": 0.0,
    "seconds_per_step": 1.0,
    "memory_gib": 1.0,
}


def write(path: Path, start: int, steps: range, rank: int = 0) -> None:
    ranks = Ranks(rank=rank, local_rank=rank, world_size=2, device=torch.device("cpu"))
    with MetricWriter(path, None, ranks, start_step=start, total_steps=9) as writer:
        for step in steps:
            writer.write(step, VALUES)


def test_a_resumed_run_writes_each_step_once(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, 0, range(1, 6))
    with path.open("a") as file:
        file.write('{"step": 6, "los')
    write(path, 3, range(4, 10))
    assert read_metrics(path)[0]["grad_norm"] is None
    assert [reading["step"] for reading in read_metrics(path)] == list(range(1, 10))


def test_only_the_first_rank_writes(tmp_path: Path) -> None:
    write(tmp_path / "metrics.jsonl", 0, range(1, 3), rank=1)
    assert not (tmp_path / "metrics.jsonl").exists()
