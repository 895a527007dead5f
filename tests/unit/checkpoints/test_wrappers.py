"""Tests of files of other projects: the one model in them is found, several are listed, foreign ones are told."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from torch import Tensor

from mvd_scale.checkpoints import Hints, export_checkpoint, import_checkpoint, read_checkpoint
from mvd_scale.checkpoints.pickles import load_pickle
from mvd_scale.checkpoints.weights import build_encoder, save_weights
from mvd_scale.checkpoints.wrappers import unwrap
from mvd_scale.cli import cli
from mvd_scale.config import ModelConfig
from mvd_scale.errors import UserError
from mvd_scale.models import Classifier

WIDTH, GRID = 32, 2
VIDEO = Hints(heads=2, frames=4, input_size=32)


def blocks(fused: bool = True) -> dict[str, Tensor]:
    """Tensors of one block in timm's names."""
    shapes = {"norm1.weight": (WIDTH,), "norm1.bias": (WIDTH,), "attn.qkv.weight": (3 * WIDTH, WIDTH)}
    shapes |= {"attn.qkv.bias": (3 * WIDTH,)} if fused else {"attn.q_bias": (WIDTH,), "attn.v_bias": (WIDTH,)}
    shapes |= {"attn.proj.weight": (WIDTH, WIDTH), "attn.proj.bias": (WIDTH,)}
    shapes |= {"norm2.weight": (WIDTH,), "norm2.bias": (WIDTH,), "mlp.fc1.weight": (4 * WIDTH, WIDTH)}
    shapes |= {"mlp.fc1.bias": (4 * WIDTH,), "mlp.fc2.weight": (WIDTH, 4 * WIDTH), "mlp.fc2.bias": (WIDTH,)}
    return {f"blocks.0.{name}": torch.randn(shape) for name, shape in shapes.items()}


def clips(positions: bool = True, fused: bool = True) -> dict[str, Tensor]:
    """An encoder of clips in timm's names, as V-JEPA has them."""
    tensors = {"patch_embed.proj.weight": torch.randn(WIDTH, 3, 2, 16, 16), "patch_embed.proj.bias": torch.randn(WIDTH)}
    table = {"pos_embed": torch.randn(1, 2 * GRID**2, WIDTH)} if positions else {}
    return {**tensors, **table, **blocks(fused), "norm.weight": torch.ones(WIDTH), "norm.bias": torch.zeros(WIDTH)}


def image(class_token: bool) -> dict[str, Tensor]:
    """An encoder of images in timm's names."""
    tensors = clips() | {"patch_embed.proj.weight": torch.randn(WIDTH, 3, 16, 16)}
    tensors["pos_embed"] = torch.randn(1, GRID**2 + class_token, WIDTH)
    return tensors | ({"cls_token": torch.randn(1, 1, WIDTH)} if class_token else {})


def without(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors.items() if not name.startswith(prefix)}


def prefixed(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {prefix + name: tensor for name, tensor in tensors.items()}


def saved(folder: Path, content: Any) -> Path:
    torch.save(content, folder / "weights.pth")
    return folder / "weights.pth"


PREDICTOR = {"predictor_embed.weight": torch.ones(2, 2)}
OPTIMIZER = {"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": [{"lr": 0.1}]}
WRAPPERS: dict[str, Any] = {
    "bare": lambda w: w,
    "model": lambda w: {"model": w, "optimizer": OPTIMIZER, "epoch": 3},
    "state_dict": lambda w: {"state_dict": prefixed(w, "module."), "best": 0.5},
    "model_state": lambda w: {"model_state": w, "optimizer_state": OPTIMIZER},
    "module in model": lambda w: {"model": {"module": w}},
    "encoder": lambda w: {"encoder": prefixed(w, "module.backbone."), "predictor": PREDICTOR, "opt": OPTIMIZER},
    "target_encoder": lambda w: {"target_encoder": prefixed(w, "module."), "predictor": PREDICTOR},
    "teacher": lambda w: {"teacher": prefixed(w, "backbone."), "optimizer": OPTIMIZER},
    "student": lambda w: {"student": prefixed(w, "module.backbone."), "epoch": 1},
    "teacher in model": lambda w: {"model": {"teacher": w}},
    "an empty model": lambda w: {"model": {}, "weights": {"depth": 2}, "state_dict": w},
    "any prefix": lambda w: {"state_dict": prefixed(w, "module.student.vit."), "epoch": 1},
    "an averaged model": lambda w: prefixed(w, "module.") | {"n_averaged": torch.tensor(3)},
    "a name of its own": lambda w: {"ema_vit": w, "optimizer": OPTIMIZER},
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_the_one_model_of_a_file_is_found(tmp_path: Path, wrapper: str) -> None:
    weights = clips()
    checkpoint = read_checkpoint(saved(tmp_path, WRAPPERS[wrapper](weights)), VIDEO)
    assert (checkpoint.format, checkpoint.unexpected) == ("v-jepa", {})
    build_encoder(checkpoint, final_norm=True)
    assert torch.equal(checkpoint.encoder["positions"], weights["pos_embed"][0])


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_the_conversion_that_a_refusal_offers_works(tmp_path: Path, wrapper: str) -> None:
    weights = clips()
    content = WRAPPERS[wrapper](weights) | {"beside": torch.nn.Linear(1, 1)}
    file = saved(tmp_path, content)
    with pytest.raises(UserError, match="contains code") as refusal:
        load_pickle(file)
    (command,) = (line for line in str(refusal.value).splitlines() if line.startswith("  python -c "))
    words = shlex.split(command)
    subprocess.run([sys.executable, *words[1:]], cwd=tmp_path, check=True)
    checkpoint = read_checkpoint(tmp_path / "converted.safetensors", VIDEO)
    build_encoder(checkpoint, final_norm=True)
    assert torch.equal(checkpoint.encoder["positions"], weights["pos_embed"][0])


def test_several_models_are_listed_and_one_is_chosen(tmp_path: Path) -> None:
    student, teacher = image(True), image(True)
    heads = {"head.last_layer.weight_v": torch.ones(3, 3), "head.mlp.0.weight": torch.ones(3, 3)}
    both = {"student": prefixed(student, "module.backbone."), "teacher": prefixed(teacher, "backbone.") | heads}
    file = saved(tmp_path, {**both, "optimizer": OPTIMIZER, "epoch": 3})
    with pytest.raises(UserError, match=r"several models, student, teacher: choose one with .* --key teacher.*DINO"):
        read_checkpoint(file, Hints(heads=2))
    checkpoint = read_checkpoint(file, Hints(heads=2, key="teacher"))
    assert checkpoint.format == "dino"
    assert torch.equal(checkpoint.encoder["positions"], teacher["pos_embed"][0, 1:])
    with pytest.raises(UserError, match="student, teacher, and none is called 'mentor'"):
        read_checkpoint(file, Hints(heads=2, key="mentor"))
    jepa = {"encoder": image(False), "target_encoder": image(False), "predictor": PREDICTOR}
    with pytest.raises(UserError, match=r"encoder, target_encoder: choose one .*I-JEPA or V-JEPA"):
        unwrap(jepa, file)
    out = tmp_path / "out.safetensors"
    words = ["import", str(saved(tmp_path, jepa)), "--key", "target_encoder", "--as", "image_teacher", "--heads", "2"]
    result = CliRunner().invoke(cli, [*words, "--out", str(out)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert torch.equal(read_checkpoint(out).encoder["positions"], jepa["target_encoder"]["pos_embed"][0])
    with pytest.raises(UserError, match="has no weights under the key 'teacher'"):
        unwrap({"model": image(True)}, file, "teacher")


def test_several_models_in_one_dictionary_are_listed_by_their_prefixes(tmp_path: Path) -> None:
    student, teacher = image(True), image(True)
    file = saved(
        tmp_path, {"state_dict": prefixed(student, "net.student.vit.") | prefixed(teacher, "net.teacher.vit.")}
    )
    with pytest.raises(UserError, match=r"several models, net\.student, net\.teacher: choose one"):
        read_checkpoint(file, Hints(heads=2))
    checkpoint = read_checkpoint(file, Hints(heads=2, key="net.teacher"))
    assert torch.equal(checkpoint.encoder["positions"], teacher["pos_embed"][0, 1:])


def test_the_log_names_the_models_that_are_not_read(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "mvd_scale")
    model, average = image(True), image(True)
    for content in (
        {"model": model, "model_ema": average, "optimizer": OPTIMIZER},
        {"state_dict": prefixed(model, "model.") | prefixed(average, "model_ema.")},
    ):
        caplog.clear()
        checkpoint = read_checkpoint(saved(tmp_path, content), Hints(heads=2))
        assert torch.equal(checkpoint.encoder["positions"], model["pos_embed"][0, 1:])
        assert "reads model, not model_ema, which `--key` would choose" in caplog.text


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        (lambda t: (t * 100).to(torch.int8), "is int8"),
        (lambda t: t.to(torch.float8_e4m3fn), "is float8_e4m3fn"),
        (lambda t: t.to(torch.complex64), "is complex64"),
        (lambda t: t.to_sparse(), "is sparse_coo"),
    ],
    ids=["int8", "float8", "complex", "sparse"],
)
def test_quantized_weights_are_refused(tmp_path: Path, changed: Callable[[Tensor], Tensor], said: str) -> None:
    tensors = image(True)
    file = saved(tmp_path, {"model": tensors | {"pos_embed": changed(tensors["pos_embed"])}})
    with pytest.raises(UserError, match=said):
        read_checkpoint(file, Hints(heads=2))


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        (clips() | {"pos_embed_spatial": torch.ones(1, 4, WIDTH)}, "MAE-ST"),
        (image(True) | {"blocks.0.ls1.gamma": torch.ones(WIDTH)}, "DINOv2"),
        (image(True) | {"blocks.0.gamma_1": torch.ones(WIDTH)}, "LayerScale"),
        (image(True) | {"blocks.0.attn.relative_position_bias_table": torch.ones(3, 2)}, "BEiT"),
        (without(clips(positions=False), "norm."), "a model of clips without a stored position table"),
        (clips(positions=False) | {"head.weight": torch.ones(3, WIDTH)}, "no V-JEPA 2, .* have no head"),
    ],
)
def test_foreign_models_are_told(tmp_path: Path, tensors: dict[str, Tensor], said: str) -> None:
    with pytest.raises(UserError, match=r"is a file of .*, which is not read: ") as raised:
        read_checkpoint(saved(tmp_path, {"model": tensors}), VIDEO)
    assert re.search(said, str(raised.value))


def test_known_encoders_are_not_foreign(tmp_path: Path) -> None:
    expected = {
        "v-jepa": clips(),
        "v-jepa 2": clips(False),
        "i-jepa": image(False),
        "timm": image(True),
        "videomae": clips(False, False),
    }
    for name, tensors in expected.items():
        hints = VIDEO if tensors["patch_embed.proj.weight"].ndim == 5 else Hints(heads=2)
        assert read_checkpoint(saved(tmp_path, tensors), hints).format == name
    stated = Hints(heads=2, frames=4, input_size=32, positions="sincos3d")
    assert read_checkpoint(saved(tmp_path, clips(positions=False)), stated).model.positions == "sincos3d"


def test_names_of_classes_come_in_from_hugging_face_and_go_out(tmp_path: Path) -> None:
    config = ModelConfig(width=32, depth=1, heads=2, frames=4, input_size=32, positions="sinusoid")
    names = ("run", "jump", "swim")
    save_weights(tmp_path / "ours.safetensors", Classifier(config, 3).state_dict(), config, classes=names)
    export_checkpoint(read_checkpoint(tmp_path / "ours.safetensors"), "hf", tmp_path / "hf")
    told = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert told["id2label"] == {"0": "run", "1": "jump", "2": "swim"}
    assert told["label2id"] == {"run": 0, "jump": 1, "swim": 2}
    back = read_checkpoint(tmp_path / "hf")
    assert back.class_names == names
    import_checkpoint(back, "classifier", tmp_path / "back.safetensors")
    assert read_checkpoint(tmp_path / "back.safetensors").class_names == names
    told["id2label"] = {"0": "LABEL_0", "1": "LABEL_1", "2": "LABEL_2"}
    (tmp_path / "hf" / "config.json").write_text(json.dumps(told))
    assert read_checkpoint(tmp_path / "hf").class_names == ()
    told["id2label"] = {"0": "run", "1": "jump"}
    (tmp_path / "hf" / "config.json").write_text(json.dumps(told))
    with pytest.raises(UserError, match=r"id2label .* names 2 classes, but its head has 3"):
        read_checkpoint(tmp_path / "hf")
