"""Ways in which CPUs compute bf16: chosen from a trial or by the recipe, set on all models, and kept with the run."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from mvd_kernels import AttentionWays, Linear, LinearWays
from mvd_scale.config import Recipe
from mvd_scale.distributed.process_group import Ranks
from mvd_scale.errors import UserError
from mvd_scale.models import Encoder, Student
from mvd_scale.models.bf16_ways import AS_THEY_ARE, IN_FLOAT32, Bf16Trial, Bf16Ways, set_bf16_ways
from mvd_scale.models.blocks import QKV, Attention
from mvd_scale.training import capabilities
from mvd_scale.training.capabilities import make_placement, try_bf16
from mvd_scale.training.placement import COMPILED, Capabilities, Devices, decide_placement, needs_bf16_trial

SHAPE = {"width": 32, "depth": 2, "heads": 2, "frames": 4, "input_size": 32}
DECODER = {"width": 16, "depth": 1, "heads": 2}
TRIAL = Bf16Trial(
    {
        "forward": {"bf16": 2.0, "float32": 1.0},
        # Not enough of a difference to leave bf16.
        "input_gradient": {"bf16": 1.05, "float32": 1.0},
        "weight_gradient": {"bf16": 0.5, "float32": 1.0},
    },
    {"forward": {"native": 3.0, "sdpa": 1.0, "sdpa in float32": 0.95}, "backward": {"native": 1.0, "sdpa": 2.0}},
)
CHOSEN = Bf16Ways(LinearWays("float32", "bf16", "bf16"), AttentionWays("sdpa", "native"))
CPU = Devices("cpu", 1, 1, Capabilities(bf16_trial=TRIAL))
ALONE = Ranks(0, 0, 1, torch.device("cpu"))


def recipe(teachers: dict[str, Any] | None = None, **training: Any) -> Recipe:
    return Recipe.model_validate(
        {
            "run": {"folder": "unused"},
            "model": SHAPE,
            "data": {"mask": {"ratio": 0.5}},
            "targets": {"video": {"kind": "video_teacher", "model": SHAPE, "decoder": DECODER}},
            "training": {
                "epochs": 2, "global_batch": 2, "base_lr": 1e-3, "warmup_epochs": 1, "precision": "bf16", **training
            },
            "teachers": teachers or {},
        }
    )  # fmt: skip


@pytest.mark.parametrize(
    ("config", "devices", "expected", "tried"),
    [
        (recipe(), CPU, CHOSEN, True),
        (recipe(bf16_products="float32"), CPU, IN_FLOAT32, False),
        (recipe(bf16_products="bf16"), CPU, AS_THEY_ARE, False),
        # The planner tries nothing.
        (recipe(), replace(CPU, capabilities=Capabilities()), AS_THEY_ARE, True),
        (recipe(compile=True), CPU, AS_THEY_ARE, False),
        (recipe(precision="fp32"), CPU, None, False),
        # Layers beside those in int8 are in bf16, if the CPU knows it.
        (recipe({"precision": "int8"}, precision="fp32"), CPU, CHOSEN, True),
        (
            recipe({"precision": "int8"}, precision="fp32"),
            replace(CPU, capabilities=Capabilities(bf16=False)), None, False,
        ),
        (recipe(), Devices("cuda", 1, 1, Capabilities("H100")), None, False),
    ],
)  # fmt: skip
def test_the_recipe_and_the_trial_decide(
    config: Recipe, devices: Devices, expected: Bf16Ways | None, tried: bool
) -> None:
    placement = decide_placement(config, [], devices)
    assert (placement.bf16_ways and placement.bf16_ways.value) == expected
    assert ("products of bf16" in dict(placement.decisions())) == (expected is not None)
    assert needs_bf16_trial(config, devices.kind, bf16=devices.capabilities.bf16) == tried


def test_the_reason_has_the_times_of_all_ways() -> None:
    decision = decide_placement(recipe(), [], CPU).bf16_ways
    assert decision is not None
    assert decision.shown == (
        "forward float32, gradient of inputs bf16, of weights bf16, attention forward sdpa, backward native"
    )
    assert "training.bf16_products is auto and one thread took, in ms: products (256 x 768 x 768)" in decision.reason
    assert "input gradient bf16 1050.0 / float32 1000.0" in decision.reason
    assert "backward native 1000.0 / sdpa 2000.0" in decision.reason


def test_float32_and_compilation_exclude_each_other() -> None:
    with pytest.raises(UserError, match=f"training.bf16_products is float32, but {COMPILED}"):
        decide_placement(recipe(bf16_products="float32", compile=True), [], CPU)


def test_ways_are_set_on_every_layer_and_change_no_weight() -> None:
    config = recipe()
    student = Student(config.model, {"video": (config.targets["video"].head_config, 32)})
    before = dict(student.named_parameters())
    set_bf16_ways(student, CHOSEN)
    assert list(student.named_parameters()) == list(before.items())
    layers = [module for module in student.modules() if isinstance(module, nn.Linear | QKV)]
    assert len(layers) == 1 + 2 * 4 + 1 + 4 + 1
    assert all(layer.ways == CHOSEN.products for layer in layers)  # type: ignore[union-attr]
    assert {module.ways for module in student.modules() if isinstance(module, Attention)} == {CHOSEN.attention}


def test_a_model_in_float32_products_computes_what_it_computed() -> None:
    torch.manual_seed(0)
    encoder = Encoder(recipe().model, final_norm=True).bfloat16()
    pixels = torch.randint(256, (2, 4, 32, 32, 3), dtype=torch.uint8)
    plain = encoder(pixels)
    set_bf16_ways(encoder, IN_FLOAT32)
    assert isinstance(encoder.patch_embed, Linear)
    wide = encoder(pixels)
    assert not torch.equal(wide, plain)
    exact = encoder.float()(pixels)
    assert (wide.float() - exact).norm() <= 1.2 * (plain.float() - exact).norm()


def test_a_run_keeps_its_trial_for_its_kind_of_cpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    made = [TRIAL, replace(TRIAL, attention={})]
    monkeypatch.setattr(capabilities, "_trial", lambda: made.pop(0))
    record = tmp_path / "bf16_trial.json"
    assert try_bf16(ALONE, record) == TRIAL
    assert try_bf16(ALONE, record) == TRIAL
    assert len(made) == 1
    stands = json.loads(record.read_text())
    stands["cpu"]["instructions"].append("amx_bf16")
    record.write_text(json.dumps(stands))
    with caplog.at_level(logging.WARNING):
        assert try_bf16(ALONE, record) == replace(TRIAL, attention={})
    assert "or of another CPU or torch: bf16 is tried anew" in caplog.text
    assert try_bf16(ALONE, record) == replace(TRIAL, attention={})
    record.write_text(record.read_text()[:-40])
    made.append(TRIAL)
    assert try_bf16(ALONE, record) == TRIAL


@pytest.mark.parametrize("able", [True, False])
def test_ranks_whose_cpus_differ_take_part_in_the_same_trial(able: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Teachers in int8 compute their other layers in bf16 only where the CPU has instructions for it."""
    tried: list[Ranks] = []
    monkeypatch.setattr(capabilities, "bf16_instructions", lambda: able)
    monkeypatch.setattr(capabilities, "try_bf16", lambda ranks, record: tried.append(ranks) or TRIAL)
    make_placement(recipe({"precision": "int8"}, precision="fp32"), {}, ALONE)
    assert tried == [ALONE]


def test_all_ranks_go_the_way_of_rank_0(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refuse() -> Bf16Trial:
        raise AssertionError("only rank 0 tries")

    monkeypatch.setattr(capabilities, "_trial", refuse)
    monkeypatch.setattr(torch.distributed, "broadcast_object_list", lambda made: made.__setitem__(0, TRIAL))
    assert try_bf16(Ranks(1, 1, 2, torch.device("cpu")), tmp_path / "bf16_trial.json") == TRIAL
    assert not any(tmp_path.iterdir())
