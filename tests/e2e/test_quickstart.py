"""The README's first command, shortened: stages by the launcher, a table, pictures, a comparison."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import psutil
import pytest
import yaml
from PIL import Image

from mvd_scale.utils.io import read_metrics

from .conftest import Jobs, wait_for

pytestmark = [pytest.mark.slow, pytest.mark.distributed]


def test_a_quickstart_that_is_stopped_leaves_nobody_behind(jobs: Jobs, clips: Path, tmp_path: Path) -> None:
    out = tmp_path / "quickstart"
    process = jobs.start("quickstart", "--out", out)
    metrics = out / "image_teacher" / "metrics.jsonl"
    wait_for(lambda: metrics.exists() and bool(metrics.read_text()), 120, process)
    everyone = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode != 0
    assert "Traceback" not in output, output
    _, alive = psutil.wait_procs(everyone, timeout=5)
    assert not alive
    assert list((out / "image_teacher" / "checkpoints").glob("step_*"))


def test_the_quickstart(jobs: Jobs, clips: Path, tmp_path: Path) -> None:
    out = tmp_path / "quickstart"
    code, output = jobs.run("quickstart", "--out", out, "--steps", "12")
    assert code == 0, output
    # A table breaks its lines where they fit the terminal.
    printed = " ".join(output.split())
    assert "2 ranks, " in printed
    for stage in ("image_teacher", "video_teacher", "student"):
        summary = json.loads((out / stage / "summary.json").read_text())
        assert summary["steps"] == 12
        assert (out / stage / "encoder.safetensors").is_file()
        assert list((out / stage / "tensorboard").iterdir())
        assert stage in output
        with Image.open(out / stage / "predictions.png") as picture:
            assert len(picture.convert("RGB").getcolors(1 << 24) or []) > 100
    # The README shows it.
    assert (out / "student" / "predictions.png").stat().st_size < 150_000
    for classifier, test in (("classifier", "test"), ("from_scratch", "test_from_scratch")):
        assert json.loads((out / classifier / "summary.json").read_text())["steps"] == 12
        assert json.loads((out / test / "summary.json").read_text())["videos"] == 300
        assert f"{test}: top-1" in printed
    # The two differ in the weights that they start from and in nothing else.
    recipes = [yaml.safe_load((out / f"{name}.yaml").read_text()) for name in ("classifier", "from_scratch")]
    for recipe in recipes:
        del recipe["run"], recipe["training"]["initial_encoder"], recipe["classifier"]["from_scratch"]
    assert recipes[0] == recipes[1]
    comparison = json.loads((out / "comparison" / "comparison.json").read_text())
    assert comparison["videos"] == 300
    assert "comparison: 300 test videos" in printed
    assert "the same fine-tuning" in printed
    readings = read_metrics(out / "student" / "metrics.jsonl")
    expected = {
        "loss",
        "loss/image",
        "loss/video",
        "grad_norm",
        "lr",
        "loss_scale",
        "clips_per_second",
        "data_wait_share",
    }
    assert expected | {"memory_gib", "weight_decay", "step"} <= readings[-1].keys()

    # Started again it has nothing left to do.
    code, output = jobs.run("quickstart", "--out", out, "--steps", "12")
    assert code == 0, output
    assert output.count("is done already") == 14
