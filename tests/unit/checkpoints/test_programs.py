"""Exported programs compute what the classifier computes, for any number of clips, and say what they are."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from torch import Tensor

from mvd_scale.checkpoints import build_classifier, export_checkpoint, read_checkpoint
from mvd_scale.checkpoints.native import save_weights
from mvd_scale.cli import cli
from mvd_scale.config import ModelConfig
from mvd_scale.config.data import ViewsConfig
from mvd_scale.errors import UserError
from mvd_scale.models import Classifier, Encoder

SHAPE = ModelConfig(width=32, depth=2, heads=2, frames=4, input_size=32)
VIEWS = ViewsConfig(stride=2, clips=2)
NAMES = ["archery", "bowling", "curling"]
TOLD = {
    "mvd_scale.classes": NAMES,
    "mvd_scale.model": SHAPE.model_dump(mode="json"),
    "mvd_scale.views": VIEWS.model_dump(mode="json"),
    "mvd_scale.normalisation": {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]},
}

Program = Callable[[Tensor], Tensor]


def save_classifier(path: Path, shape: ModelConfig = SHAPE) -> Path:
    torch.manual_seed(0)
    classifier = Classifier(shape, len(NAMES), init_scale=100)
    save_weights(path, classifier.state_dict(), shape, classes=NAMES, views=VIEWS)
    return path


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    return save_classifier(tmp_path / "classifier.safetensors")


def run(*words: str | Path) -> None:
    result = CliRunner().invoke(cli, ["export", *map(str, words)], catch_exceptions=False)
    assert result.exit_code == 0, result.output


def load_torch(path: Path) -> tuple[Program, dict[str, object]]:
    told = dict.fromkeys(TOLD, "")
    program = torch.export.load(path, extra_files=told)
    return program.module(), {key: json.loads(value) for key, value in told.items()}


def load_onnx(path: Path) -> tuple[Program, dict[str, object]]:
    runtime = pytest.importorskip("onnxruntime", reason="ONNX programs are run by onnxruntime")
    session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
    told = {key: json.loads(value) for key, value in session.get_modelmeta().custom_metadata_map.items()}
    return lambda clips: torch.from_numpy(session.run(["scores"], {"clips": clips.numpy()})[0]), told


LOADERS = {"torch": (".pt2", load_torch), "onnx": (".onnx", load_onnx)}


@pytest.mark.parametrize("class_token", [False, True], ids=["mean pooling", "class token"])
@pytest.mark.parametrize("kind", LOADERS)
def test_a_program_scores_any_number_of_clips_as_the_classifier_does(tmp_path, kind, class_token):
    if kind == "onnx":
        pytest.importorskip("onnxscript", reason="ONNX is written by onnxscript")
    shape = SHAPE.model_copy(update={"class_token": class_token})
    weights = save_classifier(tmp_path / "classifier.safetensors", shape)
    suffix, load = LOADERS[kind]
    out = tmp_path / "new" / f"program{suffix}"
    run(weights, "--to", kind, "--out", out)
    assert list(out.parent.iterdir()) == [out]
    program, told = load(out)
    assert told == TOLD | {"mvd_scale.model": shape.model_dump(mode="json")}
    classifier = build_classifier(read_checkpoint(weights)).eval()
    generator = torch.Generator().manual_seed(0)
    for batch in (1, 2, 5):
        clips = torch.randint(0, 256, (batch, 4, 32, 32, 3), dtype=torch.uint8, generator=generator)
        with torch.no_grad():
            expected = classifier(clips).softmax(1)
        assert expected.std() > 0.05
        torch.testing.assert_close(program(clips), expected, atol=1e-4, rtol=0)


def test_nothing_is_written_of_what_is_no_classifier_or_has_another_suffix(tmp_path, weights):
    encoder = tmp_path / "encoder.safetensors"
    save_weights(encoder, Encoder(SHAPE).state_dict(), SHAPE)
    before = set(tmp_path.iterdir())
    for source, kind, name, said in (
        (encoder, "torch", "program.pt2", "no classification head"),
        (weights, "torch", "program.onnx", r"ends in \.pt2"),
        (weights, "onnx", "program.pt2", r"ends in \.onnx"),
    ):
        with pytest.raises(UserError, match=said):
            export_checkpoint(read_checkpoint(source), kind, tmp_path / name)
    assert set(tmp_path.iterdir()) == before


def test_without_onnx_the_extra_is_named(tmp_path, weights, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(UserError, match=r"pip install 'mvd-scale\[onnx\]'"):
        export_checkpoint(read_checkpoint(weights), "onnx", tmp_path / "program.onnx")
    assert list(tmp_path.iterdir()) == [weights]


def test_names_that_are_not_as_many_as_the_head_has_classes_are_refused(tmp_path):
    path = tmp_path / "classifier.safetensors"
    save_weights(path, Classifier(SHAPE, 3).state_dict(), SHAPE, classes=["archery", "bowling"])
    with pytest.raises(UserError, match="names 2 classes, but its head has 3"):
        read_checkpoint(path)
