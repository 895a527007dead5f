"""Errors of the user end in one clear message and exit code 2, and overwrite nothing."""

from __future__ import annotations

import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from mvd_scale.checkpoints.weights import save_weights
from mvd_scale.config import ModelConfig
from mvd_scale.models import Encoder

from .conftest import Jobs


def teacher(path: Path, **shape: object) -> Path:
    config = ModelConfig.model_validate({"width": 32, "depth": 1, "heads": 2, "input_size": 48, **shape})
    save_weights(path, Encoder(config).state_dict(), config)
    return path


def video_teacher(checkpoint: str | Path) -> list[str]:
    return [
        "--targets",
        f"{{video: {{kind: video_teacher, checkpoint: '{checkpoint}', decoder: {{width: 32, depth: 1, heads: 2}}}}}}",
    ]


CASES: dict[str, tuple[Callable[[Path], list[str]], str]] = {
    "a key that does not exist": (lambda _: ["--training.epoch", "3"], "training.epoch: unknown key"),
    "no videos named": (lambda _: [], "data.source is missing"),
    "a folder that is not there": (lambda tmp: ["--data.source", str(tmp / "nowhere")], "nowhere"),
    "an empty folder": (lambda tmp: ["--data.source", str(_made(tmp / "empty"))], "empty"),
    "an annotation without label": (lambda tmp: ["--data.source", str(_annotations(tmp))], "list.csv:2"),
    "a teacher that is not there": (lambda tmp: video_teacher(tmp / "none.safetensors"), "none.safetensors does not"),
    "a teacher of another grid": (
        lambda tmp: video_teacher(teacher(tmp / "t.safetensors", frames=8)),
        "the teacher takes 8 frames",
    ),
    "a teacher that is a text file": (
        lambda tmp: video_teacher(_text(tmp / "t.safetensors")),
        "neither a safetensors file nor",
    ),
    "a GPU where there is none": (lambda _: ["--device", "cuda"], "torch finds no GPU"),
    "a batch that does not divide": (
        lambda _: ["--data.copies", "3", "--training.micro_batch", "null"],
        "cannot be split over 1 ranks in whole sets of 3 copies",
    ),
}


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder


def _annotations(folder: Path) -> Path:
    (folder / "list.csv").write_text("a.mp4 0\nb.mp4\n")
    return folder / "list.csv"


def _text(file: Path) -> Path:
    file.write_text("these are not weights")
    return file


@pytest.mark.parametrize("case", CASES)
def test_one_message_and_exit_code_two(case: str, jobs: Jobs, recipe: Path, clips: Path, tmp_path: Path) -> None:
    import torch

    if case == "a GPU where there is none" and torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    make, message = CASES[case]
    extra = make(tmp_path)
    if "--data.source" not in extra and case != "no videos named":
        extra += ["--data.source", str(clips)]
    code, output = jobs.run("pretrain", "--recipe", recipe, "--run.folder", tmp_path / "run", *extra)
    assert code == 2, output
    assert message in output
    assert "Traceback" not in output
    assert output.count("mvd-scale: ") == 1
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_the_traceback_is_under_debug(jobs: Jobs, recipe: Path, tmp_path: Path) -> None:
    code, output = jobs.run(
        "pretrain", "--recipe", recipe, "--run.folder", tmp_path / "run", "--model.depht", "3", "--debug"
    )
    assert code != 0
    assert "Traceback" in output
    assert "model.depht: unknown key" in output


def test_a_port_in_use(jobs: Jobs, recipe: Path, clips: Path, tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        place = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        arguments = ["pretrain", "--recipe", recipe, "--run.folder", tmp_path / "run", "--data.source", clips]
        code, output = jobs.run(*arguments, env=place)
    assert code == 2, output
    assert f"could not connect at 127.0.0.1:{port}" in output
    assert "--master_port" in output


@pytest.mark.serial
def test_all_ranks_fail_with_one_message(jobs: Jobs, recipe: Path, tmp_path: Path) -> None:
    code, output = jobs.launch(
        "pretrain", "--recipe", recipe, "--run.folder", tmp_path / "run", "--data.source", tmp_path / "nowhere", ranks=2
    )
    assert code != 0
    assert output.count("mvd-scale: ") == 1, output


def test_broken_videos_are_set_aside_and_named(jobs: Jobs, recipe: Path, clips: Path, tmp_path: Path) -> None:
    folder = _made(tmp_path / "videos")
    for clip in clips.glob("*"):
        (folder / clip.name).write_bytes(clip.read_bytes())
    victims = sorted(folder.glob("*.mp4"))
    victims[0].write_bytes(victims[0].read_bytes()[:9000])
    victims[1].write_text("a text file")
    (folder / "empty.mp4").touch()
    run = tmp_path / "run"
    code, output = jobs.run(
        "pretrain", "--recipe", recipe, "--run.folder", run, "--data.source", folder, "--training.max_steps", "4"
    )
    assert code == 0, output
    assert "18 videos" in output or "18 usable" in output
    for name in (victims[0].name, victims[1].name, "empty.mp4"):
        assert name in output
