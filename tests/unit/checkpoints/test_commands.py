"""`mvd-scale import`, `export` and `inspect` as a person runs them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from torch import Tensor

from mvd_scale.checkpoints import load_encoder, read_checkpoint, to_published
from mvd_scale.checkpoints.native import save_weights
from mvd_scale.cli import cli
from mvd_scale.config import DecoderConfig, ModelConfig
from mvd_scale.errors import UserError
from mvd_scale.models import Student

SHAPE = ModelConfig(width=32, depth=2, heads=2, frames=4, input_size=32, positions="sinusoid")
DECODER = DecoderConfig(width=48, depth=1, heads=3, embed_bias=False)
HINTS = ["--heads", "2", "--decoder-heads", "3", "--frames", "4", "--input-size", "32"]


@pytest.fixture
def published(tmp_path: Path) -> tuple[Path, dict[str, Tensor]]:
    """A pre-training checkpoint as VideoMAE gives it away."""
    native = tmp_path / "native.safetensors"
    student = Student(SHAPE, {"pixels": (DECODER, 1536)})
    save_weights(native, student.state_dict(), SHAPE, {"pixels": DECODER})
    tensors = to_published(read_checkpoint(native), "videomae")
    torch.save({"model": tensors}, tmp_path / "checkpoint-1599.pth")
    return tmp_path / "checkpoint-1599.pth", tensors


def run(*words: str | Path) -> str:
    result = CliRunner().invoke(cli, list(map(str, words)), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_inspect_says_what_a_file_is(published: tuple[Path, dict[str, Tensor]]) -> None:
    said = " ".join(run("inspect", published[0], *HINTS).split())
    for fact in (
        "format videomae, student",
        "size free (width 32, depth 2, heads 2)",
        "patch 16 pixels, tubelet 2",
        "grid 2 x 2 x 2 tokens",
        "input 4 frames of 32 x 32 pixels",
        "positions sinusoid",
        "class token no",
        "decoder pixels width 48, depth 1, heads 3, 1536 channels",
        "classes none",
        f"parameters {sum(t.numel() for t in published[1].values()) / 1e6:.2f} M",
        "faults none",
    ):
        assert fact in said


def test_inspect_names_what_is_missing_and_surplus(published: tuple[Path, dict[str, Tensor]]) -> None:
    path, tensors = published
    tensors["novelty"] = tensors.pop("encoder.norm.bias")
    torch.save(tensors, path)
    said = run("inspect", path, *HINTS)
    assert "missing encoder.norm.bias" in said
    assert "surplus novelty" in said


def test_in_as_a_teacher_and_a_student_and_out_again(published: tuple[Path, dict[str, Tensor]], tmp_path: Path) -> None:
    path, tensors = published
    run("import", path, "--as", "video_teacher", "--out", tmp_path / "teacher.safetensors", *HINTS)
    assert load_encoder(tmp_path / "teacher.safetensors", final_norm=False).config == SHAPE
    run("import", path, "--as", "student", "--out", tmp_path / "student.safetensors", *HINTS)
    run("export", tmp_path / "student.safetensors", "--to", "videomae", "--out", tmp_path / "back.pth")
    back = torch.load(tmp_path / "back.pth", weights_only=True)["model"]
    assert back.keys() == tensors.keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in tensors.items())
    run("export", tmp_path / "student.safetensors", "--to", "hf", "--out", tmp_path / "hf")
    assert read_checkpoint(tmp_path / "hf").model == SHAPE


def test_an_image_model_is_inflated(tmp_path: Path) -> None:
    from mvd_scale.models import Encoder

    image = ModelConfig(width=384, depth=1, heads=6, frames=1, tubelet=1, positions="sincos2d", class_token=True)
    save_weights(tmp_path / "image.safetensors", Encoder(image).state_dict(), image)
    run("export", tmp_path / "image.safetensors", "--to", "mae", "--out", tmp_path / "mae.pth")
    words = ("--as", "video_teacher", "--tubelet", "2", "--frames", "16", "--out", tmp_path / "video.safetensors")
    run("import", tmp_path / "mae.pth", *words)
    assert read_checkpoint(tmp_path / "video.safetensors").model.grid == (8, 14, 14)


def test_nothing_is_written_when_something_is_wrong(published: tuple[Path, dict[str, Tensor]], tmp_path: Path) -> None:
    path, tensors = published
    tensors["encoder.norm.weight"][0] = float("inf")
    torch.save(tensors, path)
    before = set(tmp_path.iterdir())
    for words in (("import", path, "--as", "student"), ("export", path, "--to", "videomae")):
        with pytest.raises(UserError, match=r"encoder\.norm\.weight holds values that are not finite"):
            run(*words, "--out", tmp_path / "out.safetensors", *HINTS)
    assert set(tmp_path.iterdir()) == before
