"""Fine-tuning and the multi-view test, as a user starts them."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

from mvd_scale.checkpoints.weights import read_checkpoint, save_weights
from mvd_scale.config import ModelConfig
from mvd_scale.config.data import ViewsConfig
from mvd_scale.data.generated.synthetic import write_synthetic_videos
from mvd_scale.models import Classifier, Encoder

from .conftest import Jobs, wait_for

pytestmark = pytest.mark.slow

MODEL = ModelConfig(width=48, depth=2, heads=3, frames=4, input_size=32, patch_size=16)
RECIPE = """
run: {folder: unused}
device: cpu
model: {width: 48, depth: 2, heads: 3, frames: 4, input_size: 32, patch_size: 16, drop_path: 0.2}
data:
  stride: 2
  mask: null
  copies: 2
  workers: 0
  crop: {kind: random_resized, area: [0.4, 1.0]}
  augment: {rand_augment: {operations: 2, magnitude: 5}, erasing: {probability: 0.5}}
classifier: {dropout: 0.2}
training:
  {epochs: 4, global_batch: 12, micro_batch: 2, base_lr: 2e-2, warmup_epochs: 1, ema_decay: 0.8, deepspeed: zero2}
checkpoints: {every_epochs: null, every_steps: 4, keep: 2}
logging: {every_steps: 1}
test: {stride: 2, clips: 2, crops: 3}
"""


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("skimage", reason="synthetic videos need the samples extra")
    return write_synthetic_videos("appearance", tmp_path_factory.mktemp("labelled"), train=5, test=6)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    file = tmp_path_factory.mktemp("weights") / "encoder.safetensors"
    save_weights(file, Encoder(MODEL).state_dict(), MODEL)
    return file


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory, labelled: Path) -> Path:
    torch.manual_seed(0)
    file = tmp_path_factory.mktemp("weights") / "classifier.safetensors"
    names = sorted(folder.name for folder in (labelled / "test").iterdir())
    views = ViewsConfig(stride=2, clips=2, crops=3)
    save_weights(file, Classifier(MODEL, 6).state_dict(), MODEL, classes=names, views=views)
    return file


@pytest.fixture
def start(tmp_path: Path, labelled: Path, encoder: Path) -> Callable[[str], list[str | Path]]:
    recipe = tmp_path / "tiny.yaml"
    recipe.write_text(RECIPE)

    def command(folder: str, *others: str) -> list[str | Path]:
        places = {
            "run.folder": tmp_path / folder,
            "data.source": labelled / "train",
            "validation.source": labelled / "test",
            "training.initial_encoder": encoder,
        }
        words = [word for key, value in places.items() for word in (f"--{key}", str(value))]
        return ["finetune", "--recipe", recipe, *words, *others]

    return command


def test_a_killed_run_ends_where_one_ends_that_was_left_alone(
    jobs: Jobs, start: Callable[..., list[str | Path]], tmp_path: Path
) -> None:
    code, output = jobs.run(*start("alone"), ranks=2)
    assert code == 0, output
    for line in map(json.loads, (tmp_path / "alone" / "validation.jsonl").read_text().splitlines()):
        assert all(0 <= line[key] <= 1 for key in ("top1", "top1_average"))

    process = jobs.start(*start("killed"), ranks=2)
    metrics = tmp_path / "killed" / "metrics.jsonl"
    wait_for(lambda: metrics.exists() and metrics.read_text().count("\n") > 9, 240, process)
    jobs.kill(process)
    code, output = jobs.run(*start("killed"), ranks=2)
    assert code == 0, output
    assert "resumed from" in output

    for name in ("classifier.safetensors", "average.safetensors", "best.safetensors"):
        ends = [load_file(tmp_path / folder / name) for folder in ("alone", "killed")]
        assert all(torch.equal(tensor, ends[1][key]) for key, tensor in ends[0].items()), name
    # The average is another model than the last weights, and both tell classes and views.
    last, average = (load_file(tmp_path / "alone" / f"{name}.safetensors") for name in ("classifier", "average"))
    assert not torch.equal(last["head.weight"], average["head.weight"])
    for name in ("classifier", "average", "best"):
        read = read_checkpoint(tmp_path / "alone" / f"{name}.safetensors")
        assert read.class_names == ("coffee", "coins", "gravel", "ihc", "retina", "text")
        assert read.views == ViewsConfig(stride=2, clips=2, crops=3)


def test_any_number_of_ranks_tests_alike(jobs: Jobs, classifier: Path, labelled: Path, tmp_path: Path) -> None:
    """41 videos, of which one is broken in the middle and one is missing: both count as wrong and are named."""
    files = sorted((labelled / "test").rglob("*.mp4"))
    torn = tmp_path / "torn.mp4"
    whole = bytearray(files[0].read_bytes())
    middle = whole.index(b"mdat") + 4
    whole[middle:] = bytes(len(whole) - middle) if whole.index(b"moov") < middle else whole[middle:]
    start = whole.index(b"mdat") + 400
    whole[start : start + 4000] = b"\xff" * 4000
    torn.write_bytes(whole)
    folders = sorted(folder.name for folder in (labelled / "test").iterdir())
    lines = [f"{file} {folders.index(file.parent.name)}" for file in files]
    source = tmp_path / "test.csv"
    source.write_text("\n".join([*lines, *lines[:3], f"{torn} 1", f"{tmp_path / 'missing.mp4'} 2"]) + "\n")

    tables = []
    for ranks in (1, 2, 3):
        out = tmp_path / f"ranks{ranks}"
        code, output = jobs.run("evaluate", classifier, source, "--out", out, "--batch", "3", ranks=ranks)
        assert code == 0, output
        tables.append(pq.read_table(out / "scores.parquet"))
        assert "not decoded          2, counted as wrong" in output
    first = tables[0]
    assert len(first) == len(lines) + 5
    for table in tables[1:]:
        for column in ("name", "label", "decoded"):
            assert table[column].equals(first[column])
        np.testing.assert_allclose(np.stack(table["views"].to_numpy()), np.stack(first["views"].to_numpy()), atol=1e-5)
    # A video that is listed twice is tested twice.
    scores = np.stack(first["scores"].to_numpy())
    np.testing.assert_array_equal(scores[:3], scores[len(lines) : len(lines) + 3])
    summary = json.loads((tmp_path / "ranks1" / "summary.json").read_text())
    right = (scores.argmax(1) == first["label"].to_numpy()) & first["decoded"].to_numpy(zero_copy_only=False)
    assert math.isclose(summary["top1"], right.mean())
    failures = (tmp_path / "ranks1" / "not_decoded.csv").read_text()
    assert "torn.mp4" in failures
    assert "missing.mp4" in failures


def test_a_killed_test_goes_on(jobs: Jobs, classifier: Path, labelled: Path, tmp_path: Path) -> None:
    source, out = labelled / "test", tmp_path / "out"
    code, output = jobs.run("evaluate", classifier, source, "--out", out)
    assert code == 0, output
    whole = pq.read_table(out / "scores.parquet")
    for name in ("scores.parquet", "summary.json", "scores_000000.parquet"):
        (out / name).unlink()
    page = tmp_path / "page.html"
    code, output = jobs.run("evaluate", classifier, source, "--out", out, "--report", page)
    assert code == 0, output
    assert "1 of 2 shards were written before" in output
    assert "data:image/jpeg" in page.read_text()
    assert pq.read_table(out / "scores.parquet").equals(whole)

    code, output = jobs.run("evaluate", classifier, source, "--out", out, "--clips", "3")
    assert code == 2
    assert "choose another --out" in output

    code, output = jobs.run("ensemble", out, out, "--out", tmp_path / "both")
    assert code == 0, output
    both = pq.read_table(tmp_path / "both" / "scores.parquet")
    np.testing.assert_allclose(np.stack(both["scores"].to_numpy()), np.stack(whole["scores"].to_numpy()), atol=1e-6)
    for folder, made in (
        (out, f"mvd-scale evaluate {classifier} {source} --out {out}"),
        (tmp_path / "both", "ensemble"),
    ):
        code, output = jobs.run("report", folder)
        assert code == 0, output
        page = (folder / "report.html").read_text()
        assert made in page
        assert "data:image/jpeg" in page


@pytest.mark.parametrize("kind", [("knn", "--neighbours", "3"), ("linear",), ("attentive", "--epochs", "2")])
def test_a_probe_judges_a_frozen_encoder(
    jobs: Jobs, encoder: Path, labelled: Path, tmp_path: Path, kind: tuple[str, ...]
) -> None:
    sets = ("--train", labelled / "train", "--test", labelled / "test", "--out", tmp_path / "probe", "--stride", "2")
    code, output = jobs.run("probe", kind[0], encoder, *sets, *kind[1:])
    assert code == 0, output
    assert "top-1" in output
    table = pq.read_table(tmp_path / "probe" / kind[0] / "scores.parquet")
    assert len(table) == 36
    np.testing.assert_allclose(np.stack(table["scores"].to_numpy()).sum(1), 1, atol=1e-5)
    code, output = jobs.run("probe", kind[0], encoder, *sets[:2], *sets[4:], "--test", tmp_path / "nothing")
    assert code == 2
    assert "nothing" in output


def test_bad_input_is_one_message(
    jobs: Jobs, start: Callable[..., list[str | Path]], classifier: Path, encoder: Path, labelled: Path, tmp_path: Path
) -> None:
    train = [f"{file} {k % 2}" for k, file in enumerate(sorted((labelled / "train").rglob("*.mp4")))]
    beyond, hollow, empty = (tmp_path / f"{name}.csv" for name in ("beyond", "hollow", "empty"))
    beyond.write_text("\n".join([train[0].replace(" 0", " 7"), *train[1:]]) + "\n")
    hollow.write_text("\n".join(line.replace(" 1", " 2") for line in train) + "\n")
    empty.write_text(f"{tmp_path / 'nothing.mp4'} 0\n")
    notes = tmp_path / "notes.safetensors"
    save_weights(notes, {"head.weight": torch.zeros(3, 2)}, MODEL)
    for number, (change, said) in enumerate(
        {
            (
                "--data.source",
                str(beyond),
                "--classifier.classes",
                "2",
            ): "has label 7, but there are 2 classes (0 to 1)",
            ("--data.source", str(hollow)): "1 of 3 classes have no usable video: 1",
            ("--data.source", str(empty)): "nothing.mp4",
            ("--classifier.classes", "5"): "has label 5, but there are 5 classes (0 to 4)",
            ("--training.initial_encoder", str(notes)): "notes.safetensors",
            ("--training.initial_encoder", "null"): "training.initial_encoder is missing",
            ("--validation.source", str(empty)): "nothing.mp4",
            ("--recipe", "quickstart/student"): "start it with `mvd-scale pretrain`",
        }.items()
    ):
        code, output = jobs.run(*start(f"bad{number}"), *change)
        assert code == 2, (change, output)
        assert said in output, (change, output)
        assert "Traceback" not in output
    for arguments, said in (
        ((encoder, labelled / "test"), "no classification head"),
        ((classifier, beyond), "has label 7, but there are 6 classes (0 to 5)"),
        ((classifier, labelled / "nowhere"), "nowhere"),
    ):
        code, output = jobs.run("evaluate", *arguments, "--out", tmp_path / "out")
        assert code == 2, output
        assert said in output
        assert "Traceback" not in output
