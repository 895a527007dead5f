"""Parameter groups: weight decay, factor on the learning rate, and the largest size of a group."""

from typing import Any

import pytest
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
