"""The folder of a test says which model it is of, and a model card lists it for that model alone."""

from __future__ import annotations

import json
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from torch.distributed import HashStore

from mvd_scale.checkpoints import export_checkpoint, read_checkpoint
from mvd_scale.checkpoints.native import save_weights
from mvd_scale.checkpoints.roles import identify_checkpoint
from mvd_scale.config import ModelConfig, load_finetune_recipe
from mvd_scale.config.data import DataConfig, ViewsConfig
from mvd_scale.distributed.process_group import Ranks
from mvd_scale.evaluation.evaluate import ensemble_results, run_evaluation
from mvd_scale.evaluation.results import EvalResult
from mvd_scale.models import Classifier

MODEL = ModelConfig(width=16, depth=1, heads=1, frames=4, input_size=32, patch_size=8)


def encode(path: Path) -> None:
    """A video of 8 frames of noise."""
    path.parent.mkdir(parents=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25)
        stream.height, stream.width, stream.pix_fmt = 32, 48, "yuv420p"
        for picture in np.random.default_rng(0).integers(0, 256, (8, 32, 48, 3), np.uint8):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())


def test_a_card_shows_the_test_of_its_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Ranks, "store", HashStore())
    ranks = Ranks(0, 0, 1, torch.device("cpu"))
    names, run = ("archery", "bowling"), tmp_path / "run"
    for name in names:
        encode(tmp_path / "videos" / name / "a.mp4")
    run.mkdir()
    recipe = load_finetune_recipe("quickstart/classifier", ["--run.folder", str(run), "--data.source", "train.parquet"])
    (run / "recipe.yaml").write_text(recipe.to_yaml())
    data, tests = DataConfig(source=str(tmp_path / "videos"), workers=0), (run / "last", run / "best")
    for weights, out in zip(("classifier", "best"), tests, strict=True):
        views = ViewsConfig(stride=2, clips=1, crops=1)
        file = run / f"{weights}.safetensors"
        save_weights(file, Classifier(MODEL, 2).state_dict(), MODEL, classes=names, views=views)
        # A run folder is its last weights.
        tested = run if weights == "classifier" else file
        run_evaluation(tested, data, {}, out, ranks, batch=1, precision="fp32", command="evaluate")
        summary = json.loads((out / "summary.json").read_text())
        assert (summary["videos"], summary["checkpoints"]) == (2, [str(tested)])
        assert summary["model"] == identify_checkpoint(read_checkpoint(file)) == EvalResult.load(out).origin.model
    assert ensemble_results(tests, run / "both", "ensemble").origin.model is None

    export_checkpoint(read_checkpoint(run), "hub", tmp_path / "model")
    card = (tmp_path / "model" / "README.md").read_text()
    assert "| `last` | 2 |" in card
    assert "`best`" not in card
    assert "`both`" not in card
