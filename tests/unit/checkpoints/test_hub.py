"""Folders for the hub: the card tells what the run tells, and transformers, from_pretrained and torch.hub load them."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import nn

import mvd_scale
from mvd_scale.checkpoints import build_classifier, export_checkpoint, read_checkpoint
from mvd_scale.checkpoints.checkpoint import Hints
from mvd_scale.checkpoints.hub import find_weights
from mvd_scale.checkpoints.native import save_weights
from mvd_scale.checkpoints.reading import read_raw_checkpoint, tensors_digest
from mvd_scale.checkpoints.roles import identify_checkpoint
from mvd_scale.config import DecoderConfig, DetectorConfig, ModelConfig, load_finetune_recipe, load_recipe
from mvd_scale.config.data import ViewsConfig
from mvd_scale.config.model import Positions
from mvd_scale.errors import UserError
from mvd_scale.evaluation.metrics import Predictions
from mvd_scale.evaluation.results import EvalResult, Origin
from mvd_scale.models import Classifier, Encoder, Student
from mvd_scale.models.detector import Detector
from mvd_scale.utils.locations import cut_location

REPOSITORY = Path(__file__).resolve().parents[3]

CLASSES = ("up", "down", "a | b `c`")

BLOCKED = ("deepspeed", "timm", "nvidia", "av", "pyarrow", "matplotlib", "tensorboard", "transformers", "click", "rich")

LOAD = f"""
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {BLOCKED}:
            raise ImportError(name)

# Neither the installed package nor what it needs for training: torch.hub has a clone alone.
sys.meta_path = [Blocked(), *(finder for finder in sys.meta_path if "__editable__" not in str(finder))]
import torch
repository, weights = sys.argv[1:]
encoder = torch.hub.load(repository, "encoder", weights, source="local")
classifier = torch.hub.load(repository, "classifier", weights, source="local")
clips = torch.arange(2 * 4 * 32 * 32 * 3).view(2, 4, 32, 32, 3).remainder(251).byte()
print(type(encoder).__name__, tuple(encoder(clips).shape), classifier(clips).double().sum().item())
"""


def shape(positions: Positions = "sincos3d") -> ModelConfig:
    size = {"width": 48, "depth": 2, "heads": 3, "patch_size": 8}
    return ModelConfig(**size, input_size=32, frames=4, tubelet=2, positions=positions)


def randomise(module: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(1)
    for parameter in module.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * (0.06 if parameter.ndim > 1 else 0.5)
    return module.eval()


def clips() -> torch.Tensor:
    """Two clips, uint8 (2, 4, 32, 32, 3); the same as in LOAD."""
    return torch.arange(2 * 4 * 32 * 32 * 3).view(2, 4, 32, 32, 3).remainder(251).byte()


def write_run(folder: Path, positions: Positions = "sincos3d") -> Path:
    """Folder of a fine-tuning run with recipe, summary, a test of its weights, and tests that are not of them alone."""
    folder.mkdir(parents=True)
    views = ViewsConfig(stride=2, clips=1, crops=1)
    model = shape(positions)
    tensors = randomise(Classifier(model, 3)).state_dict()
    save_weights(folder / "classifier.safetensors", tensors, model, classes=CLASSES, views=views)
    words = [
        "--run.folder", "/home/somebody/secret/project/runs/k400",
        "--data.source", "/home/somebody/secret/project/train.parquet",
        "--training.initial_encoder", "runs/student/encoder.safetensors", "--training.epochs", "5",
    ]  # fmt: skip
    (folder / "recipe.yaml").write_text(load_finetune_recipe("quickstart/classifier", words).to_yaml())
    (folder / "summary.json").write_text(json.dumps({"steps": 9, "origin": {"videos": "0123abcd"}}))
    tensors["head.bias"] = tensors["head.bias"] + 1
    save_weights(folder / "best.safetensors", tensors, model, classes=CLASSES, views=views)
    last, best = (read_checkpoint(folder / name) for name in ("classifier.safetensors", "best.safetensors"))
    longer = replace(last, model=model.model_copy(update={"frames": 8}))
    write_test(folder / "test", top1=0.5, model=identify_checkpoint(last))
    write_test(folder / "best", top1=0.75, model=identify_checkpoint(best))
    write_test(folder / "longer", top1=0.8, model=identify_checkpoint(longer))
    write_test(folder / "ensemble", top1=0.9, model=None)
    return folder


def write_test(out: Path, *, top1: float, model: dict[str, Any] | None) -> None:
    """Write a test of 50 videos, as `evaluate` does."""
    views = np.zeros((50, 1, 3), np.float32)
    views[:, 0, 0] = 1
    labels = (np.arange(50) >= 50 * top1).astype(np.int64)
    out.mkdir(exist_ok=True)
    origin = Origin("command", ["file"], "videos", "fp32", "1 view", ["1"], model)
    EvalResult(out, Predictions(labels, np.ones(50, np.bool_), views), ["a"] * 50, CLASSES, origin, {}).write()


def export(source: Path, family: str, out: Path, *, heads: int | None = None, **options: Any) -> Path:
    export_checkpoint(read_checkpoint(source, Hints(heads=heads)), family, out, **options)
    return out


def head_of(card: Path) -> dict[str, Any]:
    _, head, _ = card.read_text().split("---\n", 2)
    return yaml.safe_load(head)


@pytest.mark.parametrize("family", ["hf", "hub"])
def test_the_card_tells_what_the_run_tells(tmp_path: Path, family: str) -> None:
    out = export(write_run(tmp_path / "run", "sinusoid"), family, tmp_path / "model", licence="cc-by-nc-4.0")
    head = head_of(out / "README.md")
    assert head["license"] == "cc-by-nc-4.0"
    assert head["library_name"] == {"hf": "transformers", "hub": "mvd-scale"}[family]
    assert head["pipeline_tag"] == "video-classification"
    (result,) = head["model-index"][0]["results"]
    assert {metric["name"]: metric["value"] for metric in result["metrics"]} == {"top-1": 50.0, "top-5": 100.0}
    card = (out / "README.md").read_text()
    for words in (
        "project/train.parquet", "0123abcd", "runs/student/encoder.safetensors", "| `test` | 50 | 50.00 % | 100.00 % |",
        "`cc-by-nc-4.0`, as stated", "load_classifier" if family == "hub" else "torchcodec", "epochs: 5",
    ):  # fmt: skip
        assert words in card, words
    assert "secret" not in card


def test_the_card_lists_tests_of_these_weights_alone(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    for name, listed in (("classifier", {"test": 50.0}), ("best", {"best": 76.0})):
        out = export(run / f"{name}.safetensors", "hub", tmp_path / name)
        (model,) = head_of(out / "README.md")["model-index"]
        found = {each["dataset"]["name"]: each["metrics"][0]["value"] for each in model["results"]}
        assert found == listed
        rows = (out / "README.md").read_text().count(" | 50 | ")
        assert rows == 1


@pytest.mark.parametrize(
    ("text", "cut"),
    [
        ("https://host.example/a/b/x.parquet?X-Amz-Signature=secret&by=me@host#here", "b/x.parquet"),
        ("https://host.example/x.parquet?token=a/b", "x.parquet"),
        ("https://host.example?token=secret", "..."),
        ("ftp://user:pw@host/x.parquet", "x.parquet"),
        ("ftp://user:p/w@host/x.parquet", "x.parquet"),
        ("ftp://user:p?w@host/x.parquet", "..."),
        ("s3://bucket/project/train.parquet", "project/train.parquet"),
        ("file:///home/me/x.parquet", "me/x.parquet"),
        ("zip://inner.csv::https://user:pw@host/a/b.zip?sig=1", "a/b.zip"),
        ("simplecache::/home/me/project/x.parquet", "project/x.parquet"),
        ("/home/me/project/x.parquet", "project/x.parquet"),
        ("~/project/data/x.parquet", "data/x.parquet"),
        ("~me/x.parquet", "x.parquet"),
        ("../../client/data/x.parquet", "data/x.parquet"),
        ("data/../../client/secret/x.parquet", "secret/x.parquet"),
        ("../x.parquet", "x.parquet"),
        ("runs/student/encoder.safetensors", "runs/student/encoder.safetensors"),
        ("quickstart/classifier", "quickstart/classifier"),
        ("bf16", "bf16"),
    ],
)
def test_locations_are_cut(text: str, cut: str) -> None:
    assert cut_location(text) == cut


def test_the_recipe_of_a_card_has_no_credentials(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    source, teacher = "https://me:pw@host.example/a/b/x.parquet?X-Amz-Signature=0a1b", "../../client/y/best.safetensors"
    words = ["--data.source", source, "--training.initial_encoder", teacher]
    (run / "recipe.yaml").write_text(load_finetune_recipe("quickstart/classifier", words).to_yaml())
    card = (export(run, "hub", tmp_path / "model") / "README.md").read_text()
    assert card.count("b/x.parquet") == card.count("y/best.safetensors") == 2
    for hidden in ("me:pw", "host.example", "Signature", "0a1b", "client", "a/b"):
        assert hidden not in card, hidden


def test_the_card_of_a_detector_tells_how_to_detect(tmp_path: Path) -> None:
    pytest.importorskip("torchvision", reason="the detection extra is not installed")
    config = DetectorConfig(classes=3)
    tensors = randomise(Detector(shape(), config)).state_dict()
    save_weights(tmp_path / "detector.safetensors", tensors, shape(), detector=config)
    out = export(tmp_path / "detector.safetensors", "hub", tmp_path / "model")
    card = (out / "README.md").read_text()
    assert "logits = detector(clips, boxes)" in card
    assert "encoder = " not in card
    boxes = torch.tensor([[0, 1, 1, 20, 20], [1, 2, 2, 30, 30]], dtype=torch.float32)
    assert mvd_scale.from_pretrained(out)(clips(), boxes).shape == (2, 3)
    with pytest.raises(UserError, match="--to hub has"):
        export(tmp_path / "detector.safetensors", "hf", tmp_path / "hf")


def test_a_card_without_a_run(tmp_path: Path) -> None:
    save_weights(tmp_path / "encoder.safetensors", randomise(Encoder(shape())).state_dict(), shape())
    out = export(tmp_path / "encoder.safetensors", "hub", tmp_path / "model")
    head, card = head_of(out / "README.md"), (out / "README.md").read_text()
    assert (head["license"], head["pipeline_tag"]) == ("unknown", "feature-extraction")
    assert "model-index" not in head
    for words in (
        "lay beside no recipe",
        "No finished test of these weights",
        "Not stated.",
        "mvd_scale.from_pretrained",
    ):
        assert words in card


def test_the_card_names_teachers(tmp_path: Path) -> None:
    decoder = DecoderConfig(width=32, depth=1, heads=2)
    student = randomise(Student(shape(), {"video": (decoder, 8)}))
    save_weights(tmp_path / "student.safetensors", student.state_dict(), shape(), {"video": decoder})
    words = ["--targets.video.checkpoint", "/data/x/teachers/videomae_b.pth", "--data.source", "train.parquet"]
    (tmp_path / "recipe.yaml").write_text(load_recipe("quickstart/student", words).to_yaml())
    (tmp_path / "summary.json").write_text(json.dumps({"origin": {"teachers": {"video": "feed"}}}))
    out = export(tmp_path, "hub", tmp_path / "model")
    assert (
        "| target `video` | `video_teacher, teachers/videomae_b.pth, 1.0, digest feed` |"
        in (out / "README.md").read_text()
    )
    encoder = mvd_scale.from_pretrained(out)
    torch.testing.assert_close(encoder(clips()), student.encoder(clips()))


def test_the_card_of_a_classifier_names_the_teachers_of_its_encoder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    student = Path("runs/student")
    student.mkdir(parents=True)
    save_weights(student / "encoder.safetensors", randomise(Encoder(shape())).state_dict(), shape())
    words = ["--targets.video.checkpoint", "/data/x/teachers/videomae_b.pth", "--data.source", "train.parquet"]
    (student / "recipe.yaml").write_text(load_recipe("quickstart/student", words).to_yaml())
    (student / "summary.json").write_text(json.dumps({"origin": {"teachers": {"video": "feed"}}}))
    run = write_run(tmp_path / "run")  # began from this encoder
    digest = tensors_digest(read_raw_checkpoint(student / "encoder.safetensors").tensors)
    (run / "summary.json").write_text(json.dumps({"origin": {"videos": "0123abcd", "initial encoder": digest}}))
    out = export(run, "hub", tmp_path / "model")
    title, teacher = "target `video` of the encoder that it began from", "video_teacher, teachers/videomae_b.pth"
    row = f"| {title} | `{teacher}, 1.0, digest feed` |"
    assert row in (out / "README.md").read_text()
    assert head_of(out / "README.md")["tags"] == ["video", "masked-video-distillation", "classifier"]
    # The encoder of another training lies there now: nothing is known of the one that the run began from.
    save_weights(student / "encoder.safetensors", Encoder(shape()).state_dict(), shape())
    out = export(run, "hub", tmp_path / "model")
    assert "| target" not in (out / "README.md").read_text()
    assert head_of(out / "README.md")["tags"] == ["video", "classifier"]


def test_the_card_lists_the_sources_of_a_mixture(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    mixture = {
        "k400": {"source": "/home/me/secret/k400/train.parquet"},
        "ssv2": {"source": "s3://me:pw@host/a/b/c.csv"},
    }
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    recipe["data"] |= {"source": None, "mixture": mixture}
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    card = (export(run, "hub", tmp_path / "model") / "README.md").read_text()
    for row in ("| videos of k400 | `k400/train.parquet` |", "| videos of ssv2 | `b/c.csv` |"):
        assert row in card


def test_the_card_lists_tests_beside_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = write_run(tmp_path / "runs" / "classifier")
    model = identify_checkpoint(read_checkpoint(run))
    write_test(tmp_path / "runs" / "test", top1=0.5, model=model)
    write_test(tmp_path / "runs" / "slow", top1=0.24, model=model)
    write_test(tmp_path / "runs" / "other", top1=0.9, model={**model, "weights": "0"})
    monkeypatch.chdir(run)
    for source in (run, Path("classifier.safetensors")):
        (found,) = head_of(export(source, "hub", tmp_path / "model") / "README.md")["model-index"]
        tests = {each["dataset"]["name"]: each["metrics"][0]["value"] for each in found["results"]}
        assert tests == {"test": 50.0, "../test": 50.0, "slow": 24.0}


def test_the_card_claims_no_weights_of_others(tmp_path: Path) -> None:
    size = {"width": 48, "depth": 2, "heads": 3, "patch_size": 8}
    image = ModelConfig(**size, input_size=32, frames=1, tubelet=1, positions="sincos2d", class_token=True)
    save_weights(tmp_path / "encoder.safetensors", randomise(Encoder(image)).state_dict(), image)
    export(tmp_path / "encoder.safetensors", "mae", tmp_path / "mae_b.pth")
    # A recipe that happens to lie there is not theirs.
    (tmp_path / "recipe.yaml").write_text(load_recipe("quickstart/student", ["--data.source", "x"]).to_yaml())
    card = export(tmp_path / "mae_b.pth", "hub", tmp_path / "model", heads=3) / "README.md"
    assert "An image encoder converted by MVD-Scale." in card.read_text()
    assert head_of(card)["tags"] == ["image", "encoder"]
    assert "trained by" not in card.read_text()
    own = export(tmp_path / "encoder.safetensors", "hub", tmp_path / "own") / "README.md"
    assert "An image encoder trained by MVD-Scale." in own.read_text()


@torch.no_grad()
def test_from_pretrained_gives_the_same_numbers(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    out = export(run, "hub", tmp_path / "model")
    assert {file.name for file in out.iterdir()} == {"README.md", "config.json", "model.safetensors"}
    loaded = mvd_scale.from_pretrained(out)
    assert isinstance(loaded, Classifier)
    assert not loaded.training
    torch.testing.assert_close(loaded(clips()), build_classifier(read_checkpoint(run)).eval()(clips()), rtol=0, atol=0)
    by_views = mvd_scale.load_classifier(out, device="cpu")
    assert by_views.classes == CLASSES
    assert by_views.views.stride == 2


def test_learned_positions_travel(tmp_path: Path) -> None:
    encoder = Encoder(shape())
    encoder.store_positions(torch.randn(encoder.positions.shape))
    save_weights(tmp_path / "encoder.safetensors", randomise(encoder).state_dict(), shape())
    out = export(tmp_path / "encoder.safetensors", "hub", tmp_path / "model")
    assert "positions" in load_file(out / "model.safetensors")
    torch.testing.assert_close(mvd_scale.from_pretrained(out)(clips()), encoder(clips()))


def test_other_positions_are_refused_by_hf_and_sent_to_hub(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--to hub"):
        export(write_run(tmp_path / "run"), "hf", tmp_path / "model")


@torch.no_grad()
def test_transformers_loads_the_folder(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="the hf extra is not installed")
    run = write_run(tmp_path / "run", "sinusoid")
    out = export(run, "hf", tmp_path / "model")
    model = transformers.AutoModel.from_pretrained(out)
    assert type(model).__name__ == "VideoMAEModel"
    theirs = transformers.AutoModelForVideoClassification.from_pretrained(out).eval()
    ours = build_classifier(read_checkpoint(run)).eval()
    frames = clips()[0].numpy()
    processor = transformers.AutoImageProcessor.from_pretrained(out)
    pixels = processor(list(frames), return_tensors="pt")["pixel_values"]
    logits = ours(clips()[:1])
    # The card says what their last norm changes.
    assert (theirs(pixels).logits - logits).abs().max() < 1e-3 * logits.abs().max()
    # A file would be decoded by torchcodec: frames are as good.
    found = transformers.pipeline("video-classification", model=str(out))(frames)
    scores = logits.softmax(1)[0].tolist()
    assert {each["label"]: each["score"] for each in found} == pytest.approx(
        dict(zip(CLASSES, scores, strict=True)), abs=1e-3
    )


def test_what_cannot_be_downloaded_is_told_with_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    hub = pytest.importorskip("huggingface_hub")

    def offline(name: str, **options: Any) -> str:
        assert "*.safetensors" in options["allow_patterns"]
        assert not any(pattern.endswith((".bin", ".py", "*")) for pattern in options["allow_patterns"])
        if name == "owner/there":
            return str(tmp_path)
        raise OSError("no network")

    monkeypatch.setattr(hub, "snapshot_download", offline)
    with pytest.raises(UserError, match="hf download owner/model --local-dir FOLDER"):
        mvd_scale.from_pretrained("owner/model")
    assert find_weights("owner/there", "main") == tmp_path
    with pytest.raises(UserError, match="an id owner/name"):
        mvd_scale.from_pretrained("runs/of/nobody")
    with pytest.raises(UserError, match="only the hub has revisions"):
        mvd_scale.from_pretrained(tmp_path, revision="main")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UserError, match="pip install 'mvd-scale\\[hf\\]'"):
        mvd_scale.from_pretrained("owner/model")


@pytest.mark.parametrize("name", ["ProxyError", "ReadTimeout", "RemoteProtocolError"])
def test_a_lost_connection_is_no_traceback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    hub = pytest.importorskip("huggingface_hub")
    # The library differs between releases of the hub's client.
    errors = importlib.import_module("huggingface_hub.errors")
    http = importlib.import_module(errors.HTTPError.__module__.partition(".")[0])

    def lost(*_: Any, **__: Any) -> str:
        raise getattr(http, name)("")

    monkeypatch.setattr(hub, "snapshot_download", lost)
    with pytest.raises(UserError, match=f"downloaded from the hub: {name}: "):
        find_weights("owner/model")


@pytest.mark.slow
def test_torch_hub_needs_no_installation(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    out = export(run, "hub", tmp_path / "model")
    environment = {**os.environ, "TORCH_HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", LOAD, str(REPOSITORY), str(out)]
    result = subprocess.run(
        command, capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=120, check=False
    )
    assert result.returncode == 0, result.stderr
    name, *grid, total = result.stdout.split()
    assert (name, "".join(grid)) == ("Encoder", "(2,32,48)")
    expected = build_classifier(read_checkpoint(run)).eval()(clips()).double().sum().item()
    assert float(total) == pytest.approx(expected, abs=1e-4)
