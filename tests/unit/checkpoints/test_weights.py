"""Weights survive saving and loading exactly; otherwise every misfit is named and nothing is loaded."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from mvd_scale.checkpoints import describe_checkpoint
from mvd_scale.checkpoints.weights import (
    build_student,
    load_encoder,
    load_initial_encoder,
    load_strict,
    read_checkpoint,
    save_weights,
)
from mvd_scale.config import DecoderConfig, ModelConfig, TokenHeadConfig
from mvd_scale.errors import UserError
from mvd_scale.models import Encoder, Student

SHAPE = ModelConfig(width=32, depth=1, heads=2, frames=4, input_size=32)


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Path, Encoder]:
    encoder, path = Encoder(SHAPE), tmp_path / "encoder.safetensors"
    save_weights(path, encoder.state_dict(), SHAPE)
    return path, encoder


def test_an_encoder_comes_back_as_it_was(saved: tuple[Path, Encoder]) -> None:
    path, encoder = saved
    clip = torch.randint(0, 256, (1, 4, 32, 32, 3), dtype=torch.uint8)
    loaded = load_encoder(path, final_norm=True)
    assert loaded.config == SHAPE
    assert torch.equal(loaded(clip), encoder(clip))
    teacher = load_encoder(path, final_norm=False)
    torch.testing.assert_close(encoder.norm(teacher(clip)), encoder(clip))  # type: ignore[misc]


def test_a_mapped_encoder_stays_in_its_file_until_it_is_read(saved: tuple[Path, Encoder]) -> None:
    path, encoder = saved
    clip = torch.randint(0, 256, (1, 4, 32, 32, 3), dtype=torch.uint8)
    mapped = load_encoder(path, final_norm=True, mapped=True)
    assert all(torch.equal(tensor, encoder.state_dict()[name]) for name, tensor in mapped.state_dict().items())
    # In a file they do not lie where vector instructions want them, so that products may sum in another order.
    torch.testing.assert_close(mapped(clip), encoder(clip))
    maps = [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if line.endswith(path.name)]
    ranges = [[int(end, 16) for end in line[0].split("-")] for line in maps]
    assert all(any(low <= p.data_ptr() < high for low, high in ranges) for p in mapped.parameters())
    tensors = encoder.state_dict()
    del tensors["norm.weight"]
    save_weights(path, tensors, SHAPE)
    with pytest.raises(UserError, match=r"missing norm\.weight"):
        load_encoder(path, final_norm=True, mapped=True)


def test_a_classifier_starts_from_an_encoder_without_its_final_norm(saved: tuple[Path, Encoder]) -> None:
    path, encoder = saved
    started = Encoder(SHAPE, final_norm=False)
    load_initial_encoder(started, path)
    assert torch.equal(started.patch_embed.weight, encoder.patch_embed.weight)


def test_others_may_read_what_was_written(saved: tuple[Path, Encoder]) -> None:
    assert saved[0].stat().st_mode & 0o044 == 0o044


def test_all_faults_are_named_and_nothing_is_loaded() -> None:
    encoder = Encoder(SHAPE)
    before = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    tensors = {name: tensor + 1 for name, tensor in encoder.state_dict().items()}
    del tensors["norm.weight"]
    tensors["surprise"] = torch.zeros(1)
    tensors["norm.bias"] = torch.zeros(3)
    tensors["patch_embed.bias"][0] = float("nan")
    with pytest.raises(UserError) as error:
        load_strict(encoder, tensors, "file.safetensors")
    for fault in (
        "missing norm.weight",
        "surplus surprise",
        "norm.bias is (3,), expected (32,)",
        "patch_embed.bias holds values that are not finite",
    ):
        assert fault in str(error.value)
    assert all(torch.equal(tensor, before[name]) for name, tensor in encoder.state_dict().items())


def test_a_file_of_unknown_origin_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "encoder.safetensors"
    save_file({"x": torch.zeros(1)}, path)
    with pytest.raises(UserError, match="does not state the shape of its model"):
        load_encoder(path, final_norm=True)
    path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(UserError, match="not a readable safetensors file"):
        load_encoder(path, final_norm=True)


def test_heads_of_all_kinds_come_back(tmp_path: Path) -> None:
    decoder = DecoderConfig(width=16, depth=1, heads=2)
    mlp = TokenHeadConfig(kind="mlp", hidden=12)
    student = Student(SHAPE, {"a": (decoder, 5), "b": (TokenHeadConfig(kind="linear"), 6), "c": (mlp, 7)})
    path = tmp_path / "student.safetensors"
    save_weights(path, student.state_dict(), SHAPE, {"a": decoder})
    checkpoint = read_checkpoint(path)
    assert checkpoint.kind == "student"
    description = describe_checkpoint(checkpoint)
    assert "linear head b" in description
    assert "mlp head c" in description
    assert description.endswith("none")  # no faults
    again = build_student(checkpoint)
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in student.state_dict().items())


def test_a_start_from_an_image_model_embeds_still_clips_as_images(tmp_path: Path) -> None:
    shape = ModelConfig(
        width=32, depth=1, heads=2, frames=1, tubelet=1, input_size=32, positions="sincos2d", class_token=True
    )
    image, path = Encoder(shape), tmp_path / "image.safetensors"
    save_weights(path, image.state_dict(), shape)
    encoder = Encoder(SHAPE)
    load_initial_encoder(encoder, path)
    assert torch.equal(encoder.positions, Encoder(SHAPE).positions)
    assert torch.equal(encoder.blocks[0].mlp.fc1.weight, image.blocks[0].mlp.fc1.weight)
    patch = torch.rand(1, 16, 16, 3)
    still = encoder.patch_embed(patch.unsqueeze(1).expand(-1, 2, -1, -1, -1).flatten(1))
    torch.testing.assert_close(still, image.patch_embed(patch.flatten(1)))


def test_a_start_from_a_teacher_without_a_norm_keeps_a_fresh_one(tmp_path: Path) -> None:
    teacher, path = Encoder(SHAPE, final_norm=False), tmp_path / "teacher.safetensors"
    save_weights(path, teacher.state_dict(), SHAPE)
    encoder = Encoder(SHAPE)
    load_initial_encoder(encoder, path)
    assert torch.equal(encoder.patch_embed.weight, teacher.patch_embed.weight)
    assert encoder.norm is not None
    assert (encoder.norm.weight == 1).all()
    narrow = ModelConfig(width=16, depth=1, heads=2, frames=4, input_size=32)
    save_weights(path, Encoder(narrow).state_dict(), narrow)
    with pytest.raises(UserError, match=r"patch_embed\.weight is \(16, 1536\), expected \(32, 1536\)"):
        load_initial_encoder(encoder, path)


@pytest.mark.parametrize("change", [{"heads": 4}, {"positions": "sinusoid"}])
def test_weights_of_another_arithmetic_do_not_start_an_encoder(
    saved: tuple[Path, Encoder], change: dict[str, object]
) -> None:
    ((key, value),) = change.items()
    encoder = Encoder(ModelConfig.model_validate(SHAPE.model_dump() | change))
    with pytest.raises(UserError, match=rf"was trained with {key} \w+, the recipe has model\.{key} {value}"):
        load_initial_encoder(encoder, saved[0])
