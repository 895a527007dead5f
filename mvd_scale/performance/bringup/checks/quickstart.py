"""Stage (g): the quickstart's student by launch/single_node.sh on all GPUs. Needs the .venv of launch/setup.sh."""

from __future__ import annotations

import os
import subprocess
from functools import partial
from math import isfinite
from pathlib import Path

from mvd_scale.performance.bringup.session import Check, LeftOut, Session
from mvd_scale.utils.io import read_metrics

ROOT = Path(__file__).parents[4]

STEPS = {"cuda": 40, "cpu": 2}
"""Steps of each run, by device."""

_LIMIT = 80.0
"""Seconds after which a run is ended."""

_END = 10.0
"""Seconds that its ranks have for their end."""

RUNS = ("image_teacher", "video_teacher", "student")


def run(session: Session) -> None:
    """Make the checks of the stage: both teachers and the student, each as a run of its own."""
    videos = partial(make_clips, folder=session.folder)
    if not session.check("clips", videos, seconds=10):
        return
    for name in RUNS:
        seconds = min(_LIMIT, session.remaining - _END)
        work = partial(train, name=name, device=session.device, folder=session.folder, seconds=seconds)
        if not session.check(f"{name} by single_node.sh", work, seconds=25, limit=_LIMIT + 2 * _END):
            return


def make_clips(check: Check, folder: Path) -> None:
    """Write the clips of the `samples` extra."""
    from mvd_scale.data.generated.sample_clips import write_sample_clips
    from mvd_scale.errors import UserError

    if not (ROOT / ".venv" / "stamp").is_file():
        raise LeftOut("single_node.sh uses .venv, which launch/setup.sh has not installed here")
    try:
        written = write_sample_clips(folder / "clips")
    except UserError as error:
        raise LeftOut(str(error)) from error
    check.figure("clips", len(list(written.iterdir())))


def train(check: Check, name: str, device: str, folder: Path, seconds: float) -> None:
    """Train one run of the quickstart for some steps, and check its losses and its result."""
    out = folder / name
    words = [
        "pretrain", "--recipe", f"quickstart/{name}", "--run.folder", str(out), "--data.source", str(folder / "clips"),
        "--device", device, "--training.max_steps", str(STEPS[device]), "--logging.every_steps", "1",
    ]  # fmt: skip
    if name == "student":
        for teacher in ("image", "video"):
            words += [f"--targets.{teacher}.checkpoint", str(folder / f"{teacher}_teacher" / "encoder.safetensors")]
    environment = {**os.environ, "PYTHONPATH": "", **({"DS_ACCELERATOR": "cpu"} if device == "cpu" else {})}
    code = run_script([str(ROOT / "launch" / "single_node.sh"), *words], environment, seconds)
    check.expect(code == 0, f"single_node.sh ends with code 0, not {code}")
    readings = read_metrics(out / "metrics.jsonl")
    check.figure("first loss", readings[0]["loss"])
    check.figure("last loss", readings[-1]["loss"])
    check.figure("clips/s", readings[-1]["clips_per_second"])
    check.figure("memory, GiB", readings[-1]["memory_gib"])
    check.expect(all(isfinite(reading["loss"]) for reading in readings), "losses are finite")
    check.expect((out / "encoder.safetensors").is_file(), "the run exports its encoder")


def run_script(command: list[str], environment: dict[str, str], seconds: float) -> int:
    """Run a script of `launch/` and return its exit code; it is ended after some seconds.

    Its ranks are in a session of their own, which SIGKILL of this process's group does not reach: the script passes
    SIGTERM on.
    """
    with subprocess.Popen(command, env=environment) as process:
        try:
            return process.wait(seconds)
        except subprocess.TimeoutExpired:
            process.terminate()
            return process.wait(_END)
