"""Files of V-JEPA 2 and 2.1, under the names of their authors and of transformers, against transformers' model.

Tolerance of outputs in float32: 2e-5 absolute.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mvd_scale.checkpoints import Hints, build_encoder, describe_checkpoint, import_checkpoint, read_checkpoint
from mvd_scale.config import ModelConfig, Recipe
from mvd_scale.errors import UserError
from mvd_scale.models import Encoder
from mvd_scale.models.encoder import IMAGENET_MEAN, IMAGENET_STD
from mvd_scale.performance.batches import random_batch
from mvd_scale.targets.build import load_targets
from tests.random_weights import randomise

SHAPE = ModelConfig(width=64, depth=2, heads=2, frames=4, input_size=48, positions="rotary_vjepa2")
HINTS = Hints(heads=2, frames=4, input_size=48)


def encoder(**changes: Any) -> Encoder:
    """Weights of a size that shows every tensor in the outputs, biases among them."""
    torch.manual_seed(0)
    made = Encoder(SHAPE.model_copy(update=changes)).eval()
    for name, parameter in made.named_parameters():
        offset = 1.0 if "norm" in name and name.endswith("weight") else 0.0
        parameter.data = offset + (0.06 if parameter.ndim > 1 else 0.5) * torch.randn_like(parameter)
    return made


def authors(model: Encoder) -> dict[str, Tensor]:
    """Tensors of an encoder under the names of facebookresearch/vjepa2."""
    tensors: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        if name == "patch_embed.weight":
            tensors["patch_embed.proj.weight"] = tensor.view(64, -1, 16, 16, 3).movedim(-1, 1)
        elif name.startswith("patch_embed"):
            tensors[name.replace("patch_embed", "patch_embed.proj")] = tensor
        elif name.endswith("q_bias"):
            parts = [model.state_dict()[name.replace("q_bias", f"{part}_bias")] for part in "qkv"]
            tensors[name.replace("q_bias", "bias")] = torch.cat(parts)
        elif not name.endswith(("k_bias", "v_bias")):
            tensors[name] = tensor
    return tensors


def saved(folder: Path, content: object) -> Path:
    torch.save(content, folder / "weights.pt")
    return folder / "weights.pt"


def clip(frames: int = 4, side: int = 48) -> Tensor:
    return torch.rand(2, frames, side, side, 3, generator=torch.Generator().manual_seed(7))


@torch.no_grad()
def test_the_authors_file_of_v_jepa_2(tmp_path: Path) -> None:
    model = encoder()
    wrapped = {f"module.backbone.{name}": tensor for name, tensor in authors(model).items()}
    file = saved(tmp_path, {"encoder": wrapped, "target_encoder": wrapped, "predictor": {}, "epoch": 3})
    with pytest.raises(UserError, match=r"several models, encoder, target_encoder.*published tests use target_encoder"):
        read_checkpoint(file, HINTS)
    checkpoint = read_checkpoint(file, Hints(heads=2, frames=4, input_size=48, key="target_encoder"))
    assert (checkpoint.format, checkpoint.model) == ("v-jepa 2", SHAPE)
    assert torch.equal(build_encoder(checkpoint, final_norm=True).eval()(clip()), model(clip()))


@torch.no_grad()
def test_the_authors_file_of_v_jepa_2_1(tmp_path: Path) -> None:
    model, vector = encoder(positions="rotary_vjepa2_1"), torch.randn(1, 1, 64)
    tensors = authors(model)
    tensors["patch_embed.proj.bias"] = tensors["patch_embed.proj.bias"] - vector.flatten()
    norm = {part: tensors.pop(f"norm.{part}") for part in ("weight", "bias")}
    for number in range(4):
        tensors |= {f"norms_block.{number}.{part}": norm[part] + (3 - number) for part in norm}
    tensors |= {"video_mod_embed": vector, "img_mod_embed": torch.ones(1, 1, 64)}
    tensors |= {"patch_embed_img.proj.weight": torch.ones(64, 3, 1, 16, 16), "patch_embed_img.proj.bias": norm["bias"]}
    file = saved(tmp_path, {"ema_encoder": {f"module.{name}": tensor for name, tensor in tensors.items()}})
    checkpoint = read_checkpoint(file, HINTS)
    assert (checkpoint.format, checkpoint.model.positions) == ("v-jepa 2.1", "rotary_vjepa2_1")
    built = build_encoder(checkpoint, final_norm=True).eval()
    torch.testing.assert_close(built(clip()), model(clip()), rtol=0, atol=2e-5)
    assert not checkpoint.unexpected


@torch.no_grad()
def test_v_jepa_2_1_is_a_model_of_images_too(tmp_path: Path) -> None:
    images, clips = (encoder(positions="rotary_vjepa2_1", **shape) for shape in ({"frames": 1, "tubelet": 1}, {}))
    vector, names = torch.randn(1, 1, 64), authors(images)
    norm = {part: names.pop(f"norm.{part}") for part in ("weight", "bias")}
    image = {name.replace("patch_embed", "patch_embed_img"): names.pop(name) for name in list(names) if "embed" in name}
    image["patch_embed_img.proj.bias"] = image["patch_embed_img.proj.bias"] - vector.flatten()
    patches = {name: tensor for name, tensor in authors(clips).items() if "patch_embed" in name}
    norms = {f"norms_block.{n}.{part}": norm[part] + (3 - n) for n in range(4) for part in norm}
    file = saved(tmp_path, names | image | patches | norms | {"img_mod_embed": vector, "video_mod_embed": vector + 1})
    checkpoint = read_checkpoint(file, Hints(heads=2, frames=1, input_size=48))
    assert (checkpoint.format, checkpoint.model) == ("v-jepa 2.1, images", images.config)
    assert not checkpoint.unexpected
    frames = clip(frames=1)
    built = build_encoder(checkpoint, final_norm=True).eval()
    torch.testing.assert_close(built(frames), images(frames), rtol=0, atol=2e-5)
    assert read_checkpoint(file, HINTS).format == "v-jepa 2.1"

    target = {"kind": "image_teacher", "checkpoint": str(file), "final_norm": True}
    shape = {"width": 64, "depth": 2, "heads": 2, "frames": 1, "tubelet": 1, "input_size": 48}
    recipe = Recipe.model_validate(
        {
            "run": {"folder": "run"},
            "model": {"width": 32, "depth": 1, "heads": 2, "frames": 4, "input_size": 48},
            "data": {"mask": {"ratio": 0.5}},
            "targets": {
                "image": {
                    **target,
                    "model": {**shape, "positions": "rotary_vjepa2_1"},
                    "decoder": {"width": 32, "depth": 1, "heads": 2},
                }
            },
            "training": {"epochs": 2, "global_batch": 2, "base_lr": 1e-3, "warmup_epochs": 0},
        }
    )
    teacher = load_targets(recipe)["image"]
    batch = random_batch(recipe, 2, torch.device("cpu"))
    features = teacher.features(batch)
    # The front frame of the second of two tubelets.
    second = images(batch.pixels[:1, 2:3])[0]
    torch.testing.assert_close(features[0, 4:], second[batch.masked[0, 4:] - 9], rtol=0, atol=2e-5)


def test_published_sizes_are_known_by_their_width(tmp_path: Path) -> None:
    names = {
        "patch_embed.proj.weight": torch.zeros(1408, 3, 2, 16, 16),
        "blocks.0.attn.qkv.bias": torch.zeros(3 * 1408),
        "norm.weight": torch.zeros(1408),
    }
    model = read_checkpoint(saved(tmp_path, names)).model
    assert (model.heads, model.frames, model.input_size) == (22, 64, 256)


def test_a_stored_table_is_that_of_v_jepa_unless_the_user_says_otherwise(tmp_path: Path) -> None:
    tensors = authors(encoder()) | {"pos_embed": torch.randn(1, 18, 64)}
    file = saved(tmp_path, tensors)
    assert read_checkpoint(file, HINTS).format == "v-jepa"
    checkpoint = read_checkpoint(file, Hints(heads=2, frames=4, input_size=48, positions="rotary_vjepa2"))
    assert (checkpoint.format, checkpoint.unused) == ("v-jepa 2", ("pos_embed",))


def test_a_table_of_the_size_of_v_jepa_2_is_of_the_model_that_the_user_states(tmp_path: Path) -> None:
    file = saved(tmp_path, authors(encoder()) | {"pos_embed": torch.randn(1, 2048, 64)})
    with pytest.raises(UserError, match=r"can be V-JEPA or V-JEPA 2, .*--positions rotary_vjepa2"):
        read_checkpoint(file, Hints(heads=2))
    assert read_checkpoint(file, Hints(heads=2, positions="rotary_vjepa2")).format == "v-jepa 2"
    first = read_checkpoint(file, Hints(heads=2, frames=16, positions="sincos3d"))
    assert (first.format, first.model.grid) == ("v-jepa", (8, 16, 16))
    with pytest.raises(UserError, match="holds learned positions"):
        read_checkpoint(file, Hints(heads=2, frames=16, positions="sinusoid"))


def test_the_last_norm_of_v_jepa_2_1_is_not_applied_to_its_other_layers(tmp_path: Path) -> None:
    tensors = authors(encoder(positions="rotary_vjepa2_1"))
    for name in ("weight", "bias"):
        norm = tensors.pop(f"norm.{name}")
        tensors |= {f"norms_block.{number}.{name}": norm for number in range(4)}
    file = saved(tmp_path, tensors)
    model = {"width": 64, "depth": 2, "heads": 2, "frames": 4, "input_size": 48}
    target = {
        "kind": "video_teacher", "checkpoint": str(file), "final_norm": True, "norm": True,
        "model": {**model, "positions": "rotary_vjepa2_1"}, "decoder": {"width": 32, "depth": 1, "heads": 2},
    }  # fmt: skip

    def of_layers(layers: list[int]) -> Recipe:
        return Recipe.model_validate(
            {
                "run": {"folder": "run"}, "model": model, "data": {"mask": {"ratio": 0.5}},
                "targets": {"video": {**target, "layers": layers}},
                "training": {"epochs": 2, "global_batch": 2, "base_lr": 1e-3, "warmup_epochs": 0},
            }
        )  # fmt: skip

    with pytest.raises(UserError, match=r"targets\.video: V-JEPA 2\.1 has a norm of its own for each"):
        load_targets(of_layers([1, 2]))
    load_targets(of_layers([2]))


@torch.no_grad()
def test_an_imported_file_holds_all_of_the_model(tmp_path: Path) -> None:
    model = encoder()
    checkpoint = read_checkpoint(saved(tmp_path, authors(model)), HINTS)
    import_checkpoint(checkpoint, "video_teacher", tmp_path / "ours.safetensors")
    again = read_checkpoint(tmp_path / "ours.safetensors")
    assert again.model == SHAPE
    assert torch.equal(build_encoder(again, final_norm=True).eval()(clip()), model(clip()))
    told = describe_checkpoint(again)
    for line in ("positions    rotary_vjepa2", "grid         2 x 3 x 3 tokens", "faults       none"):
        assert line in told


@pytest.fixture
def hf() -> Any:
    return pytest.importorskip("transformers", reason="the hf extra is not installed")


SMALL = {
    "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2, "mlp_ratio": 3.0, "crop_size": 48,
    "frames_per_clip": 4, "pred_hidden_size": 48, "pred_num_attention_heads": 2, "pred_num_hidden_layers": 1,
}  # fmt: skip


@pytest.mark.parametrize("kind", ["VJEPA2Model", "VJEPA2ForVideoClassification"])
@torch.no_grad()
def test_features_are_those_of_transformers(tmp_path: Path, hf: Any, kind: str) -> None:
    model = getattr(hf, kind)(hf.VJEPA2Config(**SMALL)).eval()
    randomise(model)
    model.save_pretrained(tmp_path / "theirs")
    checkpoint = read_checkpoint(tmp_path / "theirs")
    assert (checkpoint.format, checkpoint.model.grid, checkpoint.unexpected) == ("hf_vjepa2", (2, 3, 3), {})
    inside = model if kind == "VJEPA2Model" else model.vjepa2
    for frames in (4, 6):
        pixels = clip(frames)
        normalised = ((pixels - torch.tensor(IMAGENET_MEAN)) / torch.tensor(IMAGENET_STD)).permute(0, 1, 4, 2, 3)
        theirs = inside(normalised, skip_predictor=True).last_hidden_state
        assert theirs.abs().max() > 0.1
        ours = build_encoder(checkpoint, final_norm=True).eval()(pixels)
        torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-5)


def test_inspect_groups_what_is_left_out(tmp_path: Path, hf: Any) -> None:
    hf.VJEPA2Model(hf.VJEPA2Config(**SMALL)).save_pretrained(tmp_path / "theirs")
    told = describe_checkpoint(read_checkpoint(tmp_path / "theirs"))
    assert "format       hf_vjepa2, encoder" in told
    assert "left out     predictor.* (" in told
    assert "input        4 frames of 48 x 48 pixels" in told
