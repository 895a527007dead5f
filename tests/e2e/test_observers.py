"""Pictures and probes during a run: they are written, and the run is the same as without them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from mvd_scale.utils.io import read_metrics

from .conftest import Jobs

pytestmark = [pytest.mark.slow, pytest.mark.distributed]


@pytest.fixture
def classes(tmp_path: Path, clips: Path) -> Path:
    """Two folders of videos: those of the rabbit, and the others."""
    for file in clips.iterdir():
        folder = tmp_path / "classes" / ("rabbit" if "bunny" in file.name else "other")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / file.name).write_bytes(file.read_bytes())
    return tmp_path / "classes"


def test_a_run_is_the_same_with_and_without_them(jobs: Jobs, recipe: Path, classes: Path, tmp_path: Path) -> None:
    readings = {}
    probe = f"{{train: {classes}, test: {classes}, every_epochs: 1, neighbours: 3}}"
    observed = ["--logging.pictures", "{every_epochs: 1, clips: 3}", "--logging.probe", probe]
    for name, callbacks in (("observed", observed), ("alone", ["--logging.pictures", "null"])):
        code, output = jobs.run(
            "pretrain", "--recipe", recipe, "--run.folder", tmp_path / name, "--data.source", classes,
            "--training.deepspeed", "zero3", "--training.max_steps", "22", *callbacks, ranks=2,
        )  # fmt: skip
        assert code == 0, output
        readings[name] = [(r["loss"], r["grad_norm"]) for r in read_metrics(tmp_path / name / "metrics.jsonl")]
    assert readings["observed"] == readings["alone"]
    pictures = sorted((tmp_path / "observed" / "pictures").iterdir())
    assert [file.name for file in pictures] == ["step_00000010.png", "step_00000020.png"]
    with Image.open(pictures[1]) as first, Image.open(pictures[0]) as second:
        assert first.size == second.size
        assert first.tobytes() != second.tobytes()
    probes = [json.loads(line) for line in (tmp_path / "observed" / "probe.jsonl").read_text().splitlines()]
    assert [reading["step"] for reading in probes] == [10, 20]
    # Every video is among its own neighbours, so chance is left far behind.
    assert all(reading["top1"] > 0.8 for reading in probes)
    assert not (tmp_path / "alone" / "pictures").exists()
