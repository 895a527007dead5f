"""Parameter groups: weight decay, factor on the learning rate, and the largest size of a group."""

from typing import Any

import pytest
import torch
from torch import nn

from mvd_scale.config import DecoderConfig, ModelConfig, list_recipes, load_recipe
from mvd_scale.models import Classifier, Student
from mvd_scale.training import optimizer as optim


def test_no_group_is_larger_than_it_may_be_and_none_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optim, "LARGEST_GROUP", 100)
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4), nn.Linear(4, 40), nn.Linear(40, 2), nn.Linear(2, 1))
    groups = optim.parameter_groups(model, 0.05)
    sizes = [[parameter.numel() for parameter in group["params"]] for group in groups if group["decays"]]
    assert sizes == [[64, 32], [160], [80, 2]]
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))
    assert all(group["weight_decay"] == (0.05 if group["decays"] else 0) for group in groups)


VIDEO: dict[str, Any] = {"width": 32, "depth": 2, "heads": 2, "frames": 4, "input_size": 32}
IMAGE = VIDEO | {"frames": 1, "tubelet": 1, "positions": "sincos2d", "class_token": True}
MATRICES = {"attn.qkv.weight", "attn.proj.weight", "mlp.fc1.weight", "mlp.fc2.weight"}
VECTORS = {
    *("norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias"),
    *("attn.qkv.q_bias", "attn.qkv.v_bias", "attn.proj.bias", "mlp.fc1.bias", "mlp.fc2.bias"),
}


def stack(prefix: str, names: set[str]) -> set[str]:
    return {f"{prefix}.blocks.{block}.{name}" for block in range(2) for name in names}


def decoder(name: str, parts: str) -> set[str]:
    return {f"decoders.{name}.{part}" for part in parts.split()}


def decays(model: nn.Module, **arguments: bool) -> tuple[set[str], set[str]]:
    """Names of the parameters with and without weight decay."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found: dict[bool, set[str]] = {True: set(), False: set()}
    for group in optim.parameter_groups(model, 0.05, **arguments):
        found[group["decays"]] |= {names[id(parameter)] for parameter in group["params"]}
    return found[True], found[False]


def student(model: dict[str, Any], *targets: str, embed_bias: bool = True) -> Student:
    shape = DecoderConfig(width=32, depth=2, heads=2, embed_bias=embed_bias)
    return Student(ModelConfig.model_validate(model), dict.fromkeys(targets, (shape, 8)))


def test_matrices_and_both_mask_tokens_of_mvd_decay() -> None:
    with_decay, without = decays(student(VIDEO, "image", "video"))
    assert with_decay == {"encoder.patch_embed.weight"} | stack("encoder", MATRICES).union(
        *(
            decoder(name, "embed.weight mask_token head.weight") | stack(f"decoders.{name}", MATRICES)
            for name in ("image", "video")
        )
    )
    assert without == {"encoder.patch_embed.bias", "encoder.norm.weight", "encoder.norm.bias"} | stack(
        "encoder", VECTORS
    ).union(
        *(
            decoder(name, "embed.bias norm.weight norm.bias head.bias") | stack(f"decoders.{name}", VECTORS)
            for name in ("image", "video")
        )
    )


def test_class_and_mask_token_of_mae_decay() -> None:
    with_decay, without = decays(student(IMAGE, "pixels"))
    tokens = {"encoder.class_token", "decoders.pixels.mask_token"}
    assert with_decay >= tokens
    assert not without & tokens


def test_the_mask_token_of_videomae_does_not_decay() -> None:
    model = student(VIDEO, "pixels", embed_bias=False)
    with_decay, without = decays(model, decay_tokens=False)
    assert without == {"encoder.patch_embed.bias", "encoder.norm.weight", "encoder.norm.bias"} | stack(
        "encoder", VECTORS
    ) | decoder("pixels", "mask_token norm.weight norm.bias head.bias") | stack("decoders.pixels", VECTORS)
    assert with_decay == {name for name, _ in model.named_parameters()} - without


def test_matrices_of_the_classifier_decay() -> None:
    with_decay, without = decays(Classifier(ModelConfig.model_validate(VIDEO), 5))
    assert with_decay == {"encoder.patch_embed.weight", "head.weight"} | stack("encoder", MATRICES)
    assert without == {"encoder.patch_embed.bias", "norm.weight", "norm.bias", "head.bias"} | stack("encoder", VECTORS)


@pytest.mark.parametrize("name", [name for name in list_recipes() if name.startswith(("pretrain/", "distill/"))])
def test_recipes_decay_tokens_as_their_published_code(name: str) -> None:
    assert load_recipe(name).training.decay_tokens is not name.startswith("pretrain/videomae")


class ApexAdam(torch.optim.Optimizer):
    """Stand-in for apex's FusedAdam, which counts its updates by group from its first one on."""

    __module__ = "apex.optimizers.fused_adam"

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        super().__init__(parameters, {"lr": 1.0})

    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            group["step"] = group["step"] + 1 if "step" in group else 1


def test_apex_goes_on_counting_where_a_resumed_run_stands() -> None:
    parameter = nn.Parameter(torch.ones(3))
    fresh = ApexAdam([parameter])
    optim.set_adam_state(fresh, [parameter], 7)
    fresh.step()
    assert optim.adam_steps(fresh, [parameter]) == 8
    assert fresh.state[parameter].keys() == {"exp_avg", "exp_avg_sq"}


def test_adam_goes_on_as_if_it_had_never_stopped() -> None:
    torch.manual_seed(0)
    gradients = torch.randn(6, 5)

    def update(optimizer: torch.optim.Optimizer, parameter: nn.Parameter, rows: range) -> None:
        for row in rows:
            parameter.grad = gradients[row].clone()
            optimizer.step()

    whole, first = (nn.Parameter(torch.ones(5)) for _ in range(2))
    update(torch.optim.AdamW([whole], lr=0.1, fused=True), whole, range(6))
    stopped = torch.optim.AdamW([first], lr=0.1, fused=True)
    update(stopped, first, range(4))
    second = nn.Parameter(first.detach().clone())
    resumed = torch.optim.AdamW([second], lr=0.1, fused=True)
    optim.set_adam_state(resumed, [second], optim.adam_steps(stopped, [first]))
    for moment in ("exp_avg", "exp_avg_sq"):
        resumed.state[second][moment].copy_(stopped.state[first][moment])
    update(resumed, second, range(4, 6))
    assert torch.equal(second, whole)
