"""The picture shows the target, and a perfect prediction looks the same."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from mvd_scale.config import Recipe
from mvd_scale.data.batch import ClipBatch
from mvd_scale.targets import build_targets
from mvd_scale.visualization.predictions import Panel, compose, pca_colors, predict_panels


class Perfect(nn.Module):
    """Predicts what the targets say."""

    def __init__(self, batch: ClipBatch, targets: dict) -> None:
        super().__init__()
        self.predictions = {name: target.features(batch) for name, target in targets.items()}

    def forward(self, *_: torch.Tensor) -> dict[str, torch.Tensor]:
        return self.predictions


@pytest.mark.parametrize("normalize", ["channel", "none"])
def test_a_perfect_prediction_is_drawn_like_its_target(normalize: str) -> None:
    recipe = Recipe.model_validate(
        {
            "run": {"folder": "run"},
            "model": {"width": 32, "depth": 1, "heads": 2, "frames": 4, "input_size": 32, "patch_size": 8},
            "data": {"mask": {"ratio": 0.5}},
            "targets": {
                "pixels": {
                    "kind": "pixels",
                    "normalize": normalize,
                    "decoder": {"width": 32, "depth": 1, "heads": 2},
                }
            },
            "training": {"epochs": 2, "global_batch": 2, "base_lr": 1e-3, "warmup_epochs": 0},
        }
    )
    order = torch.stack([torch.randperm(32, generator=torch.Generator().manual_seed(i)) for i in range(2)])
    batch = ClipBatch(
        pixels=torch.randint(0, 256, (2, 4, 32, 32, 3), dtype=torch.uint8),
        visible=order[:, :16].sort().values,
        masked=order[:, 16:].sort().values,
        labels=torch.zeros(2),
        video_ids=torch.zeros(2),
    )
    targets = build_targets(recipe, lambda name: None)  # type: ignore[arg-type, return-value]
    panels = {panel.title: panel.images for panel in predict_panels(Perfect(batch, targets), targets, batch, recipe)}
    assert np.array_equal(panels["pixels: target"], panels["pixels: predicted"])
    seen = panels["what the student sees"] != 0.5
    hidden_somewhere = panels["pixels: target"] != 0.5
    assert not (seen & hidden_somewhere & (panels["front frame"] != panels["what the student sees"])).any()
    token = int(batch.masked[0, 0])
    t, h, w = token // 16, token // 4 % 4, token % 4
    assert (panels["what the student sees"][0, t, 8 * h : 8 * h + 8, 8 * w : 8 * w + 8] == 0.5).all()
    if normalize == "none":
        target = panels["pixels: target"]
        assert (np.isclose(target, panels["front frame"]) | (target == 0.5)).all()
    picture = compose([Panel(*item) for item in panels.items()])
    assert picture.shape[1] > 4 * 192
    assert len(Image.fromarray(picture).getcolors(1 << 24) or []) > 100


def test_colours_are_principal_components_of_the_truth() -> None:
    truth = torch.randn(2, 50, 8) * torch.tensor([9.0, 3, 1, 0.1, 0.1, 0.1, 0.1, 0.1])
    first, same = pca_colors(truth, truth)
    assert torch.equal(first, same)
    assert ((first >= 0) & (first <= 1)).all()
    along = torch.corrcoef(torch.stack([first[..., 0].flatten(), truth[..., 0].flatten()]))[0, 1]
    assert along.abs() > 0.95
