"""Tests of launch/slurm.sbatch with fake Slurm programs: what it starts, and when it requeues its job."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

LAUNCH = Path(__file__).resolve().parents[2] / "launch"

SRUN = """#!/bin/bash
# Fake srun: a task on the second host, which gets the signals.
printf '%s\\0' "$@" >"$SLURM_SUBMIT_DIR/srun"
while [[ "$1" == --* ]]; do shift; done
SLURM_NODEID=1 exec "$@"
"""

SCONTROL = """#!/bin/bash
case "$1 $2" in
    "show hostnames") printf 'node-1\\nnode-2\\n' ;;
    requeue*)
        cd "$SLURM_SUBMIT_DIR"
        [[ ! -e started || -e saved ]] || echo early >>requeued
        echo "$2" >>requeued
        exit "${REQUEUE_CODE:-0}"
        ;;
esac
"""

ENDS = """#!/bin/bash
printf '%s\\0' "$PET_NODE_RANK" "$@" >"$SLURM_SUBMIT_DIR/ran"
exit {code}
"""

SAVES = """#!/bin/bash
# Ends with {code} some time after SIGUSR1, as a run that saves a checkpoint does.
trap 'sleep 0.3; touch "$SLURM_SUBMIT_DIR/saved"; exit {code}' USR1
touch "$SLURM_SUBMIT_DIR/started"
while :; do sleep 0.02; done
"""

ENVIRONMENT = {
    "SLURM_JOB_ID": "4711",
    "SLURM_JOB_NODELIST": "node-[1-2]",
    "SLURM_JOB_NUM_NODES": "2",
    "SLURM_CPUS_PER_TASK": "96",
}


class Job:
    """A Slurm job that is submitted in a copy of the repository, whose environment is ready."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.script = folder / "launch" / "slurm.sbatch"
        self.script.parent.mkdir(parents=True)
        self.script.write_text((LAUNCH / "slurm.sbatch").read_text())
        (folder / "launch" / "setup.sh").write_text('PATH="$repository/bin:$PATH"\n')
        (folder / "bin").mkdir()
        self.program("srun", SRUN)
        self.program("scontrol", SCONTROL)
        self.ranks(ENDS.format(code=0))

    def program(self, name: str, text: str) -> None:
        (self.folder / "bin" / name).write_text(text)
        (self.folder / "bin" / name).chmod(0o755)

    def ranks(self, text: str) -> None:
        """Say what torchrun and its ranks do."""
        self.program("python", text)

    def edit(self, before: str, after: str) -> None:
        text = self.script.read_text()
        assert before in text
        self.script.write_text(text.replace(before, after))

    def start(self, *arguments: str, **env: str) -> subprocess.Popen[str]:
        path = f"{self.folder / 'bin'}:{os.environ['PATH']}"
        return subprocess.Popen(
            ["bash", str(self.script), *(arguments or ("pretrain",))],
            cwd=self.folder,
            env={"PATH": path, "SLURM_SUBMIT_DIR": str(self.folder), **ENVIRONMENT, **env},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run(self, *arguments: str, **env: str) -> tuple[int, str]:
        job = self.start(*arguments, **env)
        output, _ = job.communicate(timeout=30)
        return job.returncode, output

    def signalled(self, *numbers: signal.Signals) -> tuple[int, str]:
        """Run until the ranks have started, then signal the script alone, as `--signal=B:` does."""
        job = self.start()
        wait_for((self.folder / "started").exists)
        for number in numbers:
            job.send_signal(number)
            time.sleep(0.05)
        output, _ = job.communicate(timeout=30)
        return job.returncode, output

    def words(self, name: str) -> list[str]:
        return (self.folder / name).read_bytes().decode().split("\0")[:-1]

    @property
    def requeued(self) -> list[str]:
        file = self.folder / "requeued"
        return file.read_text().split() if file.exists() else []

    @property
    def faults(self) -> int:
        file = self.folder / "slurm-4711.faults"
        return len(file.read_text().splitlines()) if file.exists() else 0


def wait_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.fixture
def job(tmp_path: Path) -> Iterator[Job]:
    return Job(tmp_path / "my repository")


def test_a_host_runs_torchrun_with_its_number_and_the_words_as_they_are(job: Job) -> None:
    hostile = ["pretrain", "--run.folder", 'runs/it\'s "a"; touch marker', "--data.source", "$(touch marker)\n`b`", "*"]
    assert job.run(*hostile) == (0, "")
    rank, *words = job.words("ran")
    assert rank == "1"
    assert words[: words.index("mvd_scale") + 1] == [
        *("-m", "mvd_scale.distributed.torchrun", "--nnodes", "2", "--nproc-per-node", "gpu"),
        *("--master-addr", "node-1", "--master-port", "14711", "-m", "mvd_scale"),
    ]
    assert words[words.index("mvd_scale") + 1 :] == hostile
    assert not (job.folder / "marker").exists()
    options = job.words("srun")[: job.words("srun").index("bash")]
    assert options == ["--export=ALL", "--kill-on-bad-exit=0", "--cpus-per-task=96"]
    assert job.requeued == []


def test_containers_take_the_place_of_the_environment(job: Job) -> None:
    (job.folder / "launch" / "setup.sh").unlink()
    job.edit("container=none", "container=pyxis")
    assert job.run()[0] == 0
    options = job.words("srun")
    assert "--container-image=docker://registry.example.com#mvd-scale:latest" in options
    assert f"--container-mounts={job.folder},/data" in options
    assert f"--container-workdir={job.folder}" in options

    job.edit("container=pyxis", "container=apptainer")
    job.program("apptainer", '#!/bin/bash\nprintf "%s\\0" "$@" >"$SLURM_SUBMIT_DIR/apptainer"; exec "${@:6}"\n')
    job.edit('image="docker://registry.example.com#mvd-scale:latest"', 'image="/images/my image.sif"')
    code, output = job.run("pretrain", "two words")
    assert code == 0, output
    assert job.words("apptainer")[:5] == ["exec", "--nv", "--bind", "/data", "/images/my image.sif"]
    assert job.words("ran")[-1] == "two words"

    job.edit("container=apptainer", "container=docker")
    assert job.run() == (2, "error: container is docker: expected none, pyxis or apptainer\n")


def test_before_its_time_limit_it_saves_and_requeues(job: Job) -> None:
    job.ranks(SAVES.format(code=138))
    code, output = job.signalled(signal.SIGUSR1)
    assert (job.folder / "saved").exists(), "it must wait for the checkpoint"
    assert job.requeued == ["4711"]
    assert output == "mvd-scale: stopped on request: requeued\n"
    assert code == 138


def test_a_second_signal_does_not_cut_the_save_short(job: Job) -> None:
    job.ranks(SAVES.format(code=138))
    job.signalled(signal.SIGUSR1, signal.SIGUSR1, signal.SIGUSR1)
    assert (job.folder / "saved").exists()
    assert job.requeued == ["4711"]


def test_a_run_that_ends_while_it_is_asked_to_stop(job: Job) -> None:
    job.ranks(SAVES.format(code=0))
    assert job.signalled(signal.SIGUSR1)[0] == 0
    assert job.requeued == []
    job.ranks(SAVES.format(code=2))
    (job.folder / "started").unlink()
    assert job.signalled(signal.SIGUSR1)[0] == 2, "a full disk, for example"
    assert job.requeued == []


@pytest.mark.parametrize(("code", "requeued", "faults"), [(143, True, 0), (75, True, 1), (137, True, 1), (1, False, 0)])
def test_a_run_that_fails_while_it_saves_is_judged_as_any_other(
    job: Job, code: int, requeued: bool, faults: int
) -> None:
    """143 is no failure: at the time limit Slurm sends SIGTERM too."""
    job.ranks(SAVES.format(code=code))
    ended, output = job.signalled(signal.SIGUSR1)
    assert ended == code
    assert job.requeued == (["4711"] if requeued else [])
    assert job.faults == faults
    assert ("stopped on request" in output) == (code == 143)


def test_sigterm_saves_and_leaves_the_requeueing_to_slurm(job: Job) -> None:
    """`scancel` sends it, and preemption, after which Slurm itself requeues. srun would kill the ranks at SIGTERM."""
    job.ranks(SAVES.format(code=138))
    _, output = job.signalled(signal.SIGTERM)
    assert (job.folder / "saved").exists()
    assert job.requeued == []
    assert "cancelled, or preempted by Slurm" in output


def test_sigterm_at_the_time_limit_leaves_the_requeueing_to_the_script(job: Job) -> None:
    job.ranks(SAVES.format(code=138))
    assert job.signalled(signal.SIGUSR1, signal.SIGTERM)[0] == 138
    assert job.requeued == ["4711"]


@pytest.mark.parametrize(
    ("code", "requeued"), [(0, False), (1, False), (2, False), (75, True), (137, True), (143, False)]
)
def test_the_exit_code_says_whether_a_restart_may_help(job: Job, code: int, requeued: bool) -> None:
    job.ranks(ENDS.format(code=code))
    ended, output = job.run()
    assert ended == code
    assert job.requeued == (["4711"] if requeued else [])
    assert job.faults == int(requeued)
    assert ("requeued" in output) == (code != 0)
    assert output.endswith(": not requeued\n") == (code != 0 and not requeued)


def test_a_stop_that_only_the_ranks_were_asked_for_is_no_fault(job: Job) -> None:
    job.ranks(ENDS.format(code=138))
    job.run()
    assert job.requeued == ["4711"]
    assert job.faults == 0


def test_faults_in_a_row_end_the_job(job: Job) -> None:
    job.ranks(ENDS.format(code=75))
    for count in (1, 2, 3, 4):
        _, output = job.run()
        assert f"fault {count} in a row, exit code 75: requeued" in output
    code, output = job.run()
    assert "5 faults in a row, listed in" in output
    assert code == 75
    assert len(job.requeued) == 4


def test_a_run_until_the_time_limit_ends_the_row_of_faults(job: Job) -> None:
    job.ranks(ENDS.format(code=75))
    job.run()
    job.run()
    assert job.faults == 2
    job.ranks(SAVES.format(code=138))
    job.signalled(signal.SIGUSR1)
    assert job.faults == 0


def test_a_requeue_that_slurm_refuses_is_said(job: Job) -> None:
    job.ranks(ENDS.format(code=75))
    code, output = job.run(REQUEUE_CODE="1")
    assert "Slurm does not requeue this job: submit it again" in output
    assert code != 0


def test_a_start_that_cannot_be(job: Job) -> None:
    command = ["bash", str(job.script)]
    result = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert (result.returncode, "no subcommand" in result.stderr) == (2, True)
    result = subprocess.run([*command, "pretrain"], capture_output=True, text=True, check=False)
    assert (result.returncode, "this is no Slurm job" in result.stderr) == (2, True)
    code, output = job.run(SLURM_SUBMIT_DIR="/somewhere")
    assert (code, "no repository at /somewhere" in output) == (2, True)


def test_sbatch_reads_all_directives() -> None:
    """It stops at the first line that is neither empty nor a comment."""
    lines = (LAUNCH / "slurm.sbatch").read_text().splitlines()
    head = lines[: next(number for number, line in enumerate(lines) if line and not line.startswith("#"))]
    directives = [line for line in lines if line.startswith("#SBATCH")]
    assert directives == [line for line in head if line.startswith("#SBATCH")]
    options = {line.removeprefix("#SBATCH ").partition("=")[0]: line.partition("=")[2] for line in directives}
    assert options["--ntasks-per-node"] == "1"
    assert options["--signal"] == "B:USR1@600"
    assert {"--requeue", "--open-mode", "--time", "--nodes"} <= options.keys()
