"""Labels of a batch outlive DALI's buffers: a GPU copies them later than the host goes on."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from mvd_scale.config.data import DataConfig
from mvd_scale.config.model import ModelConfig
from mvd_scale.data.indexing.build import build_manifest
from mvd_scale.data.loaders import base
from mvd_scale.data.loaders.clip_loader import BatchPlan, ClipLoader
from mvd_scale.distributed.data_rank import DataRank


def test_labels_are_not_in_memory_that_dali_uses_again(videos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given, as_tensor = [], base.as_tensor

    def kept(batch: object) -> Tensor:
        given.append(as_tensor(batch))  # type: ignore[arg-type]
        return given[-1]

    monkeypatch.setattr(base, "as_tensor", kept)
    model = ModelConfig(width=16, depth=1, heads=1, frames=4, input_size=32, patch_size=8)
    plan, rank = BatchPlan.one_batch(2), DataRank(torch.device("cpu"))
    manifest = build_manifest(videos, workers=1)
    with ClipLoader(manifest, DataConfig(stride=2, workers=0), model, 1, plan=plan, rank=rank) as loader:
        next(loader)
        assert loader.labels.tolist() in [tensor.tolist() for tensor in given]
        assert loader.labels.data_ptr() not in [tensor.data_ptr() for tensor in given]
