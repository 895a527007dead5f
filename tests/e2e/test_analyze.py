"""Analyses of models on videos: the same numbers for any number of ranks and any batch, and what is broken is named."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mvd_scale.checkpoints.weights import save_weights
from mvd_scale.config import ModelConfig
from mvd_scale.data.indexing.build import build_manifest
from mvd_scale.models import Encoder

from .conftest import Jobs

pytestmark = pytest.mark.slow

MODELS = {
    "image": ModelConfig(
        width=32, depth=2, heads=2, frames=1, tubelet=1, input_size=32, positions="sincos2d", class_token=True
    ),
    "video": ModelConfig(width=48, depth=2, heads=3, frames=4, input_size=48),
}


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("weights")
    for name, model in MODELS.items():
        save_weights(folder / f"{name}.safetensors", Encoder(model).state_dict(), model)
    return [f"{name}={folder / name}.safetensors" for name in MODELS]


def test_ranks_and_batches_give_the_same_matrices(jobs: Jobs, clips: Path, weights: list[str], tmp_path: Path) -> None:
    videos = tmp_path / "videos"
    videos.mkdir()
    # More than one shard of results, so that both ranks have some.
    for number in range(36):
        source = sorted(clips.iterdir())[number % 5]
        (videos / f"{number:02}{source.suffix}").symlink_to(source)
    manifest = tmp_path / "videos.parquet"
    build_manifest(videos, workers=1).save(manifest)
    (videos / sorted(file.name for file in videos.iterdir())[3]).unlink()
    found = []
    for ranks, batch, count in ((0, 8, 2), (2, 3, 2)):
        out = tmp_path / f"by{ranks}"
        options = ("--source", manifest, "--out", out, "--stride", "2", "--clips", str(count), "--batch", str(batch))
        code, output = jobs.run("analyze", "similarity", *weights, *options, ranks=ranks)
        assert code == 0, output
        assert "left out: 1 videos" in output
        found.append(json.loads((out / "similarity.json").read_text()))
        assert Image.open(out / "similarity.png").size > (600, 300)
    one, two = found
    assert one["clips"] == two["clips"] == 35 * 2
    assert list(one["left_out"]) == list(two["left_out"])
    assert len(one["left_out"]) == 1
    assert next(iter(one["left_out"])).startswith("03")
    for first, second in zip(one["models"], two["models"], strict=True):
        np.testing.assert_allclose(first["matrix"], second["matrix"], atol=1e-6)
        np.testing.assert_allclose(np.diagonal(first["matrix"]), 1, atol=1e-5)
        assert first["weights"] == second["weights"]
    assert {"source", "precision", "views", "frames", "side", "manifest"} <= one["settings"].keys()


def test_pictures_of_a_run(jobs: Jobs, clips: Path, recipe: Path, weights: list[str], tmp_path: Path) -> None:
    run, out = tmp_path / "run", tmp_path / "features.png"
    words = ("--data.source", clips, "--data.workers", "0", "--training.max_steps", "2", "--run.folder", run)
    code, output = jobs.run("pretrain", "--recipe", recipe, *words)
    assert code == 0, output
    pictures = ("--out", out, "--moving", tmp_path / "features.gif")
    video = sorted(clips.iterdir())[0]
    code, output = jobs.run("analyze", "features", run, *weights, "--video", video, *pictures)
    assert code == 0, output
    assert "video: no decoder: no predictions" in output
    # Frames, six rows of the student, and three of each encoder, of more than 96 pixels each.
    assert Image.open(out).height > 13 * 96
    before = out.read_bytes()
    code, output = jobs.run("analyze", "features", run, *weights, "--video", video, "--out", out)
    assert code == 0, output
    assert out.read_bytes() == before
    code, output = jobs.run("analyze", "features", run, "--video", tmp_path / "none.mp4", "--out", out)
    assert code == 2
    assert "none.mp4 cannot be decoded" in output
