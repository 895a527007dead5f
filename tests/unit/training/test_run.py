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
from mvd_scale.training.run import _attention, finish, resume, run_training


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
    job.runs = [job]
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
        job.students = [job]
        model: Any = SimpleNamespace(engine=None, averages=())
        finish(job, [model], ranks, 1, [{}])
        return folder.summary.is_file()

    assert SimulatedJob(2).run(end) == [True, True]


def test_a_student_that_went_on_alone_is_not_set_back_by_the_run_of_all(tmp_path: Path) -> None:
    paths = [tmp_path / "a", tmp_path / "b"]
    for path, step in ((paths[0], 12), (paths[0], 20), (paths[1], 12)):
        (path / f"step_{step:08d}").mkdir(parents=True)
    checkpointer: Any = SimpleNamespace(paths=paths, resume=lambda: pytest.fail("it sets aside what is newer"))
    schedule: Any = SimpleNamespace(last_step=12)
    with pytest.raises(UserError, match=r"has already reached step 20, beyond its last step 12"):
        resume(checkpointer, schedule, RunFolder(tmp_path), Ranks(0, 0, 1, torch.device("cpu")))


def test_a_run_of_several_has_begun_as_soon_as_a_student_has_a_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "students" / "s" / "checkpoints").mkdir(parents=True)
    assert RunFolder(tmp_path)._begun
