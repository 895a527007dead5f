"""`mvd-scale reproduce` from drawn videos to the printed table, with a few steps of each training."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mvd_scale.config.reproduction import load_scale
from mvd_scale.reproduction.compute import Costs

from .conftest import Jobs

pytestmark = pytest.mark.slow


def test_a_table_is_made_judged_and_not_made_again(jobs: Jobs, tmp_path: Path) -> None:
    pytest.importorskip("skimage", reason="synthetic videos need the samples extra: pip install 'mvd-scale[samples]'")
    scale = load_scale("mini", [])
    words = ["reproduce", "table7", "--seeds", "5", "--output", str(tmp_path), "--tasks.appearance.probe", "null"]
    for name in scale.tasks:
        words += [f"--data.{name}.train=2", f"--data.{name}.test=1", f"--data.{name}.validation=1"]
        words += [f"--tasks.{name}.finetune.tiny.training.{key}" for key in ("max_steps=1", "global_batch=4")]
    for name in ("both", *Costs(scale.encoders).lineage("both_pixels")):
        words += [f"--encoders.{name}.recipe.training.{key}" for key in ("max_steps=1", "global_batch=8")]
    code, output = jobs.run(*words)
    assert code == 0, output
    shown = ("both teachers and pixels", "[70.1]", "By fine-tuning: cannot be told.", "minutes on CPUs for one seed")
    for text in ("Table 7", *shown):
        assert text in output
    results = json.loads((tmp_path / "results.json").read_text())
    assert len(results["cells"]) == 6
    for cell in results["cells"]:
        (figure,) = cell["seeds"]
        assert (figure["seed"], figure["videos"]) == (5, 6 if cell["task"] == "appearance" else 8)
        assert (tmp_path / figure["source"]).is_file()
    assert all(part["cpu_minutes"] > 0 for part in (*results["encoders"], *results["cells"]))
    changed = [word.replace("appearance.train=2", "appearance.train=3") for word in words]
    code, output = jobs.run(*changed)
    assert code == 2
    assert "appearance_seed5 of another configuration" in output
    assert "train: 2 then, 3 now" in output
    code, output = jobs.run(*words)
    assert code == 0, output
    assert "0 of 20 stages are missing" in output
