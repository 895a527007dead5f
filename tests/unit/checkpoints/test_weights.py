"""Weights go out and come back exactly, or every reason why not is named and nothing was loaded."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from mvd_scale.checkpoints.weights import load_encoder, load_exactly, save_weights
from mvd_scale.config import ModelConfig
from mvd_scale.errors import UserError
from mvd_scale.models import Encoder

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
    assert torch.equal(mapped(clip), encoder(clip))
    maps = [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if line.endswith(path.name)]
    ranges = [[int(end, 16) for end in line[0].split("-")] for line in maps]
    assert all(any(low <= p.data_ptr() < high for low, high in ranges) for p in mapped.parameters())
    tensors = encoder.state_dict()
    del tensors["norm.weight"]
    save_weights(path, tensors, SHAPE)
    with pytest.raises(UserError, match=r"missing norm\.weight"):
        load_encoder(path, final_norm=True, mapped=True)


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
        load_exactly(encoder, tensors, "file.safetensors")
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
    with pytest.raises(UserError, match="does not say which model"):
        load_encoder(path, final_norm=True)
    path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(UserError, match="not a readable safetensors file"):
        load_encoder(path, final_norm=True)
