"""Tests that shells of other hosts interpret nothing of a command that DeepSpeed's launcher sends there by pdsh."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from deepspeed.accelerator.cuda_accelerator import CUDA_Accelerator
from deepspeed.launcher import runner

from mvd_scale.distributed.remote_command import EXPORTED, check_line, pack, remote_words, unpack
from mvd_scale.errors import UserError

PDSH = """#!/bin/bash
# Fake pdsh: replaces %h, %n and %u in the words of the command, as pdsh does, and gives a shell the line of them.
while [[ "$1" == -* ]]; do
    [[ "$1" == -S ]] || shift
    shift
done
words=()
for word; do
    word="${word//%n/0}" word="${word//%h/node-1}"
    words+=("${word//%u/me}")
done
exec sh -c "${words[*]}"
"""

PYTHON = """#!/bin/bash
# Fake Python of another host: keeps its arguments.
printf '%s\\0' "$PWD" "$@" >"$(dirname "$0")/called"
"""

HOSTILE = [
    "runs/my run",
    "runs/it's",
    'runs/"quoted" name',
    "runs/a;>marker",
    "runs/a; touch marker",
    "$(>marker)",
    "$(touch marker)",
    "a $(touch marker)",
    "`touch marker`",
    "a && touch marker",
    "a\ntouch marker\nb",
    "tab\there",
    "*",
    "~",
    "back\\slash",
    "100%h %n",
    "",
    "-h",
    "größe \udcff",
]
"""Paths and names as arguments, the last one with a byte that is not UTF-8."""


class Cluster:
    """Two hosts behind a fake pdsh."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name, text in (("pdsh", PDSH), ("python", PYTHON)):
            (folder / name).write_text(text)
            (folder / name).chmod(0o755)
        (folder / "hostfile").write_text("node-1 slots=2\nnode-2 slots=2\n")

    def launch(self, words: list[str]) -> list[str]:
        """Launch a module with arguments; return the words after the launcher's own, as a host got them."""
        options = ["--hostfile", str(self.folder / "hostfile"), "--master_addr", "10.0.0.1", "--no_ssh_check"]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("signal.signal", lambda *arguments: None)
            runner.main([*options, "--no_local_rank", "--quiet", "--module", *words])
        called = (self.folder / "called").read_bytes().decode("utf-8", "surrogateescape").split("\0")[:-1]
        assert called[0] == os.getcwd()
        return called[called.index("--enable_each_rank_log=None") + 1 :]


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cluster:
    cluster = Cluster(tmp_path)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr("sys.executable", str(tmp_path / "python"))
    for name in [name for name in os.environ if name.startswith(EXPORTED)]:
        monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    return cluster


def test_deepspeed_leaves_words_to_the_shell(cluster: Cluster) -> None:
    """The reason for this module; where this test fails, DeepSpeed has mended it."""
    cluster.launch(["mvd_scale", "runs/a;>marker"])
    assert (cluster.folder / "marker").exists()


def test_hostile_words_arrive_as_they_are(cluster: Cluster) -> None:
    module, action, word = cluster.launch(remote_words("mvd_scale", ["pretrain", *HOSTILE]))
    assert (module, action) == ("mvd_scale.distributed.remote_command", "run")
    assert unpack(word) == ["mvd_scale", "pretrain", *HOSTILE]
    assert not (cluster.folder / "marker").exists()


def test_the_module_runs_with_its_arguments(tmp_path: Path) -> None:
    (tmp_path / "shown.py").write_text("import sys\nassert __name__ == '__main__'\nprint(ascii(sys.argv[1:]))\n")
    command = [sys.executable, "-m", "mvd_scale.distributed.remote_command", "run", pack(["shown", *HOSTILE])]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.stdout == f"{HOSTILE!a}\n", result.stderr


@pytest.mark.parametrize("value", ["a; touch marker", "two words", "*", "a'b", "&& touch marker"])
def test_a_variable_that_deepspeed_encloses_well_is_sent(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch, value: str
) -> None:
    monkeypatch.setenv("NCCL_DEBUG_FILE", value)
    cluster.launch(remote_words("mvd_scale", ["pretrain"]))
    assert not (cluster.folder / "marker").exists()


@pytest.mark.parametrize("value", ["$(touch marker)", "`touch marker`", '"; touch marker; "', "a\ntouch marker", "\\"])
@pytest.mark.parametrize("name", ["NCCL_DEBUG_FILE", "PYTHONPATH", "UCX_TLS"])
def test_a_variable_that_a_shell_would_interpret_is_refused(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=f"the variable '{name}' has the value"):
        remote_words("mvd_scale", ["pretrain"])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("A=$(touch marker)\n", "the variable 'A' has the value"),
        ("A;touch marker;B=1\n", "the variable 'A;touch marker;B' has the value"),
        ("A=1\nB\n", r"\.deepspeed_env:2: 'B' is malformed: expected NAME=VALUE"),
    ],
)
def test_the_file_of_further_variables_is_checked(cluster: Cluster, text: str, said: str) -> None:
    (cluster.folder / ".deepspeed_env").write_text(text)
    with pytest.raises(UserError, match=said):
        remote_words("mvd_scale", ["pretrain"])
    (cluster.folder / ".deepspeed_env").write_text("NCCL_IB_HCA=mlx5\nOTHER=a b\n")
    remote_words("mvd_scale", ["pretrain"])


@pytest.mark.parametrize("name", ["my videos", "a;b", "a'b", "$HOME", "a\nb", "100%h"])
def test_a_folder_that_a_shell_would_interpret_is_refused(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    (cluster.folder / name).mkdir()
    monkeypatch.chdir(cluster.folder / name)
    with pytest.raises(UserError, match="the current folder is"):
        remote_words("mvd_scale", ["pretrain"])
    with pytest.raises(UserError, match="the path of Python is"):
        check_line("/data", f"/{name}/python", {})


@pytest.mark.parametrize("address", ["10.0.0.1;touch marker", "-oProxyCommand=x", "$(a)", "a b"])
def test_a_master_address_that_is_none(address: str) -> None:
    with pytest.raises(UserError, match="MASTER_ADDR is"):
        check_line("/data", "/usr/bin/python", {"MASTER_ADDR": address})
    for good in ("", "10.0.0.1", "node-1.cluster", "fe80::1"):
        check_line("/data", "/usr/bin/python", {"MASTER_ADDR": good})


def test_all_variables_that_deepspeed_sends_are_checked() -> None:
    assert {*runner.EXPORT_ENVS, *CUDA_Accelerator.export_envs(None)} <= {*EXPORTED}
