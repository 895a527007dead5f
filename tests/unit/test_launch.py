"""Tests of launch scripts: a failed start ends in one clear line, and an incomplete installation is repaired."""

from __future__ import annotations

import re
import shlex
import shutil
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from mvd_scale.distributed.remote_command import unpack

REPOSITORY = Path(__file__).resolve().parents[2]
LAUNCH = REPOSITORY / "launch"
TOOLS = [
    "awk",
    "bash",
    "cat",
    "chmod",
    "cp",
    "df",
    "dirname",
    "flock",
    "grep",
    "mkdir",
    "nproc",
    "rm",
    "sha256sum",
    "sleep",
    "tail",
]

PYTHON = """#!/bin/bash
# Fake Python: prints its version, and creates environments whose pip does what {pip} specifies.
case "$*" in
    *sys.version_info*) echo {version} ;;
    "-c import ensurepip, venv") exit {venv} ;;
    "-m venv "*) mkdir -p "$3/bin" && cp "$0" "$3/bin/python" && chmod +x "$3/bin/python" ;;
    "-m pip "*) echo "pip $*" >>{calls}; {pip} ;;
esac
"""


@dataclass
class Machine:
    """Copy of the files around the package, and fake programs that the launch scripts find on PATH."""

    root: Path
    bin: Path

    @property
    def stamp(self) -> Path:
        return self.root / ".venv" / "stamp"

    @property
    def pip_calls(self) -> int:
        calls = self.root / "calls"
        return len(calls.read_text().splitlines()) if calls.exists() else 0

    def program(self, name: str, text: str) -> None:
        self.bin.joinpath(name).unlink(missing_ok=True)
        self.bin.joinpath(name).write_text(text)
        self.bin.joinpath(name).chmod(0o755)

    def python(self, name: str = "python3.11", version: str = "3.11", pip: str = "exit 0", venv: int = 0) -> None:
        self.program(name, PYTHON.format(version=version, pip=pip, venv=venv, calls=self.root / "calls"))

    def start(self, script: str = "source launch/setup.sh; echo ready", **env: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["bash", "-c", f"set -euo pipefail; {script}"],
            cwd=self.root,
            env={"PATH": str(self.bin), **env},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    root, programs = tmp_path / "copy", tmp_path / "bin"
    programs.mkdir()
    shutil.copytree(LAUNCH, root / "launch")
    shutil.copy(REPOSITORY / "pyproject.toml", root)
    (root / "mvd_scale" / "distributed").mkdir(parents=True)
    modules = ("free_port", "hostfile", "launch_guard", "remote_command")
    for file in ("errors.py", *(f"distributed/{name}.py" for name in modules)):
        shutil.copy(REPOSITORY / "mvd_scale" / file, root / "mvd_scale" / file)
    for tool in TOOLS:
        found = shutil.which(tool)
        assert found, f"this machine has no {tool}"
        programs.joinpath(tool).symlink_to(found)
    machine = Machine(root, programs)
    machine.python()
    return machine


def one_error(result: subprocess.CompletedProcess[str]) -> str:
    """Error line of a failed start, which a progress line may precede."""
    assert result.returncode != 0
    assert "ready" not in result.stdout
    lines = [line for line in result.stderr.splitlines() if not line.startswith("Installing (")]
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("error: ")
    return lines[0]


def test_no_python_at_all(machine: Machine) -> None:
    (machine.bin / "python3.11").unlink()
    assert "no Python 3.11 to 3.13 found (python3 does not run)" in one_error(machine.start())


def test_pythons_that_do_not_fit_are_named(machine: Machine) -> None:
    (machine.bin / "python3.11").unlink()
    machine.python("python3", version="3.8")
    machine.python("python", version="3.14")
    error = one_error(machine.start())
    assert "python3 is 3.8, python is 3.14" in error
    assert "MVD_PYTHON=" in error
    assert not machine.stamp.exists()


@pytest.mark.parametrize(("version", "said"), [("3.9", "/mine is 3.9)"), (None, "/mine does not run)")])
def test_the_named_python_is_the_only_one_tried(machine: Machine, version: str | None, said: str) -> None:
    if version:
        machine.python("mine", version=version)
    assert said in one_error(machine.start(MVD_PYTHON=str(machine.bin / "mine")))


def test_missing_venv_module(machine: Machine) -> None:
    machine.python(venv=1)
    assert "no venv module" in one_error(machine.start())


def test_full_disk_is_seen_before_anything_is_made(machine: Machine) -> None:
    machine.program("df", "#!/bin/bash\necho Filesystem\necho /dev/vda 100 90 3145728 90% /\n")
    error = one_error(machine.start())
    assert "3 GB are free" in error
    assert "needs 12 GB" in error
    assert not (machine.root / ".venv").exists()


@pytest.mark.parametrize(
    ("output", "said"),
    [
        (
            "Failed to establish a new connection: [Errno -2] Name or service not known",
            "cannot reach its package index",
        ),
        ("ERROR: Could not install packages: [Errno 28] No space left on device", "the disk became full"),
    ],
)
def test_failing_pip_is_explained_and_leaves_no_stamp(machine: Machine, output: str, said: str) -> None:
    machine.python(pip=f"echo '{output}' >&2; exit 1")
    error = one_error(machine.start())
    assert said in error
    assert ".venv/install.log" in error
    assert not machine.stamp.exists()


def test_other_failures_of_pip_show_its_last_lines(machine: Machine) -> None:
    machine.python(pip="echo 'ERROR: a wheel does not build'; exit 1")
    result = machine.start()
    assert result.returncode != 0
    assert "ERROR: a wheel does not build" in result.stderr
    assert not machine.stamp.exists()


def test_second_start_installs_nothing_and_takes_no_time(machine: Machine) -> None:
    assert machine.start().stdout == "ready\n"
    calls = machine.pip_calls
    assert calls > 0
    start = time.perf_counter()
    result = machine.start()
    assert time.perf_counter() - start < 1
    assert (result.stdout, result.stderr) == ("ready\n", "")
    assert machine.pip_calls == calls


def test_a_changed_pyproject_is_installed_again(machine: Machine) -> None:
    machine.start()
    calls = machine.pip_calls
    with (machine.root / "pyproject.toml").open("a") as file:
        file.write("\n# one more requirement\n")
    assert machine.start().stdout == "ready\n"
    assert machine.pip_calls == 2 * calls


def test_an_interrupted_installation_starts_afresh(machine: Machine) -> None:
    machine.python(pip="kill -KILL $PPID; exit 1")
    assert machine.start().returncode != 0
    half_made = machine.root / ".venv" / "half-made"
    half_made.touch()
    assert not machine.stamp.exists()
    machine.python()
    assert machine.start().stdout == "ready\n"
    assert not half_made.exists()


def test_two_first_starts_side_by_side_install_once(machine: Machine) -> None:
    machine.python(pip="sleep 0.3")
    both = "(source launch/setup.sh) & (source launch/setup.sh) & wait; cat calls"
    assert len(machine.start(both).stdout.splitlines()) == 2


@pytest.fixture
def launcher(machine: Machine) -> Machine:
    """Machine with a finished installation, whose `deepspeed` prints how it was called."""
    machine.start()
    venv = machine.root / ".venv" / "bin"
    venv.joinpath("python").unlink()
    venv.joinpath("python").symlink_to(sys.executable)
    venv.joinpath("deepspeed").write_text(
        '#!/bin/bash\necho "$PWD"\necho "${DS_ACCELERATOR-} ${OMP_NUM_THREADS-}"\nprintf "[%s]" "$@"\n'
    )
    venv.joinpath("deepspeed").chmod(0o755)
    return machine


def test_single_node_takes_two_cpu_ranks_where_there_is_no_gpu(launcher: Machine, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    command = f"cd {elsewhere}; ../copy/launch/single_node.sh pretrain --recipe 'my recipe.yaml'"
    folder, cpu, words = launcher.start(command).stdout.splitlines()
    assert folder == str(elsewhere), "relative paths of the user must keep their meaning"
    assert cpu == "cpu ", "ranks choose their number of threads when they have met"
    assert "[--num_gpus][2]" in words
    assert words.endswith("[mvd_scale][pretrain][--recipe][my recipe.yaml]")


def test_single_node_leaves_the_choice_of_gpus_to_the_launcher(launcher: Machine) -> None:
    launcher.program("nvidia-smi", "#!/bin/bash\necho 'GPU 0: NVIDIA'\n")
    _, accelerator, words = launcher.start("launch/single_node.sh pretrain").stdout.splitlines()
    assert accelerator.strip() == ""
    assert "--num_gpus" not in words
    _, _, words = launcher.start("launch/single_node.sh pretrain", RANKS="3").stdout.splitlines()
    assert "[--num_gpus][3]" in words


def test_single_node_sees_gpus_that_are_listed_slowly(launcher: Machine) -> None:
    """A reader that stops at the first line would end `nvidia-smi` by SIGPIPE, which counts as a failure."""
    launcher.program("nvidia-smi", "#!/bin/bash\nfor k in {0..7}; do echo GPU $k: NVIDIA || exit 1; sleep 0.02; done\n")
    result = launcher.start("launch/single_node.sh pretrain")
    assert "--num_gpus" not in result.stdout
    assert result.stderr == ""


def test_single_node_says_that_it_computes_on_the_cpu(launcher: Machine) -> None:
    launcher.program("nvidia-smi", "#!/bin/bash\necho 'NVIDIA-SMI has failed: no GPU can be reached'; exit 9\n")
    result = launcher.start("launch/single_node.sh pretrain")
    assert result.stdout.splitlines()[1].strip() == "cpu"
    assert result.stderr == "nvidia-smi lists no GPU: 2 ranks on the CPU\n"
    assert launcher.start("launch/single_node.sh pretrain", DS_ACCELERATOR="cpu").stderr == ""


def test_a_port_in_use_is_named(launcher: Machine) -> None:
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        error = one_error(launcher.start("launch/single_node.sh pretrain", MASTER_PORT=port))
    assert f"port {port} cannot be used" in error
    assert "MASTER_PORT" in error


@pytest.mark.parametrize("script", ["single_node.sh", "multi_node.sh"])
def test_a_missing_subcommand_is_an_error(launcher: Machine, script: str) -> None:
    assert "no subcommand" in one_error(launcher.start(f"launch/{script}"))


def test_multi_node_needs_a_hostfile(launcher: Machine) -> None:
    assert "no hostfile at hostfile" in one_error(launcher.start("launch/multi_node.sh pretrain"))


def test_a_malformed_hostfile_is_one_message(launcher: Machine) -> None:
    (launcher.root / "hosts").write_text("node-1 slots=2\nnode-2\n")
    env = {"HOSTFILE": "hosts", "NODE_RANK": "0", "MASTER_ADDR": "10.0.0.1"}
    result = launcher.start("launch/multi_node.sh pretrain", **env)
    assert "hostfile hosts:2: 'node-2' is malformed, it has no slots" in one_error(result)
    assert (result.returncode, result.stdout) == (2, "")
    env |= {"HOSTFILE": "launch/hostfile.example", "NODE_RANK": "2"}
    assert "NODE_RANK is 2, but" in one_error(launcher.start("launch/multi_node.sh pretrain", **env))


def test_multi_node_without_ssh(launcher: Machine) -> None:
    env = {"HOSTFILE": "launch/hostfile.example", "NODE_RANK": "1"}
    assert "but MASTER_ADDR is not" in one_error(launcher.start("launch/multi_node.sh pretrain", **env))
    words = launcher.start("launch/multi_node.sh pretrain", MASTER_ADDR="10.0.0.1", **env).stdout.splitlines()[-1]
    assert "[--hostfile][launch/hostfile.example]" in words
    assert "[--master_addr][10.0.0.1]" in words
    assert "[--no_ssh][--node_rank][1]" in words


HOSTILE = ["--run.folder", 'runs/it\'s "a"; touch marker', "--data.source", "$(touch marker)\n`touch marker`", "*"]


def test_multi_node_by_ssh_packs_the_words(launcher: Machine) -> None:
    """DeepSpeed makes a line for the shells of the other hosts out of them."""
    command = f"launch/multi_node.sh pretrain {shlex.join(HOSTILE)}"
    result = launcher.start(command, HOSTFILE="launch/hostfile.example")
    words = re.findall(r"\[([^]]*)]", result.stdout.splitlines()[-1])
    assert words[-3:-1] == ["mvd_scale.distributed.remote_command", "run"], result.stderr
    assert unpack(words[-1]) == ["mvd_scale", "pretrain", *HOSTILE]
    assert not (launcher.root / "marker").exists()


@pytest.mark.parametrize("script", ["single_node.sh", "multi_node.sh"])
def test_words_of_ranks_of_this_host_stay_as_they_are(launcher: Machine, script: str) -> None:
    env = {"HOSTFILE": "launch/hostfile.example", "NODE_RANK": "1", "MASTER_ADDR": "10.0.0.1"}
    result = launcher.start(f"launch/{script} pretrain {shlex.join(HOSTILE)}", **env)
    assert result.stdout.endswith("[mvd_scale][pretrain]" + "".join(f"[{word}]" for word in HOSTILE)), result.stderr
    assert not (launcher.root / "marker").exists()


def test_a_folder_that_other_shells_would_interpret_is_refused(launcher: Machine) -> None:
    command = "mkdir 'my runs'; cd 'my runs'; ../launch/multi_node.sh pretrain"
    result = launcher.start(command, HOSTFILE="../launch/hostfile.example", PYTHONPATH=str(launcher.root))
    assert "the current folder is" in one_error(result)
    assert (result.returncode, result.stdout) == (2, "")


def test_a_hostfile_of_any_name(launcher: Machine) -> None:
    name = "it's my; hostfile $(touch marker)"
    shutil.copy(launcher.root / "launch" / "hostfile.example", launcher.root / name)
    result = launcher.start("launch/multi_node.sh pretrain", HOSTFILE=name)
    assert f"[--hostfile][{name}]" in result.stdout, result.stderr
    assert not (launcher.root / "marker").exists()


def test_numbers_of_hosts_are_no_expressions(launcher: Machine) -> None:
    """Bash evaluates subscripts in arithmetic, commands in them too."""
    env = {"HOSTFILE": "launch/hostfile.example", "MASTER_ADDR": "10.0.0.1", "NODE_RANK": "a[$(touch marker)]"}
    assert "NODE_RANK is a[$(touch marker)], but" in one_error(launcher.start("launch/multi_node.sh pretrain", **env))
    env |= {"NODE_RANK": "0", "MASTER_PORT": "a[$(touch marker)]"}
    assert "MASTER_PORT is" in one_error(launcher.start("launch/multi_node.sh pretrain", **env))
    assert not (launcher.root / "marker").exists()


def test_a_python_whose_path_has_spaces(machine: Machine) -> None:
    folder = machine.root / "my python"
    folder.mkdir()
    machine.python("mine")
    (machine.bin / "mine").rename(folder / "mine")
    assert machine.start(MVD_PYTHON=str(folder / "mine")).stdout == "ready\n"


def test_a_repository_whose_path_a_shell_would_interpret_is_refused(machine: Machine) -> None:
    for name in ("a;b", "it's", "$(touch marker)", "a:b", "a\nb"):
        folder = machine.root / name
        shutil.copytree(machine.root / "launch", folder / "launch")
        shutil.copy(machine.root / "pyproject.toml", folder)
        result = machine.start(f"cd {shlex.quote(name)}; source launch/setup.sh; echo ready")
        assert "shells would interpret some characters of this path" in result.stderr
        assert result.stdout == ""
        assert not (folder / ".venv").exists()
    assert machine.pip_calls == 0


def test_all_checks_run_and_those_that_fail_are_named(machine: Machine) -> None:
    machine.program("nproc", "#!/bin/bash\necho 64\n")
    for tool in ("ruff", "mypy", "pytest"):
        machine.program(tool, f'#!/bin/bash\necho {tool} "$@"; [[ "$*" != "check ." && "$*" != "-m serial"* ]]\n')
    machine.start()
    result = machine.start("launch/test.sh")
    kinds = ("not slow", "slow and not extended")
    parallel = [f"pytest -n 4 --dist loadfile -m {kind} and not serial and not gpu" for kind in kinds]
    ran = ["ruff check .", "ruff format --check .", "mypy", *parallel, "pytest -m serial or gpu"]
    assert result.stdout.splitlines() == [line for command in ran for line in (f"== {command}", command)]
    assert result.stderr.splitlines() == [f"failed: {ran[0]}", f"failed: {ran[-1]}"]
    assert result.returncode == 1


def test_the_oldest_releases_are_installed_apart_and_tested(machine: Machine) -> None:
    machine.program("nproc", "#!/bin/bash\necho 2\n")
    machine.program("pytest", '#!/bin/bash\necho "pytest $*" in "$VIRTUAL_ENV"\n')
    machine.start()
    result = machine.start("launch/test.sh --oldest")
    oldest = machine.root / ".venv-oldest"
    asked = "pytest -n 2 --dist loadfile -m not slow and not serial and not gpu"
    assert result.stdout == f"{asked} in {oldest}\n", result.stderr
    constraints = (oldest / "constraints.txt").read_text().split()
    assert constraints
    assert f"--constraint {oldest}/constraints.txt" in (machine.root / "calls").read_text()
    assert (machine.root / ".venv" / "constraints.txt").read_text() == ""
    assert machine.start("launch/test.sh --oldest -k mask").stdout == f"pytest -k mask in {oldest}\n"
    requirements = dict(line.split("==") for line in constraints)
    assert requirements["torch"] == re.search(r'"torch>=([0-9.]+)"', (REPOSITORY / "pyproject.toml").read_text())[1]
    assert "deepspeed" in requirements


@pytest.mark.parametrize(
    ("words", "asked"),
    [
        ("tests/unit -k mask", "tests/unit -k mask"),
        ("--extended", "-m extended"),
        ("--extended -k cable", "-m extended -k cable"),
        ("--gpu", "tests/gpu -m gpu --gpu-report gpu_report.md"),
        ("--gpu -k nccl", "tests/gpu -m gpu --gpu-report gpu_report.md -k nccl"),
    ],
)
def test_the_tests_that_are_asked_for(machine: Machine, words: str, asked: str) -> None:
    machine.program("pytest", '#!/bin/bash\necho "pytest $*"\n')
    result = machine.start(f"launch/test.sh {words}")
    assert result.stdout == f"pytest {asked}\n", result.stderr


def test_the_bring_up_of_a_gpu_needs_no_environment(machine: Machine) -> None:
    machine.program("python3", '#!/bin/bash\necho "$PYTHONPATH" "$@"\n')
    result = machine.start("launch/gpu_bringup.sh --stages abc", PYTHONPATH="/mine")
    paths = f"{machine.root}:{machine.root / 'kernels'}:/mine"
    assert result.stdout == f"{paths} -m mvd_scale.performance.bringup --stages abc\n", result.stderr
    assert not (machine.root / ".venv").exists()
    machine.program("other", "#!/bin/bash\necho other\n")
    assert machine.start("launch/gpu_bringup.sh", MVD_PYTHON="other").stdout == "other\n"
