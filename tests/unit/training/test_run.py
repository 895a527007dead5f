"""Log lines of a run before its first step, what is refused there, and its end."""

import json
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mvd_scale.config import load_recipe
from mvd_scale.distributed.process_group import Ranks
from mvd_scale.errors import UserError
from mvd_scale.performance.benchmarks.simulated_ranks import SimulatedJob
from mvd_scale.run_dir import RunFolder
from mvd_scale.training import run as module
from mvd_scale.training.run import _attention, finish, run_training


def test_every_attention_that_is_not_taken_is_named_with_its_reason() -> None:
    recipe = load_recipe("distill/b_from_b", ["--training.precision", "fp32"])
    assert _attention(recipe, Ranks(0, 0, 1, torch.device("cpu"))) == "native (not for torch.float32), sdpa"


def test_a_run_is_not_resumed_with_optimizer_states_on_nvme(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file of DeepSpeed may be changed between two starts: the folder stays as it is."""
    file, run = tmp_path / "nvme.json", tmp_path / "run"
    states = {"device": "nvme", "nvme_path": "/mnt/nvme"}
    file.write_text(json.dumps({"zero_optimization": {"stage": 3, "offload_optimizer": states}}))
    (run / "checkpoints" / "step_00000005").mkdir(parents=True)
    recipe = load_recipe("quickstart/student", ["--training.deepspeed", str(file), "--run.folder", str(run)])
    monkeypatch.setattr(module, "init_distributed", lambda *_: Ranks(0, 0, 1, torch.device("cpu")))
    job: Any = SimpleNamespace(recipe=recipe, folder=RunFolder(run))
    with pytest.raises(UserError, match=r"nvme\.json: zero_optimization\.offload_optimizer\.device .* expected 'cpu'"):
        run_training(job)
    assert [path.relative_to(run) for path in run.rglob("*")] == [
        Path("checkpoints"),
        Path("checkpoints/step_00000005"),
    ]


def test_all_ranks_stay_until_the_results_are_written(tmp_path: Path) -> None:
    """Rank 0 would otherwise miss the heartbeats of those that have left, while it writes the weights."""
    folder = RunFolder(tmp_path)
    folder.metrics.write_text('{"step": 1}\n')

    def export(engine: Any, path: Path, ranks: Ranks) -> None:
        time.sleep(0.5 if ranks.is_main else 0)

    def end(ranks: Ranks) -> bool:
        job: Any = SimpleNamespace(folder=folder, export=export)
        model: Any = SimpleNamespace(engine=None, averages=())
        finish(job, model, ranks, {"steps": 1, "origin": {}})
        return folder.summary.is_file()

    assert SimulatedJob(2).run(end) == [True, True]
