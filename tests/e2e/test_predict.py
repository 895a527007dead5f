"""Single videos, as a user has them classified."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

import mvd_scale
from mvd_scale.checkpoints.weights import save_weights
from mvd_scale.config import ModelConfig
from mvd_scale.config.data import ViewsConfig
from mvd_scale.models import Classifier

from .conftest import Jobs

pytestmark = pytest.mark.slow

MODEL = ModelConfig(width=48, depth=2, heads=3, frames=4, input_size=32, patch_size=16)


def test_scores_are_those_of_the_test_and_a_broken_file_stops_no_other(jobs: Jobs, clips: Path, tmp_path: Path) -> None:
    weights = tmp_path / "classifier.safetensors"
    torch.manual_seed(0)
    views = ViewsConfig(stride=2, clips=2, crops=3)
    save_weights(weights, Classifier(MODEL, 2, init_scale=10).state_dict(), MODEL, classes=["odd", "even"], views=views)
    videos = sorted(clips.iterdir())
    listed = tmp_path / "test.csv"
    listed.write_text("".join(f"{video} {k % 2}\n" for k, video in enumerate(videos)))

    code, output = jobs.run("evaluate", weights, listed, "--out", tmp_path / "out")
    assert code == 0, output
    tested = np.stack(pq.read_table(tmp_path / "out" / "scores.parquet")["scores"].to_numpy())
    classifier = mvd_scale.load_classifier(weights, device="cpu")
    predicted = np.stack([classifier(video).numpy() for video in videos])
    assert tested.std(0).min() > 0.01
    np.testing.assert_allclose(predicted, tested, atol=1e-6)

    torn = tmp_path / "torn.mp4"
    torn.write_bytes(videos[0].read_bytes()[:1000])
    code, output = jobs.run("predict", videos[0], torn, videos[1], "--checkpoint", weights, "--top", "1")
    assert code == 2, output
    assert "Traceback" not in output
    said = [line.strip() for line in output.splitlines()]
    for video, scores in zip(videos[:2], tested[:2], strict=True):
        share, unit, name = said[said.index(str(video)) + 1].split()
        assert (unit, name) == ("%", classifier.classes[scores.argmax()])
        # Two digits are printed, of scores that may differ as above: what lies between two may go to either.
        assert len(share.partition(".")[2]) == 2
        assert abs(float(share) - 100 * scores.max()) < 0.005 + 100 * 1e-6
    assert said[said.index(str(torn)) + 1].startswith("error: ")
    assert said[-1] == f"mvd-scale: 1 of 3 videos cannot be decoded: {torn}"
