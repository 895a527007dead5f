"""Import and export against transformers and timm: the same weights give the same outputs.

Tolerance of outputs in float32: 2e-5 absolute. Their LayerNorms are set to eps 1e-6, that of the published models.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from mvd_scale.checkpoints import (
    Checkpoint,
    Hints,
    build_classifier,
    build_encoder,
    build_student,
    export_checkpoint,
    read_checkpoint,
    to_published,
)
from mvd_scale.checkpoints.interpret import interpret
from mvd_scale.checkpoints.reading import RawCheckpoint
from mvd_scale.config import SIZES
from mvd_scale.models import Encoder, Student
from mvd_scale.models.encoder import IMAGENET_MEAN, IMAGENET_STD
from mvd_scale.models.positions import position_table

transformers = pytest.importorskip("transformers", reason="the hf extra is not installed")

SHAPE = {
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 192,
    "image_size": 64,
    "decoder_hidden_size": 32,
    "decoder_num_hidden_layers": 2,
    "decoder_num_attention_heads": 2,
    "decoder_intermediate_size": 128,
    "layer_norm_eps": 1e-6,
}
CLIP = {"num_frames": 4, "tubelet_size": 2}
VISIBLE = [0, 3, 5, 10, 13, 17, 22, 31]


def randomise(module: nn.Module) -> None:
    """Values of a size that shows every tensor in the outputs, biases among them."""
    generator = torch.Generator().manual_seed(3)
    for name, parameter in module.named_parameters():
        if "position" not in name and "pos_embed" not in name:
            scale = 0.06 if parameter.ndim > 1 else 0.5
            offset = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            parameter.data = offset + scale * torch.randn(parameter.shape, generator=generator)


def clip(frames: int, batch: int = 2) -> Tensor:
    """Pixels (B, T, 64, 64, 3) in 0..1."""
    return torch.rand(batch, frames, 64, 64, 3, generator=torch.Generator().manual_seed(7))


def normalised(pixels: Tensor) -> Tensor:
    """(B, T, 3, H, W), as the other libraries take clips."""
    return ((pixels - torch.tensor(IMAGENET_MEAN)) / torch.tensor(IMAGENET_STD)).permute(0, 1, 4, 2, 3)


def masks(batch: int, visible: list[int], total: int) -> tuple[Tensor, Tensor, Tensor]:
    """Boolean mask (True: masked), visible and masked indices."""
    mask = torch.ones(batch, total, dtype=torch.bool)
    mask[:, visible] = False
    masked = [token for token in range(total) if token not in visible]
    return mask, torch.tensor([visible] * batch), torch.tensor([masked] * batch)


def close(ours: Tensor, theirs: Tensor) -> None:
    assert theirs.abs().max() > 0.1
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-5)


def hf(kind: str, **more: Any) -> nn.Module:
    config = transformers.ViTMAEConfig if "ViTMAE" in kind else transformers.VideoMAEConfig
    clip_shape = {} if "ViTMAE" in kind else CLIP
    model: nn.Module = getattr(transformers, kind)(config(**SHAPE, **clip_shape, **more)).eval()
    randomise(model)
    return model


def hf_decoder_norm(model: nn.Module) -> None:
    """Their decoder ends in a LayerNorm of torch's default eps, whatever the config says."""
    model.decoder.norm.eps = 1e-6  # type: ignore[union-attr, assignment]


def there_and_back(model: Any, folder: Path) -> tuple[Checkpoint, Any]:
    """Import what the library saves; export; what the library loads from that."""
    model.save_pretrained(folder / "theirs")
    checkpoint = read_checkpoint(folder / "theirs")
    assert not checkpoint.unexpected
    export_checkpoint(checkpoint, "hf", folder / "ours")
    again, report = type(model).from_pretrained(folder / "ours", output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    return checkpoint, again.eval()


@torch.no_grad()
def test_videomae_for_pretraining(tmp_path: Path) -> None:
    model = hf("VideoMAEForPreTraining", use_mean_pooling=False)
    checkpoint, again = there_and_back(model, tmp_path)
    assert (checkpoint.format, checkpoint.kind, checkpoint.model.grid) == ("hf_videomae", "student", (2, 4, 4))
    hf_decoder_norm(model)
    hf_decoder_norm(again)
    pixels = clip(4)
    mask, visible, masked = masks(2, VISIBLE, 32)
    theirs = model(normalised(pixels), bool_masked_pos=mask).logits
    close(build_student(checkpoint).eval()(pixels, visible, masked)["pixels"], theirs)
    close(again(normalised(pixels), bool_masked_pos=mask).logits, theirs)


@pytest.mark.parametrize("pooling", [True, False])
@torch.no_grad()
def test_videomae_model(tmp_path: Path, pooling: bool) -> None:
    model = hf("VideoMAEModel", use_mean_pooling=pooling)
    checkpoint, again = there_and_back(model, tmp_path)
    assert checkpoint.final_norm == (not pooling)
    pixels = clip(4)
    theirs = model(normalised(pixels)).last_hidden_state
    close(build_encoder(checkpoint, final_norm=not pooling)(pixels), theirs)
    close(again(normalised(pixels)).last_hidden_state, theirs)


@torch.no_grad()
def test_videomae_for_classification(tmp_path: Path) -> None:
    model = hf("VideoMAEForVideoClassification", num_labels=7)
    model.fc_norm.eps = 1e-6  # type: ignore[union-attr, assignment]
    checkpoint, again = there_and_back(model, tmp_path)
    again.fc_norm.eps = 1e-6
    assert (checkpoint.kind, checkpoint.classes) == ("classifier", 7)
    pixels = clip(4)
    theirs = model(normalised(pixels)).logits
    close(build_classifier(checkpoint)(pixels), theirs)
    close(again(normalised(pixels)).logits, theirs)


@torch.no_grad()
def test_vit_mae_for_pretraining(tmp_path: Path) -> None:
    model = hf("ViTMAEForPreTraining")
    # transformers 5 leaves these tables at zero; every trained file has them filled.
    model.vit.embeddings.position_embeddings[0, 1:] = position_table("sincos2d", (1, 4, 4), 48)
    model.decoder.decoder_pos_embed[0, 1:] = position_table("sincos2d", (1, 4, 4), 32)
    checkpoint, again = there_and_back(model, tmp_path)
    assert (checkpoint.format, checkpoint.model.positions) == ("hf_mae", "sincos2d")
    assert "positions" not in checkpoint.encoder
    pixels = clip(1)
    _, visible, masked = masks(2, VISIBLE[:4], 16)
    noise = torch.zeros(2, 16).scatter(1, masked, 1.0)
    theirs = model(normalised(pixels)[:, 0], noise=noise).logits
    rows = masked.unsqueeze(-1).expand(-1, -1, theirs.shape[-1])
    student = build_student(checkpoint).eval()
    student.decoders["pixels"].norm.eps = model.decoder.decoder_norm.eps  # type: ignore[union-attr]
    close(student(pixels, visible, masked)["pixels"], theirs.gather(1, rows))
    close(again(normalised(pixels)[:, 0], noise=noise).logits, theirs)


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
@pytest.mark.parametrize("learned", [True, False])
@torch.no_grad()
def test_timm_mae(tmp_path: Path, suffix: str, learned: bool) -> None:
    def build() -> nn.Module:
        name = "vit_base_patch16_224.mae"
        shape = {"embed_dim": 48, "depth": 2, "num_heads": 3, "img_size": 64}
        return timm.create_model(name, pretrained=False, **shape).eval()

    model = build()
    randomise(model)
    if learned:
        nn.init.normal_(model.pos_embed, std=0.3)
    else:
        model.pos_embed.zero_()
        model.pos_embed[0, 1:] = position_table("sincos2d", (1, 4, 4), 48)
    file = tmp_path / "timm.pth"
    torch.save(model.state_dict(), file)
    checkpoint = read_checkpoint(file, Hints(heads=3))
    assert checkpoint.format == "timm"
    assert ("positions" in checkpoint.encoder) == learned
    pixels = clip(1)
    theirs = model.forward_features(normalised(pixels)[:, 0])
    close(build_encoder(checkpoint, final_norm=True)(pixels), theirs)
    out = tmp_path / f"out.{suffix}"
    export_checkpoint(checkpoint, "timm", out)
    again = build()
    timm.models.load_checkpoint(again, str(out), strict=True)
    close(again.forward_features(normalised(pixels)[:, 0]), theirs)


@pytest.mark.parametrize("size", SIZES)
def test_all_sizes_of_videomae_by_shape(size: str) -> None:
    width, depth, heads = SIZES[size]
    decoder = min(width // 2, 512)
    with torch.device("meta"):
        config = transformers.VideoMAEConfig(
            hidden_size=width,
            num_hidden_layers=depth,
            num_attention_heads=heads,
            intermediate_size=4 * width,
            decoder_hidden_size=decoder,
            decoder_num_attention_heads=decoder // 64,
            decoder_intermediate_size=4 * decoder,
            use_mean_pooling=False,
        )
        model = transformers.VideoMAEForPreTraining(config)
    checkpoint = interpret(RawCheckpoint(Path("meta"), model.state_dict(), config={}), Hints())
    assert (checkpoint.model.width, checkpoint.model.depth, checkpoint.model.heads) == SIZES[size]
    assert checkpoint.model.grid == (8, 14, 14)
    with torch.device("meta"):
        parts = {name: (part.config, part.channels) for name, part in checkpoint.decoders.items()}
        student = Student(checkpoint.model, parts)
    assert_same_shapes(checkpoint.tensors(), student)
    with torch.device("meta"):
        exported = to_published(checkpoint, "hf")
    named = {  # Files say q_bias and v_bias where the modules of transformers 5 say query.bias and value.bias.
        name.replace("attention.q_bias", "attention.query.bias").replace("attention.v_bias", "attention.value.bias"): t
        for name, t in exported.items()
    }
    assert_same_shapes(named, model)


@pytest.mark.parametrize("size", SIZES)
def test_all_sizes_of_timm_by_shape(size: str) -> None:
    width, depth, heads = SIZES[size]
    patch, side = (14, 224) if size == "H" else (16, 224)
    with torch.device("meta"):
        model = timm.models.VisionTransformer(
            img_size=side, patch_size=patch, embed_dim=width, depth=depth, num_heads=heads, num_classes=0
        )
    # Positions are compared by value, so they must have some.
    tables = {"pos_embed": torch.zeros(1, 1 + (side // patch) ** 2, width)}
    checkpoint = interpret(RawCheckpoint(Path("meta"), {**model.state_dict(), **tables}), Hints())
    assert (checkpoint.model.width, checkpoint.model.depth, checkpoint.model.heads) == SIZES[size]
    assert checkpoint.model.grid == (1, side // patch, side // patch)
    with torch.device("meta"):
        encoder = Encoder(checkpoint.model)
    tensors = dict(checkpoint.encoder)
    assert tensors.pop("positions").shape == encoder.positions.shape
    assert_same_shapes(tensors, encoder)
    assert_same_shapes(to_published(checkpoint, "timm"), model)


def assert_same_shapes(tensors: Any, module: nn.Module) -> None:
    expected = {name: tensor.shape for name, tensor in module.state_dict().items()}
    assert {name: tensor.shape for name, tensor in tensors.items()} == expected
