"""Stages of a table run side by side, a failure stops what depends on it alone, a kill loses what ran, no more."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path

import pytest

import mvd_scale
from mvd_scale.config.pipeline import Pipeline
from mvd_scale.config.reproduction import load_scale, load_table
from mvd_scale.errors import UserError
from mvd_scale.pipelines.runner import stage_output
from mvd_scale.reproduction import records, runner
from mvd_scale.reproduction.expand import Expansion, expand
from mvd_scale.reproduction.records import Record, StageConfigs
from mvd_scale.reproduction.reproduce import reproduce
from mvd_scale.reproduction.runner import _divide_cpus, run_missing

from .conftest import Shell


def test_all_stages_run_once_after_those_that_they_are_made_from(
    small: Expansion, shell: Callable[[Shell], None], tmp_path: Path
) -> None:
    order = tmp_path / "order"
    shell(lambda name: f"echo {name} >>{order}")
    assert run_missing(small.pipeline, 1) == {}
    ran = order.read_text().split()
    assert sorted(ran) == sorted(
        name for name in small.pipeline.stages if not name.startswith(("appearance", "motion"))
    )
    assert ran.index("video_teacher_seed0") < ran.index("video_seed0") < ran.index("video_motion_classifier_seed0")
    record = Record.load(small.pipeline, "video_seed0")
    assert record is not None
    assert record.config_hash == StageConfigs(small.pipeline).hash("video_seed0")
    assert record.cpu_minutes is not None
    assert len(record.commit) >= 5
    shell(lambda name: "false")
    assert run_missing(small.pipeline, 1) == {}


def test_a_failed_stage_is_named_and_the_others_go_on(small: Expansion, shell: Callable[[Shell], None]) -> None:
    shell(lambda name: "echo no memory; exit 3" if name == "per_token_seed0" else "")
    failed = run_missing(small.pipeline, 1)
    assert "ended with exit code 3" in failed["per_token_seed0"]
    log = small.pipeline.folder / "per_token_seed0.log"
    assert str(log) in failed["per_token_seed0"]
    assert "no memory" in log.read_text()
    assert failed["per_token_motion_test_seed0"].startswith("left out, because ")
    assert all(name.startswith("per_token") for name in failed)
    assert stage_output(small.pipeline, "video_motion_probe_test_seed0").is_file()
    shell(lambda name: "")
    assert run_missing(small.pipeline, 1) == {}


def test_a_stage_without_its_output_has_failed(
    small: Expansion, shell: Callable[[Shell], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    shell(lambda name: "exit 0" if name == "video_teacher_seed0" else "")
    assert "video_teacher_seed0" in run_missing(small.pipeline, 1)


def test_a_finished_stage_of_another_configuration_is_refused(
    small: Expansion, shell: Callable[[Shell], None], tmp_path: Path
) -> None:
    shell(lambda name: "")
    run_missing(small.pipeline, 1)
    _, table = load_table("table9", "mini")
    scale = load_scale("mini", ["--encoders.video.recipe.training.base_lr", "0.01"])
    changed = expand(scale, table, [0], small.pipeline.folder, "test").pipeline
    with pytest.raises(UserError, match="video_seed0 of another configuration, and 6 others") as error:
        run_missing(changed, 1)
    assert "recipe.training.base_lr: 0.032 then, 0.01 now" in str(error.value)
    assert "Give another folder with `--output`" in str(error.value)
    # Settings of logs, checkpoints and loaders change no result.
    same = ["--encoders.video.recipe.logging.every_steps", "7", "--encoders.video.recipe.data.workers", "1"]
    pipeline = expand(load_scale("mini", same), table, [0], small.pipeline.folder, "test").pipeline
    assert run_missing(pipeline, 1) == {}


def test_a_changed_teacher_changes_its_students(small: Expansion, tmp_path: Path) -> None:
    _, table = load_table("table9", "mini")
    scale = load_scale("mini", ["--encoders.video_teacher.recipe.training.base_lr", "0.01"])
    changed = expand(scale, table, [0], tmp_path / "elsewhere", "test").pipeline
    new, old = StageConfigs(changed), StageConfigs(small.pipeline)
    differing = {name for name in changed.stages if new.hash(name) != old.hash(name)}
    data = {name for name in changed.stages if name.startswith(("appearance", "motion"))}
    assert differing == set(changed.stages) - data


def test_a_stage_has_the_commit_at_which_it_was_started(
    small: Expansion, shell: Callable[[Shell], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    moved = tmp_path / "moved"
    monkeypatch.setattr(runner, "code_version", lambda: "second" if moved.exists() else "first")
    shell(lambda name: f"touch {moved}" if name == "video_teacher_seed0" else "")
    run_missing(small.pipeline, 1)
    made = {name: Record.load(small.pipeline, name) for name in ("video_teacher_seed0", "video_seed0")}
    assert {name: record and record.commit for name, record in made.items()} == {
        "video_teacher_seed0": "first",
        "video_seed0": "second",
    }


def test_a_table_that_is_being_made_has_results_of_what_is_there(
    shell: Callable[[Shell], None], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    shell(lambda name: f"cp {out}/results.json {tmp_path}/{name}.json")
    made = reproduce("table9", "mini", seeds=[0], output=out, jobs=1)
    assert len(made.results.encoders) == 3
    last = [cell for cell in made.results.cells if cell.seeds][-1].encoder
    seen = json.loads((tmp_path / f"{last}_motion_test_seed0.json").read_text())
    there = {(cell["encoder"], cell["task"], cell["measure"]) for cell in seen["cells"] if cell["seeds"]}
    assert 0 < len(there) < len(seen["cells"])
    assert seen["cells"][0]["missing"] in ({}, {"0": "has not been run"})


def test_more_jobs_than_cpus_are_refused() -> None:
    cpus = len(os.sched_getaffinity(0))
    assert sorted(cpu for share in _divide_cpus(cpus) for cpu in share) == sorted(os.sched_getaffinity(0))
    with pytest.raises(UserError, match=r"--jobs .* is more than the .* CPUs"):
        _divide_cpus(cpus + 1)


def test_a_killed_start_goes_on_where_it_stopped(small: Expansion, shell: Callable[[Shell], None]) -> None:
    order = small.pipeline.folder / "order"
    shell(lambda name: f"echo {name} >>{order}; {'sleep 60' if name == 'video_seed0' else ':'}")
    first = get_context("fork").Process(target=run_missing, args=(small.pipeline, 1))
    first.start()
    while not order.is_file() or "video_seed0" not in order.read_text():
        assert first.is_alive()
        time.sleep(0.05)
    first.kill()
    first.join()
    before = order.read_text().split()
    shell(lambda name: f"echo {name} >>{order}")
    # The new start waits until the guard has ended the job of the killed one.
    assert run_missing(small.pipeline, 1) == {}
    after = order.read_text().split()[len(before) :]
    assert after[0] == "video_seed0"
    assert set(before) & set(after) == {"video_seed0"}


def test_minutes_of_a_stage_in_this_process_include_its_worker_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def with_worker(pipeline: Pipeline, name: str) -> None:
        work = "import time\nwhile time.process_time() < 0.5: pass"
        subprocess.run([sys.executable, "-S", "-c", work], check=True)

    monkeypatch.setattr(runner, "run_local_stage", with_worker)
    stages = {"videos": {"kind": "index", "sources": ["videos"]}}
    pipeline = Pipeline.model_validate({"folder": tmp_path, "stages": stages})
    assert run_missing(pipeline, 1) == {}
    record = Record.load(pipeline, "videos")
    assert record is not None
    assert record.cpu_minutes is not None
    assert record.cpu_minutes >= 0.5 / 60


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Package in a folder of a repository, both empty; the commit of the code is that of this package."""
    folder = tmp_path / "repository" / "mvd_scale"
    folder.mkdir(parents=True)
    (folder / "__init__.py").touch()
    (folder.parent / "other.txt").write_text("first")
    git(folder.parent, "init", "--quiet")
    monkeypatch.setattr(mvd_scale, "__file__", str(folder / "__init__.py"))
    return folder


def git(folder: Path, *words: str) -> str:
    author = ("-c", "user.name=a", "-c", "user.email=a@localhost", "-c", "commit.gpgsign=false")
    return subprocess.run(["git", *author, *words], cwd=folder, check=True, capture_output=True, text=True).stdout


def test_the_commit_is_that_of_the_repository_that_holds_the_package(package: Path) -> None:
    git(package, "add", "--all", ":/")
    git(package, "commit", "--quiet", "-m", "all")
    commit = git(package, "rev-parse", "HEAD").strip()
    assert records.code_version() == commit
    # A changed file beside the package, such as a launch script, is a change too.
    (package.parent / "other.txt").write_text("second")
    assert records.code_version() == f"{commit}+changes"


def test_the_version_stands_for_the_commit_where_no_repository_holds_the_package(
    package: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As when it is installed in an environment below the user's own project.
    git(package.parent, "add", "other.txt")
    git(package.parent, "commit", "--quiet", "-m", "another project")
    assert records.code_version() == f"version {mvd_scale.__version__}"
    monkeypatch.setenv("PATH", "")
    assert records.code_version() == f"version {mvd_scale.__version__}"
