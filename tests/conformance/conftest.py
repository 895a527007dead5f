"""Reads the published vectors and puts the weights among them into files of the published form."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from mvd_scale.checkpoints import Checkpoint, to_published
from mvd_scale.models.encoder import IMAGENET_MEAN, IMAGENET_STD

FOLDER = Path(os.environ.get("MVD_REFERENCE_DIR") or Path(__file__).resolve().parents[3] / "shared" / "reference")
KINDS = ("mvd", "videomae", "mae", "classifier", "schedules", "views", "segments", "traincrop")

OUTPUT = {"rtol": 0.0, "atol": 2e-5}
LOSS = {"rel": 0.0, "abs": 1e-5}
GRADIENT = {"rtol": 1e-3, "atol": 2e-5}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A parameter called like a kind of vectors runs over all files of it."""
    for kind in KINDS:
        if kind in metafunc.fixturenames:
            files = sorted(FOLDER.glob(f"{kind}_*"))
            reason = f"no {kind}_* in {FOLDER}; set MVD_REFERENCE_DIR"
            absent = [pytest.param(None, marks=pytest.mark.skip(reason=reason), id="absent")]
            metafunc.parametrize(kind, files or absent, indirect=True, ids=[file.stem for file in files] or None)


@dataclass(frozen=True)
class Vectors:
    """One file of reference vectors."""

    tensors: Mapping[str, Tensor]
    config: Mapping[str, Any]
    metadata: Mapping[str, str]

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    def under(self, prefix: str) -> dict[str, Tensor]:
        """The tensors below a prefix, without it."""
        return {n.removeprefix(prefix): tensor for n, tensor in self.tensors.items() if n.startswith(prefix)}

    def clips(self, name: str) -> Tensor:
        """Pixels (B, T, H, W, 3) in 0..1, as our models take them, from normalised (B, 3, [T,] H, W)."""
        normalised = self[name] if self[name].ndim == 5 else self[name].unsqueeze(2)
        return normalised.permute(0, 2, 3, 4, 1) * torch.tensor(IMAGENET_STD) + torch.tensor(IMAGENET_MEAN)

    def tokens(self) -> tuple[Tensor, Tensor]:
        """Visible and masked token indices, ascending: (B, V), (B, M)."""
        masked = self["mask"].bool()
        clips = len(masked)
        return (~masked).nonzero()[:, 1].view(clips, -1), masked.nonzero()[:, 1].view(clips, -1)


def _read(file: Path) -> Vectors:
    with safe_open(file, "pt") as handle:
        names = handle.keys()
        metadata = handle.metadata()
        return Vectors({n: handle.get_tensor(n) for n in names}, json.loads(metadata["config"]), metadata)


@pytest.fixture
def mvd(request: pytest.FixtureRequest) -> Vectors:
    return _read(request.param)


@pytest.fixture
def videomae(request: pytest.FixtureRequest) -> Vectors:
    return _read(request.param)


@pytest.fixture
def mae(request: pytest.FixtureRequest) -> Vectors:
    return _read(request.param)


@pytest.fixture
def classifier(request: pytest.FixtureRequest) -> Vectors:
    return _read(request.param)


@pytest.fixture
def traincrop(request: pytest.FixtureRequest) -> Vectors:
    return _read(request.param)


@pytest.fixture
def schedules(request: pytest.FixtureRequest) -> Any:
    return json.loads(request.param.read_text())


@pytest.fixture
def segments(request: pytest.FixtureRequest) -> Any:
    return json.loads(request.param.read_text())


@pytest.fixture
def views(request: pytest.FixtureRequest) -> Any:
    return json.loads(request.param.read_text())


def publish(folder: Path, tensors: dict[str, Tensor], form: str) -> Path:
    """A file as its authors would give it away: `pth` with a wrapper, or `safetensors`."""
    file = folder / f"published.{form}"
    if form == "pth":
        torch.save({"model": tensors, "epoch": 1599}, file)
    else:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file)
    return file


def published_gradients(checkpoint: Checkpoint, model: nn.Module, family: str) -> dict[str, Tensor]:
    """The gradients of a student of ours under the published names."""
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    encoder = {n.removeprefix("encoder."): g for n, g in gradients.items() if n.startswith("encoder.")}
    decoders = {}
    for name, decoder in checkpoint.decoders.items():
        start = f"decoders.{name}."
        decoders[name] = replace(
            decoder, tensors={n.removeprefix(start): g for n, g in gradients.items() if n.startswith(start)}
        )
    return to_published(replace(checkpoint, encoder=encoder, decoders=decoders), family)


def assert_gradients(vectors: Vectors, gradients: Mapping[str, Tensor]) -> None:
    """Every published gradient is met, and no trainable tensor of ours is without one."""
    expected = vectors.under("grad.")
    assert expected
    tables = {name for name in gradients if "pos_embed" in name}
    assert expected.keys() == gradients.keys() - tables
    for name, gradient in expected.items():
        torch.testing.assert_close(gradients[name], gradient, **GRADIENT, msg=lambda m, n=name: f"{n}: {m}")
