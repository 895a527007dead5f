"""Launch files of a table at full scale, run with a fake `sbatch`: jobs, their order, hours and memory."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

from mvd_scale.cli.data import index
from mvd_scale.config import load_recipe
from mvd_scale.config.pipeline import BaseStage, IndexStage, Pipeline
from mvd_scale.config.reproduction import load_scale
from mvd_scale.errors import UserError
from mvd_scale.performance.planning.plan import Cluster, make_cluster, make_plan
from mvd_scale.performance.planning.video_decoding import VideoFormat
from mvd_scale.reproduction import cluster as cluster_jobs
from mvd_scale.reproduction.cluster import write_launch_files
from mvd_scale.reproduction.records import Record
from mvd_scale.reproduction.report import to_text
from mvd_scale.reproduction.reproduce import Reproduction, reproduce

REPOSITORY = Path(__file__).resolve().parents[3]

SBATCH = """#!/bin/bash
printf '%s\\n' "$*" >>"$JOBS"
wc -l <"$JOBS"
"""

PYTHON = """#!/bin/bash
printf '%s\\n' "$*" >>"$JOBS.indexed"
while [[ "$1" != --out ]]; do shift; done
mkdir -p "$(dirname "$2")" && touch "$2"
"""


def cluster(gpu: str = "H100", gpus: int = 32) -> Cluster:
    video = VideoFormat(320, 250, 300, None)
    return make_cluster(gpu, gpus, 8, attention=None, efficiency=None, video=video, videos=240_000)


def prepared(folder: Path, *overrides: str) -> Reproduction:
    return reproduce("table9", "full", seeds=[0], output=folder / "out", cluster=cluster(), overrides=overrides)


def submitted(made: Reproduction, folder: Path) -> list[str]:
    """Words of each `sbatch`, in the order of the jobs, which are numbered from 1."""
    assert made.script is not None
    programs = folder / "bin"
    programs.mkdir()
    for name, text in (("sbatch", SBATCH), ("python", PYTHON)):
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    env = {**os.environ, "PATH": f"{programs}:{os.environ['PATH']}", "JOBS": str(folder / "jobs"),
           "SBATCH_OPTIONS": "--partition=gpu"}  # fmt: skip
    subprocess.run(["bash", str(made.script)], cwd=REPOSITORY, env=env, check=True)
    return (folder / "jobs").read_text().splitlines()


def test_each_stage_is_a_job_after_those_that_it_is_made_from(tmp_path: Path) -> None:
    made = prepared(tmp_path)
    jobs = submitted(made, tmp_path)
    by_name = {re.search(r"--job-name=(\S+)", job)[1]: job for job in jobs}  # type: ignore[index]
    number = {name: place for place, name in enumerate(by_name, start=1)}
    assert all(job.startswith("--parsable --partition=gpu ") for job in jobs)
    assert all("--nodes=4 --gpus-per-node=8" in job for job in jobs)
    # Indexing runs before the first job, so that the teacher waits for none.
    assert "dependency" not in by_name["videomae_b_seed0"]
    assert "launch/slurm.sbatch pretrain --recipe " in by_name["videomae_b_seed0"]
    assert f"--dependency=afterok:{number['videomae_b_seed0']} " in by_name["b_video_seed0"]
    assert f"--dependency=afterok:{number['b_video_seed0']} " in by_name["b_video_k400_classifier_seed0"]
    assert f"--dependency=afterok:{number['b_video_ssv2_classifier_seed0']} " in by_name["b_video_ssv2_test_seed0"]
    assert "launch/slurm.sbatch evaluate " in by_name["b_video_ssv2_test_seed0"]
    for name in by_name:
        if not name.endswith("_test_seed0"):
            assert (tmp_path / "out" / f"{name}.yaml").is_file()
    assert load_recipe(tmp_path / "out" / "b_video_seed0.yaml").run.folder == tmp_path / "out" / "b_video_seed0"


def test_the_lists_that_a_table_needs_are_indexed_as_told(tmp_path: Path) -> None:
    made = prepared(
        tmp_path, "--data.k400.root", "/data/my videos", "--data.k400.split", "train", "--data.ssv2.fold", "2",
        "--data.ssv2.classes", "labels.json",
    )  # fmt: skip
    submitted(made, tmp_path)
    out = tmp_path / "out"
    command = "-m mvd_scale data index"
    # No images: neither encoder has a teacher of images.
    assert (tmp_path / "jobs.indexed").read_text().splitlines() == [
        f"{command} k400/train.csv --root /data/my videos --split train --out {out}/k400/manifest.parquet",
        f"{command} k400/val.csv --out {out}/k400_test/manifest.parquet",
        f"{command} ssv2/train.csv --fold 2 --classes labels.json --out {out}/ssv2/manifest.parquet",
        f"{command} ssv2/val.csv --out {out}/ssv2_test/manifest.parquet",
    ]
    assert made.script is not None
    assert "'/data/my videos'" in made.script.read_text()


def test_each_field_of_an_index_is_an_option_of_its_command() -> None:
    options = {option for parameter in index.params for option in parameter.opts}
    fields = IndexStage.model_fields.keys() - BaseStage.model_fields.keys() - {"kind", "sources"}
    assert {f"--{field}" for field in fields} <= options


def test_a_stage_that_has_begun_keeps_the_commit_of_its_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    test = {"kind": "evaluate", "checkpoint": "weights", "source": "videos"}
    stages = {"begun": test, "waiting": test}
    pipeline = Pipeline.model_validate({"folder": tmp_path / "out", "stages": stages})
    for commit in ("first", "second"):
        monkeypatch.setattr(cluster_jobs, "code_version", lambda commit=commit: commit)
        write_launch_files("Two tests", load_scale("full", []), pipeline, cluster())
        pipeline.place("begun").mkdir(exist_ok=True)
    made = {name: Record.load(pipeline, name) for name in stages}
    # The other one will run by the code that is there when its job starts.
    assert {name: record and record.commit for name, record in made.items()} == {"begun": "first", "waiting": "second"}


def test_hours_and_memory_are_those_of_the_plan(tmp_path: Path) -> None:
    made = prepared(tmp_path)
    plan = make_plan("ablations/per_token_b", [], cluster())
    (stage,) = (planned for planned in made.planned if planned.name == "b_per_token_seed0")
    assert stage.plan is not None
    assert stage.plan.run_hours == pytest.approx(plan.run_hours)
    assert f"{plan.run_hours:.1f} hours on 32 H100" in stage.to_text()
    assert made.script is not None
    text = made.script.read_text()
    assert f"# plan: {stage.to_text()}" in text
    limit = re.search(r"--job-name=b_per_token_seed0 .* --time=(\d+):00:00", text)
    assert limit is not None
    assert plan.run_hours <= int(limit[1]) <= max(1.25 * plan.run_hours + 1, 24)


def test_finished_stages_are_not_submitted_again_and_results_are_gathered(tmp_path: Path) -> None:
    prepared(tmp_path)
    out = tmp_path / "out"
    for name in ("k400", "k400_test", "ssv2", "ssv2_test"):
        (out / name).mkdir()
        (out / name / "manifest.parquet").touch()
    for name in ("videomae_b_seed0", "b_video_seed0"):
        (out / name).mkdir()
        (out / name / "encoder.safetensors").touch()
    (out / "b_video_k400_classifier_seed0").mkdir()
    (out / "b_video_k400_classifier_seed0" / "classifier.safetensors").touch()
    (out / "b_video_k400_test_seed0").mkdir()
    (out / "b_video_k400_test_seed0" / "summary.json").write_text('{"top1": 0.5, "videos": 4}')
    made = prepared(tmp_path)
    jobs = submitted(made, tmp_path)
    assert not any("job-name=b_video_k400" in job or "job-name=videomae" in job for job in jobs)
    assert any("job-name=b_video_ssv2_classifier" in job for job in jobs)
    assert "50.0 [82.1]" in to_text(made.results)
    # A change of what has begun is refused.
    with pytest.raises(UserError, match="b_video_seed0 of another configuration"):
        reproduce(
            "table9", "full", seeds=[0], output=out, cluster=cluster(),
            overrides=["--encoders.b_video.recipe.training.epochs", "200"],
        )  # fmt: skip


def test_a_training_that_does_not_fit_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"stage videomae_b_seed0 cannot run on 24 H100: .*cannot be split"):
        reproduce("table9", "full", seeds=[0], output=tmp_path, cluster=cluster(gpus=24))
    with pytest.raises(UserError, match="--validation is for `--scale mini`"):
        reproduce("table9", "full", seeds=[0], output=tmp_path, split="validation", cluster=cluster())
