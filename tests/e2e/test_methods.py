"""Every method of the paper learns: its loss falls on real clips."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mvd_scale.checkpoints.weights import save_weights
from mvd_scale.config import load_recipe
from mvd_scale.config.target import TrainedTeacherTarget
from mvd_scale.models import Encoder

from .methods import METHODS

pytestmark = pytest.mark.slow


def test_the_loss_of_every_method_falls(clips: Path, tmp_path: Path) -> None:
    teachers = []
    for name in ("image", "video"):
        target = load_recipe("quickstart/student").targets[name]
        assert isinstance(target, TrainedTeacherTarget)
        assert target.model is not None
        torch.manual_seed(1)
        teachers.append(tmp_path / f"{name}.safetensors")
        save_weights(teachers[-1], Encoder(target.model).state_dict(), target.model)
    script = Path(__file__).with_name("methods.py")
    result = subprocess.run(
        [sys.executable, str(script), str(tmp_path / "runs"), str(clips), *map(str, teachers), "30"],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        env={**os.environ, "DS_ACCELERATOR": "cpu"},
    )
    losses = {line["method"]: line for line in map(json.loads, result.stdout.splitlines())}
    assert losses.keys() == METHODS.keys()
    for method, line in losses.items():
        assert line["last"] < 0.97 * line["first"], method
