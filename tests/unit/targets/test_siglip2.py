"""SigLIP 2 as a teacher, by timm's models of fixed and of any size, against transformers' classes with random weights.

Tolerance of features in float32: 2e-5 absolute.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import timm
import torch
from torch import Tensor

from mvd_scale.models.timm_vit import TimmViT
from tests.random_weights import randomise

SIZES = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 2}
SIDE = 256


@pytest.fixture
def hf() -> Any:
    return pytest.importorskip("transformers", reason="the hf extra is not installed")


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Build timm's models with two layers of 64 channels."""
    made = partial(timm.create_model, depth=2, embed_dim=64, num_heads=2)
    monkeypatch.setattr("mvd_scale.models.timm_vit.timm.create_model", made)


def by_names_of_timm(tensors: dict[str, Tensor], embedding: str) -> dict[str, Tensor]:
    """Tensors of a vision tower of transformers under timm's names, without its pooling."""
    tensors = {name.removeprefix("vision_model."): tensor for name, tensor in tensors.items()}
    names = {"layer_norm1": "norm1", "layer_norm2": "norm2", "self_attn.out_proj": "attn.proj"}
    theirs: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if name.startswith("encoder.layers.") and not any(f"{part}_proj" in name for part in "qkv"):
            name = name.replace("encoder.layers", "blocks")
            for old, new in names.items():
                name = name.replace(old, new)
            theirs[name] = tensor
        elif name.startswith("encoder.layers.") and "q_proj" in name:
            packed = torch.cat([tensors[name.replace("q_proj", f"{part}_proj")] for part in "qkv"])
            theirs[name.replace("encoder.layers", "blocks").replace("self_attn.q_proj", "attn.qkv")] = packed
        elif name.startswith("post_layernorm."):
            theirs[name.replace("post_layernorm", "norm")] = tensor
        elif name.startswith("embeddings.patch_embedding."):
            theirs[name.replace("embeddings.patch_embedding", embedding)] = tensor
    return theirs


def teacher(name: str, tensors: dict[str, Tensor], grid: int = 16) -> TimmViT:
    made = TimmViT(name, grid, final_norm=True, pretrained=False).eval()
    pool = {name: tensor for name, tensor in made.vit.state_dict().items() if name.startswith("attn_pool.")}
    assert pool
    made.load(tensors | pool, "weights")
    return made


def images() -> Tensor:
    return torch.rand(2, 1, SIDE, SIDE, 3, generator=torch.Generator().manual_seed(7))


@torch.no_grad()
def test_the_models_of_one_size(hf: Any) -> None:
    model = hf.SiglipVisionModel(hf.SiglipVisionConfig(**SIZES, image_size=SIDE, patch_size=16)).eval()
    randomise(model)
    tensors = by_names_of_timm(model.state_dict(), "patch_embed.proj")
    positions = {
        name: tensor for name, tensor in model.state_dict().items() if name.endswith("position_embedding.weight")
    }
    tensors["pos_embed"] = next(iter(positions.values()))[None]
    ours = teacher("vit_base_patch16_siglip_256.v2_webli", tensors)
    expected = model(images()[:, 0].permute(0, 3, 1, 2) * 2 - 1).last_hidden_state
    assert expected.abs().max() > 0.1
    torch.testing.assert_close(ours(images()), expected, rtol=0, atol=2e-5)


@torch.no_grad()
def test_the_models_of_any_size(hf: Any) -> None:
    model = hf.Siglip2VisionModel(hf.Siglip2VisionConfig(**SIZES, num_patches=256, patch_size=16)).eval()
    randomise(model)
    tensors = by_names_of_timm(model.state_dict(), "embeds.proj")
    positions = {
        name: tensor for name, tensor in model.state_dict().items() if name.endswith("position_embedding.weight")
    }
    tensors["embeds.pos_embed"] = next(iter(positions.values())).view(1, 16, 16, 64)
    ours = teacher("naflexvit_base_patch16_siglip.v2_webli", tensors)
    patches = (images()[:, 0] * 2 - 1).view(2, 16, 16, 16, 16, 3).transpose(2, 3).flatten(3).flatten(1, 2)
    shapes, seen = torch.tensor([[16, 16]] * 2), torch.ones(2, 256, dtype=torch.long)
    expected = model(patches, pixel_attention_mask=seen, spatial_shapes=shapes).last_hidden_state
    assert expected.abs().max() > 0.1
    torch.testing.assert_close(ours(images()), expected, rtol=0, atol=2e-5)
    fewer = TimmViT("naflexvit_base_patch16_siglip", 14, final_norm=True, pretrained=False)
    assert fewer.input_size == 224
    assert fewer(images()[:, :, :224, :224]).shape == (2, 196, 64)
