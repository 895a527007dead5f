"""A profile of real steps: all files are written on any number of ranks, and the training is not changed."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from .conftest import Jobs, plain_steps

pytestmark = [pytest.mark.slow, pytest.mark.distributed]

# A learning rate from the first step on, so that a disturbed step is seen in the next loss.
WORDS = ["--training.warmup_epochs", "0", "--teachers.sharding", "zero3"]


def profiled(jobs: Jobs, clips: Path, out: Path, *words: str, ranks: int = 0) -> dict[str, Any]:
    arguments = ["--recipe", "quickstart/student", "--data.source", clips, "--batch", "2", "--steps", "1", *words]
    code, output = jobs.run("profile", *arguments, "--out", out, ranks=ranks)
    assert code == 0, output
    assert "utilisation" in output
    return json.loads((out / "summary.json").read_text())


# The arithmetic that the machine could do is timed beside that of the steps.
@pytest.mark.serial
def test_a_profile_is_whole_and_leaves_the_losses_as_they_are(jobs: Jobs, clips: Path, tmp_path: Path) -> None:
    out = tmp_path / "profile"
    report = profiled(jobs, clips, out, *WORDS)
    names = {"trace.json.gz", "memory.png", "modules.txt", "summary.json", "summary.txt"}
    assert {file.name for file in out.iterdir()} == names
    parts = report["parts"]
    assert {"data wait", "image teacher", "video teacher", "student forward", "backward", "optimizer"} <= parts.keys()
    milliseconds = sum(part["milliseconds"] for part in parts.values())
    assert milliseconds == pytest.approx(report["profiled_milliseconds_per_step"], rel=1e-6)
    assert parts["loss and rest"]["milliseconds"] < 0.2 * milliseconds
    assert report["flops_per_step"] == sum(part["flops"] for part in parts.values())
    assert 0 < report["utilisation"] < 1
    assert report["highest_in"] == "backward"
    assert report["operators"][0]["name"].startswith("aten::")
    with Image.open(out / "memory.png") as picture:
        assert picture.width > 800
    with gzip.open(out / "trace.json.gz", "rt") as file:
        assert len(json.load(file)["traceEvents"]) > 1000

    plain = plain_steps(jobs, 4, tmp_path, "quickstart/student", "--data.source", clips, *WORDS)
    losses = [loss for (loss,) in plain["losses"]]
    assert len(set(losses)) == len(losses)
    assert report["losses"] == pytest.approx(losses, rel=1e-6)


def test_every_rank_writes_its_trace_and_the_first_one_sees_the_collectives(
    jobs: Jobs, clips: Path, tmp_path: Path
) -> None:
    report = profiled(jobs, clips, tmp_path / "profile", *WORDS, ranks=2)
    assert report["ranks"] == 2
    assert report["communication_milliseconds"] > 0
    assert report["collectives"][0]["name"].startswith("gloo:")
    for name in ("trace.json.gz", "trace_rank1.json.gz"):
        assert (tmp_path / "profile" / name).stat().st_size > 1000


def test_the_checkpoints_that_a_recipe_names_are_its_teachers(jobs: Jobs, clips: Path, tmp_path: Path) -> None:
    """A file that is no checkpoint is refused, which shows that the file is read."""
    nothing = tmp_path / "nothing.safetensors"
    nothing.write_bytes(b"")
    arguments = ["--recipe", "quickstart/student", "--data.source", clips, "--targets.image.checkpoint", nothing]
    code, output = jobs.run("profile", *arguments, "--out", tmp_path / "profile")
    assert code == 2
    assert "nothing.safetensors" in output
