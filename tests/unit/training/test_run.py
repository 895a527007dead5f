"""Log lines of a run before its first step, and its end."""

import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from mvd_scale.config import load_recipe
from mvd_scale.distributed.process_group import Ranks
from mvd_scale.performance.benchmarks.simulated_ranks import SimulatedJob
from mvd_scale.run_dir import RunFolder
from mvd_scale.training.run import _attention, finish


def test_every_attention_that_is_not_taken_is_named_with_its_reason() -> None:
    recipe = load_recipe("distill/b_from_b", ["--training.precision", "fp32"])
    assert _attention(recipe, Ranks(0, 0, 1, torch.device("cpu"))) == "native (not for torch.float32), sdpa"


def test_all_ranks_stay_until_the_results_are_written(tmp_path: Path) -> None:
    """Rank 0 would otherwise miss the heartbeats of those that have left, while it writes the weights."""
    folder = RunFolder(tmp_path)
    folder.metrics.write_text('{"step": 1}\n')

    def export(engine: Any, path: Path, ranks: Ranks) -> None:
        time.sleep(0.5 if ranks.is_main else 0)

    def end(ranks: Ranks) -> bool:
        job: Any = SimpleNamespace(folder=folder, export=export)
        job.students = [job]
        model: Any = SimpleNamespace(engine=None, averages=())
        finish(job, [model], ranks, 1, [{}])
        return folder.summary.is_file()

    assert SimulatedJob(2).run(end) == [True, True]
