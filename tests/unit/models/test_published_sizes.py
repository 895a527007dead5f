"""Parameters and multiply-accumulates of the paper's tables (Tables 3 and 4)."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from mvd_scale.config import DecoderConfig, ModelConfig
from mvd_scale.models import Classifier, Student


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize(
    ("size", "millions", "gmacs"), [("S", 22, 57), ("B", 87, 180), ("L", 305, 597), ("H", 633, 1192)]
)
def test_the_fine_tuned_model(size: str, millions: int, gmacs: int) -> None:
    with torch.device("meta"):
        classifier = Classifier(ModelConfig.model_validate({"size": size}), classes=400)
        clip = torch.empty(1, 16, 224, 224, 3, dtype=torch.uint8)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            classifier(clip)
    # The tables give whole millions, some of them rounded up.
    assert abs(count(classifier) / 1e6 - millions) < 1
    # The paper's "GFLOPs" are multiply-accumulates; a torch FLOP is half of one.
    assert counter.get_total_flops() / 2e9 == pytest.approx(gmacs, rel=0.005)


@pytest.mark.parametrize(
    ("size", "decoder", "channels", "millions"),
    [
        ("B", {"width": 768, "depth": 2, "heads": 12}, 768, 116.94),
        ("L", {"width": 512, "depth": 4, "heads": 8}, 1024, 331.18),
    ],
)
def test_the_distillation_student(size: str, decoder: dict[str, int], channels: int, millions: float) -> None:
    shape = (DecoderConfig.model_validate(decoder), channels)
    with torch.device("meta"):
        student = Student(ModelConfig.model_validate({"size": size}), {"image": shape, "video": shape})
    assert count(student) / 1e6 == pytest.approx(millions, abs=0.005)
