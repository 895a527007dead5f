"""Action detection, as a user starts it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mvd_scale.checkpoints.weights import read_checkpoint, save_weights
from mvd_scale.config import DetectorConfig, ModelConfig
from mvd_scale.config.data import ViewsConfig
from mvd_scale.detection.synth import make_detection_set

from .conftest import Jobs, wait_for

pytestmark = pytest.mark.slow
pytest.importorskip("torchvision", reason="needs torchvision: the detection extra")

# As published, boxes are read half a cell to the right and below. Cells are small, so that objects stay in their boxes.
MODEL = {"width": 64, "depth": 2, "heads": 4, "frames": 4, "input_size": 64, "patch_size": 8, "drop_path": 0.1}
RECIPE = f"""
run: {{folder: unused}}
device: cpu
model: {json.dumps(MODEL)}
data: {{stride: 6, mask: null, workers: 0, crop: {{kind: short_side, sides: [64, 64]}}}}
detector: {{classes: 5, init_scale: 1.0, from_scratch: true}}
key_frames: {{annotations: unused, starts_at: 900}}
training:
  {{epochs: 36, global_batch: 12, micro_batch: 3, base_lr: 4e-2, warmup_epochs: 1, layer_decay: 1.0, deepspeed: zero2}}
checkpoints: {{every_epochs: null, every_steps: 10, keep: 2}}
logging: {{every_steps: 1, tensorboard: false}}
"""


@pytest.fixture(scope="module")
def ava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("skimage", reason="synthetic videos need the samples extra")
    return make_detection_set(tmp_path_factory.mktemp("ava"), train=20, test=18)


@pytest.fixture
def test_options(ava: Path) -> list[str | Path]:
    files = {"annotations": "test.csv", "boxes": "people.csv", "actions": "actions.pbtxt", "excluded": "excluded.csv"}
    return [ava / "test", *(word for name, file in files.items() for word in (f"--{name}", ava / file)),
            "--starts-at", "900", "--short-side", "64", "--device", "cpu"]  # fmt: skip


@pytest.fixture
def start(tmp_path: Path, ava: Path) -> Callable[..., list[str | Path]]:
    recipe = tmp_path / "tiny.yaml"
    recipe.write_text(RECIPE)
    files = {"annotations": "test.csv", "boxes": "people.csv", "actions": "actions.pbtxt"}
    validation = {name: str(ava / file) for name, file in files.items()}
    validation |= {"source": str(ava / "test"), "starts_at": 900, "short_side": 64, "every_epochs": 18}

    def command(folder: str, *others: str) -> list[str | Path]:
        places = {
            "run.folder": tmp_path / folder,
            "data.source": ava / "train",
            "key_frames.annotations": ava / "train.csv",
            "validation": json.dumps(validation),
        }
        words = [word for key, value in places.items() for word in (f"--{key}", str(value))]
        return ["detect", "train", "--recipe", recipe, *words, *others]

    return command


def test_it_learns_and_a_killed_run_ends_where_one_ends_that_was_left_alone(
    jobs: Jobs, start: Callable[..., list[str | Path]], test_options: list[str | Path], tmp_path: Path
) -> None:
    code, output = jobs.run(*start("alone"), ranks=2)
    assert code == 0, output
    losses = [json.loads(line)["loss"] for line in (tmp_path / "alone" / "metrics.jsonl").read_text().splitlines()]
    assert len(losses) == 108
    assert sum(losses[-8:]) < 0.85 * sum(losses[:8])

    process = jobs.start(*start("killed"), ranks=2)
    metrics = tmp_path / "killed" / "metrics.jsonl"
    wait_for(lambda: metrics.exists() and metrics.read_text().count("\n") > 21, 240, process)
    jobs.kill(process)
    code, output = jobs.run(*start("killed"), ranks=2)
    assert code == 0, output
    assert "resumed from" in output
    for name in ("detector.safetensors", "best.safetensors"):
        ends = [load_file(tmp_path / folder / name) for folder in ("alone", "killed")]
        assert all(torch.equal(tensor, ends[1][key]) for key, tensor in ends[0].items()), name
    (*_, newest) = sorted((tmp_path / "alone" / "checkpoints").glob("step_*"))
    assert read_checkpoint(newest).kind == "detector"

    figures = []
    untrained, trained = tmp_path / "untrained.safetensors", tmp_path / "alone" / "detector.safetensors"
    save_untrained(untrained)
    for number, (weights, ranks) in enumerate(((untrained, 1), (trained, 1), (trained, 2))):
        out = tmp_path / f"test{number}"
        # Ranks divide the cores, and threads divide sums: left alone, two ranks would round scores otherwise than one.
        threads = {"OMP_NUM_THREADS": "1"}
        code, output = jobs.run("detect", "evaluate", weights, *test_options, "--out", out, ranks=ranks, env=threads)
        assert code == 0, output
        figures.append(json.loads((out / "summary.json").read_text()))
    assert [of["key_frames"] for of in figures] == [35] * 3
    assert figures[1]["frame_map"] > figures[0]["frame_map"] + 0.1
    # However many ranks test, with as many threads each: no box twice, none lost, the same scores.
    assert figures[1] == figures[2]
    results = [(tmp_path / f"test{number}" / "results.csv").read_text() for number in (1, 2)]
    assert results[0] == results[1]
    # 35 key frames with two objects and a false person each, five actions.
    assert len(set(results[0].splitlines())) == 35 * 3 * 5

    # The same without the excluded key frame, during training on two ranks.
    last = json.loads((tmp_path / "alone" / "validation.jsonl").read_text().splitlines()[-1])
    assert abs(last["frame_map"] - figures[1]["frame_map"]) < 0.1


def save_untrained(path: Path) -> None:
    from mvd_scale.models.detector import Detector

    torch.manual_seed(0)
    model, config = ModelConfig.model_validate(MODEL), DetectorConfig(classes=5, init_scale=1.0)
    views = ViewsConfig(stride=6, clips=1, crops=1)
    save_weights(path, Detector(model, config).state_dict(), model, views=views, detector=config)
    assert read_checkpoint(path).kind == "detector"


def test_a_broken_video_costs_its_boxes_and_a_test_goes_on(
    jobs: Jobs, ava: Path, test_options: list[str | Path], tmp_path: Path
) -> None:
    weights, out, videos = tmp_path / "detector.safetensors", tmp_path / "out", tmp_path / "videos"
    save_untrained(weights)
    videos.mkdir()
    for file in (ava / "test").iterdir():
        (videos / file.name).symlink_to(file)
    (videos / "test0001.mp4").unlink()
    torn = bytearray((ava / "test" / "test0001.mp4").read_bytes())
    # Behind the first frame, which the index decodes.
    first = torn.index(b"mdat") + int(0.3 * len(torn))
    torn[first : first + 4000] = b"\xff" * 4000
    (videos / "test0001.mp4").write_bytes(torn)
    (videos / "test0002.mp4").unlink()

    command = ["detect", "evaluate", weights, videos, *test_options[1:], "--out", out]
    code, output = jobs.run(*command)
    assert code == 0, output
    assert "2 key frames are left out: test0002 is not among the videos (2)" in output
    assert "not decoded          2, counted as without any detection" in output
    results = (out / "results.csv").read_bytes()
    assert b"test0001" not in results

    for name in ("results.csv", "scores_000000.parquet"):
        (out / name).unlink()
    code, output = jobs.run(*command)
    assert code == 0, output
    assert "1 of 2 shards were written before" in output
    assert (out / "results.csv").read_bytes() == results
    code, output = jobs.run(*command, "--score", "0.9")
    assert code == 2
    assert "choose another --out" in output

    figures = [
        "--annotations",
        ava / "test.csv",
        "--actions",
        ava / "actions.pbtxt",
        "--excluded",
        ava / "excluded.csv",
    ]
    code, output = jobs.run("detect", "score", out / "results.csv", *figures)
    assert code == 0, output
    assert f"{100 * json.loads((out / 'summary.json').read_text())['frame_map']:.2f} %" in output


def test_bad_input_is_one_message(
    jobs: Jobs, start: Callable[..., list[str | Path]], ava: Path, tmp_path: Path
) -> None:
    unknown = tmp_path / "unknown.csv"
    unknown.write_text("train0000,0901,0,0,1,1,6,0\n")
    for number, (change, said) in enumerate(
        {
            ("--key_frames.annotations", str(unknown)): "unknown.csv, line 1: action '6' is unknown",
            ("--key_frames.starts_at", "0"): "train0000 does not contain these seconds",
            ("--validation.boxes", str(tmp_path / "none.csv")): "none.csv cannot be read",
            ("--detector.from_scratch", "false"): "or train from scratch with `--detector.from_scratch true`",
            ("--recipe", "finetune/b_k400"): "start it with `mvd-scale finetune`",
        }.items()
    ):
        code, output = jobs.run(*start(f"bad{number}"), *change)
        assert code == 2, (change, output)
        assert said in output, (change, output)
        assert "Traceback" not in output
