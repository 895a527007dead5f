"""Files of VideoMAE V2 g, UMT and InternVideo2."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mvd_scale.checkpoints import (
    Hints,
    build_classifier,
    build_encoder,
    build_student,
    describe_checkpoint,
    read_checkpoint,
)
from mvd_scale.config import ModelConfig, load_recipe
from mvd_scale.errors import UserError
from mvd_scale.models import Classifier, Encoder
from mvd_scale.models.blocks import Block

GIANT = ModelConfig(
    width=64, depth=2, heads=2, mlp_ratio=279 / 64, frames=4, input_size=42, patch_size=14, positions="sinusoid"
)
UMT = ModelConfig(width=64, depth=2, heads=2, frames=4, input_size=32, tubelet=1, positions="sinusoid")


def split(name: str) -> str:
    return name.replace("qkv.q_", "q_").replace("qkv.v_", "v_")


def published(model: Encoder, prefix: str = "") -> dict[str, Tensor]:
    """Tensors of an encoder under VideoMAE's names."""
    shape, tensors = model.config, {}
    for name, tensor in model.state_dict().items():
        if name == "patch_embed.weight":
            kernel = tensor.unflatten(1, (shape.tubelet, shape.patch_size, shape.patch_size, 3))
            tensors["patch_embed.proj.weight"] = kernel.movedim(-1, 1)
        else:
            tensors[split(name.replace("patch_embed", "patch_embed.proj"))] = tensor
    return {prefix + name: tensor for name, tensor in tensors.items()}


def encoder(shape: ModelConfig, *, final_norm: bool = True) -> Encoder:
    torch.manual_seed(0)
    made = Encoder(shape, final_norm=final_norm).eval()
    for parameter in made.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return made


def hints(shape: ModelConfig, heads: int | None = 2) -> Hints:
    return Hints(heads=heads, decoder_heads=2, frames=shape.frames, input_size=shape.input_size)


def saved(folder: Path, content: object) -> Path:
    torch.save(content, folder / "weights.pth")
    return folder / "weights.pth"


def clip(shape: ModelConfig) -> Tensor:
    return torch.rand(2, shape.frames, shape.input_size, shape.input_size, 3)


@torch.no_grad()
def test_pre_training_of_videomae_v2_g(tmp_path: Path) -> None:
    model = encoder(GIANT)
    channels = 3 * 2 * 14**2
    decoder = {"encoder_to_decoder.weight": torch.zeros(32, 64), "mask_token": torch.zeros(1, 1, 32)}
    small = Encoder(GIANT.model_copy(update={"width": 32, "depth": 1})).state_dict()
    decoder |= {
        f"decoder.{split(name)}": tensor for name, tensor in small.items() if name.startswith(("blocks", "norm"))
    }
    decoder |= {"decoder.head.weight": torch.zeros(channels, 32), "decoder.head.bias": torch.zeros(channels)}
    checkpoint = read_checkpoint(saved(tmp_path, {"model": published(model, "encoder.") | decoder}), hints(GIANT))
    assert (checkpoint.format, checkpoint.kind, checkpoint.model) == ("videomae", "student", GIANT)
    build_student(checkpoint)
    pixels = clip(GIANT)
    assert torch.equal(build_encoder(checkpoint, final_norm=True).eval()(pixels), model(pixels))


@torch.no_grad()
def test_a_classifier_of_videomae_v2_g_needs_no_positions(tmp_path: Path) -> None:
    model = Classifier(GIANT, 3).eval()
    model.encoder = encoder(GIANT, final_norm=False)
    head = {"fc_norm.weight": torch.ones(64), "fc_norm.bias": torch.zeros(64)}
    head |= {"head.weight": model.head.weight, "head.bias": model.head.bias}
    checkpoint = read_checkpoint(saved(tmp_path, {"module": published(model.encoder) | head}), hints(GIANT))
    assert (checkpoint.format, checkpoint.kind, checkpoint.model) == ("videomae", "classifier", GIANT)
    pixels = clip(GIANT)
    assert torch.equal(build_classifier(checkpoint).eval()(pixels), model(pixels))


def test_the_size_of_videomae_v2_g_is_known_by_its_width(tmp_path: Path) -> None:
    names = {
        "patch_embed.proj.weight": torch.zeros(1408, 3, 2, 14, 14),
        "blocks.39.attn.q_bias": torch.zeros(1408),
        "blocks.0.mlp.fc1.weight": torch.zeros(6144, 1408),
    }
    model = read_checkpoint(saved(tmp_path, names)).model
    assert (model.heads, model.depth, model.grid, int(1408 * model.mlp_ratio)) == (16, 40, (8, 16, 16), 6144)


@torch.no_grad()
def test_pre_training_of_umt(tmp_path: Path) -> None:
    model = encoder(UMT)
    heads = {"clip_decoder.0.head.weight": torch.zeros(8, 64), "clip_decoder.0.norm.weight": torch.zeros(8)}
    checkpoint = read_checkpoint(saved(tmp_path, {"model": published(model, "encoder.") | heads}), hints(UMT))
    assert (checkpoint.format, checkpoint.kind, checkpoint.model) == ("umt", "encoder", UMT)
    assert not checkpoint.unexpected
    pixels = clip(UMT)
    assert torch.equal(build_encoder(checkpoint, final_norm=True).eval()(pixels), model(pixels))


def test_the_clips_of_umt_are_known(tmp_path: Path) -> None:
    names = {
        "patch_embed.proj.weight": torch.zeros(768, 3, 1, 16, 16),
        "blocks.0.attn.q_bias": torch.zeros(768),
        "fc_norm.weight": torch.zeros(768),
        "head.weight": torch.zeros(3, 768),
    }
    checkpoint = read_checkpoint(saved(tmp_path, names))
    assert (checkpoint.format, checkpoint.kind) == ("umt", "classifier")
    assert (checkpoint.model.frames, checkpoint.model.grid, checkpoint.model.positions) == (8, (8, 14, 14), "sinusoid")


@torch.no_grad()
def test_a_stored_table_of_umt_is_read(tmp_path: Path) -> None:
    model = encoder(UMT, final_norm=False)
    model.store_positions(torch.randn_like(model.positions))
    tensors = published(model)
    tensors["pos_embed"] = tensors.pop("positions").unsqueeze(0)
    checkpoint = read_checkpoint(saved(tmp_path, tensors), hints(UMT))
    pixels = clip(UMT)
    torch.testing.assert_close(build_encoder(checkpoint, final_norm=False).eval()(pixels), model(pixels))


def test_cosine_attention_is_refused(tmp_path: Path) -> None:
    tensors = published(encoder(GIANT)) | {"blocks.0.attn.scale": torch.ones(2, 1, 1)}
    with pytest.raises(UserError, match=r"blocks\.0\.attn\.scale"):
        build_encoder(read_checkpoint(saved(tmp_path, tensors), hints(GIANT)), final_norm=True)


INTERNVIDEO2 = ModelConfig(
    width=64, depth=2, heads=2, frames=2, input_size=42, patch_size=14, tubelet=1, class_token=True, rms_norm=True
)


def internvideo2(model: Encoder) -> dict[str, Tensor]:
    """Tensors of an encoder under the names of InternVideo2, with its scales taken out of the layers before them."""
    tensors = {name: tensor for name, tensor in published(model).items() if not name.endswith(("q_bias", "v_bias"))}
    for name in [name for name in tensors if name.endswith(("attn.proj.bias", "mlp.fc2.bias"))]:
        block = ".".join(name.split(".")[:2])
        gamma = torch.rand(64) + 0.5
        tensors[f"{block}.ls{1 if 'attn' in name else 2}.gamma"] = gamma
        weight = name.replace("bias", "weight")
        tensors |= {name: tensors[name] / gamma, weight: tensors[weight] / gamma.unsqueeze(1)}
    tensors["cls_token"] = tensors.pop("class_token")
    return tensors | {"clip_projector.norm1_q.weight": torch.ones(64), "clip_decoder.0.head.weight": torch.ones(8, 64)}


def unbiased() -> Encoder:
    model = encoder(INTERNVIDEO2, final_norm=False)
    for name, parameter in model.named_parameters():
        if name.endswith(("q_bias", "v_bias")):
            parameter.data.zero_()
    return model


@torch.no_grad()
def test_internvideo2(tmp_path: Path) -> None:
    model = unbiased()
    table = torch.randn(1, 1 + 18, 64)
    expected = encoder(INTERNVIDEO2, final_norm=False)
    expected.load_state_dict(model.state_dict())
    expected.store_positions(table[0, 1:])
    assert expected.class_token is not None
    expected.class_token.data += table[0, 0]
    file = saved(tmp_path, {"module": internvideo2(model) | {"pos_embed": table}})
    checkpoint = read_checkpoint(file, hints(INTERNVIDEO2))
    assert (checkpoint.format, checkpoint.model, checkpoint.unexpected) == ("internvideo2", INTERNVIDEO2, {})
    pixels = clip(INTERNVIDEO2)
    ours = build_encoder(checkpoint, final_norm=False).eval()(pixels)
    torch.testing.assert_close(ours, expected(pixels), rtol=0, atol=2e-5)
    assert describe_checkpoint(checkpoint).count("faults       none") == 1


def test_separate_position_tables_of_internvideo2_are_summed(tmp_path: Path) -> None:
    space, time, of_class = torch.randn(1, 9, 64), torch.randn(1, 2, 64), torch.randn(1, 1, 64)
    tables = {"pos_embed_spatial": space, "pos_embed_temporal": time, "pos_embed_cls": of_class}
    model = unbiased()
    checkpoint = read_checkpoint(saved(tmp_path, internvideo2(model) | tables), hints(INTERNVIDEO2))
    torch.testing.assert_close(checkpoint.encoder["positions"][9 + 4], time[0, 1] + space[0, 4])
    assert model.class_token is not None
    torch.testing.assert_close(checkpoint.encoder["class_token"], model.class_token.data + of_class)


@torch.no_grad()
def test_norms_of_internvideo2_by_hand() -> None:
    block = Block(64, 2, 2.0, 0.0, rms=True).eval()
    for parameter in block.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    tokens = torch.randn(1, 5, 64)

    def norm(values: Tensor, by: nn.Module) -> Tensor:
        return values / (values.square().mean(-1, keepdim=True) + 1e-6).sqrt() * by.get_parameter("weight")

    attention = block.attn
    queries, keys, values = F.linear(
        norm(tokens, block.norm1),
        attention.get_parameter("qkv.weight"),
        attention.qkv.bias(),  # type: ignore[operator]
    ).chunk(3, dim=-1)
    assert attention.q_norm is not None
    assert attention.k_norm is not None
    parts = (norm(queries, attention.q_norm), norm(keys, attention.k_norm), values)
    query, key, value = (part.unflatten(-1, (2, 32)).transpose(1, 2) for part in parts)
    scores = (query @ key.transpose(-1, -2) / 32**0.5).softmax(-1)
    between = tokens + attention.proj((scores @ value).transpose(1, 2).flatten(2))
    expected = between + block.mlp(norm(between, block.norm2))
    torch.testing.assert_close(block(tokens), expected, rtol=0, atol=1e-5)


def test_a_student_has_layer_norms() -> None:
    with pytest.raises(UserError, match=r"model\.rms_norm is for frozen teachers"):
        load_recipe("distill/b_from_b", ["--model.rms_norm", "true"])
