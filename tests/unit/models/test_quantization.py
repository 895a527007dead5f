"""Tests of 8-bit teachers: which layers are quantized, and by what settings of torchao, which is a stub here."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import timm
import torch
from torch import nn

from mvd_scale.config import ModelConfig
from mvd_scale.models import quantization
from mvd_scale.models.blocks import Blocks
from mvd_scale.models.encoder import Encoder
from mvd_scale.models.quantization import quantize_linear_layers


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[dict[str, Any], list[str]]]:
    """Settings and names of the layers of each call of torchao."""
    made: list[tuple[dict[str, Any], list[str]]] = []

    def quantize(model: nn.Module, config: dict[str, Any], filter_fn: Callable[[nn.Module, str], bool]) -> None:
        made.append((config, [name for name, child in model.named_modules() if filter_fn(child, name)]))

    stub = ModuleType("torchao.quantization")
    stub.__dict__.update(Float8DynamicActivationFloat8WeightConfig=dict, PerRow=lambda: "rows", quantize_=quantize)
    monkeypatch.setitem(sys.modules, "torchao", ModuleType("torchao"))
    monkeypatch.setitem(sys.modules, "torchao.quantization", stub)
    monkeypatch.setattr(quantization, "has_fp8", lambda gpu: True)
    monkeypatch.setattr(nn.Module, "to", lambda self, *_: self)
    return made


GPU: Any = SimpleNamespace(type="cuda")
LAYERS = ["attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"]


def test_fp8_quantizes_our_layers_and_leaves_the_process_alone(calls: list[tuple[dict[str, Any], list[str]]]) -> None:
    model = nn.ModuleDict({"blocks": Blocks(32, 2, 2), "head": nn.Linear(32, 4)})
    quantize_linear_layers(model, "fp8", GPU)
    ((config, names),) = calls
    assert config == {"granularity": "rows", "set_inductor_config": False}
    assert sorted(names) == sorted(f"blocks.{block}.{layer}" for block in range(2) for layer in LAYERS)


def test_fp8_quantizes_timm_s_layers(calls: list[tuple[dict[str, Any], list[str]]]) -> None:
    with torch.device("meta"):
        model = timm.create_model("vit_tiny_patch16_224", depth=1, num_classes=3)
    quantize_linear_layers(model, "fp8", GPU)
    assert sorted(calls[0][1]) == sorted(f"blocks.0.{layer}" for layer in LAYERS)


def test_tables_of_rotary_positions_stay_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    shape = ModelConfig(width=64, depth=1, heads=2, frames=4, input_size=32, patch_size=16, positions="rotary_vjepa2")
    model = Encoder(shape)
    table = model.positions.clone()
    monkeypatch.setattr(quantization, "_to_int8", lambda model: None)
    made = quantize_linear_layers(model, "int8", torch.device("cpu"), torch.bfloat16)
    assert isinstance(made, Encoder)
    assert made.patch_embed.weight.dtype == torch.bfloat16
    assert made.positions.dtype == torch.float32
    assert torch.equal(made.positions, table)
