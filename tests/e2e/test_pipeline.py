"""A pipeline that is killed in its second stage and restarted gives the same result as an uninterrupted one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from .conftest import RECIPE, Jobs, wait_for

pytestmark = pytest.mark.slow

PIPELINE = """
folder: {folder}
ranks: 1
stages:
  videos: {{kind: index, sources: [{clips}]}}
  teacher:
    kind: pretrain
    recipe: {{base: {recipe}, data: {{source: "{{videos}}/manifest.parquet"}}, training: {{max_steps: 3}}}}
  student:
    kind: pretrain
    recipe:
      base: {recipe}
      data: {{source: "{{videos}}/manifest.parquet"}}
      targets:
        pixels: null
        video:
          kind: video_teacher
          decoder: {{width: 32, depth: 1, heads: 2}}
          checkpoint: "{{teacher}}/encoder.safetensors"
"""


@pytest.fixture
def start(tmp_path: Path, clips: Path) -> Path:
    (tmp_path / "tiny.yaml").write_text(RECIPE)
    file = tmp_path / "pipeline.yaml"
    file.write_text(PIPELINE.format(folder=tmp_path / "out", clips=clips, recipe=tmp_path / "tiny.yaml"))
    return file


def test_killed_and_started_again_it_ends_in_the_same_place(jobs: Jobs, start: Path, tmp_path: Path) -> None:
    code, output = jobs.run("pipeline", start, "--folder", tmp_path / "alone")
    assert code == 0, output

    process = jobs.start("pipeline", start)
    metrics = tmp_path / "out" / "student" / "metrics.jsonl"
    wait_for(lambda: metrics.exists() and metrics.read_text().count("\n") > 7, 120, process)
    jobs.kill(process)
    assert not (tmp_path / "out" / "student" / "encoder.safetensors").exists()

    # Its rank saves and leaves by itself; the next start waits for that.
    code, output = jobs.run("pipeline", start)
    assert code == 0, output
    assert output.count("is done already") == 2
    assert "resumed from" in output
    ends = [load_file(tmp_path / folder / "student" / "encoder.safetensors") for folder in ("alone", "out")]
    assert all(torch.equal(tensor, ends[1][name]) for name, tensor in ends[0].items())


def test_a_wrong_stage_is_said_before_any_starts(jobs: Jobs, start: Path, tmp_path: Path) -> None:
    code, output = jobs.run("pipeline", start, "--stages.student.recipe.training.epoch", "3")
    assert code == 2
    assert "training.epoch: unknown key" in output
    assert not (tmp_path / "out").exists()
    code, output = jobs.run("pipeline", start, "--stages.student.recipe.training.global_batch", "4", "--ranks", "3")
    assert code == 2
    assert "cannot be split over 3 ranks" in output
    empty = tmp_path / "empty"
    empty.mkdir()
    code, output = jobs.run("pipeline", start, "--stages.videos.sources", f"[{empty}]")
    assert code == 2
    assert "empty" in output
