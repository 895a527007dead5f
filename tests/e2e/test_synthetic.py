"""Learnability of synthetic videos: the classes of `motion` can be learnt from the order of frames and only from it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from mvd_scale.checkpoints.weights import save_weights
from mvd_scale.config import load_finetune_recipe
from mvd_scale.data.generated.synthetic import DIRECTIONS, FRAMES, SIDE
from mvd_scale.models import Classifier, Encoder
from tests.fork_server import ForkServer

from .conftest import Jobs

pytestmark = pytest.mark.slow

RECIPE = load_finetune_recipe("quickstart/synthetic", ["--data.source", "unused"])

STEPS = 700
"""Steps of a classifier that looks for a leak: as many as the recipe needs to learn the unchanged videos."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("skimage", reason="synthetic videos need the samples extra: pip install 'mvd-scale[samples]'")
    return tmp_path_factory.mktemp("synthetic")


@pytest.fixture(scope="module")
def motion(folder: Path, fork_server: ForkServer) -> Path:
    """A finished `mvd-scale pipeline synthetic`."""
    code, output = fork_server.run("mvd_scale", "pipeline", "synthetic", "--folder", folder / "motion")
    assert code == 0, output
    assert "test: top-1" in output
    return folder / "motion"


def accuracy(test: Path) -> float:
    top1: float = json.loads((test / "summary.json").read_text())["top1"]
    return top1


def test_motion_is_learnt(motion: Path) -> None:
    assert accuracy(motion / "test") > 0.85


def test_appearance_is_learnt_and_no_frozen_random_encoder_tells_it(jobs: Jobs, folder: Path) -> None:
    out = folder / "appearance"
    change = ("--stages.labelled.label", "appearance", "--stages.labelled.train", "140")
    code, output = jobs.run("pipeline", "synthetic", "--folder", out, *change)
    assert code == 0, output
    learnt = accuracy(out / "test")
    assert learnt > 0.5

    torch.manual_seed(0)
    random = folder / "random.safetensors"
    save_weights(random, Encoder(RECIPE.model).state_dict(), RECIPE.model)
    for kind in ("knn", "linear"):
        sources = ("--train", out / "labelled" / "train", "--test", out / "labelled" / "test")
        code, output = jobs.run("probe", kind, random, *sources, "--out", folder / "probes", "--batch", "16")
        assert code == 0, output
        assert accuracy(folder / "probes" / kind) < learnt - 0.15


@pytest.mark.parametrize("leak", ["single frames", "shuffled frames"])
def test_motion_is_in_the_order_of_frames_only(motion: Path, leak: str) -> None:
    def clips(videos: Tensor, generator: torch.Generator) -> Tensor:
        frames = RECIPE.model.frames
        first = torch.randint(FRAMES - frames + 1, (1,), generator=generator).item()
        clip = videos[:, first : first + frames]
        if leak == "single frames":
            return clip[:, :1].expand(-1, frames, -1, -1, -1)
        return torch.stack([video[torch.randperm(frames, generator=generator)] for video in clip])

    # 120 videos: three standard deviations of a coin are 0.14.
    assert abs(trained(motion / "labelled", clips) - 0.5) < 0.14


def trained(labelled: Path, clips: Callable[[Tensor, torch.Generator], Tensor]) -> float:
    """Share of test videos that the recipe's model names after training on `clips`."""
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    model = Classifier(RECIPE.model, len(DIRECTIONS))
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3, weight_decay=0.05)
    videos, labels = decoded(labelled / "train")
    for _ in range(STEPS):
        chosen = torch.randint(len(videos), (RECIPE.training.global_batch,), generator=generator)
        cross_entropy(model(clips(videos[chosen], generator)), labels[chosen]).backward()
        optimizer.step()
        optimizer.zero_grad()
    videos, labels = decoded(labelled / "test")
    with torch.inference_mode():
        return (model(clips(videos, generator)).argmax(1) == labels).float().mean().item()


def decoded(split: Path) -> tuple[Tensor, Tensor]:
    """The middle of every frame of all videos, uint8 (X, T, 64, 64, 3), and their classes."""
    margin = (SIDE - 64) // 2

    def frames(file: Path) -> Iterator[np.ndarray]:
        with av.open(str(file)) as container:
            for frame in container.decode(video=0):
                yield frame.to_ndarray(format="rgb24")[margin:-margin, margin:-margin]

    files = sorted(split.rglob("*.mp4"))
    labels = torch.tensor([DIRECTIONS.index(file.parent.name) for file in files])
    return torch.from_numpy(np.stack([np.stack(list(frames(file))) for file in files])), labels
